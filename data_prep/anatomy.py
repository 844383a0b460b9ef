"""The synthetic subjects of `phantom`: who they are, how their anatomy differs from the template, what it looks like.

A subject is painted in template space (tissue contrast, individual folding, what `effects` lists); one smooth,
invertible warp says which template point lies at each point of its world. Millimetres are RAS; a place in the brain is
named in template millimetres (MNI), before the subject's own warp.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from brainscale.geometry import voxel_to_mm
from brainscale_data_prep import effects
from brainscale_data_prep.severity import TASKS, confounded_site, draw_labels, draw_severities, moved, stream

PETALIA_MM = (((30.0, 60.0, 0.0), 5.0), ((-25.0, -95.0, 0.0), -5.0))
"""Centres and shifts along y of the asymmetry every subject has: right frontal pole forwards, left occipital back."""
PETALIA_STD_MM = 26.0
RIGHT_GAIN_FRACTION, MIDLINE_MM = 0.03, 20.0
"""The right side is brighter and the left darker by this share: 1 + share × tanh(x / MIDLINE_MM)."""
YOUNGEST, OLDEST = 20, 85

CONTRASTS = ("T1w", "T2w", "FLAIR", "PDw")


class Intensities(NamedTuple):
    """Brightness of one contrast by tissue, relative to T1w white matter; `texture` weighs the template's detail."""

    csf: float
    grey: float
    white: float
    bone: float
    marrow: float
    muscle: float
    fat: float
    lesion: float
    mass: float
    oedema: float
    texture: float


INTENSITIES = {
    "T1w": Intensities(0.22, 0.62, 1.0, 0.08, 0.75, 0.50, 1.25, lesion=0.50, mass=0.45, oedema=0.78, texture=1.6),
    "T2w": Intensities(1.10, 0.62, 0.42, 0.06, 0.45, 0.28, 0.70, lesion=1.00, mass=0.72, oedema=0.95, texture=-0.9),
    "FLAIR": Intensities(0.16, 0.70, 0.55, 0.06, 0.40, 0.35, 0.65, lesion=1.10, mass=0.82, oedema=1.05, texture=-0.6),
    "PDw": Intensities(0.90, 0.85, 0.68, 0.10, 0.55, 0.50, 0.80, lesion=0.95, mass=0.78, oedema=0.95, texture=-0.7),
}
TISSUES = {name: code for code, name in enumerate(Intensities._fields[:7])}
DARKEST_BRAIN = 0.1
"""Floor of painted brain: half of it separates brain from the zeros around it."""

LATTICE_LOW_MM = np.array([-112.0, -152.0, -168.0])
"""First point of the random fields' lattices, which cover brain, head and neck."""
WARP_STEP_MM, WARP_SHAPE, WARP_STD_MM = 8.0, (29, 35, 37), 22.0
FOLD_STEP_MM, FOLD_SHAPE, FOLD_STD_MM = 4.0, (57, 69, 73), 4.8


@dataclass(frozen=True)
class Template:
    """Tissue of the template on one grid, as lists over its n brain voxels and m voxels of the head around them."""

    step_mm: int
    affine: np.ndarray
    shape_xyz: tuple[int, int, int]
    brain_xyz: np.ndarray
    """(3,n) voxel indices; the next four are (n,) float32, tissue probabilities and what they leave of the T1."""
    csf: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    texture: np.ndarray
    near_csf: np.ndarray
    """(n,) CSF blurred by effects.WIDENING_MM."""
    head_xyz: np.ndarray
    """(3,m) voxel indices, m = 0 for a brain alone."""
    head_tissue: np.ndarray
    """(m,) values of TISSUES."""

    def white_xyz(self) -> np.ndarray:
        """(x,y,z) probability of white matter."""
        volume = np.zeros(self.shape_xyz, np.float32)
        volume[tuple(self.brain_xyz)] = self.white
        return volume

    def axes_mm(self) -> list[np.ndarray]:
        """Template millimetres of the voxels along x, y and z."""
        return [self.affine[k, 3] + self.step_mm * np.arange(n) for k, n in enumerate(self.shape_xyz)]


@dataclass(frozen=True)
class Subject:
    """One synthetic person: the columns of participants.tsv and the draws behind the anatomy."""

    number: int
    age: int
    sex: str
    site: str
    labels: Mapping[str, int]
    """Task → 0 or 1."""
    severities: Mapping[str, float]
    """Task → what decides the size of its effect."""
    region_severities: np.ndarray
    """(12,) parts of the distributed severity."""
    to_template: np.ndarray
    """(4,4) affine from the subject's world to template mm, the first part of the warp."""
    displacement_mm: np.ndarray
    """(3, *WARP_SHAPE) added next. Its gradient stays near or below 0.5, half of what keeps x + u(x) one-to-one."""
    folding: np.ndarray
    """(2, *FOLD_SHAPE) change of the log odds of white matter and of CSF against grey matter."""
    ventricle_individual: float
    hippocampus_individual: float
    lesion_draws_mm: np.ndarray
    """(LESION_DRAWS,4) candidates: centre and radius, in template mm."""
    mass_mm: np.ndarray
    """(3,) centre of the mass."""

    @property
    def ageing(self) -> float:
        """0 at the youngest age, 1 at the oldest."""
        return (self.age - YOUNGEST) / (OLDEST - YOUNGEST)

    def at(self, task: str, severity: float) -> "Subject":
        """The same person with another severity of one task; of the distributed one, all regions change alike."""
        parts = self.region_severities
        parts = moved(parts, severity) if task == "distributed" else parts
        return replace(self, severities={**self.severities, task: severity}, region_severities=parts)


def draw_subject(seed: int, number: int, sites: Sequence[str], confound: tuple[str, float] | None = None) -> Subject:
    """Subject `number` (from 1) of cohort `seed`; the size of the cohort does not enter.

    Labels are balanced and pairwise independent within every eight subjects; age and sex do not depend on them, nor
    does the site unless `confound` (see severity.confounded_site) says so.
    """
    labels = draw_labels(seed, number, TASKS)
    severities, parts = draw_severities(seed, number, labels)
    rng = stream(seed, 1, number, 0)
    age, sex, site = (
        int(rng.integers(YOUNGEST, OLDEST + 1)),
        "MF"[rng.integers(2)],
        sites[int(rng.integers(len(sites)))],
    )
    if confound:
        site = confounded_site(seed, number, labels, confound, site, sites)
    # the template is larger than the mean brain, see Lancaster et al. 2007, Hum. Brain Mapp. 28:1194
    size = (0.97 if sex == "M" else 0.92) * (1 + 0.03 * bounded_normal(rng, 1)) * (1 + 0.015 * bounded_normal(rng, 3))
    to_world = np.eye(4)
    to_world[:3, :3] = Rotation.from_rotvec(1.5 * bounded_normal(rng, 3), degrees=True).as_matrix() * size
    to_world[:3, 3] = 1.5 * bounded_normal(rng, 3)
    displacement = 2.5 * np.stack([_smooth_field(rng, WARP_SHAPE, WARP_STD_MM / WARP_STEP_MM) for _ in range(3)])
    gradient = np.array(np.gradient(displacement, WARP_STEP_MM, axis=(1, 2, 3)))
    steepest = np.sqrt((gradient**2).sum(axis=(0, 1))).max()
    displacement *= min(1.0, 0.5 / steepest, 7.0 / np.abs(displacement).max())
    folding = 0.9 * np.stack([_smooth_field(rng, FOLD_SHAPE, FOLD_STD_MM / FOLD_STEP_MM) for _ in range(2)])
    ventricle, hippocampus = bounded_normal(rng, 2)
    rng = stream(seed, 6, number, 0)
    lesions_mm = _places(rng, effects.LESIONS_MM, effects.LESION_DRAWS)
    radii_mm = rng.uniform(*effects.LESION_RADIUS_MM, effects.LESION_DRAWS)
    return Subject(
        number, age, sex, site, labels, severities, parts, np.linalg.inv(to_world), displacement, folding,
        float(ventricle), float(hippocampus), np.column_stack([lesions_mm, radii_mm]),
        _places(rng, effects.MASS_MM, 1)[0],
    )  # fmt: skip


def _places(rng: np.random.Generator, region_mm: tuple[effects.Mm, effects.Mm], count: int) -> np.ndarray:
    """(count,3) template mm in a region given by its centre and spread, on either side."""
    places = region_mm[0] + region_mm[1] * bounded_normal(rng, (count, 3))
    places[:, 0] *= rng.choice((-1, 1), count)
    return places


def bounded_normal(rng: np.random.Generator, size: int | tuple[int, ...]) -> Any:
    """Standard normal draws limited to ±2."""
    return np.clip(rng.standard_normal(size), -2, 2)


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], std_cells: float) -> np.ndarray:
    field = gaussian_filter(rng.standard_normal(shape), std_cells)
    return (field / field.std()).astype(np.float32)


def world_to_template(subject: Subject, world_mm: np.ndarray) -> np.ndarray:
    """Template mm (…,3) of the tissue at world mm (…,3) of the subject: one-to-one and smooth.

    Affine, random displacement, the common asymmetry, then ventricles and mass, which draw from nearer their centres.
    """
    points = voxel_to_mm(subject.to_template, world_mm)
    cells = np.moveaxis((points - LATTICE_LOW_MM) / WARP_STEP_MM, -1, 0)
    shifts = [map_coordinates(field, cells, order=1, mode="nearest") for field in subject.displacement_mm]
    points += np.stack(shifts, axis=-1)
    forwards = np.zeros(points.shape[:-1])
    for pole_mm, shift_mm in PETALIA_MM:
        forwards += shift_mm * np.exp(-((points - pole_mm) ** 2).sum(axis=-1) / (2 * PETALIA_STD_MM**2))
    points[..., 1] -= forwards
    growth = effects.ventricle_growth(subject.ageing, subject.ventricle_individual)
    centre_mm, std_mm = np.array(effects.VENTRICLES_MM)
    points = effects.push(points, centre_mm, std_mm, growth)
    radius_mm = effects.mass_radius_mm(subject.severities["mass"])
    return effects.push(points, subject.mass_mm, effects.PUSH_RADII * radius_mm, effects.MASS_PUSH)


def paint(template: Template, subject: Subject, contrast: str) -> np.ndarray:
    """The subject's noise-free image in template space, (x,y,z) float32, 0 outside."""
    look, axes_mm, (x, y, z) = INTENSITIES[contrast], template.axes_mm(), template.brain_xyz
    cells = [(mm - low) / FOLD_STEP_MM for mm, low in zip(axes_mm, LATTICE_LOW_MM)]
    more_white, more_csf = (np.exp(interpolate(field, cells)[x, y, z]) for field in subject.folding)
    # a power above 1 brings back the edges that averaging many brains has blurred
    white, grey, csf = (p * np.sqrt(p) for p in (template.white * more_white, template.grey, template.csf * more_csf))
    brain, severe = effects.Brain(template.brain_xyz, axes_mm), subject.severities
    white, grey = effects.change_boundary(brain, white, grey, effects.boundary_detail(severe["sharpness"]))
    total = white + grey + csf
    white, grey = white / total, grey / total
    loss = effects.hippocampus_loss(subject.ageing, severe["atrophy"], subject.hippocampus_individual)
    kept = 1 - np.float32(loss) * brain.near(*effects.HIPPOCAMPUS_MM, both_sides=True)
    widening = effects.ventricle_widening(severe["atrophy"])
    left = 1 - np.float32(widening) * template.near_csf * brain.near(*effects.VENTRICLES_MM)
    for place_mm, share in zip(effects.REGIONS_MM, effects.region_losses(subject.region_severities)):
        left *= 1 - np.float32(share) * brain.near(place_mm, effects.REGION_STD_MM)
    white, grey = white * left, grey * kept * left
    values = white * look.white + grey * look.grey + (1 - white - grey) * look.csf
    values += look.texture * template.texture
    load, draws_mm = effects.lesion_load(severe["lesions"]), subject.lesion_draws_mm
    for lesion_mm, radius_mm in effects.lesion_places(template.white_xyz(), template.affine, draws_mm, load):
        effects.blend(values, brain, lesion_mm, radius_mm, look.lesion)
    radius_mm = (1 - effects.MASS_PUSH) * effects.mass_radius_mm(severe["mass"])
    effects.blend(values, brain, subject.mass_mm, effects.OEDEMA_RADII * radius_mm, look.oedema, white)
    effects.blend(values, brain, subject.mass_mm, radius_mm, look.mass)
    image = np.zeros(template.shape_xyz, np.float32)
    image[x, y, z] = np.maximum(values, DARKEST_BRAIN)
    image[tuple(template.head_xyz)] = np.array(look, np.float32)[template.head_tissue]
    image *= (1 + RIGHT_GAIN_FRACTION * np.tanh(axes_mm[0] / MIDLINE_MM)).astype(np.float32)[:, None, None]
    return image


def interpolate(lattice: np.ndarray, positions: Sequence[np.ndarray]) -> np.ndarray:
    """Linear interpolation of a lattice (…,x,y,z), float32, at every combination of fractional positions per axis."""
    for axis, position in enumerate(positions, start=lattice.ndim - 3):
        low = np.clip(np.floor(position).astype(int), 0, lattice.shape[axis] - 2)
        share = (position - low).astype(np.float32).reshape(-1, *[1] * (lattice.ndim - 1 - axis))
        below = lattice.take(low, axis)
        lattice = below + share * (lattice.take(low + 1, axis) - below)
    return lattice


def head_around(brain: np.ndarray, axes_mm: Sequence[np.ndarray]) -> np.ndarray:
    """Synthetic head for a brain mask (x,y,z) on axes in template mm: int8 values of TISSUES, -1 for air and brain.

    Shells of the distance from the brain (CSF, skull with marrow, scalp), a face ellipsoid and a neck with its spine.
    """
    x, y, z = (mm.astype(np.float32).reshape(np.roll((-1, 1, 1), k)) for k, mm in enumerate(axes_mm))
    step_mm = float(axes_mm[0][1] - axes_mm[0][0])

    def disc(centre_xy: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
        return np.sqrt(((x - centre_xy[0]) / radii[0]) ** 2 + ((y - centre_xy[1]) / radii[1]) ** 2)

    def ball(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        return np.sqrt(disc((centre[0], centre[1]), (radii[0], radii[1])) ** 2 + ((z - centre[2]) / radii[2]) ** 2)

    from_brain = distance_transform_edt(~brain, step_mm).astype(np.float32)
    outside = np.minimum(from_brain - 12, (disc((0, -22), (52, 56)) - 1) * 52 + np.maximum(z + 45, 0))
    outside = np.minimum(outside, (ball((0, 36, -58), (58, 52, 60)) - 1) * 52)
    outside = np.minimum(outside, (ball((0, 88, -48), (13, 16, 20)) - 1) * 13)
    depth = -gaussian_filter(outside, 5 / step_mm)
    skull, spine = z > -64, z < -74
    tissue = np.select(
        [
            depth < 0,
            from_brain <= 2.5,
            ((from_brain <= 4) | (from_brain > 6)) & (from_brain <= 7.5) & skull,
            (from_brain <= 6) & skull,
            depth < 2,
            depth < 6,
        ],
        [-1, *(TISSUES[name] for name in ("csf", "bone", "marrow", "muscle", "fat"))],
        TISSUES["muscle"],
    ).astype(np.int8)
    deep = (tissue == TISSUES["muscle"]) & (depth > 6)
    for name, centre_xy, radii in (
        ("bone", (0, -16), (17, 14)), ("marrow", (0, -16), (15, 12)),
        ("bone", (0, -46), (13, 12)), ("csf", (0, -46), (10, 9)), ("white", (0, -46), (6, 5)),
    ):  # fmt: skip
        tissue[deep & spine & (disc(centre_xy, radii) < 1)] = TISSUES[name]
    for side in (-1, 1):
        tissue[(from_brain > 3) & (depth > 4) & (ball((32 * side, 62, -34), (13, 13, 13)) < 1)] = TISSUES["csf"]
    tissue[deep & (z < -68) & (disc((0, 14), (9, 8)) < 1)] = -1
    tissue[deep & (ball((0, 58, -52), (11, 34, 12)) < 1)] = -1
    tissue[brain] = -1
    return tissue
