"""Which samples a rank takes, and how many it may hold. No torch: the processes that read for DALI import this."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from brainscale.config import Config
from brainscale.reader import Reader
from brainscale.samplers import Order
from brainscale.sampling import Draw, draw
from brainscale.settings import InputError
from brainscale.store_files import StoreDamage


@dataclass
class Stream:
    """Which samples one rank takes, micro-batch by micro-batch."""

    reader: Reader
    order: Order
    config: Config
    rank: int
    world_size: int
    micro_batch: int
    """Volumes per forward pass of one rank."""

    @property
    def stride(self) -> int:
        """Samples of a micro-batch of all ranks."""
        return self.micro_batch * self.world_size

    def draw(self, index: int) -> Draw:
        """The sample at a global index."""
        reader, config = self.reader, self.config
        return draw(
            config.seed, index, self.order.row(index), reader.store.volume_zyx, reader.volume_zyx, reader.cell,
            config.data.flip_fraction, config.augment,
        )  # fmt: skip

    def draws(self, first: int) -> list[Draw]:
        """This rank's share of the micro-batch whose first global sample index is `first`."""
        start = first + self.rank * self.micro_batch
        return [self.draw(index) for index in range(start, start + self.micro_batch)]

    @property
    def batch_bytes(self) -> int:
        """Voxels of a micro-batch of this rank, at most: a crop that is rotated needs more than its own size."""
        crop, store = int(np.prod(self.reader.volume_zyx)), self.reader.store
        voxels = max(crop, int(np.prod(store.volume_zyx))) if self.config.augment.affine_fraction else crop
        return self.micro_batch * voxels * store.dtype.itemsize

    def batches_in_memory(self, least: int) -> int:
        """How many batches `data.prefetch_mb` allows. Raises InputError when they are fewer than `least`."""
        number = self.config.data.prefetch_mb * 10**6 // self.batch_bytes
        if number < least:
            raise InputError(
                f"data.prefetch_mb = {self.config.data.prefetch_mb} holds {number} of the {least} batches of "
                f"{self.batch_bytes / 1e6:.1f} MB that the loader needs; set it to "
                f"{-(-least * self.batch_bytes // 10**6)} or more, or lower train.micro_batch_volumes"
            )
        return number

    @cached_property
    def _ids(self) -> np.ndarray:
        return self.reader.store.column("id")

    def remember_names(self) -> None:
        """Read the names of scans while the disk answers: when they are needed, it may not."""
        self.scan(int(self.order.rows[0]))

    def scan(self, row: int) -> str:
        """The name of a row's scan."""
        return str(self._ids[self.reader.at(row)])

    def damage(self, index: int, sentence: str) -> StoreDamage:
        """Damage that was met in reading the sample at a global index, with the scan's name."""
        row = self.order.row(index)
        return StoreDamage(f"sample {index} (row {row}, {self.scan(row)}): {sentence}")

    def awaited(self, first: int) -> str:
        """Names the samples of this rank from a global index on, for a message."""
        store, draws = self.reader.store, self.draws(first)
        named = ", ".join(f"row {d.row} ({self.scan(d.row)}) of {store.file_of(d.row)}" for d in draws[:8])
        more = f" and {len(draws) - 8} more" if len(draws) > 8 else ""
        return f"waiting for samples {draws[0].index} to {draws[-1].index}: {named}{more}"
