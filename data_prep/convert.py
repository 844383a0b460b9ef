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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from brainscale import store as stores
from brainscale import store_files
from brainscale.config import InputError, Plan
from brainscale.geometry import spacing_mm
from brainscale_data_prep import discover, nifti, pool
from brainscale_data_prep.discover import ScanFile
from brainscale_data_prep.nifti import Refused
from brainscale_data_prep.preprocess import prepare

COMPRESSED_SHARE = 0.5
"""Bytes of a store over bytes of its voxels, about, for the check of free space."""

EXAMPLES = 3
"""Refused scans quoted when there are too many of them."""

Grid = tuple[int, int, int]


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
) -> Summary:
    """Convert every scan of `source` into `store`, or continue to; `max_refused` is a share of all scans.

    `shard` (i, n) restricts the run to the shards s with s mod n = i. Raises InputError, TooManyRefused and
    pool.Stopped, each with one sentence.
    """
    source, store, started = Path(source), Path(store), time.monotonic()
    if workers < 1 or not 0 <= shard[0] < shard[1]:
        raise InputError(f"got {workers} workers and shard {shard[0]}/{shard[1]}; give workers >= 1 and 0 <= i < n")
    found = discover.find(source)
    grid_xyz, num_rows = _grid(plan, found.scans), len(found.scans)
    if store.exists() and not store.is_dir():
        raise InputError(f"{store} is a file; give the path of a new folder for the store")
    store.mkdir(parents=True, exist_ok=True)
    summary = Summary(store=store, skipped=found.skipped)
    with _only_writer(store):
        stores.create(store, plan, grid_xyz[::-1], num_rows)
        was_complete = (store / store_files.COMPLETE).exists()
        _check_scan_list(store, found.scans, was_complete)
        done = stores.finished_shards(store)
        num_shards = math.ceil(num_rows / stores.shard_volumes(plan, num_rows))
        tasks = []
        for number in range(num_shards):
            rows = stores.shard_rows(plan, num_rows, number)
            journal = store_files.read_journal(store, number) if number in done else None
            if journal and _mended(journal["records"], found.scans, store_files.journal_time(store, number)):
                done.discard(number)
                journal = None
            if number not in done and number % shard[1] == shard[0]:
                tasks.append(Task(store, number, plan, grid_xyz, rows, [found.scans[row] for row in rows]))
            elif journal:
                summary.add(journal["records"])
        num_volumes = sum(len(task.rows) for task in tasks)
        _check_space(store, plan, grid_xyz, num_volumes)

        def collect(result: tuple[list[dict[str, Any]], int]) -> int:
            records, bytes_read = result
            summary.add(records)
            summary.bytes_read += bytes_read
            summary.volumes_now += len(records)
            _check_refused(summary, num_rows, max_refused)
            return len(records)

        if tasks:
            pool.run(convert_shard, tasks, workers, collect, num_volumes)
        if len(done) + len(tasks) == num_shards:
            if not was_complete:
                _check_refused(summary, num_rows, max_refused)
            stores.finish(store)
            _describe(summary, stores.open_store(store), found.scans)
    summary.seconds = time.monotonic() - started
    return summary


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


def _grid(plan: Plan, scans: list[ScanFile]) -> Grid:
    """The plan's grid (x,y,z); "largest" reads every header, and a scan whose header cannot be read does not count."""
    if plan.grid_voxels_xyz != "largest":
        return plan.grid_voxels_xyz

    def size(scan: ScanFile) -> np.ndarray:
        try:
            shape, affine = nifti.read_shape(scan.path)
        except Refused:
            return np.zeros(3)
        order = np.argsort(nifti.axes_to_ras(affine)[:, 0])
        scale = 1.0 if plan.spacing_mm_xyz == "native" else spacing_mm(affine)[order] / np.array(plan.spacing_mm_xyz)
        return np.array(shape)[order] * scale

    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(size, [scan for scan in scans if not scan.code]))
    largest = np.max(sizes, axis=0, initial=0)
    if not largest.all():
        raise TooManyRefused(f"none of the {len(scans)} scans has a header that can be read; look at one with a viewer")
    cell = plan.foreground_cell_voxels
    x, y, z = (math.ceil(round(n, 3) / cell) * cell for n in largest.tolist())
    if x * y * z * np.dtype(plan.dtype).itemsize > nifti.MAX_BYTES:
        raise InputError(
            f"the smallest grid that holds every scan has {x} × {y} × {z} voxels, too many for one volume; "
            "set grid_voxels_xyz, or leave out the largest scans"
        )
    return x, y, z


@contextmanager
def _only_writer(store: Path) -> Iterator[None]:
    lock = FileLock(store / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another process is converting into {store}; wait for it, or give another folder") from None
    try:
        yield
    finally:
        (store / ".lock").unlink(missing_ok=True)
        lock.release()


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
    free = shutil.disk_usage(store).free
    if need > free:
        raise InputError(
            f"{volumes} volumes need about {need / 1e9:.1f} GB and the disk of {store} has {free / 1e9:.1f} GB free; "
            "make room or give another folder"
        )


def _mended(records: list[dict[str, Any]], scans: list[ScanFile], since_s: float) -> bool:
    """Whether a source that was refused has been replaced or changed since its shard was written."""
    refused = [scans[record["row"]].path for record in records if record["status"] == "refused"]
    return any(path.exists() and max(path.stat().st_mtime, path.stat().st_ctime) > since_s for path in refused)


def _check_refused(summary: Summary, num_rows: int, max_refused: float | None) -> None:
    counts = ", ".join(f"{count} {code}" for code, count in sorted(summary.reasons.items()))
    first = f"; the first: {'; '.join(summary.examples)}"
    if max_refused is not None and summary.refused > max_refused * num_rows:
        raise TooManyRefused(
            f"{summary.refused} of {num_rows} scans are refused ({counts}), more than the {max_refused:.1%} allowed; "
            f"{summary.store} is left unfinished: run again with a larger --max-refused, or mend the source{first}"
        )
    if summary.refused == num_rows:
        raise TooManyRefused(f"all {num_rows} scans are refused ({counts}); {summary.store} is left unfinished{first}")


@dataclass(frozen=True)
class Task:
    """One shard's work."""

    store: Path
    shard: int
    plan: Plan
    grid_xyz: Grid
    rows: range
    scans: list[ScanFile]


# --------------------------------------------------------------------------------------------- in a worker


def convert_shard(task: Task) -> tuple[list[dict[str, Any]], int]:
    """Read, prepare and write one shard: its records and the number of bytes read."""
    grid_zyx, cell = task.grid_xyz[::-1], task.plan.foreground_cell_voxels
    volumes = np.zeros((len(task.rows), *grid_zyx), task.plan.dtype)
    foreground = np.zeros((len(task.rows), *(n // cell for n in grid_zyx)), np.uint8)
    records, bytes_read = [], 0
    for slot, (row, file) in enumerate(zip(task.rows, task.scans)):
        place = {"row": row, "id": file.id, "source": file.source}
        try:
            if file.code:
                raise Refused(file.code, file.sentence)
            scan = nifti.read(file.path)
            prepared = prepare(scan, task.plan, task.grid_xyz)
        except MemoryError:
            raise
        except Refused as refused:
            records.append({**place, "status": "refused", "reason": refused.code, "sentence": refused.sentence})
            continue
        except Exception as error:
            sentence = f"{type(error).__name__}: {error}".replace(f"{file.path}", file.source)
            records.append({**place, "status": "refused", "reason": "unreadable", "sentence": sentence})
            continue
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
                "duplicate_of": "",
                "participant": file.participant,
            }
        )
    stores.write_shard(task.store, task.shard, volumes, foreground, records)
    return records, bytes_read
