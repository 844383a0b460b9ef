"""A row of a store as a NIfTI file again."""

from pathlib import Path

import numpy as np

from brainscale.settings import InputError
from brainscale.store import open_store
from brainscale_data_prep import nifti


def export_nifti(store_path: Path, row: int, file: Path) -> None:
    """Write a stored volume as NIfTI-1 whose voxels lie, in RAS mm, where the original's did.

    Intensities are in the original's unit (scale and offset become slope and intercept). Raises InputError for a row
    that was refused or does not exist, and for a file that exists or is not named .nii or .nii.gz.
    """
    store = open_store(store_path)
    at = int(np.searchsorted(store.rows, row))
    if at == len(store.rows) or store.rows[at] != row:
        why = next((f"{scan['reason']}: {scan['sentence']}" for scan in store.refused if scan["row"] == row), "")
        known = f"rows 0 to {store.rows[-1]}"
        raise InputError(f"row {row} of {store_path} holds no volume ({why or known}); scans.parquet lists the rows")
    if not file.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{file} does not end in .nii or .nii.gz; name a NIfTI file")
    if file.exists():
        raise InputError(f"{file} exists; remove it or give another name")
    affine = store.column("affine_stored")[at].reshape(4, 4)
    slope, inter = (float(store.column(name)[at]) for name in ("scale", "offset"))
    nifti.write(file, store.volumes([row])[0].T, affine, slope, inter)
