"""Lesions and a change of cortical sharpness planted into one real T1w scan, in its own space, without registration.

White matter is estimated from brightness: the brightest of three clusters of the brain's voxels. Lesions are small dark
balls deep in it; the sharpness is that of its edge within the cortex. Both leave every voxel outside their region as it
is, bit for bit. Voxels are (x,y,z) as the file stores them; lengths are mm.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans
from scipy.ndimage import affine_transform, distance_transform_edt, find_objects, gaussian_filter

from brainscale.geometry import spacing_mm
from brainscale_data_prep import effects
from brainscale_data_prep.foreground import clean, is_compact, label_like, largest_component
from brainscale_data_prep.nifti import Refused, Scan
from brainscale_data_prep.severity import rising

PLANTED = ("lesions", "sharpness")
RIM_MM, CORTEX_MM, LESIONS_FROM_MM = 4.0, 22.0, 15.0
"""Depths below the brain's surface: white matter begins, the cortex ends, lesions begin."""
EDGE_MM = 2.0
"""The band reaches this far to both sides of the white matter's edge, at least one voxel; lesions lie deeper."""
DARKENING = 0.45
"""Share of its brightness that white matter loses in a lesion."""
FEWEST_MM3 = 20_000.0
"""With less white matter than this a scan is left out: a brain has some 500,000 mm³."""
CLUSTER_VOXELS, COARSE_VOXELS = 20_000, 2


class NotPlanted(Refused):
    """A scan that conversion takes, and that no effect can be planted into (`no_white_matter`)."""


class Tissue(NamedTuple):
    """Where effects may lie in the box around a scan's brain, (x,y,z) bool."""

    box: tuple[slice, ...]
    brain: np.ndarray
    white: np.ndarray
    deep_white: np.ndarray
    """White matter that lesions may change; none of it is in the band."""
    band: np.ndarray
    """Both sides of the white matter's edge in the cortex."""


class Planted(NamedTuple):
    """A scan with effects in it."""

    voxels: np.ndarray
    """(x,y,z), type and byte order of the scan's."""
    lesion: np.ndarray
    """(x,y,z) bool: where a lesion lies in the brain's box."""
    num_lesions: int


def brain_of(scan: Scan, mask: Scan | None) -> tuple[np.ndarray, Any]:
    """(x,y,z) bool of brain, and the background's voxel value. Raises Refused (`no_mask`, `bad_mask`, …)."""
    if label_like(scan.voxels):
        raise Refused("not_a_brain_scan", "its voxels are labels or a mask, not intensities; leave it out")
    _, background, differs = clean(scan, [])
    if mask is None:
        coarse = differs[(slice(None, None, COARSE_VOXELS),) * 3] if differs is not None else np.zeros((1, 1, 1), bool)
        if differs is None or not is_compact(largest_component(coarse), coarse):
            raise Refused("no_mask", "it is not skull-stripped and has no brain mask; give one in derivatives/")
        return differs & np.isfinite(scan.voxels), background
    inside = (mask.voxels * np.float32(mask.slope) + np.float32(mask.inter) != 0).astype(np.uint8)
    to_mask = np.linalg.inv(mask.affine) @ scan.affine
    brain = affine_transform(inside, to_mask[:3, :3], to_mask[:3, 3], scan.voxels.shape, order=0).view(bool)
    if not brain.any():
        raise Refused("bad_mask", "its mask covers nothing of it; mend the mask")
    return brain & np.isfinite(scan.voxels), background


def estimate_tissue(scan: Scan, brain: np.ndarray, background: Any) -> Tissue:
    """White matter and its edge, from brightness. Raises NotPlanted."""
    spacing = spacing_mm(scan.affine)
    box = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in find_objects(brain.view(np.uint8))[0])
    brain = brain[box]
    depth = distance_transform_edt(brain, spacing)
    brightness = np.where(brain, _above(scan, box, background), 0) * np.sign(scan.slope)
    inner = brightness[depth > RIM_MM]
    white = np.zeros(brain.shape, bool)
    if inner.size and inner.min() < inner.max():
        sample = inner[:: max(1, inner.size // CLUSTER_VOXELS)]
        centres = np.sort(kmeans(sample, np.percentile(sample, (5, 40, 85)))[0])
        white = largest_component((brightness > centres[-2:].mean()) & (depth > RIM_MM))
    volume_mm3 = float(np.count_nonzero(white) * np.prod(spacing))
    if volume_mm3 < FEWEST_MM3:
        raise NotPlanted("no_white_matter", f"only {volume_mm3:.0f} mm³ look like white matter of T1w; leave it out")
    reach = max(EDGE_MM, float(spacing.max()))
    to_edge = np.where(white, distance_transform_edt(white, spacing), distance_transform_edt(~white, spacing))
    band = brain & (to_edge <= reach) & (depth > RIM_MM / 2) & (depth <= CORTEX_MM)
    return Tissue(box, brain, white, white & (to_edge > reach) & (depth > LESIONS_FROM_MM), band)


def _above(scan: Scan, box: tuple[slice, ...], background: Any) -> np.ndarray:
    """Voxels of a box less the background, float64."""
    return scan.voxels[box].astype(np.float64) - float(background)


def plant(
    scan: Scan, tissue: Tissue, background: Any, severities: Mapping[str, float], rng: np.random.Generator
) -> Planted:
    """The scan with lesions and boundary of the given severities; `rng` draws places and radii of lesions, one after
    another, so that a higher severity adds to the lesions of a lower one. Raises NotPlanted."""
    spacing = spacing_mm(scan.affine)
    before = np.where(tissue.brain, _above(scan, tissue.box, background), 0)
    weight, num_lesions = _lesions(tissue, spacing, effects.lesion_load(severities["lesions"]), rng)
    values = before * (1 - DARKENING * weight)

    std = effects.BLUR_MM / spacing
    share = gaussian_filter(tissue.brain.astype(np.float64), std)[tissue.band]
    smooth = gaussian_filter(before, std)[tissue.band] / share
    sharpened = smooth + boundary_detail(severities["sharpness"]) * (before[tissue.band] - smooth)
    inside = before[tissue.brain]
    values[tissue.band] = np.clip(sharpened, inside.min(), inside.max())  # no value that the scan does not have

    changed = tissue.band | (weight > 0)
    voxels = scan.voxels.copy(order="F")
    new = values[changed] + float(background)
    voxels[tissue.box][changed] = np.rint(new) if voxels.dtype.kind in "iu" else new
    return Planted(voxels, weight > 0, num_lesions)


def boundary_detail(severity: float) -> float:
    """What the boundary's detail is multiplied by: 1 at severity 0, towards 0 above, towards 2 below."""
    return 2 * float(rising(severity, 0.0, -0.8))


def _lesions(tissue: Tissue, spacing: np.ndarray, load: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(x,y,z) weight from 0 to 1, and the number of lesions."""
    places = np.argwhere(tissue.deep_white)
    if not len(places):
        raise NotPlanted("no_white_matter", "no white matter of it lies deep enough for a lesion; leave it out")
    draws = rng.integers(len(places), size=effects.MOST_LESIONS)
    radii_mm = rng.uniform(*effects.LESION_RADIUS_MM, size=effects.MOST_LESIONS)
    weight, edge_mm, shown = np.zeros(tissue.white.shape, np.float32), float(spacing.max()), int(np.ceil(load))
    for number, (centre, radius_mm) in enumerate(zip(places[draws[:shown]], radii_mm)):
        radius_mm *= np.cbrt(min(1.0, load - number))
        reach = np.ceil((radius_mm + edge_mm) / spacing).astype(int)
        box = tuple(slice(max(0, c - r), c + r + 1) for c, r in zip(centre, reach))
        offsets_mm = [(np.arange(weight.shape[a])[box[a]] - centre[a]) * spacing[a] for a in range(3)]
        distance_mm = np.linalg.norm(np.stack(np.meshgrid(*offsets_mm, indexing="ij")), axis=0)
        ball = np.clip((radius_mm - distance_mm) / edge_mm + 0.5, 0, 1) * min(1.0, (2 * radius_mm / edge_mm) ** 3)
        weight[box] = np.maximum(weight[box], np.where(tissue.deep_white[box], ball, 0))
    return weight, shown
