"""The synthetic scanners of `phantom`: grids, bias fields, noise and units; from a painted subject to stored voxels."""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d, map_coordinates
from scipy.spatial.transform import Rotation

from brainscale.geometry import mm_to_voxel, spacing_mm, voxel_to_mm
from brainscale_data_prep import anatomy
from brainscale_data_prep.anatomy import CONTRASTS, Subject, Template
from brainscale_data_prep.severity import stream


class Site(NamedTuple):
    """What a scanner adds: noise (share of white matter), bias field (spread of its logarithm) and units."""

    noise_fraction: float
    bias_std: float
    gain: float


SITES = {"north": Site(0.02, 0.04, 350.0), "harbour": Site(0.03, 0.06, 900.0), "valley": Site(0.04, 0.08, 600.0)}
SPACINGS_MM = ((1.0, 1.0, 1.0), (0.9, 0.9, 1.2), (1.2, 1.2, 1.2), (1.5, 1.5, 1.5), (2.0, 1.0, 1.0), (1.0, 1.0, 3.0))
ORIENTATIONS = ("RAS", "LAS", "LPI", "LPS", "PSR", "ASL", "LSA", "RIP")
DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
OBLIQUE_FRACTION, OBLIQUE_DEGREES = 0.3, 3.0
SLOPE_FRACTION, SLOPES = 0.25, (0.25, 0.5, 2.0)
LOWEST_NECK_MM = -85.0
"""Fields of view of heads end 12 to 18 mm below this."""


def draw_grid(
    rng: np.random.Generator, template: Template, subject: Subject, spacing: float | None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine (4,4) to the subject's world and shape (x,y,z) of a scan that holds the whole subject.

    Orientation, obliqueness, margins and, unless `spacing` (mm, isotropic) is given, the resolution are random.
    """
    mm = np.array(SPACINGS_MM[rng.integers(len(SPACINGS_MM))] if spacing is None else (spacing,) * 3)
    letters = ORIENTATIONS[rng.integers(len(ORIENTATIONS))]
    axes = np.array([DIRECTIONS[letter] for letter in letters], dtype=float).T
    if rng.random() < OBLIQUE_FRACTION:
        tilt = OBLIQUE_DEGREES * anatomy.bounded_normal(rng, 3)
        axes = Rotation.from_rotvec(tilt, degrees=True).as_matrix() @ axes
    tissue_xyz = np.concatenate([template.brain_xyz[:, ::97], template.head_xyz[:, ::97]], axis=1)
    tissue_mm = voxel_to_mm(template.affine, tissue_xyz.T)
    tissue_mm = mm_to_voxel(subject.to_template, tissue_mm[tissue_mm[:, 2] > LOWEST_NECK_MM]) @ axes
    margin_mm = rng.uniform(12, 18, size=(2, 3))
    low, high = tissue_mm.min(axis=0) - margin_mm[0], tissue_mm.max(axis=0) + margin_mm[1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * mm, axes @ low
    x, y, z = (np.ceil((high - low) / mm).astype(int) + 1).tolist()
    return affine, (x, y, z)


def sample(
    image: np.ndarray, template: Template, subject: Subject, affine: np.ndarray, shape_xyz: tuple[int, int, int]
) -> np.ndarray:
    """A painted image on a scan's grid, (x,y,z) float32: blurred to the voxel size, then read through the warp."""
    spacings = spacing_mm(affine)
    for axis, across in enumerate(np.abs(affine[:3, :3] / spacings).argmax(axis=1)):
        # Gaussian profiles whose full width at half maximum (2.355 standard deviations) is the voxel size
        variance = (spacings[across] ** 2 - template.step_mm**2) / (2.355 * template.step_mm) ** 2
        if variance > 0.05:
            image = gaussian_filter1d(image, np.sqrt(variance), axis=axis, truncate=3)
    strides = np.maximum(1, np.rint(4 / spacings)).astype(int)
    knots = np.meshgrid(*(np.arange(0, n - 1 + s, s) for n, s in zip(shape_xyz, strides)), indexing="ij")
    template_mm = anatomy.world_to_template(subject, voxel_to_mm(affine, np.stack(knots, axis=-1)))
    voxels = np.moveaxis(mm_to_voxel(template.affine, template_mm), -1, 0).astype(np.float32)
    coordinates = anatomy.interpolate(voxels, [np.arange(n) / s for n, s in zip(shape_xyz, strides)])
    return map_coordinates(image, coordinates, order=1)


def bias_field(rng: np.random.Generator, std: float, shape_xyz: tuple[int, int, int]) -> np.ndarray:
    """A smooth multiplicative field (x,y,z): the exponential of a quadratic whose coefficients have spread `std`."""
    knots = np.linspace(-1, 1, 17, dtype=np.float32)
    x, y, z = knots[:, None, None], knots[:, None], knots
    terms = (x, y, z, x * y, y * z, x * z, x * x, y * y, z * z)
    log_field = np.zeros((17, 17, 17), np.float32)
    for coefficient, term in zip(std * rng.standard_normal(9), terms):
        log_field += np.float32(coefficient) * term
    return np.exp(anatomy.interpolate(log_field, [np.linspace(0, 16, n) for n in shape_xyz]))


def scan(
    template: Template, subject: Subject, contrast: str, seed: int, spacing: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Stored voxels (x,y,z) int16, affine (4,4) and scl_slope of one scan: value = stored × slope.

    Noise is Rician, the magnitude of a complex signal (Gudbjartsson and Patz 1995, Magn. Reson. Med. 34:910). Outside a
    brain without a head the values are 0, as skull stripping leaves them.
    """
    rng = stream(seed, 2, subject.number, CONTRASTS.index(contrast))
    site = SITES[subject.site]
    affine, shape = draw_grid(rng, template, subject, spacing)
    signal = sample(anatomy.paint(template, subject, contrast), template, subject, affine, shape)
    measured = np.ones(shape, bool) if template.head_xyz.size else signal > anatomy.DARKEST_BRAIN / 2
    signal = (signal * bias_field(rng, site.bias_std, shape))[measured]
    noise = rng.standard_normal((2, signal.size), dtype=np.float32) * np.float32(site.noise_fraction)
    slope = float(rng.choice(SLOPES)) if rng.random() < SLOPE_FRACTION else 1.0
    codes = np.rint(np.hypot(signal + noise[0], noise[1]) * np.float32(site.gain * rng.uniform(0.8, 1.25) / slope))
    assert codes.max() < 2**15
    stored = np.zeros(shape, np.int16)
    stored[measured] = codes
    return stored, affine, slope
