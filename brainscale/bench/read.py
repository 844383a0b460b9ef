"""`brainscale bench read`: whole volumes from a store, against zarr-python on it and nibabel on the files."""

import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import zarr

from brainscale.bench.record import measure, skipped
from brainscale.store import open_store


def run(store_path: Path, source: Path | None, n: int) -> list[dict[str, Any]]:
    """Read one volume a time, other rows every time, page cache warm. source: the folder the store was made from."""
    store = open_store(store_path)
    array = zarr.open_array(store_path / "volumes", mode="r")
    rows = itertools.cycle(store.rows.tolist())
    codec = f"{store.plan.codec}, chunk {store.plan.chunk_voxels or 'one volume'}, warm"
    case = f"{'×'.join(map(str, store.volume_zyx))} {store.dtype}, {codec}"
    variants = {
        "brainscale (tensorstore)": lambda: store.volumes([next(rows)]),
        "zarr-python": lambda: np.asarray(array[next(rows)]),
    }
    lines = []
    if source is None:
        lines.append(skipped("read", case, "nibabel, NIfTI file", "no --source given"))
    else:
        files = itertools.cycle([source / name for name in store.column("source")])
        variants["nibabel, NIfTI file"] = lambda: np.asanyarray(nibabel.load(next(files)).dataobj)
    return measure("read", case, variants, "zarr-python", n) + lines
