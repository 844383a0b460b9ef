"""Pixel loss: masked-voxel error of predictions against targets gathered on the fly, loss and gradient in one pass.

    target[b,k,p] = value of voxel p of patch ids[b,k], as in patch_gather;
                    with normalize (target − mean) / √(variance + 1e-6), each patch by itself
    mse  L = mean (prediction − target)²        ∂L/∂prediction = 2·(prediction − target) / count
    l1   L = mean |prediction − target|         ∂L/∂prediction = sign(prediction − target) / count

over all count = B·K·P predicted voxels. Shapes and letters: patch_gather. prediction (B,K,P) float16, bfloat16 or
float32; the loss is a float32 scalar, summed in float32 within a tile and in float64 over tiles, always in one order.
The targets never lie in memory. The gradient is made in the forward pass (as Liger-Kernel's cross entropy does,
arXiv 2410.10989) and is all that is kept for the backward pass, which scales it. Source of the per-patch target: MAE,
arXiv 2111.06377.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from brainscale_kernels.launch import blocks, launch, tile, tile_warps, unit_gradient, volume_strides
from brainscale_kernels.patch_gather import (
    TOKEN_DTYPES,
    Stored,
    check,
    load_tokens,
    load_values,
    patch_gather_reference,
    patch_mask,
    patch_moments,
    patch_offsets,
    patch_statistics_reference,
)

VARIANCE_OFFSET = 1e-6
"""Added to a patch's variance when targets are normalised per patch: background patches are constant."""
KINDS = ("mse", "l1")


# ------------------------------------------------------------------------------------------- reference


def pixel_loss_reference(
    stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Sequence[int], kind: str, normalize: bool
) -> Tensor:
    """The loss, a scalar of at least float32. Raises ValueError for arguments that do not fit each other."""
    check_prediction(stored, ids, prediction, patch_zyx)
    _check_kind(kind)
    target = patch_gather_reference(stored, ids, patch_zyx)
    if normalize:
        mean, variance = patch_statistics_reference(target)
        target = (target - mean) / (variance + VARIANCE_OFFSET).sqrt()
    difference = F.mse_loss if kind == "mse" else F.l1_loss
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return difference(prediction.to(wide), target.to(wide))


# ---------------------------------------------------------------------------------------------- kernel


@triton.jit
def _pixel_kernel(
    volume, ids, scale, offset, low, high, prediction, sums, gradient,
    count, per_volume, num_tokens, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, PATCHES: tl.constexpr, ELEMENTS: tl.constexpr,
    UNIT: tl.constexpr, MSE: tl.constexpr, NORMALIZE: tl.constexpr, VARIANCE: tl.constexpr, GRADIENT: tl.constexpr,
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
    target = load_values(volume, offsets, inside, row, live, scale, offset, low, high)
    if NORMALIZE:
        mean, variance = patch_moments(target, inside, VOXELS)
        target = (target - mean[:, None]) / tl.sqrt_rn(variance + VARIANCE)[:, None]
    at = slot.to(tl.int64)[:, None] * VOXELS + tl.arange(0, ELEMENTS)[None, :]
    difference = tl.load(prediction + at, mask=inside, other=0.0).to(tl.float32) - target
    difference = tl.where(inside, difference, 0.0)
    errors = difference * difference if MSE else tl.abs(difference)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(errors, axis=1), axis=0))
    if GRADIENT:
        if MSE:
            unit = 2.0 * difference
        else:  # NaN stays NaN
            unit = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
        tl.store(gradient + at, unit.to(gradient.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------------- operator


@torch.library.custom_op("brainscale::pixel_loss", mutates_args=())
def pixel_loss_op(
    volume: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor, ids: Tensor, prediction: Tensor,
    patch_zyx: Sequence[int], kind: str, normalize: bool, needs_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the gradient of its sum in prediction's dtype (empty where it is not needed)."""
    prediction = prediction.contiguous()
    batch, count = ids.shape
    grid_z, grid_y, grid_x = (v // p for v, p in zip(volume.shape[2:], patch_zyx))
    strides, unit = volume_strides(volume, patch_zyx)
    patches, elements = tile(patch_zyx)
    programs = blocks(batch * count, patches)
    sums = prediction.new_empty(programs, dtype=torch.float32)
    gradient = torch.empty_like(prediction) if needs_gradient else prediction.new_empty(0)
    pz, py, px = patch_zyx
    launch(
        _pixel_kernel, (programs,),
        volume, ids.contiguous(), scale.contiguous(), offset.contiguous(), low.contiguous(), high.contiguous(),
        prediction, sums, gradient, batch * count, count, grid_z * grid_y * grid_x, grid_y, grid_x, *strides,
        PZ=pz, PY=py, PX=px, PATCHES=patches, ELEMENTS=elements, UNIT=unit, MSE=kind == "mse", NORMALIZE=normalize,
        VARIANCE=VARIANCE_OFFSET, GRADIENT=needs_gradient, num_warps=tile_warps(elements),
    )  # fmt: skip
    return mean_of(sums, prediction.numel()), gradient


@pixel_loss_op.register_fake
def _(
    volume: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor, ids: Tensor, prediction: Tensor,
    patch_zyx: Sequence[int], kind: str, normalize: bool, needs_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_loss(prediction, needs_gradient)


def mean_of(sums: Tensor, count: float) -> Tensor:
    """The float32 mean of `count` terms from the sums of tiles, which are added in float64."""
    return (sums.sum(dtype=torch.float64) / count).float()


def fake_loss(prediction: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """What a loss operator returns, in shape and dtype."""
    gradient = torch.empty_like(prediction, memory_format=torch.contiguous_format) if needs_gradient else None
    return (
        prediction.new_empty((), dtype=torch.float32),
        prediction.new_empty(0) if gradient is None else gradient,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the second output


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (unit,) = ctx.saved_tensors
    return *[None] * 6, grad if grad is None else unit_gradient(unit, grad, unit.numel()), *[None] * 4


pixel_loss_op.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------- public


def pixel_loss(
    stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Sequence[int], kind: str, normalize: bool
) -> Tensor:
    """The loss, a float32 scalar, by the kernel; differentiable in `prediction` (once). Errors: the reference's, and
    ValueError for predictions of another dtype than TOKEN_DTYPES."""
    check_prediction(stored, ids, prediction, patch_zyx)
    _check_kind(kind)
    check_dtype(prediction)
    needs_gradient = prediction.requires_grad and torch.is_grad_enabled()
    return pixel_loss_op(*stored, ids, prediction, patch_zyx, kind, normalize, needs_gradient)[0]


def check_prediction(stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Sequence[int]) -> None:
    """Raise ValueError unless predictions (B,K,P) fit the ids, the patch and the volumes, and there is one at least."""
    check(stored, ids, patch_zyx)
    pz, py, px = patch_zyx
    if prediction.shape != (*ids.shape, pz * py * px) or not prediction.numel():
        raise ValueError(
            f"got predictions of shape {tuple(prediction.shape)}, wanted {(*ids.shape, pz * py * px)} for the ids and "
            f"patches of {tuple(patch_zyx)} (z, y, x), and at least one"
        )
    if prediction.device != ids.device:
        raise ValueError(f"got predictions on {prediction.device} and ids on {ids.device}, wanted one device")


def check_dtype(prediction: Tensor) -> None:
    """Raise ValueError for predictions that the kernels do not take."""
    if prediction.dtype not in TOKEN_DTYPES:
        raise ValueError(f"got predictions of {prediction.dtype}, wanted one of {TOKEN_DTYPES}")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"got pixel loss {kind!r}, wanted one of {KINDS}")
