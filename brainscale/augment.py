"""What is done to the voxels of a sample, in numpy and scipy: the plain reference of the DALI graph.

From the voxels that were read to a volume of the crop's size, in storage type:
1. placed: cut and padded, or rotated and scaled about the crop's centre (in mm; one trilinear interpolation); what lies
   outside the stored volume is the row's background,
2. mirrored left-right,
3. intensities, over u = 0..1 between the row's clip bounds: blurred, then u^γ · gain · field + noise, cut to 0..1
   again (the patch gather cuts there too). Voxels that are background alone stay so,
4. rounded to codes, once.

Sources: polynomial bias field of order 3, Van Leemput et al., IEEE TMI 18 (1999) 885.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage, special

from brainscale.geometry import Zyx
from brainscale.sampling import NOISE, NOISE_PLACES, Change, words

KNOTS = 8
"""The logarithm of a bias field is given at this many points along each axis, and linear between."""
EXPONENTS = [e for e in itertools.product(range(4), repeat=3) if 0 < sum(e) <= 3]


@dataclass(frozen=True)
class Box:
    """Which part of a stored volume a sample needs, and how it is placed on the crop's grid."""

    corner_zyx: Zyx
    size_zyx: Zyx
    start_zyx: Zyx
    """Where the crop begins, in voxels of the box; negative or past its end: padding."""
    linear_zyx: np.ndarray
    """(3,3): voxel of the box = linear · voxel of the crop + offset; the identity where nothing moves."""
    offset_zyx: np.ndarray
    """(3,)"""


@dataclass(frozen=True)
class Codes:
    """What codes of a row mean: the background's, and those of the clip bounds."""

    background: float
    low: float
    high: float


class Noise:
    """Standard normal noise of a seed: a table, of which every sample reads as many values as it has voxels from a
    place of its own. Within a volume all values are independent; making them anew would cost more than reading."""

    def __init__(self, seed: int, crop_zyx: Zyx) -> None:
        self.seed, self.num_voxels = seed, math.prod(crop_zyx)

    @property
    def table(self) -> np.ndarray:
        """(voxels + NOISE_PLACES,) float32."""
        return _table(self.seed, self.num_voxels + NOISE_PLACES)

    def of(self, change: Change, shape_zyx: tuple[int, ...]) -> np.ndarray:
        """(z,y,x) float32 of one sample, a view."""
        return self.table[change.noise_place : change.noise_place + self.num_voxels].reshape(shape_zyx)


@lru_cache(maxsize=2)
def _table(seed: int, count: int) -> np.ndarray:
    uniform = (words(seed, NOISE, 0, count) >> 11) * 2.0**-53 + 2.0**-54
    return special.ndtri(uniform).astype(np.float32)


def inverse_linear(change: Change, spacing_mm_zyx: np.ndarray) -> np.ndarray:
    """(3,3): offset in the stored volume = this · offset on the crop's grid, both from the centre in voxels (z, y, x).

    Rotations about z, then y, then x act in millimetres, so that brains of anisotropic voxels are not sheared. A
    positive angle turns what lies along the earlier of the two other axes (z, y, x) towards the later.
    """
    rotation = np.eye(3)
    for axis, degrees in enumerate(change.rotation_deg_zyx):
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        first, second = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[[first, second], [first, second]] = cos
        turn[first, second], turn[second, first] = -sin, sin
        rotation = turn @ rotation
    return rotation.T / change.scale * spacing_mm_zyx / spacing_mm_zyx[:, None]


def box_of(corner_zyx: Zyx, crop_zyx: Zyx, volume_zyx: Zyx, change: Change, spacing_mm_zyx: np.ndarray) -> Box:
    """The smallest box with all voxels that a crop needs, and one more on each side where it is interpolated."""
    corner, crop, volume = (np.array(a) for a in (corner_zyx, crop_zyx, volume_zyx))
    if not change.moves:
        low, high = np.maximum(corner, 0), np.minimum(corner + crop, volume)
        start = corner - low
        return Box(_zyx(low), _zyx(high - low), _zyx(start), np.eye(3), start.astype(np.float64))
    linear = inverse_linear(change, spacing_mm_zyx)
    half = (crop - 1) / 2
    centre, reach = corner + half, np.abs(linear) @ half
    low = np.clip(np.floor(centre - reach).astype(int) - 1, 0, volume - 1)
    high = np.clip(np.ceil(centre + reach).astype(int) + 2, low + 1, volume)
    return Box(_zyx(low), _zyx(high - low), (0, 0, 0), linear, centre - linear @ half - low)


def _zyx(voxels: np.ndarray) -> Zyx:
    z, y, x = (int(v) for v in voxels)
    return z, y, x


def placed(voxels: np.ndarray, box: Box, crop_zyx: Zyx, change: Change, background: float) -> np.ndarray:
    """(z,y,x) of the crop's size: float32 where it is interpolated, else in the type of `voxels` (of the box)."""
    if change.moves:
        above = voxels - np.float32(background) if background else voxels  # or weights that sum to nearly 1 blur it
        return np.float32(background) + ndimage.affine_transform(
            above, box.linear_zyx, box.offset_zyx, crop_zyx, np.float32, 1, "grid-constant", 0.0
        )
    if voxels.shape == crop_zyx:
        return voxels
    whole = np.full(crop_zyx, background, voxels.dtype)
    into = tuple(slice(-s, n - s) for s, n in zip(box.start_zyx, voxels.shape))
    whole[into] = voxels
    return whole


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in storage type, which can hold them: they lie between values that it held."""
    if values.dtype == dtype:
        return values
    return np.rint(values).astype(dtype) if dtype.kind in "iu" else values.astype(dtype)


def altered(volume: np.ndarray, change: Change, codes: Codes, spacing_mm_zyx: np.ndarray, noise: Noise) -> np.ndarray:
    """A volume with other intensities, in float32."""
    volume = volume.astype(np.float32)
    low, span = np.float32(codes.low), np.float32(codes.high - codes.low)
    u = np.clip((volume - low) * (np.float32(1) / span), 0, 1)
    if change.blur_mm:
        sigma = blur_voxels(change, spacing_mm_zyx)
        u = ndimage.gaussian_filter(u, sigma, mode="mirror", radius=blur_radius(sigma))
    u = u ** np.float32(change.gamma) * np.float32(change.gain)
    if change.bias:
        zoom = [size / KNOTS for size in volume.shape]
        u *= np.exp(ndimage.zoom(log_field(change.bias), zoom, order=1, grid_mode=True, mode="nearest"))
    if change.noise_std:
        u += np.float32(change.noise_std) * noise.of(change, volume.shape)
    return np.where(volume == np.float32(codes.background), volume, low + span * np.clip(u, 0, 1))


def blur_voxels(change: Change, spacing_mm_zyx: np.ndarray) -> np.ndarray:
    """(3,) standard deviations of a blur along z, y, x."""
    return change.blur_mm / spacing_mm_zyx


def blur_radius(sigma_voxels: np.ndarray) -> list[int]:
    """Voxels on each side that a blur looks at, along z, y, x."""
    return np.ceil(3 * sigma_voxels).astype(int).tolist()


def log_field(bias: tuple[float, ...]) -> np.ndarray:
    """(KNOTS, KNOTS, KNOTS) float32 logarithm of a bias field, zeros where there is none. bias: its largest size, and a
    coefficient per term."""
    if not bias:
        return np.zeros((KNOTS,) * 3, np.float32)
    largest, *coefficients = bias
    at = (2 * np.arange(KNOTS) + 1) / KNOTS - 1
    z, y, x = np.meshgrid(at, at, at, indexing="ij")
    field = sum(c * z**i * y**j * x**k for c, (i, j, k) in zip(coefficients, EXPONENTS))
    return (largest * field / np.abs(field).max()).astype(np.float32)
