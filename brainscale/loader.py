"""From draws to batches: the plain torch loader. It owns no state but the cursor, so resume is exact and elastic.

Voxels stay in storage type; a batch carries the four numbers per sample that turn them into clipped z-scores, which the
patch gather applies to the tokens it picks. Threads read ahead (tensorstore decodes without the GIL).
"""

import itertools
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from brainscale.config import Config
from brainscale.geometry import Zyx, token_grid
from brainscale.sampling import Draw, draw
from brainscale.settings import InputError
from brainscale.store import Store
from brainscale_kernels.patch_gather import Stored

PREFETCH_BATCHES = 2


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


class Reader:
    """Turns draws into batches of one store."""

    def __init__(self, store: Store, patch_zyx: Zyx, crop_zyx: Zyx | None) -> None:
        """Raises InputError when the crop does not fit the store's grid or the patch does not divide it."""
        self.store = store
        self.patch_zyx = patch_zyx
        self.volume_zyx: Zyx = store.volume_zyx if crop_zyx is None else crop_zyx
        self.cell = store.plan.foreground_cell_voxels
        if any(c > v for c, v in zip(self.volume_zyx, store.volume_zyx)):
            raise InputError(
                f"data.crop_voxels_zyx {self.volume_zyx} is larger than the store's {store.volume_zyx} (z, y, x)"
            )
        self.grid_zyx = token_grid(self.volume_zyx, patch_zyx)
        if any(p % self.cell for p in patch_zyx):
            raise InputError(
                f"model.patch_voxels_zyx {patch_zyx} must be a multiple of the store's foreground cell of {self.cell} "
                "voxels; choose another patch or convert with another foreground_cell_voxels"
            )
        self.affine = normalisation(store)
        self.position = {int(row): i for i, row in enumerate(store.rows)}

    def batch(self, draws: list[Draw]) -> Batch:
        """Read and collate. Raises StoreDamage, naming the file, when a volume cannot be read."""
        return self.collate(draws, [self.sample(d) for d in draws])

    def sample(self, d: Draw) -> tuple[np.ndarray, np.ndarray]:
        """Voxels (Z,Y,X) and foreground shares (N,) of one draw."""
        return self._volume(d), self._foreground(d)

    def collate(self, draws: list[Draw], samples: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        """Samples, read before, as a batch."""
        volumes = np.stack([volume for volume, _ in samples])[:, None]
        foreground = np.stack([shares for _, shares in samples])
        at = [self.position[d.row] for d in draws]
        scale, offset, low, high = (torch.from_numpy(column[at]) for column in self.affine)
        return Batch(
            torch.from_numpy(volumes), scale, offset, low, high, torch.from_numpy(foreground),
            row=np.array([d.row for d in draws]), sample_index=np.array([d.index for d in draws]),
        )  # fmt: skip

    def _volume(self, d: Draw) -> np.ndarray:
        whole = self.volume_zyx == self.store.volume_zyx
        volume = self.store.volumes([d.row])[0] if whole else self.store.crop(d.row, d.corner_zyx, self.volume_zyx)
        return np.ascontiguousarray(volume[:, :, ::-1]) if d.flip else volume

    def _foreground(self, d: Draw) -> np.ndarray:
        cells = self.store.foreground([d.row])[0]
        (z, y, x), (nz, ny, nx) = ((n // self.cell for n in at) for at in (d.corner_zyx, self.volume_zyx))
        cells = cells[z : z + nz, y : y + ny, x : x + nx]
        cells = cells[:, :, ::-1] if d.flip else cells
        (gz, gy, gx), (cz, cy, cx) = self.grid_zyx, (p // self.cell for p in self.patch_zyx)
        return cells.reshape(gz, cz, gy, cy, gx, cx).mean((1, 3, 5), dtype=np.float32).reshape(-1) / np.float32(255)


class Loader:
    """Endless batches of one rank from a cursor (the global index of the next optimizer step's first sample)."""

    def __init__(
        self, reader: Reader, rows: np.ndarray, config: Config, rank: int, world_size: int, micro_batch: int
    ) -> None:
        """rows: the rows to train on; micro_batch: volumes per forward pass of one rank."""
        self.reader, self.rows, self.config = reader, rows, config
        self.rank, self.world_size, self.micro_batch = rank, world_size, micro_batch

    def draws(self, first: int) -> list[Draw]:
        """This rank's share of the micro-batch whose first global sample index is `first`."""
        start, store = first + self.rank * self.micro_batch, self.reader.store
        return [
            draw(
                self.config.seed, index, self.rows, store.volume_zyx, self.reader.volume_zyx, self.reader.cell,
                self.config.data.flip_fraction,
            )
            for index in range(start, start + self.micro_batch)
        ]  # fmt: skip

    def batches(self, cursor: int) -> Generator[tuple[Batch, int], None, None]:
        """Yield (batch, cursor after it). Reads `PREFETCH_BATCHES` ahead; closing the iterator ends its threads."""
        stride = self.micro_batch * self.world_size
        with ThreadPoolExecutor(self.config.data.workers, thread_name_prefix="loader") as pool:
            ahead: deque[tuple[list[Draw], list[Future[tuple[np.ndarray, np.ndarray]]]]] = deque()
            try:
                while True:
                    while len(ahead) < PREFETCH_BATCHES:
                        draws = self.draws(cursor + len(ahead) * stride)
                        ahead.append((draws, [pool.submit(self.reader.sample, d) for d in draws]))
                    draws, futures = ahead[0]
                    batch = self.reader.collate(draws, [future.result() for future in futures])
                    ahead.popleft()
                    cursor += stride
                    yield batch, cursor
            finally:
                for future in itertools.chain.from_iterable(futures for _, futures in ahead):
                    future.cancel()


def normalisation(store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(scale, offset, low, high), each (rows,) float32: value = clamp(code × scale + offset, low, high), which is a
    foreground z-score, 0..1 between the clip bounds, or the original unit, as the plan's `normalize` says."""
    columns = ("scale", "offset", "mean", "std", "clip_low", "clip_high")
    scale, offset, mean, std, low, high = (store.column(name).astype(np.float64) for name in columns)
    centre, unit = {
        "zscore": (mean, std),
        "unit_range": (low, high - low),
        "none": (np.zeros_like(mean), np.ones_like(std)),
    }[store.plan.normalize]
    parts = (scale / unit, (offset - centre) / unit, (low - centre) / unit, (high - centre) / unit)
    return tuple(part.astype(np.float32) for part in parts)  # type: ignore[return-value]
