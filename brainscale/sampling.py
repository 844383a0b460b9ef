"""Everything random about which voxels a sample holds, as a pure function of (seed, global sample index).

index = step × global batch + position in the batch, whatever the number of ranks and the accumulation, so a resumed or
resized run draws the same samples in the same order. Words come from Philox counters (numpy keeps raw bit streams
stable between releases, unlike its distributions).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from brainscale.data_settings import Augment
from brainscale.geometry import Zyx
from brainscale.settings import InputError

ORDER, AUGMENT, MASK, NOISE, DECODED = 0, 1, 2, 6, 7
"""Streams: independent random words for the same (seed, index)."""
NOISE_PLACES = 1 << 20
"""Places where the noise of a sample may begin."""


@dataclass(frozen=True)
class Change:
    """How a sample is changed beside crop and flip (`augment.py` does it); nothing by default."""

    rotation_deg_zyx: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """About each axis, in this order."""
    scale: float = 1.0
    gamma: float = 1.0
    gain: float = 1.0
    bias: tuple[float, ...] = ()
    """Largest absolute logarithm of a smooth field of factors, and the coefficients of its polynomial."""
    noise_std: float = 0.0
    """Of Gaussian noise, as a share of the range between the clip bounds."""
    noise_place: int = 0
    """Which noise: 0..NOISE_PLACES."""
    blur_mm: float = 0.0
    """Standard deviation of a Gaussian blur."""

    @property
    def moves(self) -> bool:
        """Whether voxels are interpolated."""
        return self.scale != 1 or any(self.rotation_deg_zyx)

    @property
    def alters(self) -> bool:
        """Whether intensities change."""
        return (self.gamma, self.gain, self.noise_std, self.blur_mm) != (1, 1, 0, 0) or bool(self.bias)


SAME = Change()


@dataclass(frozen=True)
class Draw:
    """What one sample is made of."""

    index: int
    row: int
    corner_zyx: Zyx
    """First voxel of the crop; negative on an axis where the crop is longer than the volume."""
    flip: bool
    change: Change = SAME


def words(seed: int, stream: int, index: int, count: int) -> np.ndarray:
    """`count` uniform uint64 words that depend on the arguments alone."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, index, 0]).random_raw(count)


def draw(
    seed: int, index: int, row: int, volume_zyx: Zyx, crop_zyx: Zyx, corner_step: int, flip_fraction: float,
    augment: Augment,
) -> Draw:  # fmt: skip
    """The sample at a global index, of a row that an order has chosen.

    Crop corners are multiples of `corner_step` voxels (the store's foreground cell); an axis on which the crop is
    longer than the volume is padded around it, as evenly as cells allow.
    """
    random = words(seed, AUGMENT, index, 4)
    corner = [
        int(word) % ((v - c) // corner_step + 1) * corner_step if v >= c else (v - c) // 2 // corner_step * corner_step
        for word, v, c in zip(random[:3], volume_zyx, crop_zyx)
    ]
    z, y, x = corner
    return Draw(index, row, (z, y, x), int(random[3]) / 2.0**64 < flip_fraction, draw_change(augment, seed, index))


def draw_change(augment: Augment, seed: int, index: int) -> Change:
    """What is done to the sample at a global index. Every kind has words of its own, so that switching one on or
    turning it up leaves the others as they are."""
    if augment.changes_nothing:
        return SAME
    random = words(seed, AUGMENT, index, 39)[4:] / 2.0**64

    def between(share: float, low: float, high: float) -> float:
        return float(low + (high - low) * share)

    def factor(share: float, largest: float) -> float:
        return math.exp(between(share, -1, 1) * math.log(largest))

    done: dict[str, Any] = {}
    if random[0] < augment.affine_fraction:
        z, y, x = (between(share, -1, 1) * augment.max_rotation_deg for share in random[1:4])
        done.update(rotation_deg_zyx=(z, y, x), scale=factor(random[4], augment.max_scale))
    if random[5] < augment.gamma_fraction:
        done.update(gamma=factor(random[6], augment.max_gamma))
    if random[7] < augment.gain_fraction:
        done.update(gain=factor(random[8], augment.max_gain))
    if random[9] < augment.bias_fraction:
        size = random[10] * math.log(augment.max_bias)
        done.update(bias=(float(size), *(between(share, -1, 1) for share in random[11:30])))
    if random[30] < augment.noise_fraction:
        done.update(noise_std=float(random[31] * augment.max_noise_std), noise_place=int(random[32] * NOISE_PLACES))
    if random[33] < augment.blur_fraction:
        done.update(blur_mm=float(random[34] * augment.max_blur_mm))
    return Change(**done)


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
