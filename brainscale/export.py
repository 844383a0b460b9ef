"""Handing an encoder over: a directory of weights, settings with the preprocessing contract, and a model card.

Its layout is the one of Hugging Face's hub (config.json, model.safetensors, README.md). The same checkpoint and words
give the same bytes. The directory appears whole or not at all. It says how many scans there were and of which kind,
never which, and no path.
"""

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors.torch import save

from brainscale import score_file
from brainscale.checkpoint_files import Tensors, fsync
from brainscale.config import Config
from brainscale.encoder_files import CARD, CONFIG, WEIGHTS, ExportConfig, WeightsFile
from brainscale.export_formats import monai_arguments, monai_tensors, timm_arguments, timm_tensors
from brainscale.pretrained import Pretrained, from_run
from brainscale.settings import InputError, to_toml

Format = Literal["brainscale", "monai", "timm"]
USAGE = {
    "brainscale": """import brainscale
encoder = brainscale.load_encoder("DIR")
features = encoder(volumes)                     # (B, C); encoder.tokens(volumes): (1, B, N, C)""",
    "monai": """import json
from monai.networks.nets import ViT
from safetensors.torch import load_file

vit = ViT(**json.load(open("DIR/config.json"))["arguments"]).eval()
vit.load_state_dict(load_file("DIR/model.safetensors"))    # MONAI 1.5: strict=False
tokens = vit(volumes[:, None])[0]                          # (B, N, C)""",
    "timm": """from safetensors.torch import load_file

tensors = load_file("DIR/model.safetensors")    # under the names of timm's VisionTransformer without a class token
# It needs a patch embedding in 3D (stride = kernel, axes z, y, x) and the "arguments" of config.json.""",
}


@dataclass(frozen=True)
class Words:
    """What only a person can say. name: of the model ("": the run's name); licences: of weights and of the data that
    they were trained on ("": not stated)."""

    name: str = ""
    licence: str = ""
    data_licence: str = ""


def export(
    run_dir: Path, directory: Path, part: str = "encoder", form: Format = "brainscale", words: Words | None = None
) -> Path:
    """Write the newest intact checkpoint's encoder (or a JEPA's "teacher") to a new directory; returns it.

    form: "brainscale" is read by `load_encoder`; "monai" and "timm" by those (`export_formats`). Raises InputError for
    a directory that is not empty, as `from_run`, and for evaluation/scores.json that cannot be read.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not an empty folder; give another one, or remove it")
    pretrained = from_run(run_dir, part)
    tensors, head = contents(pretrained, form)
    evaluation = run_dir / "evaluation"
    scores = score_file.read(evaluation) if (evaluation / score_file.NAME).is_file() else None
    weights = save({name: tensors[name].contiguous() for name in sorted(tensors)}, metadata={"format": "pt"})
    record = WeightsFile(num_bytes=len(weights), sha256=hashlib.sha256(weights).hexdigest())
    config = ExportConfig(
        model=pretrained.settings, contract=pretrained.contract, about=pretrained.about, weights=record
    ).model_dump(mode="json")
    text = json.dumps({**config, **head}, indent=1, ensure_ascii=False) + "\n"
    card = model_card(pretrained, form, words or Words(), scores)
    _put_whole(directory, {WEIGHTS: weights, CONFIG: text.encode(), CARD: card.encode()})
    return directory


def contents(pretrained: Pretrained, form: Format) -> tuple[Tensors, dict[str, Any]]:
    """Tensors of a form under its names, and what its config.json says otherwise than `ExportConfig`."""
    if form == "brainscale":
        return pretrained.state_dict(), {}
    if form == "monai":
        arguments, tensors = monai_arguments(pretrained), monai_tensors(pretrained)
    else:
        arguments, tensors = timm_arguments(pretrained), timm_tensors(pretrained)
    return tensors, {"format": f"{form}-vit", "arguments": arguments}


def model_card(pretrained: Pretrained, form: Format, words: Words, scores: score_file.Scores | None) -> str:
    """The model card: Markdown with Hugging Face's YAML head."""
    about = pretrained.about
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=False, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"cell": _cell, "number": lambda value: "–" if value is None else f"{value:.3f}"}
    return environment.get_template("model_card.md.j2").render(
        name=words.name or (about["source"] + (" (teacher)" if about["part"] == "teacher" else "")),
        licence=words.licence,
        data_licence=words.data_licence,
        library=form,
        about=about,
        model=pretrained.settings.model_dump(mode="json"),
        contract=pretrained.contract.model_dump(mode="json"),
        usage=USAGE[form],
        scores=scores,
        is_scored=scores is not None
        and any(encoder.weights == pretrained.fingerprint() for encoder in scores.encoders),
        settings=to_toml(Config.model_validate(about["settings"])).strip(),
    )


def _cell(value: Any) -> str:
    """Text of a Markdown table's cell: one line, with bars escaped."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _put_whole(directory: Path, contents: dict[str, bytes]) -> None:
    """Write a directory beside its place, flush it to disk, and rename it there; nothing is left behind otherwise.

    Raises InputError with what the system says, of a full disk for example.
    """
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        fsync(temporary)
        temporary.rename(directory)  # over an empty folder too
        fsync(directory.parent)
    except OSError as error:
        raise InputError(f"{directory} cannot be written ({error.strerror}); make room, or give another one") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
