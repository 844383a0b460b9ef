"""The command that hands an encoder over: `export`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def export(
    run: Path,
    directory: Path,
    /,
    *,
    part: Literal["encoder", "teacher"] = "encoder",
    form: Annotated[Literal["brainscale", "monai", "timm"], Parameter(name="--format")] = "brainscale",
    name: str = "",
    licence: Annotated[str, Parameter(name=["--licence", "--license"])] = "",
    data_licence: Annotated[str, Parameter(name=["--data-licence", "--data-license"])] = "",
) -> None:
    """Write the encoder of a run's newest intact checkpoint to a new directory: weights, settings, model card.

    `brainscale.load_encoder(DIRECTORY)` reads it, without DeepSpeed or Triton.

    Example: brainscale export runs/a exports/a --licence apache-2.0 --data-licence "data use agreement of …"

    Parameters
    ----------
    directory
        A folder that does not exist yet, or is empty.
    part
        The trained encoder, or a JEPA's teacher.
    form
        For `brainscale.load_encoder`, or under the names of MONAI's ViT or of timm's (model.position = "sincos").
    name
        Of the model, for the card; by default the run's.
    licence
        Of the weights, for the card; best an identifier that the Hugging Face hub knows.
    data_licence
        Of the data that they were trained on, for the card.
    """
    from brainscale import export as handing_over

    words = handing_over.Words(name, licence, data_licence)
    print(handing_over.export(run, directory, part, form, words))
