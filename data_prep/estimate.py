"""`to_zarr.py SOURCE STORE --plan`: what a conversion would take, from a sample of its scans, with nothing kept."""

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainscale import store as stores
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale_data_prep import discover, pool
from brainscale_data_prep.convert import grid
from brainscale_data_prep.discover import Found
from brainscale_data_prep.shards import Task, convert_shard

SAMPLE_SCANS = 12
MAX_LISTED = 20
FIXED_FILES = 16
"""Files and folders of a store beside its shards, about."""


@dataclass
class Estimate:
    """A prediction; bytes and seconds are scaled up from the sample."""

    scans: int
    skipped: dict[str, int]
    grid_xyz: tuple[int, int, int]
    shards: int
    inodes: int
    store_bytes: float
    seconds: float
    """With all workers, as many cores, and a disk that keeps up."""
    worker_bytes: float
    """Memory at the peak of one worker."""
    workers: int
    free_bytes: int
    sampled: int
    refused: list[str]
    """Of the sample, and of the whole list what is refused unread: source, reason and sentence."""


def estimate(
    source: Path, store: Path, plan: Plan, workers: int, find: Callable[[Path], Found] = discover.find
) -> Estimate:
    """Convert a few scans, evenly spread over the list, into a temporary folder and scale up. Raises InputError."""
    if workers < 1:
        raise InputError(f"got {workers} workers; give at least 1")
    found = find(source)
    scans = found.scans
    grid_xyz, num_rows = grid(plan, scans), len(scans)
    readable = [scan for scan in scans if not scan.code]
    chosen = [readable[i] for i in np.unique(np.linspace(0, len(readable) - 1, SAMPLE_SCANS).round().astype(int))]
    existing = next(folder for folder in (store.absolute(), *store.absolute().parents) if folder.is_dir())
    refused = [f"{scan.source}: {scan.code}: {scan.sentence}" for scan in scans if scan.code]
    seconds: list[float] = []
    stored_bytes: list[int] = []
    peak = 0
    single = plan.model_copy(update={"shard_volumes": 1})
    with tempfile.TemporaryDirectory(prefix="brainscale-plan-") as folder:
        sample = Path(folder) / "store"
        if chosen:
            stores.create(sample, single, grid_xyz[::-1], len(chosen))

            def collect(result: tuple[list[dict], float, int]) -> int:
                nonlocal peak
                (record,), took, used = result
                peak = max(peak, used)
                seconds.append(took)
                if record["status"] == "refused":
                    refused.append(f"{record['source']}: {record['reason']}: {record['sentence']}")
                else:
                    stored_bytes.append(stores.shard_bytes(sample, record["row"]))
                return 1

            tasks = [Task(sample, i, single, grid_xyz, range(i, i + 1), [scan]) for i, scan in enumerate(chosen)]
            pool.run(timed_shard, tasks, 1, collect, len(tasks), "sampling")
    per_shard = stores.shard_volumes(plan, num_rows)
    shards = math.ceil(num_rows / per_shard)
    volume_bytes = math.prod(grid_xyz) * np.dtype(plan.dtype).itemsize
    typical = float(np.mean(stored_bytes)) if stored_bytes else math.nan
    # the first scan of a worker also warms it up
    each = float(np.mean(seconds[1:] or seconds)) if seconds else math.nan
    return Estimate(
        scans=num_rows,
        skipped=found.skipped,
        grid_xyz=grid_xyz,
        shards=shards,
        # every shard has a file and three folders in each of two arrays
        inodes=shards * 2 * 4 + FIXED_FILES,
        store_bytes=typical * len(readable) * len(stored_bytes) / max(len(chosen), 1),
        seconds=each * num_rows / min(workers, shards),
        # a shard is held as voxels, and once more while it is encoded
        worker_bytes=peak + 2 * (per_shard - 1) * volume_bytes,
        workers=workers,
        free_bytes=shutil.disk_usage(existing).free,
        sampled=len(chosen),
        refused=refused,
    )


def timed_shard(task: Task) -> tuple[list[dict], float, int]:
    """A shard's records, its seconds, and the worker's largest memory so far in bytes."""
    started = time.perf_counter()
    records, _ = convert_shard(task)
    return records, time.perf_counter() - started, peak_bytes()


def peak_bytes() -> int:
    """The largest memory that this process has had since it began; getrusage would count its parent's before exec."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def text(e: Estimate) -> str:
    """An estimate for people."""
    reasons = Counter(line.split(": ")[1] for line in e.refused)
    skipped = ", ".join(f"{count} {name}" for name, count in sorted(e.skipped.items()))
    x, y, z = e.grid_xyz
    lines = [
        f"volumes    {e.scans:,} of {x} × {y} × {z} voxels (x, y, z){f'; not selected: {skipped}' if skipped else ''}",
        f"inodes     {e.inodes:,} ({e.shards:,} shards)",
    ]
    if e.store_bytes > 0:
        size = f"{e.store_bytes / 1e9:,.2f} GB" if e.store_bytes >= 1e8 else f"{e.store_bytes / 1e6:,.1f} MB"
        short = ": NOT ENOUGH" if e.store_bytes > e.free_bytes else ""
        spoken = f"{e.seconds / 60:.1f} min" if e.seconds >= 90 else f"{e.seconds:.1f} s"
        lines += [
            f"bytes      {size}; the disk has {e.free_bytes / 1e9:,.1f} GB free{short}",
            f"hours      {e.seconds / 3600:,.2f} ({spoken}) with {e.workers} workers on as many cores",
            f"memory     {e.workers * e.worker_bytes / 1e9:.1f} GB ({e.worker_bytes / 1e9:.2f} GB per worker)",
        ]
    else:
        lines.append("bytes, time and memory are not known: no sampled scan was taken")
    counts = ", ".join(f"{count} {code}" for code, count in sorted(reasons.items()))
    return "\n".join(
        (
            *lines,
            f"sampled    {e.sampled} scans; nothing was written to the store",
            f"refused    {len(e.refused)} of those sampled or refused by name{f' ({counts})' if counts else ''}",
            *(f"  {line}" for line in e.refused[:MAX_LISTED]),
        )
    )
