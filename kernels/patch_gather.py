"""Patch gather: from a stored volume and token ids to normalised, cast tokens, in one pass.

    tokens[b,k,p] = cast(clamp(volume[b, voxel p of patch ids[b,k]] · scale[b] + offset[b], low[b], high[b]))

Letters: B batch, K selected tokens, P = pz·py·px voxels of a patch, Z Y X voxels of a volume. Voxels of a patch run in
z, y, x order, x fastest; so do token ids over the token grid (Z/pz, Y/py, X/px). volume (B,1,Z,Y,X) int16, uint8,
float16, bfloat16 or float32 with any strides; ids (B,K) int64 in any order, repeats allowed; scale, offset, low, high
(B,) float32. Arithmetic is float32; tokens are float16, bfloat16 or float32. Optionally the mean and the variance (over
P) of each selected patch, as targets that are normalised per patch need them.

Limits: at most 2³¹ − 1 tokens per volume and a patch that spans fewer than 2³¹ elements; offsets are 64-bit. There is
no gradient to the volume. The gradient to an embedding that follows is a plain matrix product.

Bytes: the selected voxels are read once and the tokens written once, nothing else but ids. A tile holds whole patches,
so that reads are as wide as a patch's rows and writes are contiguous. Source of the design: eager torch moves the whole
volume through memory several times for this; a compiler fuses the same pass but must trace the caller.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from brainscale_kernels.launch import blocks, launch, tile, tile_warps, volume_strides

VOLUME_DTYPES = (torch.int16, torch.uint8, torch.float16, torch.bfloat16, torch.float32)
TOKEN_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Stored(NamedTuple):
    """Volumes (B,1,Z,Y,X) as a store keeps them, and what makes values of them: clamp(volume · scale + offset, low,
    high), each (B,) float32."""

    volume: Tensor
    scale: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor


# ------------------------------------------------------------------------------------------- reference


def patch_gather_reference(
    stored: Stored, ids: Tensor, patch_zyx: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Tokens (B,K,P) in `dtype`. Only the selected patches are read and converted.

    Raises ValueError for shapes and dtypes other than those above and for a volume that is no multiple of the patch,
    IndexError for an id outside the token grid (on a GPU: an assert on the device, which stops the process).
    """
    check(stored, ids, patch_zyx)
    _check_dtype(dtype)
    b, _, *volume_zyx = stored.volume.shape
    pz, py, px = patch_zyx
    gz, gy, gx = (v // p for v, p in zip(volume_zyx, patch_zyx))
    cells = stored.volume.reshape(b, gz, pz, gy, py, gx, px).permute(0, 1, 3, 5, 2, 4, 6)
    # On a GPU index_select refuses negative ids, which the indexing below would count from the end.
    token = torch.arange(gz * gy * gx, device=ids.device).index_select(0, ids.flatten()).view(ids.shape)
    row = torch.arange(b, device=ids.device)[:, None]
    patches = cells[row, token // (gy * gx), token // gx % gy, token % gx].reshape(b, ids.shape[1], pz * py * px)
    scale, offset, low, high = (v[:, None, None] for v in stored[1:])
    return (patches.float() * scale + offset).clamp(low, high).to(dtype)


def patch_statistics_reference(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (B,K,1) float32, of each patch of float32 tokens (B,K,P); the variance over P."""
    variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True, correction=0)
    return mean, variance


# --------------------------------------------------------------------------------------------- kernels


@triton.jit
def patch_origins(
    row, token, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where the first voxels of patches lie: int64 offsets [patches] for rows and tokens [patches]."""
    origin = row.to(tl.int64) * stride_b
    origin += (token // (grid_y * grid_x) * PZ).to(tl.int64) * stride_z
    origin += (token // grid_x % grid_y * PY).to(tl.int64) * stride_y
    return origin * UNIT + (token % grid_x * PX).to(tl.int64) * stride_x


@triton.jit
def patch_offsets(
    row, token, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, ELEMENTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where the voxels of whole patches lie: int64 offsets [patches, ELEMENTS] for rows and tokens [patches]."""
    origin = patch_origins(row, token, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x, PZ, PY, PX, UNIT)
    element = tl.arange(0, ELEMENTS)
    inner = (element // (PY * PX) * stride_z + element // PX % PY * stride_y) * UNIT + element % PX * stride_x
    return origin[:, None] + inner[None, :]


@triton.jit
def patch_mask(live, VOXELS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Which elements of a tile are voxels, for `live` [patches]."""
    inside = live[:, None]
    if VOXELS < ELEMENTS:
        inside = inside & (tl.arange(0, ELEMENTS) < VOXELS)[None, :]
    return inside


@triton.jit
def load_tokens(ids, slot, live, num_tokens):
    """Token ids of slots as int32; stops the process for one outside the token grid."""
    token = tl.load(ids + slot, mask=live, other=0)
    tl.device_assert((token >= 0) & (token < num_tokens), "a token id outside the token grid")
    return token.to(tl.int32)


@triton.jit
def load_values(volume, offsets, inside, row, live, scale, offset, low, high):
    """Voxels at offsets [patches, ELEMENTS] as float32 values, scaled and clamped by their rows' parameters."""
    scale_ = tl.load(scale + row, mask=live, other=0.0)[:, None]
    offset_ = tl.load(offset + row, mask=live, other=0.0)[:, None]
    low_ = tl.load(low + row, mask=live, other=0.0)[:, None]
    high_ = tl.load(high + row, mask=live, other=0.0)[:, None]
    values = tl.load(volume + offsets, mask=inside, other=0).to(tl.float32) * scale_ + offset_
    values = tl.maximum(values, low_, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(values, high_, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def patch_moments(values, inside, VOXELS: tl.constexpr):
    """Mean and variance [patches] of the voxels of each patch; the mean is taken off before squaring."""
    mean = tl.sum(tl.where(inside, values, 0.0), axis=1) / VOXELS
    away = tl.where(inside, values - mean[:, None], 0.0)
    return mean, tl.sum(away * away, axis=1) / VOXELS


@triton.jit
def _gather_kernel(
    volume, ids, scale, offset, low, high, tokens, mean, variance,
    count, per_volume, num_tokens, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, PATCHES: tl.constexpr, ELEMENTS: tl.constexpr,
    UNIT: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    VOXELS: tl.constexpr = PZ * PY * PX
    slot = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    live = slot < count
    row = slot // per_volume
    token = load_tokens(ids, slot, live, num_tokens)
    offsets = patch_offsets(
        row, token, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x, PZ, PY, PX, ELEMENTS, UNIT
    )
    inside = patch_mask(live, VOXELS, ELEMENTS)
    values = load_values(volume, offsets, inside, row, live, scale, offset, low, high)
    out = slot.to(tl.int64)[:, None] * VOXELS + tl.arange(0, ELEMENTS)[None, :]
    tl.store(tokens + out, values.to(tokens.dtype.element_ty), mask=inside)
    if STATISTICS:
        mean_, variance_ = patch_moments(values, inside, VOXELS)
        tl.store(mean + slot, mean_, mask=live)
        tl.store(variance + slot, variance_, mask=live)


# -------------------------------------------------------------------------------------------- operator


@torch.library.custom_op("brainscale::patch_gather", mutates_args=())
def patch_gather_op(
    volume: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor, ids: Tensor, patch_zyx: Sequence[int],
    dtype: torch.dtype, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Tokens (B,K,P), and mean and variance (B,K,1), which are empty unless asked for."""
    (tokens, mean, variance), (batch, count) = _outputs(ids, patch_zyx, dtype, statistics), ids.shape
    grid_z, grid_y, grid_x = (v // p for v, p in zip(volume.shape[2:], patch_zyx))
    strides, unit = volume_strides(volume, patch_zyx)
    patches, elements = tile(patch_zyx)
    pz, py, px = patch_zyx
    launch(
        _gather_kernel, (blocks(batch * count, patches),),
        volume, ids.contiguous(), scale.contiguous(), offset.contiguous(), low.contiguous(), high.contiguous(), tokens,
        mean, variance, batch * count, count, grid_z * grid_y * grid_x, grid_y, grid_x, *strides,
        PZ=pz, PY=py, PX=px, PATCHES=patches, ELEMENTS=elements, UNIT=unit, STATISTICS=statistics,
        num_warps=tile_warps(elements),
    )  # fmt: skip
    return tokens, mean, variance


@patch_gather_op.register_fake
def _(
    volume: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor, ids: Tensor, patch_zyx: Sequence[int],
    dtype: torch.dtype, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(ids, patch_zyx, dtype, statistics)


def _outputs(
    ids: Tensor, patch_zyx: Sequence[int], dtype: torch.dtype, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    moments = (*ids.shape, 1) if statistics else (0,)
    mean, variance = (ids.new_empty(moments, dtype=torch.float32) for _ in range(2))
    return ids.new_empty((*ids.shape, math.prod(patch_zyx)), dtype=dtype), mean, variance


def _no_gradient(ctx: object, *gradients: Tensor) -> None:
    raise NotImplementedError("patch gather has no gradient to the volume or its scale; detach them")


patch_gather_op.register_autograd(_no_gradient)


# ---------------------------------------------------------------------------------------------- public


def patch_gather(stored: Stored, ids: Tensor, patch_zyx: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens (B,K,P) in `dtype`, by the kernel. Shapes, errors: `patch_gather_reference`."""
    check(stored, ids, patch_zyx)
    _check_dtype(dtype)
    return patch_gather_op(*stored, ids, patch_zyx, dtype, False)[0]


def patch_gather_with_statistics(
    stored: Stored, ids: Tensor, patch_zyx: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B,K,P) in `dtype`, and mean and variance (B,K,1) float32 of each patch before the cast, by the kernel."""
    check(stored, ids, patch_zyx)
    _check_dtype(dtype)
    return patch_gather_op(*stored, ids, patch_zyx, dtype, True)


def check(stored: Stored, ids: Tensor, patch_zyx: Sequence[int]) -> None:
    """Raise ValueError unless volume, ids, patch and parameters fit each other, IndexError for an id outside the token
    grid where they lie on the CPU: on a GPU looking would wait for it, and the kernels look themselves."""
    volume = stored.volume
    if volume.ndim != 5 or volume.shape[1] != 1:
        raise ValueError(f"patch gather: got a volume of shape {tuple(volume.shape)}, wanted (B, 1, Z, Y, X)")
    if volume.dtype not in VOLUME_DTYPES:
        raise ValueError(f"patch gather: got a volume of {volume.dtype}, wanted one of {VOLUME_DTYPES}")
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
    tokens = math.prod(v // p for v, p in zip(volume.shape[2:], patch_zyx))
    looks = ids.device.type == "cpu" and ids.numel() > 0 and not torch.compiler.is_compiling()  # a GPU: load_tokens
    if looks and not 0 <= ids.min() <= ids.max() < tokens:
        raise IndexError(f"patch gather: got ids from {ids.min()} to {ids.max()}, wanted 0 to {tokens - 1}")
    for name, values in zip(Stored._fields[1:], stored[1:]):
        if values.shape != (batch,) or values.dtype != torch.float32:
            raise ValueError(
                f"patch gather: got {name} of shape {tuple(values.shape)} and {values.dtype}, "
                f"wanted ({batch},) of torch.float32"
            )
    if devices := {t.device for t in (*stored, ids)} - {volume.device}:
        raise ValueError(f"patch gather: got a volume on {volume.device} and other tensors on {devices.pop()}")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in TOKEN_DTYPES:
        raise ValueError(f"patch gather: got token dtype {dtype}, wanted one of {TOKEN_DTYPES}")
