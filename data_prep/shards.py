"""One shard's work, in a worker process: read, prepare and write its rows, whatever any one of its scans holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainscale import store as stores
from brainscale.prep_plan import Plan
from brainscale_data_prep import nifti
from brainscale_data_prep.discover import ScanFile
from brainscale_data_prep.nifti import Refused, Scan
from brainscale_data_prep.preprocess import Prepared, prepare
from brainscale_data_prep.pseudonyms import HIDDEN_SENTENCE

Grid = tuple[int, int, int]
NAMING = ("bad_mask", "not_nifti", "truncated", "unreadable")
"""Codes whose sentences may quote names of files or their content."""


@dataclass(frozen=True)
class Task:
    """Rows of a store that one worker handles."""

    store: Path
    shard: int
    plan: Plan
    grid_xyz: Grid
    rows: range
    scans: list[ScanFile]
    hide_names: bool = False
    """Sentences that may hold a name are left out of the records."""


def read(file: ScanFile, plan: Plan, grid_xyz: Grid, hide_names: bool = False) -> tuple[Scan, Prepared] | Refused:
    """A scan of the source, as its file holds it and as the store shall; or why it cannot be taken.

    This is the one place where any failure of one scan, whatever it is, becomes a refusal.
    """
    try:
        if file.code:
            raise Refused(file.code, file.sentence)
        scan = nifti.read(file.path, plan.assume_orientation, plan.frame, plan.min_extent_mm)
        return scan, prepare(scan, plan, grid_xyz, _mask(file, plan))
    except MemoryError:
        raise
    except Refused as refused:
        return Refused(refused.code, HIDDEN_SENTENCE) if hide_names and refused.code in NAMING else refused
    except Exception as error:
        what = HIDDEN_SENTENCE if hide_names else str(error).replace(f"{file.path}", file.source)
        return Refused("unreadable", f"{type(error).__name__}: {what}")


def _mask(file: ScanFile, plan: Plan) -> Scan | None:
    if file.mask is None or plan.foreground not in ("auto", "mask"):
        return None
    try:
        return nifti.read(file.mask)
    except Refused as refused:
        raise Refused("bad_mask", f"its mask {file.mask_source} cannot be used: {refused.sentence}") from None


def convert_shard(task: Task) -> tuple[list[dict[str, Any]], int]:
    """Read, prepare and write one shard: its records and the number of bytes read."""
    grid_zyx, cell = task.grid_xyz[::-1], task.plan.foreground_cell_voxels
    volumes = np.zeros((len(task.rows), *grid_zyx), task.plan.dtype)
    foreground = np.zeros((len(task.rows), *(n // cell for n in grid_zyx)), np.uint8)
    records, bytes_read = [], 0
    for slot, (row, file) in enumerate(zip(task.rows, task.scans)):
        place = {"row": row, "id": file.id, "source": file.source}
        outcome = read(file, task.plan, task.grid_xyz, task.hide_names)
        if isinstance(outcome, Refused):
            why = {"status": "refused", "reason": outcome.code, "sentence": outcome.sentence}
            records.append({**place, **why})
            continue
        scan, prepared = outcome
        volumes[slot], foreground[slot] = prepared.volume_zyx, prepared.foreground_cells_zyx
        bytes_read += scan.bytes_read
        records.append(
            {
                **place,
                **prepared.record,
                "status": "warning" if prepared.record["warnings"] else "ok",
                "reason": "",
                "sentence": "",
                "subject": file.subject,
                "session": file.session,
                "contrast": file.contrast,
                "mask_source": file.mask_source if prepared.record["foreground_method"] == "mask" else "",
                "duplicate_of": "",
                "participant": file.participant,
            }
        )
    stores.write_shard(task.store, task.shard, volumes, foreground, records)
    return records, bytes_read
