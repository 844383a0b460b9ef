"""`to_zarr.py SOURCE STORE --verify`: every row read from its source again and held against what the store holds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainscale.settings import InputError
from brainscale.store import Store, damage
from brainscale.store_files import StoreDamage, read_complete
from brainscale_data_prep import discover, pool, pseudonyms
from brainscale_data_prep.discover import Found, ScanFile
from brainscale_data_prep.nifti import Refused
from brainscale_data_prep.preprocess import Prepared
from brainscale_data_prep.shards import Grid, read

ROWS_PER_TASK = 16
MAX_LISTED = 5
ROUNDED_COLUMNS = (
    "mean", "std", "clip_low", "clip_high", "foreground_threshold", "foreground_fraction", "scale", "offset",
    "background_code", "cropped_fraction",
)  # fmt: skip
"""Sums of floats, whose last digits differ between CPU types."""
EXACT_COLUMNS = ("source_xxh3_128", "affine_source", "affine_stored", "shape_source_xyz", "crop_voxels_xyz", "warnings")
NAMES = ("subject", "session", "contrast")


@dataclass(frozen=True)
class Task:
    """Rows of a store to compare with their sources."""

    store: Store
    grid_xyz: Grid
    rows: list[int]
    scans: list[ScanFile]
    stored: list[dict[str, Any]]
    """Of each row the columns that are compared, or {"reason": …} where it was refused."""


def verify(
    source: Path,
    store_path: Path,
    workers: int,
    find: Callable[[Path], Found] = discover.find,
    key: bytes | None = None,
) -> list[str]:
    """Every difference between a store and its source, one sentence each; none when they agree.

    The store's own plan is applied again to every scan. Raises InputError for what is no finished store, or a source
    that holds none of its scans.
    """
    try:
        read_complete(store_path)
    except StoreDamage as damaged:
        return [str(damaged)]
    problems = damage(store_path, deep=False)
    if problems:
        return problems
    store, found = Store(store_path), find(source).scans
    scans = pseudonyms.hide(found, key) if key else found
    held = dict(zip(store.rows.tolist(), zip(store.column("source"), store.column("id"))))
    held.update((scan["row"], (scan["source"], scan["id"])) for scan in store.refused)
    known = {(scan.source, scan.id): scan for scan in scans}
    for sources, words in (
        ({source for source, _ in set(held.values()) - set(known)}, "in the store but not in the source"),
        ({source for source, _ in set(known) - set(held.values())}, "in the source but not in the store"),
    ):
        if sources:
            names = ", ".join(sorted(sources)[:MAX_LISTED])
            problems.append(f"{len(sources)} scans are {words}: {names}{', …' if len(sources) > MAX_LISTED else ''}")
    pairs = [(row, known[name]) for row, name in sorted(held.items()) if name in known]
    parts = [pairs[start : start + ROWS_PER_TASK] for start in range(0, len(pairs), ROWS_PER_TASK)]
    if not parts:
        raise InputError(f"{source} holds none of the scans of {store_path}; give the source that it was made from")
    columns = {name: store.column(name) for name in (*NAMES, *EXACT_COLUMNS, *ROUNDED_COLUMNS)}
    stored: dict[int, dict[str, Any]] = {scan["row"]: {"reason": scan["reason"]} for scan in store.refused}
    stored.update({row: {name: c[at] for name, c in columns.items()} for at, row in enumerate(store.rows.tolist())})
    grid_xyz = store.volume_zyx[::-1]
    tasks = [
        Task(store, grid_xyz, [row for row, _ in part], [scan for _, scan in part], [stored[row] for row, _ in part])
        for part in parts
    ]

    def collect(result: tuple[list[str], int]) -> int:
        problems.extend(result[0])
        return result[1]

    pool.run(verify_rows, tasks, workers, collect, len(pairs), "verifying")
    return problems


def verify_rows(task: Task) -> tuple[list[str], int]:
    """What differs in these rows, and how many they are."""
    problems = []
    for row, file, stored in zip(task.rows, task.scans, task.stored):
        outcome, was = read(file, task.store.plan, task.grid_xyz), stored.get("reason", "")
        now = outcome.code if isinstance(outcome, Refused) else ""
        if now != was:
            words = (f"refused ({code})" if code else "taken" for code in (was, now))
            problems.append(f"row {row}, {file.source}: was {', would now be '.join(words)}")
        elif not isinstance(outcome, Refused):
            names = [f"{n} is {stored[n]!r}, now {getattr(file, n)!r}" for n in NAMES if stored[n] != getattr(file, n)]
            if difference := ", ".join(names) or _difference(task.store, row, stored, outcome[1]):
                problems.append(f"row {row}, {file.source}: {difference}")
    return problems, len(task.rows)


def _difference(store: Store, row: int, stored: dict[str, Any], prepared: Prepared) -> str:
    for name in EXACT_COLUMNS:
        held = [code for code in np.ravel(stored[name]).tolist() if code != "duplicate_of"]
        now = np.ravel(prepared.record[name]).tolist()
        if held != now:
            what = "its file is not the one that was converted" if name == "source_xxh3_128" else f"{name} differs"
            return f"{what}: stored {held}, now {now}"
    for name in ROUNDED_COLUMNS:
        if not np.isclose(stored[name], prepared.record[name], rtol=1e-4, atol=1e-9):
            return f"{name} differs: stored {stored[name]}, now {prepared.record[name]}"
    try:
        volume, cells = store.volumes([row])[0], store.foreground([row])[0]
    except StoreDamage as damaged:
        return str(damaged)
    other = np.abs(cells.astype(int) - prepared.foreground_cells_zyx) > 1
    if other.any():
        return f"{np.count_nonzero(other)} cells of its foreground differ"
    apart = np.abs(volume.astype(np.float64) - prepared.volume_zyx)
    allowed = 1.0 if store.dtype.kind in "iu" else 1e-3 * prepared.record["std"]
    if wrong := int(np.count_nonzero(~(apart <= allowed))):
        return f"{wrong} voxels differ by more than {allowed:g} stored units (at most by {np.nanmax(apart):g})"
    return ""
