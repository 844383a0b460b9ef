"""Token grids and affines: patchify and its inverse, voxel ↔ millimetre. No input or output, no heavy import.

Letters: B batch, N tokens of a volume, K some of them, P voxels of a patch, Z Y X voxels.
"""

from typing import TYPE_CHECKING

import numpy as np

from brainscale.settings import InputError

if TYPE_CHECKING:
    from torch import Tensor

Zyx = tuple[int, int, int]


def token_grid(volume_zyx: Zyx, patch_zyx: Zyx) -> Zyx:
    """Tokens per axis. Raises InputError when the volume is no multiple of the patch."""
    if any(v % p for v, p in zip(volume_zyx, patch_zyx)):
        raise InputError(
            f"a volume of {volume_zyx} voxels (z, y, x) is no multiple of the patch {patch_zyx}; "
            "set model.patch_voxels_zyx or data.crop_voxels_zyx so that every axis divides"
        )
    z, y, x = (v // p for v, p in zip(volume_zyx, patch_zyx))
    return z, y, x


def patchify(volume: "Tensor", patch_zyx: Zyx) -> "Tensor":
    """Cut (B,1,Z,Y,X) into tokens (B,N,P); token ids and voxels inside a patch run in z, y, x order, x fastest."""
    b = volume.shape[0]
    z, y, x = volume.shape[2:]
    (gz, gy, gx), (pz, py, px) = token_grid((z, y, x), patch_zyx), patch_zyx
    cells = volume.reshape(b, gz, pz, gy, py, gx, px).permute(0, 1, 3, 5, 2, 4, 6)
    return cells.reshape(b, gz * gy * gx, pz * py * px)


def unpatchify(tokens: "Tensor", volume_zyx: Zyx, patch_zyx: Zyx) -> "Tensor":
    """Inverse of `patchify`: (B,N,P) → (B,1,Z,Y,X)."""
    b = tokens.shape[0]
    (gz, gy, gx), (pz, py, px) = token_grid(volume_zyx, patch_zyx), patch_zyx
    cells = tokens.reshape(b, gz, gy, gx, pz, py, px).permute(0, 1, 4, 2, 5, 3, 6)
    return cells.reshape(b, 1, *volume_zyx)


def token_coordinates(grid_zyx: Zyx) -> np.ndarray:
    """(N,3) integer z, y, x position of every token id."""
    return np.stack(np.unravel_index(np.arange(int(np.prod(grid_zyx))), grid_zyx), axis=1)


def voxel_to_mm(affine: np.ndarray, ijk: np.ndarray) -> np.ndarray:
    """World position (…,3) in RAS millimetres of voxel indices (…,3) in x, y, z order under a 4×4 affine."""
    return ijk @ affine[:3, :3].T + affine[:3, 3]


def mm_to_voxel(affine: np.ndarray, xyz_mm: np.ndarray) -> np.ndarray:
    """Voxel indices (…,3), x, y, z order and fractional, of world positions (…,3) in RAS millimetres."""
    return (xyz_mm - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T


def spacing_mm(affine: np.ndarray) -> np.ndarray:
    """(3,) distance in mm between neighbouring voxels along i, j, k: the lengths of the affine's columns."""
    return np.linalg.norm(affine[:3, :3], axis=0)
