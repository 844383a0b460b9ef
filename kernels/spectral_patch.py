"""Spectral loss of masked patches, each by itself, in one kernel: gather, DFT, difference, sum, gradient.

    L = mean over kept bins, patches and samples of the difference of the 3D spectra of prediction[b,k] and of the
        values of patch ids[b,k]                                        (spectrum.py: modes, bins, gradient spectrum G)

Letters: B batch, K masked tokens, P voxels of a patch. Stored volumes and ids: patch_gather. prediction (B,K,P)
float16, bfloat16 or float32; the loss is a float32 scalar. Values are taken as they come, in units of the volume's
standard deviation: a patch is not z-scored again, since that would blow up the noise of flat patches. Its mean is the
bin at radius 0, which any `cutoff_fraction` above 0 leaves out. There is no published form of this.

A DFT of up to 16 points is a product with a 16×16 matrix. A program takes a tile of 4096 voxels, one patch of 16³ or
eight of 8³ (shorter axes: several per 16, one block of the matrix each; 12: padded with zeros), as a 256×16 matrix,
multiplies along x, turns y into the columns, multiplies, turns z, multiplies. So the spectra, their difference, G and
its inverse transform stay in registers: device memory sees stored voxels and predictions in, gradients out.

Precision: float32 by float16 tensor cores. Both factors are split into a float16 and the float16 of what it left out,
and three of the four products are added in float32 (Ootomo & Yokota, arXiv 2203.03341); tiles are first scaled by a
power of two so that nothing over- or underflows. One float16 product would be wrong by 2 % in the gradient of logmag.
The kernel never multiplies in bfloat16: the bins above the cut-off are the small ones.

Limits: axes of at most 16 voxels, `Form.paper` is not defined.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brainscale_kernels.launch import blocks, launch, unit_gradient, volume_strides
from brainscale_kernels.patch_gather import Stored, load_tokens, load_values, patch_gather_reference, patch_origins
from brainscale_kernels.pixel_loss import check_dtype, check_prediction, fake_loss, mean_of
from brainscale_kernels.spectrum import (
    MODES,
    Form,
    check_form,
    compare_complex,
    compare_features,
    cutoff_integers,
    divisor,
    feature,
    scales,
    spectral_error,
)

LONGEST_AXIS = 16
TILE_VOXELS = LONGEST_AXIS**3
TABLE_GAIN = 4
"""Factor of the DFT matrices, without which what float16 leaves out of them would be subnormal."""
REGISTERS = 128
"""Per thread at most, so that two programs of 8 warps share a multiprocessor; nothing spills (compile_report)."""


# ------------------------------------------------------------------------------------------- reference


def spectral_patch_reference(
    stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Sequence[int], form: Form
) -> Tensor:
    """The loss, a scalar of at least float32. Raises ValueError for arguments that do not fit each other and for
    `form.paper`."""
    check_prediction(stored, ids, prediction, patch_zyx)
    return patch_loss(prediction, patch_gather_reference(stored, ids, patch_zyx), patch_zyx, form)


def patch_loss(prediction: Tensor, target: Tensor, patch_zyx: Sequence[int], form: Form) -> Tensor:
    """The loss of patches against patches, both (B,K,P) with voxels in z, y, x order, of any dtype."""
    _check_form(form)
    if prediction.shape != target.shape or prediction.ndim != 3 or prediction.shape[2] != math.prod(patch_zyx):
        raise ValueError(
            f"the spectral term got predictions of shape {tuple(prediction.shape)} and targets of "
            f"{tuple(target.shape)}; both must be (B, K, {math.prod(patch_zyx)}) for patches of {tuple(patch_zyx)} "
            "(z, y, x)"
        )
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    wide_prediction, wide_target = (t.to(wide).unflatten(2, tuple(patch_zyx)) for t in (prediction, target))
    return spectral_error(wide_prediction, wide_target, form)


# ---------------------------------------------------------------------------------------------- kernel


@lru_cache(maxsize=8)
def _tables(patch_zyx: tuple[int, int, int], device: torch.device) -> Tensor:
    """(3,4,16,16) float16 for axes z, y, x, times TABLE_GAIN: cosines, what float16 left out of them, sines, the same.
    Angle 2π·j·k/p; p shorter than 16 has one block per repetition."""
    tables = torch.zeros(3, 4, LONGEST_AXIS, LONGEST_AXIS)
    for axis, p in enumerate(patch_zyx):
        angles = torch.outer(torch.arange(p), torch.arange(p)).remainder(p).double() * (2 * math.pi / p)
        for first in range(0, LONGEST_AXIS, _padded(p)):
            block = slice(first, first + p)
            for i, wave in enumerate((TABLE_GAIN * angles.cos(), TABLE_GAIN * angles.sin())):
                tables[axis, 2 * i, block, block] = wave.half().float()
                tables[axis, 2 * i + 1, block, block] = (wave - wave.half().double()).float()
    return tables.half().to(device)


def _shrink(size: int) -> float:
    """What a product along an axis is multiplied with: a power of two near 1/√p, so that sums grow four times at most;
    TABLE_GAIN taken off."""
    return 0.5 ** (int(math.log2(size)) // 2) / TABLE_GAIN


def _padded(size: int) -> int:
    """The power of two at or above an axis's length."""
    return 1 << (size - 1).bit_length()


@triton.jit
def _power_of_two(values):
    """A power of two that brings the largest magnitude of a tile to 256 … 512, and its inverse."""
    largest = tl.max(tl.reshape(tl.abs(values), (4096,)), axis=0)
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 16)
    return ((262 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 8) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _times(values, high, low, total):
    """total + values · (high + low): float32 [256,16] by a split float16 [16,16]."""
    upper = values.to(tl.float16)
    lower = (values - upper.to(tl.float32)).to(tl.float16)
    total = tl.dot(lower, high, total)
    total = tl.dot(upper, low, total)
    return tl.dot(upper, high, total)


@triton.jit
def _axis(re, im, tables, AXIS: tl.constexpr, SHRINK: tl.constexpr, FORWARD: tl.constexpr):
    """A DFT (FORWARD) or its inverse along the columns of complex [256,16], times SHRINK · TABLE_GAIN."""
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :] + AXIS * 1024
    cos, cos_low = tl.load(tables + at), tl.load(tables + at + 256)
    sin, sin_low = tl.load(tables + at + 512), tl.load(tables + at + 768)
    if not FORWARD:
        sin, sin_low = -sin, -sin_low
    zero = tl.zeros((256, 16), tl.float32)
    out_re = _times(im, sin, sin_low, _times(re, cos, cos_low, zero))
    out_im = _times(re, -sin, -sin_low, _times(im, cos, cos_low, zero))
    return out_re * SHRINK, out_im * SHRINK


@triton.jit
def _turn(values, OUTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[OUTER, ROWS, COLUMNS] with its last two axes exchanged, as 256×16 before and after."""
    return tl.reshape(tl.permute(tl.reshape(values, (OUTER, ROWS, COLUMNS)), (0, 2, 1)), (256, 16))


@triton.jit
def _transform(
    values, tables, N: tl.constexpr, QZ: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
):  # fmt: skip
    """3D DFTs of real patches [N,QZ,QY,QX] (as 256×16), as real and imaginary part [N,QX,QY,QZ]."""
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :] + 2048
    zero = tl.zeros((256, 16), tl.float32)
    re = _times(values, tl.load(tables + at), tl.load(tables + at + 256), zero)
    im = _times(values, -tl.load(tables + at + 512), -tl.load(tables + at + 768), zero)
    re, im = _turn(re * SX, N * QZ, QY, QX), _turn(im * SX, N * QZ, QY, QX)
    re, im = _axis(re, im, tables, 1, SY, True)
    return _axis(_turn(re, N, QZ, QX * QY), _turn(im, N, QZ, QX * QY), tables, 0, SZ, True)


@triton.jit
def _untransform(
    re, im, tables, N: tl.constexpr, QZ: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
):  # fmt: skip
    """The real part of the un-normalised inverse of `_transform`."""
    re, im = _axis(re, im, tables, 0, SZ, False)
    re, im = _axis(_turn(re, N, QX * QY, QZ), _turn(im, N, QX * QY, QZ), tables, 1, SY, False)
    re, im = _turn(re, N * QZ, QX, QY), _turn(im, N * QZ, QX, QY)
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :] + 2048
    total = _times(re, tl.load(tables + at), tl.load(tables + at + 256), tl.zeros((256, 16), tl.float32))
    return _times(im, -tl.load(tables + at + 512), -tl.load(tables + at + 768), total) * SX


@triton.jit
def _kept(
    weight_z, weight_y, weight_x, least, PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    QZ: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr,
):  # fmt: skip
    """1.0 for the bins [N,QX,QY,QZ] (as 256×16) that are compared, else 0.0 (cutoff_integers)."""
    bins = tl.arange(0, 256)[:, None] * 16 + tl.arange(0, 16)[None, :]
    z, y, x = bins % QZ, bins // QZ % QY, bins // (QZ * QY) % QX
    kz, ky, kx = tl.minimum(z, PZ - z), tl.minimum(y, PY - y), tl.minimum(x, PX - x)
    far = weight_z * kz * kz + weight_y * ky * ky + weight_x * kx * kx
    return ((far >= least) & (z < PZ) & (y < PY) & (x < PX)).to(tl.float32)


@triton.jit
def _patch_kernel(
    volume, ids, scale, offset, low, high, prediction, tables, sums, gradient,
    count, per_volume, num_tokens, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x,
    weight_z, weight_y, weight_x, least, amplitude, log_scale, log_offset, larger,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, QZ: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr,
    SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr, MODE: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    VOXELS: tl.constexpr = PZ * PY * PX
    slot = tl.program_id(0) * N + tl.arange(0, N)
    live = slot < count
    row = slot // per_volume
    token = load_tokens(ids, slot, live, num_tokens)
    element = tl.arange(0, QZ * QY * QX)
    z, y, x = element // (QY * QX), element // QX % QY, element % QX
    inside = live[:, None] & ((z < PZ) & (y < PY) & (x < PX))[None, :]
    origin = patch_origins(row, token, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x, PZ, PY, PX, UNIT)
    inner = (z * stride_z + y * stride_y) * UNIT + x * stride_x
    values = load_values(volume, origin[:, None] + inner[None, :], inside, row, live, scale, offset, low, high)
    target = tl.reshape(tl.where(inside, values, 0.0), (256, 16))
    base = tl.program_id(0).to(tl.int64) * (N * VOXELS)
    prediction += base
    gradient += base
    at = tl.arange(0, N)[:, None] * VOXELS + ((z * PY + y) * PX + x)[None, :]
    predicted = tl.reshape(tl.load(prediction + at, mask=inside, other=0.0).to(tl.float32), (256, 16))

    if MODE == 2:
        predicted -= target
        up, down = _power_of_two(predicted)
        re, im = _transform(predicted * up, tables, N, QZ, QY, QX, SZ, SY, SX)
        kept = _kept(weight_z, weight_y, weight_x, least, PZ, PY, PX, QZ, QY, QX)
        error, by_re, by_im = compare_complex(re * (down * larger), im * (down * larger), kept, amplitude)
    else:
        up, down = _power_of_two(target)
        re, im = _transform(target * up, tables, N, QZ, QY, QX, SZ, SY, SX)
        true = feature(re * (down * larger), im * (down * larger), amplitude, log_scale, log_offset, MODE)
        up, down = _power_of_two(predicted)
        re, im = _transform(predicted * up, tables, N, QZ, QY, QX, SZ, SY, SX)
        kept = _kept(weight_z, weight_y, weight_x, least, PZ, PY, PX, QZ, QY, QX)
        error, by_re, by_im = compare_features(
            re * (down * larger), im * (down * larger), true, kept, amplitude, log_scale, log_offset, MODE
        )
    tl.store(sums + tl.program_id(0), tl.sum(tl.reshape(error, (4096,)), axis=0))
    if GRADIENT:
        up, down = _power_of_two(tl.abs(by_re) + tl.abs(by_im))
        by = _untransform(by_re * up, by_im * up, tables, N, QZ, QY, QX, SZ, SY, SX) * (down * larger)
        by = tl.reshape(by, (N, QZ * QY * QX))
        tl.store(gradient + at, by.to(gradient.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------------- operator


@torch.library.custom_op("brainscale::spectral_patch", mutates_args=())
def spectral_patch_op(
    volume: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor, ids: Tensor, prediction: Tensor,
    patch_zyx: Sequence[int], mode: str, cutoff_fraction: float, log_scale: float, needs_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the gradient of the sum over bins and patches in prediction's dtype (empty where not needed)."""
    pz, py, px = patch_zyx
    form = Form(mode, cutoff_fraction, log_scale)
    prediction = prediction.contiguous()
    batch, count = ids.shape
    grid_z, grid_y, grid_x = (v // p for v, p in zip(volume.shape[2:], patch_zyx))
    strides, unit = volume_strides(volume, patch_zyx)
    qz, qy, qx = (_padded(p) for p in patch_zyx)
    patches = TILE_VOXELS // (qz * qy * qx)
    programs = blocks(batch * count, patches)
    shrinks = [_shrink(p) for p in patch_zyx]
    sums = prediction.new_empty(programs, dtype=torch.float32)
    gradient = torch.empty_like(prediction) if needs_gradient else prediction.new_empty(0)
    launch(
        _patch_kernel, (programs,),
        volume, ids.contiguous(), scale.contiguous(), offset.contiguous(), low.contiguous(), high.contiguous(),
        prediction, _tables((pz, py, px), prediction.device), sums, gradient,
        batch * count, count, grid_z * grid_y * grid_x, grid_y, grid_x, *strides,
        *cutoff_integers((pz, py, px), cutoff_fraction), *scales((pz, py, px), form),
        1 / math.prod(TABLE_GAIN * s for s in shrinks),
        PZ=pz, PY=py, PX=px, QZ=qz, QY=qy, QX=qx, SZ=shrinks[0], SY=shrinks[1], SX=shrinks[2], N=patches, UNIT=unit,
        MODE=MODES.index(mode), GRADIENT=needs_gradient, num_warps=8, maxnreg=REGISTERS,
    )  # fmt: skip
    return mean_of(sums, _terms(ids, patch_zyx, form)), gradient


def _terms(ids: Tensor, patch_zyx: Sequence[int], form: Form) -> float:
    z, y, x = (int(p) for p in patch_zyx)  # concrete also while a compiler traces
    return divisor((z, y, x), form) * ids.numel()


@spectral_patch_op.register_fake
def _(
    volume: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor, ids: Tensor, prediction: Tensor,
    patch_zyx: Sequence[int], mode: str, cutoff_fraction: float, log_scale: float, needs_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_loss(prediction, needs_gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the second output
    ctx.terms = _terms(inputs[5], inputs[7], Form(*inputs[8:11]))


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (unit,) = ctx.saved_tensors
    return *[None] * 6, grad if grad is None else unit_gradient(unit, grad, ctx.terms), *[None] * 5


spectral_patch_op.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------- public


def spectral_patch(stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Sequence[int], form: Form) -> Tensor:
    """The loss, a float32 scalar, by the kernel; differentiable in `prediction` (once). Errors: the reference's, and
    ValueError for an axis longer than 16 voxels and predictions of another dtype than TOKEN_DTYPES."""
    check_prediction(stored, ids, prediction, patch_zyx)
    check_dtype(prediction)
    _check_form(form)
    if max(patch_zyx) > LONGEST_AXIS:
        raise ValueError(
            f"the spectral kernel of patches got patches of {tuple(patch_zyx)} voxels (z, y, x), wanted axes of at "
            f"most {LONGEST_AXIS}"
        )
    needs_gradient = prediction.requires_grad and torch.is_grad_enabled()
    return spectral_patch_op(*stored, ids, prediction, patch_zyx, *form[:3], needs_gradient)[0]


def _check_form(form: Form) -> None:
    check_form(form)
    if form.paper:
        raise ValueError("the published form of the spectral term is defined on whole volumes, not on patches")
