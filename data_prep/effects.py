"""What each synthetic disease does to the anatomy: where it lies, how severity becomes size, how it is painted.

Places are template millimetres (MNI, RAS), before the subject's own warp; +x and -x where both sides are meant. Tissue
is painted as lists over the template's n brain voxels; a mass and the ventricles also push what lies around them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from brainscale_data_prep.severity import NUM_REGIONS, rising

Mm = tuple[float, float, float]

VENTRICLES_MM: tuple[Mm, Mm] = ((0.0, -8.0, 16.0), (16.0, 30.0, 14.0))
"""Centre and standard deviations of the region that grows with age, and whose ventricles widen with atrophy."""
WIDENING_MM = 5.0
"""Tissue gives way to CSF by the share of CSF around it, blurred by this standard deviation."""
HIPPOCAMPUS_MM: tuple[Mm, Mm] = ((28.0, -20.0, -16.0), (9.0, 14.0, 9.0))
"""The same of the region (both sides) whose grey matter gives way to CSF."""
LESIONS_MM: tuple[Mm, Mm] = ((25.0, -18.0, 24.0), (6.0, 24.0, 8.0))
"""The same of the places (both sides) among which lesions lie, where the template is white matter."""
LESION_RADIUS_MM, LEAST_WHITE, MOST_LESIONS, LESION_DRAWS = (1.4, 2.6), 0.85, 24, 160
MASS_MM: tuple[Mm, Mm] = ((32.0, -12.0, 24.0), (4.0, 20.0, 8.0))
"""Centre and spread of the place (one side) of the mass."""
MASS_RADIUS_MM, OEDEMA_RADII, MASS_PUSH, PUSH_RADII = 16.0, 1.8, 0.35, 1.5
"""Largest radius; reach of the oedema and standard deviation of the push in radii of the mass; share pushed."""
DEEP_MM: tuple[Mm, Mm] = ((0.0, -14.0, 8.0), (36.0, 44.0, 27.0))
"""Centre and half axes of the ellipsoid of deep grey matter, where the grey/white boundary is left alone."""
BELOW_MM = (-36.0, -14.0)
"""Cerebellum: behind this y and below this z the boundary is left alone too."""
BLUR_MM, MOST_DETAIL = 1.3, 4.0
"""Standard deviation of what is taken for the blurred boundary; detail around it is kept up to fourfold."""
REGIONS_MM: tuple[Mm, ...] = tuple(
    (side * x, y, z)
    for x, y, z in (
        (30.0, 52.0, 2.0), (44.0, 24.0, 16.0), (40.0, -10.0, 46.0),
        (46.0, -50.0, 38.0), (56.0, -26.0, 0.0), (22.0, -88.0, 8.0),
    )
    for side in (-1.0, 1.0)
)  # fmt: skip
REGION_STD_MM: Mm = (10.0, 10.0, 10.0)
"""Centres and standard deviation of the regions of the distributed pattern: their tissue gives way to CSF."""
assert len(REGIONS_MM) == NUM_REGIONS


# ------------------------------------------------------------------------------------------------- sizes


def ventricle_growth(ageing: float, individual: float) -> float:
    """g of `push`; ageing runs from 0 to 1, `individual` is a standard normal draw that no column tells of."""
    return 0.08 + 0.3 * ageing + 0.03 * individual


def ventricle_widening(severity: float) -> float:
    """Share of the tissue beside the ventricles that CSF replaces, where there is as much CSF as tissue around."""
    return float(rising(severity, 0.0, 1.2))


def hippocampus_loss(ageing: float, severity: float, individual: float) -> float:
    """Share of grey matter replaced by CSF at the centres of HIPPOCAMPUS_MM."""
    return float(rising(severity + individual / 3, -1.3 + 0.8 * ageing, 0.9))


def lesion_load(severity: float) -> float:
    """Number of lesions; the last one has its fraction of the radius."""
    return MOST_LESIONS * float(rising(severity, -1.6, 0.8))


def mass_radius_mm(severity: float) -> float:
    """Radius of the mass: a millimetre or two in most healthy subjects."""
    return MASS_RADIUS_MM * float(rising(severity, -1.4, 1.2))


def boundary_detail(severity: float) -> float:
    """What the detail of the grey/white boundary is multiplied by: above 1 is sharper, below 1 blurred."""
    return MOST_DETAIL * float(rising(severity, -0.8, -0.8))


def region_losses(parts: np.ndarray) -> np.ndarray:
    """(12,) shares of grey and white matter replaced by CSF at the centres of REGIONS_MM."""
    return np.asarray(rising(parts, -1.0, 1.0))


# ------------------------------------------------------------------------------------------------- displacement


def push(points: np.ndarray, centre_mm: np.ndarray, std_mm: np.ndarray | float, growth: float) -> np.ndarray:
    """Where tissue at points (…,3) comes from when a region grows: at distance r from its centre lies what was at
    (1 - growth)·r, for small r. One-to-one for growth from 0 to below 1."""
    offset = points - centre_mm
    near = np.exp(-((offset / std_mm) ** 2).sum(axis=-1, keepdims=True) / 2)
    return points - growth * near * offset


# ------------------------------------------------------------------------------------------------- tissue


class Brain(NamedTuple):
    """Where the n brain voxels of a template lie: (3,n) indices into axes of template mm."""

    xyz: np.ndarray
    axes_mm: Sequence[np.ndarray]

    def near(self, centre_mm: Sequence[float], std_mm: Sequence[float], both_sides: bool = False) -> np.ndarray:
        """(n,) Gaussian weight of a region; `both_sides`: around x and -x."""
        mm = (np.abs(self.axes_mm[0]) if both_sides else self.axes_mm[0], *self.axes_mm[1:])
        x, y, z = (
            np.exp(-(((along - centre) / std) ** 2) / 2).astype(np.float32)
            for along, centre, std in zip(mm, centre_mm, std_mm)
        )
        return x[self.xyz[0]] * y[self.xyz[1]] * z[self.xyz[2]]

    def distance_mm(self, centre_mm: np.ndarray | Sequence[float], scale: Sequence[float] = (1, 1, 1)) -> np.ndarray:
        """(n,) distance from a place, or in half axes `scale`."""
        x, y, z = (
            (((along - centre) / length) ** 2).astype(np.float32)
            for along, centre, length in zip(self.axes_mm, centre_mm, scale)
        )
        return np.sqrt(x[self.xyz[0]] + y[self.xyz[1]] + z[self.xyz[2]])

    @property
    def step_mm(self) -> float:
        return float(self.axes_mm[0][1] - self.axes_mm[0][0])


def cortical(brain: Brain) -> np.ndarray:
    """(n,) whether a voxel's grey/white boundary belongs to the cerebral cortex."""
    behind, below = BELOW_MM
    cerebellum = (brain.axes_mm[1][brain.xyz[1]] < behind) & (brain.axes_mm[2][brain.xyz[2]] < below)
    return (brain.distance_mm(*DEEP_MM) > 1) & ~cerebellum


def change_boundary(brain: Brain, white: np.ndarray, grey: np.ndarray, detail: float) -> tuple[np.ndarray, np.ndarray]:
    """White and grey matter (n,) once the detail of their boundary in the cortex is multiplied by `detail`.

    Detail is what the blur takes away, taken twice, so that none of it is a change of brightness around; the blur is of
    both tissues alone, so that no CSF enters.
    """
    x, y, z = brain.xyz
    both = white + grey
    volume = np.zeros([len(mm) for mm in brain.axes_mm], np.float32)

    def blur(values: np.ndarray) -> np.ndarray:
        volume[x, y, z] = values
        return gaussian_filter(volume, BLUR_MM / brain.step_mm, truncate=2.5)[x, y, z]

    share = both / np.maximum(blur(both), 1e-6)
    fine = white - share * blur(white)
    fine -= share * blur(fine)
    changed = np.clip(white + np.where(cortical(brain), np.float32(detail - 1), np.float32(0)) * fine, 0, both)
    return changed, both - changed


def lesion_places(
    white: np.ndarray, affine: np.ndarray, draws_mm: np.ndarray, load: float
) -> list[tuple[np.ndarray, float]]:
    """(centre in mm, radius in mm) of the lesions that `load` has, from draws (m,4) of centre and radius: the first
    ones whose centre is white matter by the template's probability (x,y,z)."""
    voxels = np.rint((draws_mm[:, :3] - affine[:3, 3]) / affine[0, 0]).astype(int)
    inside = white[tuple(voxels.T)] >= LEAST_WHITE
    kept = draws_mm[inside][: int(np.ceil(load))]
    fractions = np.minimum(load - np.arange(len(kept)), 1)
    return [(draw[:3], float(draw[3] * np.cbrt(fraction))) for draw, fraction in zip(kept, fractions)]


def blend(
    values: np.ndarray,
    brain: Brain,
    centre_mm: np.ndarray,
    radius_mm: float,
    brightness: float,
    share: np.ndarray | None = None,
) -> None:
    """Paint a ball into values (n,), in place; `share` (n,) says how much of a voxel can take it.

    Its edge is one voxel wide; a ball smaller than that fades.
    """
    edge_mm = brain.step_mm
    reach_mm = radius_mm + edge_mm / 2
    first, last = np.searchsorted(brain.axes_mm[0], (centre_mm[0] - reach_mm, centre_mm[0] + reach_mm))
    slab = slice(*np.searchsorted(brain.xyz[0], (first, last)))  # voxels are listed in the order of x
    distance_mm = Brain(brain.xyz[:, slab], brain.axes_mm).distance_mm(centre_mm)
    near = np.flatnonzero(distance_mm < reach_mm)
    weight = np.minimum((radius_mm - distance_mm[near]) / edge_mm + 0.5, 1)
    weight *= np.float32(min(1.0, (2 * radius_mm / edge_mm) ** 3))
    if share is not None:
        weight *= share[slab][near]
    part = values[slab]
    part[near] += weight * (np.float32(brightness) - part[near])
