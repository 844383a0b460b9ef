"""What is background and what is head or brain. Arrays are z,y,x; no files here."""

from typing import Any

import numpy as np
from scipy import ndimage

from brainscale_data_prep.intensity import above, counted, level_percentiles, percentiles
from brainscale_data_prep.nifti import Refused, Scan

CONSTANT_BACKGROUND_SHARE = 0.4
COMPONENT_SHARE = 0.95
COMPACT_SHARE = 0.5
"""Of a compact object this share survives one erosion; of half-filled noise (1/2)^6 does."""
RIM_SHARE = 0.05
"""Resampled, a skull-stripped brain's rim overshoots into the background; voxels below this share of the median
foreground do not count as brain."""
EVERYTHING = -float(np.finfo(np.float32).max)
"""The threshold under which nothing lies."""
FEW_VALUES, REPEATED_SHARE = 8, 0.4
SAMPLE_VOXELS, FEWEST_VOXELS = 100_000, 1_000


def clean(scan: Scan, warnings: list[str]) -> tuple[np.ndarray, Any, np.ndarray | None]:
    """Voxels in native byte order without NaN or infinity, integers in 16 bits if they fit; the background as a voxel
    value; and, where that is constant (fills ≥ 40 % of the volume), which voxels differ from it.

    The background is the commonest value on the volume's faces where that is constant, else the faces' 10th percentile
    (air). Voxels that are not finite take its value, and the lowest one where they are the faces.
    """
    voxels = scan.voxels
    if not voxels.dtype.isnative:
        voxels = voxels.astype(voxels.dtype.newbyteorder("="), order="K")
    low, high = voxels.min(), voxels.max()  # NaN and infinity show in one of them
    num_bad = 0
    if not np.isfinite((low, high)).all():
        finite = np.isfinite(voxels)
        num_bad = voxels.size - int(np.count_nonzero(finite))
        if num_bad == voxels.size:
            raise Refused("constant", "none of its voxels is a finite number; leave it out")
        low, high = voxels[finite].min(), voxels[finite].max()
    if voxels.dtype.kind in "iu" and voxels.dtype.itemsize > 2:  # wide integers whose values are not
        narrow = next((t for t in (np.int16, np.uint16) if np.iinfo(t).min <= low and high <= np.iinfo(t).max), None)
        voxels = voxels if narrow is None else voxels.astype(narrow, order="K")
    faces = np.concatenate([np.moveaxis(voxels, axis, 0)[side].ravel() for axis in range(3) for side in (0, -1)])
    faces = faces[np.isfinite(faces)]
    if low == high:
        raise Refused(
            "constant", f"all its voxels have the value {float(low) * scan.slope + scan.inter:g}; leave it out"
        )
    values, counts = np.unique(faces, return_counts=True)
    background, differs = low if scan.slope > 0 else high, None
    if values.size and 2 * faces.size >= _face_voxels(voxels.shape):
        background = values[counts.argmax()]
        differs = voxels != background
        if not _leaves_constant(differs):
            air = np.quantile(faces, 0.1 if scan.slope > 0 else 0.9, method="lower")
            background, differs = air, differs if air == background else None
    if num_bad:
        warnings.append(f"non_finite:{num_bad}")
        voxels = np.where(finite, voxels, background)
    if differs is None or num_bad:
        differs = voxels != background
    return voxels, background, differs if _leaves_constant(differs) else None


def _leaves_constant(differs: np.ndarray) -> bool:
    return bool(np.count_nonzero(differs) <= (1 - CONSTANT_BACKGROUND_SHARE) * differs.size)


def _face_voxels(shape: tuple[int, ...]) -> int:
    x, y, z = shape
    return 2 * (x * y + y * z + x * z)


def foreground_threshold(
    raw: np.ndarray, background: Any, slope: float, coarse: np.ndarray, method: str, resampled: bool
) -> float:
    """Level above background (original units) over which a voxel is foreground, by "otsu", "nonzero" or "none".

    `coarse` is what some voxels `raw` are above the background; of integers only the levels are looked at.
    """
    if method == "otsu" and raw.dtype.kind in "iu" and raw.dtype.itemsize <= 2 and slope > 0:
        voxels, counts = counted(raw)
        return otsu(above(voxels, background, slope), counts)
    if method == "none":
        return EVERYTHING
    if method == "otsu":
        return otsu(coarse)
    return RIM_SHARE * float(np.median(coarse[coarse > 0])) if resampled and (coarse > 0).any() else 0.0


def is_compact(component: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the largest component of a coarse mask is nearly all of it and solid, as a skull-stripped brain is."""
    size = np.count_nonzero(component)
    if size == 0 or size < COMPONENT_SHARE * np.count_nonzero(mask):
        return False
    return bool(np.count_nonzero(ndimage.binary_erosion(component)) >= COMPACT_SHARE * size)


def label_like(voxels: np.ndarray) -> bool:
    """Whether (x,y,z) voxels, as stored, look like labels or a mask: whole numbers that form uniform patches.

    Per value other than the commonest, the share of voxels whose neighbour along x has the same value; the mean over
    values is high for labels, and low for intensities however smooth or dark much of the head is. On 430 real files: at
    most 0.12 for images of whole numbers (8-bit templates included), at least 0.81 for label maps of more than two
    values, 0.42 for one thinned to every fourth voxel. Fewer than 8 values are labels too (masks, small lesions). About
    100,000 voxels are looked at, all of them where hardly any of those is foreground. Not seen: probability maps; an
    8-bit image enlarged along x by repeating voxels is taken for labels.
    """
    volume = voxels.T
    lines = max(1, SAMPLE_VOXELS // volume.shape[2])
    step = max(1, round(np.sqrt(volume.shape[0] * volume.shape[1] / lines)))
    sample = volume[::step, ::step]
    sample = sample.astype(sample.dtype.newbyteorder("="))
    seen, counts = np.unique(sample, return_counts=True)
    value, equal = _beside(sample, seen[counts.argmax()])
    if value.size < FEWEST_VOXELS:
        value, equal = _beside(volume, seen[counts.argmax()])
    if value.dtype.kind == "f" and (value != np.rint(value)).any():
        return False
    kinds, counts = np.unique(value, return_counts=True)
    if len(kinds) < FEW_VALUES:
        return len(kinds) > 0
    repeated, times = np.unique(value[equal], return_counts=True)
    return bool((times / counts[np.searchsorted(kinds, repeated)]).sum() >= REPEATED_SHARE * len(kinds))


def _beside(volume: np.ndarray, background: Any) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of a (z,y,x) volume that are not background, and whether the next one along x has the same value."""
    value, following = volume[..., :-1], volume[..., 1:]
    inside = (value != background) & np.isfinite(value)
    return value[inside], (value == following)[inside]


def otsu(values: np.ndarray, counts: np.ndarray | None = None) -> float:
    """Threshold of the largest variance between two classes (Otsu 1979), over 256 bins of the 0.1-99.9 percentiles.

    `counts`: how often each value occurs, where they are rising levels.
    """
    if counts is None:
        low, high = percentiles(values.flatten(), 0.1, 99.9)
    else:
        low, high = level_percentiles(values, counts, 0.1, 99.9)
    if low == high:
        low, high = float(values.min()), float(values.max())
    counts, edges = np.histogram(values, bins=256, range=(low, high), weights=counts)
    share = counts / max(counts.sum(), 1)
    centres = (edges[:-1] + edges[1:]) / 2
    below, moment = np.cumsum(share), np.cumsum(share * centres)
    product = below * (1 - below)
    between = np.divide((moment[-1] * below - moment) ** 2, product, out=np.zeros(256), where=product > 1e-12)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(edges[(best[0] + best[-1]) // 2 + 1])


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest face-connected part of a mask."""
    labels, num_labels = ndimage.label(mask)
    if num_labels < 2:
        return mask
    return labels == np.bincount(labels[mask]).argmax()


def cell_shares(inside: np.ndarray, cell: int) -> np.ndarray:
    """Share of foreground per cell³ of a (Z,Y,X) mask, as uint8 0..255."""
    gz, gy, gx = (n // cell for n in inside.shape)
    small = np.uint8 if cell**3 <= 255 else np.uint32
    total = inside.view(np.uint8).reshape(gz, cell, gy * cell * gx * cell).sum(axis=1, dtype=small)
    total = total.reshape(gz, gy, cell, gx * cell).sum(axis=2, dtype=small).reshape(gz, gy, gx, cell)
    shares = sum((total[..., i] for i in range(1, cell)), start=total[..., 0])  # quicker than sum along the last axis
    return np.rint(shares * (255 / cell**3)).astype(np.uint8)
