"""Whether an affine (voxel (i,j,k) → RAS mm) can be believed: its numbers, and what the header says a second time."""

import numpy as np

from brainscale.geometry import spacing_mm, voxel_to_mm
from brainscale_data_prep.source_bytes import Refused

SPACING_LIMITS_MM = (0.01, 100.0)
FURTHEST_MM = 1e6
"""No number of an affine is larger."""
PIXDIM_AGREES = 1e-3
"""Shares by which pixdim and affine may differ; 448 real files differ by less than 1e-6."""
QFORM_AGREES_MM = 0.1
"""How far qform and sform may put a corner apart: a qform's float32 quaternion near a half turn is off by up to 0.09 mm
at 125 mm; of 310 real files all but one, whose sform is a registration, agree to 0.004 mm."""
RIGHT_ANGLE = 1e-3
"""Cosine of the angle between two axes, above which an affine is sheared."""


def are_spacings(pixdim: np.ndarray) -> bool:
    """Whether three numbers can be distances between voxels, in mm."""
    return bool((pixdim > 0).all() and (pixdim < FURTHEST_MM).all())


def assumed(spacing: np.ndarray, shape: tuple[int, int, int], orientation: str) -> np.ndarray:
    """The 4×4 affine of voxels that run as `orientation` says ("RAS", "LPS", …), with the volume's centre at 0."""
    affine = np.diag([*spacing, 1.0])
    affine[:3] *= [[1] if code in "RAS" else [-1] for code in orientation]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def check(
    affine: np.ndarray, qform: np.ndarray | None, pixdim: np.ndarray, shape: tuple[int, int, int], warnings: list[str]
) -> None:
    """Compare an affine with qform (None: there should be one and it is no rotation) and pixdim.

    Raises Refused (`singular_affine`); appends `sheared`, `bad_pixdim` or `qform_sform_conflict` to `warnings`.
    """
    if not _is_sane(affine):
        raise Refused("singular_affine", "its affine holds numbers that are no positions in mm; export it again")
    spacing = spacing_mm(affine)
    low, high = SPACING_LIMITS_MM
    if not ((spacing > low) & (spacing < high)).all():
        lengths = " × ".join(f"{length:.4g}" for length in spacing)
        raise Refused("singular_affine", f"its affine has voxels of {lengths} mm; export it again")
    directions = affine[:3, :3] / spacing
    if abs(np.linalg.det(directions)) < 0.05:
        raise Refused("singular_affine", "two axes of its affine point the same way; export it again")
    sheared = np.abs(directions.T @ directions - np.eye(3)).max() > RIGHT_ANGLE
    if sheared:
        warnings.append("sheared")
    if not are_spacings(pixdim) or (not sheared and np.abs(pixdim / spacing - 1).max() > PIXDIM_AGREES):
        warnings.append("bad_pixdim")
    elif qform is None or not _is_sane(qform) or _apart_mm(affine, qform, shape) > QFORM_AGREES_MM:
        warnings.append("qform_sform_conflict")


def check_extent(affine: np.ndarray, shape: tuple[int, int, int], min_extent_mm: float) -> None:
    """Raises Refused (`thin_slab`) for a volume that covers less than that along one of its axes."""
    extent_mm = spacing_mm(affine) * shape
    thinnest = int(extent_mm.argmin())
    if extent_mm[thinnest] < min_extent_mm - 1e-3:
        raise Refused(
            "thin_slab",
            f"it covers {extent_mm[thinnest]:.4g} mm along its {'ijk'[thinnest]} axis; "
            f"at least {min_extent_mm:g} mm are needed (min_extent_mm)",
        )


def _is_sane(affine: np.ndarray) -> bool:
    return bool((np.abs(affine) < FURTHEST_MM).all())  # false for NaN


def _apart_mm(affine: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> float:
    """How far apart two affines put a corner of the volume at most."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, 8).T
    return float(np.linalg.norm(voxel_to_mm(affine - other, corners), axis=1).max())
