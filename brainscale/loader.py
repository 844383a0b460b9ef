"""From draws to batches: what a batch is, and the plain torch loader. It owns no state but the cursor, so resume is
exact and elastic.

Voxels stay in storage type; a batch carries the four numbers per sample that turn them into clipped z-scores, which the
patch gather applies to the tokens it picks. Threads read ahead (tensorstore decodes without the GIL) into the memory
of a batch, which is page-locked where there is a GPU; its copy to the GPU runs beside the step before.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from brainscale.feed import JOIN_S, Feed
from brainscale.reader import Reader
from brainscale.sampling import Draw
from brainscale.store_files import StoreDamage
from brainscale.stream import Stream
from brainscale_kernels.patch_gather import Stored

Pending = tuple[list[Draw], Tensor, list[Future[np.ndarray]]]
"""A batch that is being read: its samples, the memory of its volumes, and a read of each, which gives foreground."""
MAX_AHEAD = 4
"""Batches read ahead at most: more would hide no wait that the disk can make up for."""


@dataclass(frozen=True)
class Batch:
    """B samples. A token's value is clamp(voxel × scale + offset, low, high): z-scored over the scan's foreground."""

    volumes: Tensor
    """(B,1,Z,Y,X) in storage dtype."""
    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    """Each (B,) float32."""
    foreground: Tensor
    """(B,N) float32: share of brain or head in every token, 0..1."""
    row: np.ndarray
    """(B,) rows of the store."""
    sample_index: np.ndarray
    """(B,) global sample indices."""

    @property
    def stored(self) -> Stored:
        """What the kernels read."""
        return Stored(self.volumes, self.scale, self.offset, self.low, self.high)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on another device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("volumes", "scale", "offset", "low", "high", "foreground")
        }
        return replace(self, **moved)


def collate(reader: Reader, draws: list[Draw], volumes: Tensor, foreground: np.ndarray) -> Batch:
    """A batch of volumes (B,1,Z,Y,X) and foreground shares (B,N), read before."""
    at = [reader.at(d.row) for d in draws]
    scale, offset, low, high = (torch.from_numpy(column[at]) for column in reader.affine)
    return Batch(
        volumes, scale, offset, low, high, torch.from_numpy(foreground),
        row=np.array([d.row for d in draws]), sample_index=np.array([d.index for d in draws]),
    )  # fmt: skip


def read_batch(reader: Reader, draws: list[Draw]) -> Batch:
    """Read samples now, one after another. Raises StoreDamage, naming the file, when a volume cannot be read."""
    return collate(reader, draws, *stacked([reader.sample(d) for d in draws]))


def stacked(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, np.ndarray]:
    """Volumes (B,1,Z,Y,X) and foreground shares (B,N) of samples."""
    volumes, foreground = zip(*samples)
    return torch.from_numpy(np.stack(volumes)[:, None]), np.stack(foreground)


@dataclass
class Loader(Stream):
    """Endless batches of one rank from a cursor (the global index of the next optimizer step's first sample), read by
    threads: the plain twin of the DALI loader."""

    name: ClassVar[str] = "torch"
    """What `data.loader` calls it."""
    device: torch.device = field(default=torch.device("cpu"))

    def batches(self, cursor: int) -> Generator[tuple[Batch, int], None, None]:
        """Yield (batch, cursor after it), its volumes on the device. Closing the iterator ends its threads.

        Raises InputError for memory too small, StoreDamage for data that cannot be read, with sample and file,
        LoaderFailed for a batch that comes too late.
        """
        ahead = min(self.batches_in_memory(3) - 2, MAX_AHEAD)  # one more lies ready, one is in use
        at = cursor
        pool = ThreadPoolExecutor(self.config.data.workers, thread_name_prefix="loader")
        pending: deque[Pending] = deque()
        self.remember_names()
        feed = Feed(
            lambda feed: self._read(cursor, ahead, pool, pending, feed.fail),
            1,
            self.config.data.timeout_s,
            lambda: self.awaited(at),
        )
        try:
            while True:
                batch, copied = next(feed)
                if copied is not None:
                    torch.cuda.current_stream(self.device).wait_event(copied)
                    batch.volumes.record_stream(torch.cuda.current_stream(self.device))
                at += self.stride
                yield batch, at
        finally:
            feed.close()
            pool.shutdown(wait=False, cancel_futures=True)
            under_way = [read for _, _, reads in pending for read in reads if not read.cancelled()]
            _, hanging = wait(under_way, 0.0 if feed.late else JOIN_S)
            pool.shutdown(wait=not hanging)  # a read that hangs is left behind

    def _read(
        self,
        cursor: int,
        ahead: int,
        pool: ThreadPoolExecutor,
        pending: deque[Pending],
        fail: Callable[[Exception], None],
    ) -> Generator[tuple[Batch, torch.cuda.Event | None], None, None]:
        """Batches on the device, and when their copy is done. `ahead` of them are being read at any time."""
        dtype = torch.from_numpy(np.empty(0, self.reader.store.dtype)).dtype
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if on_gpu else None
        while True:
            while len(pending) < ahead:
                draws = self.draws(cursor)
                volumes = torch.empty((len(draws), 1, *self.reader.volume_zyx), dtype=dtype, pin_memory=on_gpu)
                reads = [pool.submit(self._fill, volumes[i, 0].numpy(), d, fail) for i, d in enumerate(draws)]
                pending.append((draws, volumes, reads))
                cursor += self.stride
            draws, volumes, reads = pending[0]
            foreground = np.stack([read.result() for read in reads])
            pending.popleft()
            copied = None
            if stream is not None:
                with torch.cuda.stream(stream):
                    volumes = volumes.to(self.device, non_blocking=True)
                    copied = stream.record_event()
            yield collate(self.reader, draws, volumes, foreground), copied

    def _fill(self, out: np.ndarray, d: Draw, fail: Callable[[Exception], None]) -> np.ndarray:
        try:
            out[...], foreground = self.reader.sample(d)
        except StoreDamage as error:
            damage = self.damage(d.index, str(error))
            fail(damage)
            raise damage from error
        return foreground
