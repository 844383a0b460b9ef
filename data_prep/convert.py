"""Conversion of a source into a store: parallel, interruptible, and the same bytes however it was run.

Rows are assigned before any voxel is read, one worker prepares and writes a whole shard, and the journal of finished
shards is the only state, so a killed conversion continues by the same command.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainscale import store as stores
from brainscale import store_files
from brainscale.geometry import spacing_mm
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale_data_prep import discover, nifti, ownership, pool, pseudonyms
from brainscale_data_prep.discover import Found, ScanFile
from brainscale_data_prep.nifti import Refused
from brainscale_data_prep.shards import Grid, Task, convert_shard

COMPRESSED_SHARE = 0.5
"""Bytes of a store over bytes of its voxels, about, for the check of free space."""

EXAMPLES = 3
"""Refused scans quoted when there are too many of them."""


class TooManyRefused(RuntimeError):
    """More scans were refused than allowed, or all of them; the store is not finished (exit code 3)."""


@dataclass
class Summary:
    taken: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    """Taken scans per warning code."""
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Refused scans per reason code."""
    examples: list[str] = field(default_factory=list)
    """Source and sentence of the first refused scans."""
    subjects: int = 0
    """Subjects of a finished store; those of a scan that names none are counted by scan."""
    seconds: float = 0.0
    bytes_read: int = 0
    volumes_now: int = 0
    """Rows that this run handled; the others were finished before."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Volumes of the source that are not selected."""
    store: Path = Path()
    finished: bool = False

    def add(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if record["status"] == "refused":
                self.refused += 1
                self.reasons[record["reason"]] += 1
                if len(self.examples) < EXAMPLES:
                    self.examples.append(f"{record['source']}: {record['sentence']}")
            else:
                self.taken += 1
                self.warnings.update(code.partition(":")[0] for code in record["warnings"])


def report_line(summary: Summary) -> str:
    """What a conversion ends with: taken, warnings and refusals by code, speed, where to look."""
    lines = [f"{summary.store}: {summary.taken} scans taken, {summary.refused} refused"]
    if summary.volumes_now:
        rate = summary.volumes_now / max(summary.seconds, 1e-9)
        lines[0] += (
            f"; {summary.volumes_now} in {summary.seconds:.1f} s ({rate:.1f} volumes/s, "
            f"{summary.bytes_read / 1e6 / max(summary.seconds, 1e-9):.1f} MB/s read)"
        )
    elif summary.finished:
        lines[0] += "; it was already done"
    for name, counts in (
        ("warnings", summary.warnings),
        ("refused", summary.reasons),
        ("not selected", summary.skipped),
    ):
        if counts:
            lines.append(f"  {name}: " + ", ".join(f"{count} {code}" for code, count in sorted(counts.items())))
    if summary.finished:
        lines.append(f"  subjects: {summary.subjects}")
    if summary.refused and summary.finished:
        lines.append(f"  why, scan by scan: {summary.store / store_files.REFUSED}")
    if not summary.finished:
        lines.append(
            "  the other tasks' shards are still missing; the task that writes the last one finishes the store"
        )
    return "\n".join(lines)


def convert(
    source: Path,
    store: Path,
    plan: Plan,
    workers: int,
    max_refused: float | None = None,
    shard: tuple[int, int] = (0, 1),
    find: Callable[[Path], Found] = discover.find,
    key: bytes | None = None,
) -> Summary:
    """Convert every scan that `find` finds in `source` into `store`, or continue to; `max_refused` is a share of all.

    `shard` (i, n) restricts the run to the shards s with s mod n = i; n such runs may go on at once, and the last one
    finishes the store. With a `key`, names are stored as keyed hashes. Raises InputError, TooManyRefused and
    pool.Stopped, each with one sentence.
    """
    source, store, started = Path(source), Path(store), time.monotonic()
    if workers < 1 or not 0 <= shard[0] < shard[1]:
        raise InputError(f"got {workers} workers and shard {shard[0]}/{shard[1]}; give workers >= 1 and 0 <= i < n")
    found = find(source)
    grid_xyz, num_rows = grid(plan, found.scans), len(found.scans)
    scans = pseudonyms.hide(found.scans, key) if key else found.scans
    if store.exists() and not store.is_dir():
        raise InputError(f"{store} is a file; give the path of a new folder for the store")
    if not (store / store_files.PLAN).exists():
        _check_space(store, plan, grid_xyz, -(-num_rows // shard[1]))
    store.mkdir(parents=True, exist_ok=True)
    summary = Summary(store=store, skipped=found.skipped)
    with ownership.owner(store, shard):
        with ownership.mutex(store):
            numbers = _begin(store, plan, grid_xyz, scans, summary)
        tasks = [
            Task(store, number, plan, grid_xyz, rows, [scans[row] for row in rows], key is not None)
            for number in numbers
            if number % shard[1] == shard[0] and (rows := stores.shard_rows(plan, num_rows, number))
        ]
        num_volumes = sum(len(task.rows) for task in tasks)
        _check_space(store, plan, grid_xyz, num_volumes)

        def collect(result: tuple[list[dict[str, Any]], int]) -> int:
            records, bytes_read = result
            summary.add(records)
            summary.bytes_read += bytes_read
            summary.volumes_now += len(records)
            _check_refused(summary, num_rows, max_refused)
            return len(records)

        try:
            if tasks:
                pool.run(convert_shard, tasks, workers, collect, num_volumes)
            with ownership.mutex(store):
                _finish(store, scans, summary, max_refused)
        except TooManyRefused:
            with ownership.mutex(store):
                store_files.write_refused(store, sorted(stores.finished_shards(store)))
            raise
    summary.seconds = time.monotonic() - started
    return summary


def _begin(store: Path, plan: Plan, grid_xyz: Grid, scans: list[ScanFile], summary: Summary) -> list[int]:
    """Make the store or check that it is this one; the numbers of the shards that are still to be made."""
    stores.create(store, plan, grid_xyz[::-1], len(scans))
    was_complete = (store / store_files.COMPLETE).exists()
    _check_scan_list(store, scans, was_complete)
    done = stores.finished_shards(store)
    for number in sorted(done) if not was_complete else ():
        journal = store_files.read_journal(store, number)
        assert journal is not None
        if _mended(journal["records"], scans, store_files.journal_time(store, number)):
            (store / store_files.journal_name(number)).unlink()
            done.discard(number)
        else:
            summary.add(journal["records"])
    num_shards = math.ceil(len(scans) / stores.shard_volumes(plan, len(scans)))
    return [number for number in range(num_shards) if number not in done]


def _finish(store: Path, scans: list[ScanFile], summary: Summary, max_refused: float | None) -> None:
    """Finish the store if every shard is there, whichever task wrote it, and describe it."""
    num_rows = len(scans)
    num_shards = math.ceil(num_rows / stores.shard_volumes(store_files.read_plan(store), num_rows))
    if len(stores.finished_shards(store)) < num_shards:
        return
    if not (store / store_files.COMPLETE).exists():
        counted = Summary(store=store)
        for number in range(num_shards):
            journal = store_files.read_journal(store, number)
            assert journal is not None
            counted.add(journal["records"])
        _check_refused(counted, num_rows, max_refused)
    stores.finish(store)
    _describe(summary, stores.open_store(store), scans)


def _describe(summary: Summary, finished: stores.Store, scans: list[ScanFile]) -> None:
    """Fill in what a finished store holds; it must be made of these scans."""
    held = dict(zip(finished.rows.tolist(), finished.column("source")))
    held.update((record["row"], record["source"]) for record in finished.refused)
    if [held.get(row) for row in range(len(scans))] != [scan.source for scan in scans]:
        raise InputError(f"{finished.path} is finished and was made from other scans; convert into a new folder")
    summary.taken, summary.refused = len(finished.rows), len(finished.refused)
    summary.reasons = Counter(record["reason"] for record in finished.refused)
    summary.warnings = Counter(code.partition(":")[0] for codes in finished.column("warnings") for code in codes)
    subjects = zip(finished.column("subject").tolist(), finished.column("id").tolist())
    summary.subjects = len({subject or scan for subject, scan in subjects})
    summary.finished = True


# --------------------------------------------------------------------------------------------- checks before


def grid(plan: Plan, scans: list[ScanFile]) -> Grid:
    """The plan's grid (x,y,z); "largest" reads every header, and a scan whose header cannot be read does not count."""
    if plan.grid_voxels_xyz != "largest":
        return plan.grid_voxels_xyz

    def size(scan: ScanFile) -> np.ndarray | Refused:
        try:
            shape, affine = nifti.read_shape(scan.path, plan.assume_orientation, plan.frame, plan.min_extent_mm)
        except Refused as refused:
            return refused
        order = np.argsort(nifti.axes_to_ras(affine)[:, 0])
        scale = 1.0 if plan.spacing_mm_xyz == "native" else spacing_mm(affine)[order] / np.array(plan.spacing_mm_xyz)
        return np.array(shape)[order] * scale

    readable = [scan for scan in scans if not scan.code]
    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(size, readable))
    largest = np.max([np.zeros(3), *(found for found in sizes if not isinstance(found, Refused))], axis=0)
    if not largest.all():
        first = next((f"{scan.source}: {why.sentence}" for scan, why in zip(readable, sizes)
                      if isinstance(why, Refused)), f"{scans[0].source}: {scans[0].sentence}")  # fmt: skip
        raise TooManyRefused(f"none of the {len(scans)} scans can be taken; the first: {first}")
    cell = plan.foreground_cell_voxels
    x, y, z = (math.ceil(round(n, 3) / cell) * cell for n in largest.tolist())
    if x * y * z * np.dtype(plan.dtype).itemsize > nifti.MAX_BYTES:
        raise InputError(
            f"the smallest grid that holds every scan has {x} × {y} × {z} voxels, too many for one volume; "
            "set grid_voxels_xyz, or leave out the largest scans"
        )
    return x, y, z


def _check_scan_list(store: Path, scans: list[ScanFile], was_complete: bool) -> None:
    """A store under way keeps the digest of its scan list; another list would put other scans into the same rows."""
    text = "".join(f"{scan.id}\t{scan.source}\n" for scan in scans)
    wanted = {"scans": len(scans), "sha256": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()}
    file = store / "journal" / "scans.json"
    if file.exists():
        if json.loads(file.read_text()) != wanted:
            raise InputError(
                f"the list of scans has changed since the conversion into {store} was begun; "
                "restore the source, or convert into a new folder"
            )
    elif not was_complete:
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name("scans.json.partial")
        partial.write_text(json.dumps(wanted))
        os.replace(partial, file)


def _check_space(store: Path, plan: Plan, grid_xyz: Grid, volumes: int) -> None:
    need = int(COMPRESSED_SHARE * volumes * math.prod(grid_xyz) * np.dtype(plan.dtype).itemsize)
    existing = next(folder for folder in (store.absolute(), *store.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise InputError(
            f"{volumes} volumes need about {need / 1e9:.2g} GB and the disk of {store} has {free / 1e9:.2g} GB free; "
            "make room or give another folder"
        )


def _mended(records: list[dict[str, Any]], scans: list[ScanFile], since_s: float) -> bool:
    """Whether a source that was refused, or its mask, has been replaced or changed since its shard was written."""
    files = [scans[record["row"]] for record in records if record["status"] == "refused"]
    refused = [path for file in files for path in (file.path, file.mask) if path is not None]
    return any(path.exists() and max(path.stat().st_mtime, path.stat().st_ctime) > since_s for path in refused)


def _check_refused(summary: Summary, num_rows: int, max_refused: float | None) -> None:
    counts = ", ".join(f"{count} {code}" for code, count in sorted(summary.reasons.items()))
    first = f"; the first: {'; '.join(summary.examples)}"
    first += f"; all so far: {summary.store / store_files.REFUSED}"
    if max_refused is not None and summary.refused > max_refused * num_rows * (1 + 1e-9):  # 0.29 × 100 is below 29
        raise TooManyRefused(
            f"{summary.refused} of {num_rows} scans are refused ({counts}), more than the {max_refused:.1%} allowed; "
            f"{summary.store} is left unfinished: run again with a larger --max-refused, or mend the source{first}"
        )
    if summary.refused == num_rows:
        raise TooManyRefused(f"all {num_rows} scans are refused ({counts}); {summary.store} is left unfinished{first}")
