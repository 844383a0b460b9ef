"""From one scan to one row of the store: canonical axes, placement, resampling, quantisation. No files here.

Everything that happens to a voxel is one of: moved by a permutation of axes (exact), cut or padded (counted as
`cropped_fraction`), resampled by a separable kernel (no rotation; the affine follows), rounded to a stated quantum.
Arrays are z,y,x in C order, the bytes of NIfTI's x-fastest order; vectors are x,y,z where the name says so.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from scipy import ndimage

from brainscale.geometry import spacing_mm
from brainscale.prep_plan import Plan
from brainscale_data_prep.foreground import (
    EVERYTHING,
    cell_shares,
    clean,
    foreground_threshold,
    is_compact,
    label_like,
    largest_component,
)
from brainscale_data_prep.intensity import above, count_levels, keep_integers, quantise, statistics, stays_integer
from brainscale_data_prep.nifti import Refused, Scan, axes_to_ras
from brainscale_data_prep.resampling import Box, extent, resample, window

COARSE_MM = 2.0
"""The foreground's bounding box is found on every n-th voxel, about this far apart."""
BRIGHT_FACES = 0.75
"""Share of the faces above which foreground is hardly a head: of 100 real volumes heads and slabs of them have up to
0.30 and cut-outs from inside a head up to 0.59; inverted heads have 1.0."""
SAME_SPACING = 1e-3
"""Spacings that agree to this share are the same: along such an axis voxels are taken as they are."""


@dataclass
class Prepared:
    volume_zyx: np.ndarray
    """(Z,Y,X), storage type."""
    foreground_cells_zyx: np.ndarray
    """uint8, share of foreground per cell, 0..255."""
    record: dict[str, Any]
    """The columns of scans.parquet that follow from voxels and header."""


@dataclass
class Located:
    """Where the grid lies in a scan, and what of the scan is foreground."""

    first: np.ndarray
    """Its first voxel and the distance of its voxels (x,y,z), in canonical source voxels."""
    step: np.ndarray
    resampled: bool
    method: str
    threshold: float
    """Value above background over which a voxel is foreground, in original units."""
    stripped: bool
    cropped: float
    bright_faces: bool
    """Whether most of the volume's faces is foreground, as where the air is brighter than the head."""


def prepare(scan: Scan, plan: Plan, grid_xyz: tuple[int, int, int], mask: Scan | None = None) -> Prepared:
    """Bring a scan onto the plan's grid; `mask` is its brain mask, on any grid of the same world.

    Raises Refused (`not_a_brain_scan`, `constant`, `does_not_fit`, `no_mask`, `bad_mask`).
    """
    warnings = list(scan.warnings)
    if label_like(scan.voxels):
        raise Refused("not_a_brain_scan", "its voxels are labels or a mask, not intensities; leave it out")
    voxels, background, differs = clean(scan, warnings)
    base = float(background) * scan.slope + scan.inter
    voxels_xyz, affine = canonical(voxels, scan.affine, plan.orientation)
    raw = voxels_xyz.T
    at = _locate(scan, raw, affine, background, differs is not None, plan, grid_xyz, mask)
    if at.cropped > plan.warn_cropped_fraction:
        warnings.append("cropped")
    if at.bright_faces:
        warnings.append("bright_background")

    # Outside `box` every voxel is background, whose value above itself is 0: nothing needs to be computed there, unless
    # all of the scan counts as foreground.
    box = tuple(slice(0, size) for size in raw.shape)
    if differs is not None and at.threshold >= 0:
        box = extent(canonical(differs, scan.affine, plan.orientation)[0].T)
    inside = np.zeros(grid_xyz[::-1], bool)
    if at.resampled:
        grid = resample(raw, box, background, scan.slope, at.first, at.step, grid_xyz)
        part = _covered(voxels_xyz.shape, at, grid_xyz)
        values = grid[part]
    else:
        source, part = window(box, at.first, grid_xyz)
        raw = np.ascontiguousarray(raw[source])
    within = None
    if mask is not None and at.method == "mask":
        within = sample_mask(mask, plan, affine, at.first, at.step, grid_xyz)[part]
    if not at.resampled and stays_integer(raw, background, plan):
        numbers, inside[part] = count_levels(raw, within, background, scan.slope, at.threshold, plan)
        stored, scale, offset, background_code = keep_integers(raw, background, scan, plan)
    else:
        if not at.resampled:
            grid = values = above(raw, background, scan.slope)
            if raw.dtype.kind in "iu" and plan.dtype != "float32":
                warnings.append("rounded_integers")
        inside[part] = values > at.threshold if within is None else (values > at.threshold) & within
        numbers = statistics(values[inside[part]], plan)
        if plan.dtype == "float32":
            exact = grid + np.float32(base) if at.resampled else raw * np.float64(scan.slope) + scan.inter
            stored, scale, offset, background_code = exact.astype(np.float32), 1.0, 0.0, float(np.float32(base))
        else:
            stored, scale, offset, background_code = quantise(grid, base, numbers["std"], plan, warnings)
    if not at.resampled:
        stored, kept = np.zeros(grid_xyz[::-1], stored.dtype), stored
        if background_code:
            stored.fill(background_code)
        stored[part] = kept

    to_grid = np.eye(4)
    to_grid[[0, 1, 2], [0, 1, 2]], to_grid[:3, 3] = at.step, at.first
    record = {
        "warnings": sorted(warnings),
        "source_xxh3_128": scan.source_xxh3_128,
        "voxels_xxh3_128": xxhash.xxh3_128(stored.data).hexdigest(),
        "header_base64": base64.b64encode(scan.header).decode(),
        "affine_source": scan.affine.ravel().tolist(),
        "affine_stored": (affine @ to_grid).ravel().tolist(),
        "spacing_source_mm_xyz": spacing_mm(scan.affine).tolist(),
        "shape_source_xyz": list(scan.voxels.shape),
        "crop_voxels_xyz": at.first.tolist(),
        "cropped_fraction": at.cropped,
        "scale": scale,
        "offset": offset,
        "background_code": background_code,
        "mean": numbers["mean"] + base,
        "std": numbers["std"],
        "clip_low": numbers["clip_low"] + base,
        "clip_high": numbers["clip_high"] + base,
        "foreground_threshold": at.threshold + base if at.threshold > EVERYTHING else EVERYTHING,
        "foreground_fraction": np.count_nonzero(inside) / inside.size,
        "skull_stripped": at.stripped,
        "foreground_method": at.method,
    }
    return Prepared(stored, cell_shares(inside, plan.foreground_cell_voxels), record)


def _locate(
    scan: Scan,
    raw: np.ndarray,
    affine: np.ndarray,
    background: Any,
    constant_background: bool,
    plan: Plan,
    grid_xyz: tuple[int, int, int],
    mask: Scan | None,
) -> Located:
    shape_xyz, spacing = np.array(raw.shape[::-1]), spacing_mm(affine)
    target = spacing if plan.spacing_mm_xyz == "native" else np.array(plan.spacing_mm_xyz)
    kept = np.abs(spacing / target - 1) <= SAME_SPACING
    resampled, step = not kept.all(), np.where(kept, 1.0, target / spacing)

    stride = np.maximum(1, np.round(COARSE_MM / spacing)).astype(int)
    sparse = raw[:: stride[2], :: stride[1], :: stride[0]]
    coarse = above(sparse, background, scan.slope)
    component = largest_component(coarse > 0) if constant_background else None
    stripped = component is not None and is_compact(component, coarse > 0)
    method = _method(plan, mask is not None, stripped)
    if mask is not None and method == "mask":
        threshold = EVERYTHING
        component = sample_mask(mask, plan, affine, np.zeros(3), stride, coarse.shape[::-1])
        if not component.any():
            raise Refused("bad_mask", "its mask covers nothing of it; mend the mask or leave it out (--masks none)")
    else:
        threshold = foreground_threshold(sparse, background, scan.slope, coarse, method, resampled)
        dark = component is not None and not component.any()
        if component is None or threshold != 0:
            component = largest_component(coarse > threshold)
        if not component.any() or (dark and method != "none"):
            raise Refused("constant", "nothing in it is brighter than its background; leave it out")
    first = place(component, stride, shape_xyz, spacing, step, grid_xyz, plan)
    first = np.where(kept, np.floor(first + 0.5), first)  # voxels are copied along an axis that keeps its spacing
    cropped = 1 - _inside(component, stride, first, step, grid_xyz) / np.count_nonzero(component)
    if cropped > plan.max_cropped_fraction:
        raise Refused(
            "does_not_fit",
            f"the grid {grid_xyz} would cut off {cropped:.0%} of its foreground "
            f"(at most {plan.max_cropped_fraction:.0%}); choose a larger grid",
        )
    bright = method == "otsu" and _face_share(coarse > threshold) > BRIGHT_FACES
    return Located(first, step, bool(resampled), method, threshold, stripped, float(cropped), bright)


def _face_share(mask: np.ndarray) -> float:
    """Share of a volume's six faces that a mask covers."""
    faces = [np.moveaxis(mask, axis, 0)[side] for axis in range(3) for side in (0, -1)]
    return sum(int(np.count_nonzero(face)) for face in faces) / sum(face.size for face in faces)


def _method(plan: Plan, has_mask: bool, stripped: bool) -> str:
    if plan.foreground == "mask" and not has_mask:
        raise Refused("no_mask", 'the plan says foreground = "mask" and it comes with none; give one, or use "auto"')
    if plan.foreground != "auto":
        return plan.foreground
    return "mask" if has_mask else "nonzero" if stripped else "otsu"


# --------------------------------------------------------------------------------------------- axes and values


def canonical(voxels: np.ndarray, affine: np.ndarray, orientation: str = "RAS") -> tuple[np.ndarray, np.ndarray]:
    """A view (x,y,z) of the voxels whose axes run as `orientation` says, as nearly as they can, and its affine."""
    axes = axes_to_ras(affine)
    axes[:, 1] *= [1 if orientation[axis] in "RAS" else -1 for axis in axes[:, 0]]
    order = np.argsort(axes[:, 0])
    to_source = np.zeros((4, 4))
    to_source[3, 3] = 1
    for axis, source_axis in enumerate(order):
        sign = axes[source_axis, 1]
        to_source[source_axis, axis] = sign
        to_source[source_axis, 3] = 0 if sign > 0 else voxels.shape[source_axis] - 1
    flipped = voxels[tuple(slice(None, None, int(sign)) for sign in axes[:, 1])]
    return flipped.transpose(order), affine @ to_source


# --------------------------------------------------------------------------------------------- placing the grid


def place(
    component: np.ndarray,
    stride: np.ndarray,
    shape_xyz: np.ndarray,
    spacing: np.ndarray,
    step: np.ndarray,
    grid_xyz: tuple[int, int, int],
    plan: Plan,
) -> np.ndarray:
    """Where the grid's first voxel lies, in canonical source voxels (x,y,z); its voxels are `step` of those apart."""
    grid = np.array(grid_xyz)
    if plan.crop == "centre":
        return (shape_xyz - 1) / 2 - (grid - 1) / 2 * step
    z, y, x = extent(component)
    low = np.array([s.start for s in (x, y, z)]) * stride - 0.5
    high = np.minimum(np.array([s.stop for s in (x, y, z)]) * stride, shape_xyz) - 0.5
    first = (low + high) / 2 - (grid - 1) / 2 * step
    if high[2] - low[2] > grid[2] * step[2]:
        margin = plan.top_margin_mm / spacing[2]
        up = plan.orientation[2] == "S"
        first[2] = high[2] + margin - (grid[2] - 0.5) * step[2] if up else low[2] - margin + 0.5 * step[2]
    return first


def sample_mask(
    mask: Scan, plan: Plan, affine: np.ndarray, first: np.ndarray, step: np.ndarray, shape_xyz: Sequence[int]
) -> np.ndarray:
    """(z,y,x) bool: whether the nearest voxel of a mask is not 0, at the points `first` + `step` × (i,j,k) of a scan
    whose canonical voxels (x,y,z) `affine` maps to mm; False outside the mask's volume."""
    voxels, mask_affine = canonical(mask.voxels, mask.affine, plan.orientation)
    values = voxels.T * np.float32(mask.slope) + np.float32(mask.inter)
    inside = ((values != 0) & np.isfinite(values)).view(np.uint8)
    to_mask = np.linalg.inv(mask_affine) @ affine
    start, matrix = to_mask[:3, :3] @ first + to_mask[:3, 3], to_mask[:3, :3] * step
    shape_zyx = tuple(shape_xyz)[::-1]
    if np.abs(matrix - np.diag(np.diag(matrix))).max() * max(shape_xyz) >= 0.01:
        turned = matrix[::-1, ::-1]
        return ndimage.affine_transform(inside, turned, start[::-1], shape_zyx, order=0).view(bool)
    at = [np.rint(start[a] + matrix[a, a] * np.arange(shape_xyz[a])).astype(int) for a in (2, 1, 0)]
    valid = [np.flatnonzero((i >= 0) & (i < size)) for i, size in zip(at, inside.shape)]
    sampled = np.zeros(shape_zyx, bool)
    sampled[np.ix_(*valid)] = inside[np.ix_(*(i[v] for i, v in zip(at, valid)))]
    return sampled


def _inside(
    component: np.ndarray, stride: np.ndarray, first: np.ndarray, step: np.ndarray, grid_xyz: tuple[int, int, int]
) -> int:
    """Voxels of a coarse (z,y,x) mask that the grid covers."""
    covered = []
    for axis in (2, 1, 0):
        at = np.arange(component.shape[2 - axis]) * stride[axis]
        low, high = first[axis] - step[axis] / 2, first[axis] + (grid_xyz[axis] - 0.5) * step[axis]
        covered.append(slice(np.searchsorted(at, low, side="left"), np.searchsorted(at, high, side="right")))
    return int(np.count_nonzero(component[tuple(covered)]))


def _covered(shape_xyz: Sequence[int], at: Located, grid_xyz: tuple[int, int, int]) -> Box:
    """The part of the grid whose voxels' centres lie within the scan; the others are padding, never foreground."""
    part = []
    for axis in (2, 1, 0):
        position = at.first[axis] + at.step[axis] * np.arange(grid_xyz[axis])
        within = np.flatnonzero((position >= -0.5) & (position < shape_xyz[axis] - 0.5))
        part.append(slice(within[0], within[-1] + 1) if within.size else slice(0, 0))
    return tuple(part)
