"""What is background and what is head or brain. Arrays are z,y,x; no files here."""

from typing import Any

import numpy as np
from scipy import ndimage

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


def clean(scan: Scan, warnings: list[str]) -> tuple[np.ndarray, Any, bool]:
    """Voxels in native byte order without NaN or infinity, the background as a voxel value, and whether it is constant.

    The background is the commonest value on the volume's faces where that fills ≥ 40 % of the volume, else the faces'
    10th percentile (air). Voxels that are not finite take its value, and the lowest one where they are the faces.
    """
    voxels = scan.voxels
    if not voxels.dtype.isnative:
        voxels = voxels.astype(voxels.dtype.newbyteorder("="), order="K")
    finite = np.isfinite(voxels) if voxels.dtype.kind == "f" else np.True_
    num_bad = 0 if finite is np.True_ else voxels.size - int(np.count_nonzero(finite))
    if num_bad == voxels.size:
        raise Refused("constant", "none of its voxels is a finite number")
    faces = np.concatenate([np.moveaxis(voxels, axis, 0)[side].ravel() for axis in range(3) for side in (0, -1)])
    faces = faces[np.isfinite(faces)]
    known = voxels[finite] if num_bad else voxels
    low, high = known.min(), known.max()
    if low == high:
        raise Refused("constant", f"all its voxels have the value {float(low) * scan.slope + scan.inter:g}")
    values, counts = np.unique(faces, return_counts=True)
    if values.size and 2 * faces.size >= _face_voxels(voxels.shape):
        background = values[counts.argmax()]
        if np.count_nonzero(voxels == background) < CONSTANT_BACKGROUND_SHARE * voxels.size:
            background = np.quantile(faces, 0.1 if scan.slope > 0 else 0.9, method="lower")
    else:
        background = low if scan.slope > 0 else high
    if num_bad:
        warnings.append(f"non_finite:{num_bad}")
        voxels = np.where(finite, voxels, background)
    constant = np.count_nonzero(voxels == background) >= CONSTANT_BACKGROUND_SHARE * voxels.size
    return voxels, background, bool(constant)


def _face_voxels(shape: tuple[int, ...]) -> int:
    x, y, z = shape
    return 2 * (x * y + y * z + x * z)


def is_stripped(coarse: np.ndarray, constant_background: bool) -> bool:
    """Whether a volume (`coarse`: value − background) is skull-stripped: one compact object on constant background."""
    return constant_background and _is_compact(coarse > 0)


def foreground_threshold(coarse: np.ndarray, method: str, resampled: bool) -> float:
    """Level above background (original units) over which a voxel is foreground, by "otsu", "nonzero" or "none"."""
    if method == "none":
        return EVERYTHING
    if method == "otsu":
        return otsu(coarse)
    return RIM_SHARE * float(np.median(coarse[coarse > 0])) if resampled and (coarse > 0).any() else 0.0


def _is_compact(mask: np.ndarray) -> bool:
    component = largest_component(mask)
    size = np.count_nonzero(component)
    if size == 0 or size < COMPONENT_SHARE * np.count_nonzero(mask):
        return False
    return bool(np.count_nonzero(ndimage.binary_erosion(component)) >= COMPACT_SHARE * size)


def otsu(values: np.ndarray) -> float:
    """Threshold of the largest variance between two classes (Otsu 1979), over 256 bins of the 0.1-99.9 percentiles."""
    low, high = np.percentile(values, (0.1, 99.9))
    if low == high:
        low, high = values.min(), values.max()
    counts, edges = np.histogram(values, bins=256, range=(float(low), float(high)))
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
    return labels == np.bincount(labels.ravel())[1:].argmax() + 1


def cell_shares(inside: np.ndarray, cell: int) -> np.ndarray:
    """Share of foreground per cell³ of a (Z,Y,X) mask, as uint8 0..255."""
    gz, gy, gx = (n // cell for n in inside.shape)
    total = inside.reshape(gz, cell, gy * cell * gx * cell).sum(axis=1, dtype=np.uint32)
    total = total.reshape(gz, gy, cell, gx * cell).sum(axis=2).reshape(gz, gy, gx, cell).sum(axis=3)
    return np.rint(total * (255 / cell**3)).astype(np.uint8)
