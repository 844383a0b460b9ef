"""Patch gather: from a stored volume and token ids to normalised, cast tokens.

The plain PyTorch form below is the definition that every faster form is held to. Letters: B batch, K selected tokens,
P voxels of a patch, Z Y X voxels.
"""

import math

import torch
from torch import Tensor

VOLUME_DTYPES = (torch.int16, torch.uint8, torch.float16, torch.bfloat16, torch.float32)
TOKEN_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def patch_gather_reference(
    volume: Tensor,
    ids: Tensor,
    patch_zyx: tuple[int, int, int],
    scale: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens (B,K,P) in `dtype` of a volume (B,1,Z,Y,X): clamp(volume · scale + offset, low, high), in float32, then
    cast. Voxels of a patch run in z, y, x order, x fastest; so do token ids over the token grid (Z/pz, Y/py, X/px).

    volume: int16, uint8, float16, bfloat16 or float32. ids: (B,K) int64 in any order, repeats allowed. scale, offset,
    low, high: (B,) float32, one per volume. Only the selected patches are read and converted.

    Raises ValueError for shapes and dtypes other than these and a volume that is no multiple of the patch, IndexError
    for an id outside the token grid (on a GPU: a device-side assert).
    """
    _check(volume, ids, patch_zyx, (scale, offset, low, high), dtype)
    b, _, *volume_zyx = volume.shape
    pz, py, px = patch_zyx
    gz, gy, gx = (v // p for v, p in zip(volume_zyx, patch_zyx))
    cells = volume.reshape(b, gz, pz, gy, py, gx, px).permute(0, 1, 3, 5, 2, 4, 6)
    # index_select refuses negative ids, which the indexing below would count from the end.
    token = torch.arange(gz * gy * gx, device=ids.device).index_select(0, ids.flatten()).view(ids.shape)
    row = torch.arange(b, device=ids.device)[:, None]
    patches = cells[row, token // (gy * gx), token // gx % gy, token % gx].reshape(b, ids.shape[1], pz * py * px)
    values = patches.float() * scale[:, None, None] + offset[:, None, None]
    return values.clamp(low[:, None, None], high[:, None, None]).to(dtype)


def _check(
    volume: Tensor,
    ids: Tensor,
    patch_zyx: tuple[int, int, int],
    per_volume: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> None:
    if volume.ndim != 5 or volume.shape[1] != 1:
        raise ValueError(f"patch gather: got a volume of shape {tuple(volume.shape)}, wanted (B, 1, Z, Y, X)")
    if volume.dtype not in VOLUME_DTYPES:
        raise ValueError(f"patch gather: got a volume of {volume.dtype}, wanted one of {VOLUME_DTYPES}")
    if dtype not in TOKEN_DTYPES:
        raise ValueError(f"patch gather: got token dtype {dtype}, wanted one of {TOKEN_DTYPES}")
    if math.prod(patch_zyx) < 1 or any(v % p for v, p in zip(volume.shape[2:], patch_zyx)):
        raise ValueError(
            f"patch gather: got a volume of {tuple(volume.shape[2:])} voxels and patches of {tuple(patch_zyx)} "
            "(z, y, x), wanted every axis of the volume to be a multiple of the patch"
        )
    batch = volume.shape[0]
    if ids.ndim != 2 or ids.shape[0] != batch or ids.dtype != torch.int64:
        raise ValueError(
            f"patch gather: got ids of shape {tuple(ids.shape)} and {ids.dtype}, wanted ({batch}, K) of torch.int64"
        )
    for name, values in zip(("scale", "offset", "low", "high"), per_volume):
        if values.shape != (batch,) or values.dtype != torch.float32:
            raise ValueError(
                f"patch gather: got {name} of shape {tuple(values.shape)} and {values.dtype}, "
                f"wanted ({batch},) of torch.float32"
            )
