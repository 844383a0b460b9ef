"""Everything random about which voxels a sample holds, as a pure function of (seed, global sample index).

index = step × global batch + position in the batch, whatever the number of ranks and the accumulation, so a resumed or
resized run draws the same samples in the same order. Words come from Philox counters (numpy keeps raw bit streams
stable between releases, unlike its distributions).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from brainscale.geometry import Zyx
from brainscale.settings import InputError

ORDER, AUGMENT, MASK = 0, 1, 2
"""Streams: independent random words for the same (seed, index)."""


@dataclass(frozen=True)
class Draw:
    """What one sample is made of."""

    index: int
    row: int
    corner_zyx: Zyx
    flip: bool


def words(seed: int, stream: int, index: int, count: int) -> np.ndarray:
    """`count` uniform uint64 words that depend on the arguments alone."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, index, 0]).random_raw(count)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of range(count): every item once per epoch."""
    return np.argsort(words(seed, ORDER, epoch, count), kind="stable")


def draw(
    seed: int, index: int, rows: np.ndarray, volume_zyx: Zyx, crop_zyx: Zyx, corner_step: int, flip_fraction: float
) -> Draw:
    """The sample at a global index. Batches straddle epochs; nothing is dropped or repeated within one.

    rows: the rows that may be drawn. Crop corners are multiples of `corner_step` voxels (the store's foreground cell).
    """
    epoch, position = divmod(index, len(rows))
    row = int(rows[epoch_order(seed, epoch, len(rows))[position]])
    random = words(seed, AUGMENT, index, 4)
    corners = [(v - c) // corner_step + 1 for v, c in zip(volume_zyx, crop_zyx)]
    z, y, x = (int(word) % places * corner_step for word, places in zip(random[:3], corners))
    return Draw(index, row, (z, y, x), int(random[3]) / 2.0**64 < flip_fraction)


def held_out(subjects: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(rows,) bool: True where the row's subject is kept out of training.

    round(fraction × subjects) of them, at least one when fraction > 0, chosen by a hash of (seed, subject), so that all
    scans of a subject fall on one side. Raises InputError when that would leave no subject to train on.
    """
    names = sorted(set(subjects.tolist()), key=lambda s: xxhash.xxh3_128_hexdigest(f"{seed}/{s}".encode()))
    count = max(1, round(fraction * len(names))) if fraction > 0 else 0
    if count >= len(names):
        raise InputError(
            f"{len(names)} subject(s) cannot be split with data.holdout_fraction = {fraction}: nobody would be left to "
            "train on; add subjects or set data.holdout_fraction = 0"
        )
    return np.isin(subjects, names[:count])
