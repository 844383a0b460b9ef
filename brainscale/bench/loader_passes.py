"""How passes over batches are timed, the same for every loader: in turn, from the middle of a stream."""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brainscale.bench.read import drop_from_page_cache
from brainscale.bench.record import paired_ratio, sample_lines, skipped

BENCH = "loader"
PERSISTENT = "MONAI PersistentDataset + ThreadDataLoader"
PERSISTENT_THREADS = "MONAI PersistentDataset + ThreadDataLoader, worker threads"


@dataclass(frozen=True)
class Work:
    """The piece of work that every variant does: batches of the same volumes in the same order. The first `fill`
    batches fill the pipelines and are not timed, `timed` are, and `fill` more keep the readers busy until the last."""

    path: Path
    """Of the store."""
    rows: tuple[int, ...]
    """Those that are read, sorted."""
    sequence: tuple[int, ...]
    """Row of every volume, in order."""
    files: dict[int, Path]
    """Row → NIfTI file."""
    cache: Path
    """Folder of PersistentDataset."""
    batch: int
    fill: int
    timed: int
    device: torch.device

    @property
    def paths(self) -> list[str]:
        """The NIfTI file of every row."""
        return [str(self.files[row]) for row in self.rows]


@dataclass(frozen=True)
class Variant:
    """A loader that is ready. batches: begins to load and yields (B,1,Z,Y,X) on the work's device; closing ends it."""

    batches: Callable[[], Generator[Tensor, None, None]]
    files: tuple[Path, ...]
    """Those that it reads."""
    codes: bool = False
    """Whether it delivers stored integers, not values."""


class Pass(NamedTuple):
    """Seconds of the timed batches, of which the consumer waited so long, and CPU seconds meanwhile."""

    seconds: float
    waited_s: float
    cpu_s: float


class NotCold(Exception):
    """The page cache keeps what it is asked to drop."""


def take(work: Work, variant: Variant, consume: Callable[[], Any] = lambda: None) -> Pass:
    """One pass. consume: what is done with every timed batch."""
    batches = variant.batches()
    try:
        for _ in range(work.fill):
            next(batches)
        synchronize(work.device)
        processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
        cpu_s, begin, waited_s = sum(map(cpu_clock_s, processes)), time.perf_counter(), 0.0
        for _ in range(work.timed):
            asked = time.perf_counter()
            next(batches)
            waited_s += time.perf_counter() - asked
            consume()
        synchronize(work.device)
        return Pass(time.perf_counter() - begin, waited_s, sum(map(cpu_clock_s, processes)) - cpu_s)
    finally:
        batches.close()


def cpu_clock_s(process: int) -> float:
    """User and system seconds of a process with all its threads so far, by the clock that clock_getcpuclockid(3) names:
    it counts nanoseconds, where /proc counts hundredths of a second."""
    return time.clock_gettime((~process << 3) | 2)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    work: Work, variants: dict[str, Variant], n: int, cold: bool, consume: Callable[[], Any] = lambda: None
) -> dict[str, list[Pass]]:
    """`n` passes of each variant, A B C, B C A, …, with its files in the page cache or dropped from it.

    Raises NotCold where they stay."""
    names = list(variants)
    passes: dict[str, list[Pass]] = {name: [] for name in names}
    for turn in range(n):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for file in variants[name].files:
                if not cold:
                    file.read_bytes()
                elif not drop_from_page_cache(file):
                    raise NotCold
            passes[name].append(take(work, variants[name], consume))
    return passes


def pass_lines(
    case: str, work: Work, variants: dict[str, Variant], reference: str, n: int, cold: bool, megabytes: float
) -> list[dict[str, Any]]:
    """Lines over seconds per volume. megabytes: of a volume (or crop) in the store's type."""
    print(f"measuring: {case}", file=sys.stderr, flush=True)
    try:
        passes = in_turn(work, variants, n, cold)
    except NotCold:
        return [skipped(BENCH, case, reference, "the page cache keeps what it is asked to drop on this disk")]
    volumes = work.timed * work.batch
    seconds = {name: [one.seconds / volumes for one in own] for name, own in passes.items()}
    lines = with_persistent_ratio(sample_lines(BENCH, case, "s", seconds, reference), seconds)
    for line in lines:
        line["volumes_per_s"] = 1 / line["median"]
        line["mb_per_s"] = megabytes / line["median"]
        line["cpu_s_per_volume"] = statistics.median(one.cpu_s / volumes for one in passes[line["variant"]])
    return lines


def with_persistent_ratio(lines: list[dict[str, Any]], samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The lines, and their ratio to PersistentDataset: with processes or threads, whichever has the smaller median."""
    found = [line for line in lines if line["variant"] in (PERSISTENT, PERSISTENT_THREADS)]
    if found:
        best = min(found, key=lambda line: line["median"])
        for line in lines:
            own, other = samples[line["variant"]], samples[best["variant"]]
            line["ratio_to_persistent"] = paired_ratio(line["unit"], own, other)
    return lines
