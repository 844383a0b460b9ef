"""NIfTI files as rows in memory: prepared by an encoder's plan as a conversion would, without a store. No torch.

The voxels, and so the features, of a file are those of its row in a store of the same plan. What cannot be taken is
refused with the codes of a conversion.
"""

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bids2table import parse_bids_entities  # type: ignore[import-untyped]

from brainscale.geometry import Zyx
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale_data_prep import bids, discover, pool, tree
from brainscale_data_prep.discover import ScanFile
from brainscale_data_prep.nifti import Refused
from brainscale_data_prep.preprocess import Prepared
from brainscale_data_prep.shards import read

AHEAD = 2
"""Prepared scans that wait for the encoder, for each worker."""


@dataclass(frozen=True)
class NiftiRows:
    """Prepared scans, with the part of the interface of `Store` that embedding needs. Rows count from 0."""

    plan: Plan
    scans: list[tuple[ScanFile, Prepared]]

    @property
    def rows(self) -> np.ndarray:
        """All of them."""
        return np.arange(len(self.scans))

    @property
    def volume_zyx(self) -> Zyx:
        """Voxels of a volume."""
        z, y, x = self.scans[0][1].volume_zyx.shape
        return z, y, x

    def column(self, name: str) -> np.ndarray:
        """A column that follows from voxels and header, by the name it has in scans.parquet."""
        return np.array([prepared.record[name] for _, prepared in self.scans])

    def volumes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,Z,Y,X) in storage type."""
        return np.stack([self.scans[row][1].volume_zyx for row in rows])

    def foreground(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,GZ,GY,GX) uint8 shares of foreground."""
        return np.stack([self.scans[row][1].foreground_cells_zyx for row in rows])


def plan_grid_xyz(plan: Plan, volume_zyx: Zyx) -> tuple[int, int, int]:
    """The grid that files are brought to: the plan's, or, where that was the largest scan of the training data
    ("largest"), the volumes that the encoder saw; what does not fit into them is refused or carries a warning."""
    z, y, x = volume_zyx
    return (x, y, z) if plan.grid_voxels_xyz == "largest" else plan.grid_voxels_xyz


def find(sources: Sequence[Path]) -> tuple[list[ScanFile], dict[str, int]]:
    """The scans of NIfTI files, folders, BIDS datasets and tables, in this order, and the volumes of folders that are
    not selected, counted. Among several, ids of a folder's scans begin with the folder's number ("2/sub-01…"), as those
    of several stores do. Raises InputError for what holds no scans, and for a file given twice."""
    scans: list[ScanFile] = []
    skipped: dict[str, int] = {}
    for number, source in enumerate(sources, start=1):
        if source.is_file() and tree.split(source.name)[1]:
            scans.append(_file(source))
            continue
        if not source.exists():
            raise InputError(f"{source} does not exist; give NIfTI files, a folder of them, or stores")
        found = discover.find(source)
        prefix = f"{number}/" if len(sources) > 1 else ""
        scans += [
            replace(scan, id=prefix + scan.id, subject=prefix + scan.subject if scan.subject else "")
            for scan in found.scans
        ]
        for name, count in found.skipped.items():
            skipped[name] = skipped.get(name, 0) + count
    seen: set[str] = set()
    for scan in scans:
        if scan.id in seen and not scan.code:
            raise InputError(f"{scan.path} was given twice (id {scan.id}); give each file once")
        seen.add(scan.id)
    return scans, skipped


def _file(path: Path) -> ScanFile:
    """A file given by itself; subject, session and contrast as BIDS names say them."""
    name = tree.escape(str(path))
    entities = parse_bids_entities(path.name)
    contrast = entities.get("suffix", "")
    what = bids.NOT_ANATOMICAL.get(contrast, "")
    return ScanFile(
        id=tree.split(name)[0],
        path=path,
        source=name,
        subject=f"sub-{entities['sub']}" if "sub" in entities else "",
        session=f"ses-{entities['ses']}" if "ses" in entities else "",
        contrast=contrast if contrast in bids.ANATOMICAL else "",
        code="not_a_brain_scan" if what else "",
        sentence=f"it is {what} by its name (suffix {contrast}), not an anatomical image" if what else "",
    )


def prepared(
    files: Sequence[ScanFile], plan: Plan, grid_xyz: tuple[int, int, int], workers: int
) -> Iterator[tuple[ScanFile, Prepared | Refused]]:
    """Every scan as the store would hold it, or why it cannot be taken, in order, by so many processes (1: this one).

    Raises InputError when a worker is killed.
    """
    if workers <= 1:
        for file in files:
            yield file, _prepare(file, plan, grid_xyz)
        return
    waiting: deque[tuple[ScanFile, Future[Any]]] = deque()
    spawn = multiprocessing.get_context("spawn")
    with pool.environment(), ProcessPoolExecutor(min(workers, len(files)), spawn, pool.start_worker) as processes:
        try:
            for file in files:
                waiting.append((file, processes.submit(_prepare, file, plan, grid_xyz)))
                if len(waiting) > AHEAD * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise InputError(
                "a process that prepares scans was killed, mostly for want of memory; give fewer --workers"
            ) from None
        finally:
            processes.shutdown(wait=True, cancel_futures=True)


def _prepare(file: ScanFile, plan: Plan, grid_xyz: tuple[int, int, int]) -> Prepared | Refused:
    outcome = read(file, plan, grid_xyz)
    return outcome if isinstance(outcome, Refused) else outcome[1]
