"""The command from volumes to features: embed."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from brainscale.cli_data import share
from brainscale.settings import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pyarrow as pa

    from brainscale.pretrained import Pretrained
    from brainscale_data_prep.discover import ScanFile


def embed(
    run_or_export: Path,
    /,
    *volumes: Path,
    out: Path,
    layers: Annotated[str, Parameter(allow_leading_hyphen=True)] = "-1",
    pooling: str = "mean",
    foreground_only: bool = False,
    where: tuple[str, ...] = (),
    part: str = "",
    device: str = "auto",
    batch: int = 0,
    workers: int | None = None,
    max_refused: str | None = None,
) -> None:
    """Write one row of features per scan, of stores or of NIfTI files, which are prepared as the encoder's own scans.

    Example: brainscale embed runs/a stores/brains --out features.parquet

    Example: brainscale embed exports/a scan.nii.gz data/bids --layers -1,7 --pooling mean+std --out features.parquet

    Scans that cannot be taken are listed on stderr and in OUT.refused.jsonl; exit code 3 when they are all of them, or
    more than --max-refused. A store of another preprocessing plan is refused.

    Parameters
    ----------
    run_or_export
        A run folder (its newest intact checkpoint) or an export directory.
    volumes
        Stores; or NIfTI files, folders, BIDS datasets and tables, as to-zarr takes them.
    out
        The Parquet file: row, id, subject, session, contrast, warnings, participant columns, features. It is replaced.
    layers
        Comma-separated, joined in this order: -1 behind the final norm, k the output of block k (from 0).
    pooling
        Over the tokens of a layer: mean, max, or mean+std (both, joined).
    foreground_only
        Pool tokens with 10 % of brain or head or more, in place of all.
    where
        Take scans with this value alone, e.g. --where contrast=T1w or --where participant_site=A,B. Repeatable.
    part
        Of a JEPA run: encoder (default) or teacher; an export holds one of them.
    device
        auto (a GPU where there is one), cpu or cuda.
    batch
        Volumes at once; 0: by memory.
    workers
        Processes that prepare NIfTI files; default: one per core with a GPU, else this one.
    max_refused
        Largest share of the files that may be refused, e.g. 5%; default: no limit, but at least one must be taken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from brainscale import features, store_files

    if out.suffix != ".parquet":
        raise InputError(f"--out {out} is no .parquet file; give FILE.parquet")
    if not volumes:
        raise InputError("no volumes given; add a store, or NIfTI files or folders")
    recipe: dict[str, Any] = {"layers": layer_numbers(layers), "pooling": pooling, "foreground_only": foreground_only}
    features.check_recipe(recipe["layers"], pooling)
    limit, target = share(max_refused), features.choose_device(device)
    stores = [
        path for path in volumes if any((path / name).exists() for name in (store_files.COMPLETE, store_files.PLAN))
    ]
    if stores and len(stores) < len(volumes):
        raise InputError(f"{stores[0]} is a store and others are not; embed stores and NIfTI by two commands")
    pretrained = features.opened(run_or_export, part).to(target)
    made = (
        of_stores(pretrained, stores, where, batch, recipe)
        if stores
        else of_files(pretrained, volumes, where, batch, workers, limit, recipe, out)
    )
    sink = pa.BufferOutputStream()
    pq.write_table(made, sink, compression="zstd")
    store_files.write(out.parent, out.name, memoryview(sink.getvalue()))
    print(f"{out}: {made.num_rows} volumes × {made.schema.field('features').type.list_size} features")


def of_stores(
    pretrained: "Pretrained", paths: list[Path], where: tuple[str, ...], batch: int, recipe: dict[str, Any]
) -> "pa.Table":
    """The table of features of stores."""
    from brainscale import features
    from brainscale.stores import open_stores
    from brainscale_data_prep.pool import progress

    store = open_stores(paths)
    rows = store.rows[chosen(lambda name: store.column(name).tolist(), len(store.rows), where)]
    with progress("embedding", len(rows)) as advance:
        found = features.embed(pretrained, store, rows, batch=batch, progress=advance, **recipe)
    if store.refused:
        print(f"scans refused when the store was made: {len(store.refused)}, in its refused.jsonl", file=sys.stderr)
    return features.table(
        features.store_scans(store, rows), found, pretrained, volume_zyx=list(store.volume_zyx), **recipe
    )


def of_files(
    pretrained: "Pretrained",
    sources: tuple[Path, ...],
    where: tuple[str, ...],
    batch: int,
    workers: int | None,
    limit: float | None,
    recipe: dict[str, Any],
    out: Path,
) -> "pa.Table":
    """The same of NIfTI files; ends the process with exit code 3 when too many are refused."""
    from brainscale import features, store_files
    from brainscale.nifti_rows import find, plan_grid_xyz
    from brainscale_data_prep.pool import progress

    contract = pretrained.contract
    files, skipped = find(sources)
    files = [files[at] for at in chosen(lambda name: [told(file, name) for file in files], len(files), where)]
    if workers is None:
        on_gpu = pretrained.encoder.embed.weight.device.type == "cuda"
        workers = len(os.sched_getaffinity(0)) if on_gpu else 1
    if contract.plan.spacing_mm_xyz == "native":
        print(
            "the encoder's plan keeps every scan's own spacing: voxels of another size than it was trained on are not "
            "told apart",
            file=sys.stderr,
        )
    grid_xyz = plan_grid_xyz(contract.plan, contract.volume_zyx)
    with progress("embedding", len(files)) as advance:
        found = features.embed_files(pretrained, files, grid_xyz, workers, batch, advance, **recipe)
    for name, counts in (("not selected", skipped), ("warnings", warned(found.scans))):
        if counts:
            print(f"{name}: " + ", ".join(f"{count} {code}" for code, count in sorted(counts.items())), file=sys.stderr)
    listed = out.with_name(f"{out.name}.refused.jsonl")
    listed.unlink(missing_ok=True)
    if found.refused:
        lines = [
            {"row": row, "id": file.id, "status": "refused", "source": file.source}
            | {"reason": why.code, "sentence": why.sentence}
            for row, file, why in found.refused
        ]
        store_files.write(out.parent, listed.name, "".join(json.dumps(line) + "\n" for line in lines).encode())
        for line in lines:
            print(f"refused {line['source']}: {line['reason']}: {line['sentence']}", file=sys.stderr)
    if not found.scans or (limit is not None and len(found.refused) > limit * len(files) * (1 + 1e-9)):
        print(f"error: {len(found.refused)} of {len(files)} scans are refused; {out} is not written", file=sys.stderr)
        sys.exit(3)
    x, y, z = grid_xyz
    return features.table(features.file_scans(found), found.features, pretrained, volume_zyx=[z, y, x], **recipe)


def warned(scans: "Iterable[tuple[int, ScanFile, dict[str, Any]]]") -> Counter[str]:
    """Warnings of prepared scans by code."""
    return Counter(code.partition(":")[0] for _, _, record in scans for code in record["warnings"])


def told(file: "ScanFile", name: str) -> str | None:
    """What a file's name or its participants table says under the name of a column of a store."""
    if name in ("id", "source", "subject", "session", "contrast"):
        return getattr(file, name)
    return file.participant.get(name.removeprefix("participant_"))


def chosen(column: "Callable[[str], list[Any]]", count: int, where: tuple[str, ...]) -> list[int]:
    """Which of `count` scans have the values that --where asks for. Raises InputError where none has."""
    kept = list(range(count))
    for text in where:
        name, equals, values = text.partition("=")
        if not (name and equals):
            raise InputError(f"--where {text!r} is not COLUMN=VALUE; give e.g. contrast=T1w")
        held = ["" if value is None else str(value) for value in column(name)]
        left = [at for at in kept if held[at] in values.split(",")]
        if not left:
            there = ", ".join(sorted({held[at] for at in kept})[:12])
            raise InputError(f"--where {text} leaves no scan; {name} is one of {there}")
        kept = left
    return kept


def layer_numbers(text: str) -> tuple[int, ...]:
    """(-1, 7) from "-1,7"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--layers {text!r} is no list of numbers; give e.g. -1 or -1,7") from None
