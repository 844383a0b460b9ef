"""Spectral loss of whole volumes: how far the Fourier magnitudes of a mosaic are from those of the true volume.

    x  = the stored volume, as values (patch_gather)          x̂ = x with the patches `ids` replaced by predictions
    z-score of each by itself: y = (x − mean) / (std + 1e-6), std over N−1
    L  = mean over samples and bins of the difference of the spectra of ŷ and y      (spectrum.py: modes, bins, forms)

Letters: B batch, K masked tokens, P voxels of a patch, N = Z·Y·X voxels. Stored volumes and ids: patch_gather.
prediction (B,K,P) float16, bfloat16 or float32. Of repeated ids the last counts. The loss is a float32 scalar.

Gradient (G: spectrum.py), made in the forward pass; nothing of the spectrum is kept for the backward pass:

    g = un-normalised inverse transform of G                                       (Z,Y,X), mean zero
    ∂L/∂x̂ = [g − ŷ · ⟨g,ŷ⟩ · (std + 1e-6) / ((N−1)·std)] / (std + 1e-6),           ⟨g,ŷ⟩ = Σ_full Re(G*·F̂)

The second term is 0 for a constant mosaic. Transforms are torch.fft's (cuFFT), in float32, between fused kernels: two
that make means, deviations and z-scores of both volumes without a mosaic in between; one that compares spectra, sums,
and writes G over F̂; one that gathers token gradients out of g. Sums are taken in two stages, always in one order.

Limits: fewer than 2³¹ voxels a volume. Beside its outputs the operator needs about 24 bytes a voxel, for at most
GROUP_VOXELS voxels (one volume at least) at a time. Source: arXiv 2606.13315, in `Form.paper` its published form.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brainscale_kernels.launch import blocks, launch, tile, tile_warps, unit_gradient, volume_strides
from brainscale_kernels.patch_gather import (
    Stored,
    load_tokens,
    load_values,
    patch_gather_reference,
    patch_mask,
    patch_offsets,
)
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

STD_OFFSET = 1e-6
"""Added to a volume's standard deviation in its z-score (the paper's constant)."""
GROUP_VOXELS = 1 << 25
"""Volumes are taken in groups of at most this many voxels: six of 160×192×160, about 0.8 GB beside the outputs."""
BLOCK_BINS = 1024
STATISTICS = 3
"""mean, std + 1e-6, and (std + 1e-6) / ((N−1)·std), or 0 for a constant volume."""


# ------------------------------------------------------------------------------------------- reference


def volume_loss(mosaic: Tensor, target: Tensor, form: Form) -> Tensor:
    """The loss of mosaics against true volumes, both (B,1,Z,Y,X) of any dtype; a scalar of at least float32.

    The term sees neither gain nor offset of a volume. Raises ValueError when the two are not volumes of one shape.
    """
    check_form(form)
    if mosaic.shape != target.shape or mosaic.ndim != 5 or mosaic.shape[1] != 1:
        raise ValueError(
            f"the spectral term got a mosaic of shape {tuple(mosaic.shape)} and a target of {tuple(target.shape)}; "
            "both must be (B, 1, Z, Y, X) of one shape"
        )
    return spectral_error(_z_scored(mosaic), _z_scored(target), form)


def spectral_volume_reference(
    stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Sequence[int], form: Form
) -> Tensor:
    """The loss, a scalar of at least float32. Raises ValueError for arguments that do not fit each other."""
    check_prediction(stored, ids, prediction, patch_zyx)
    shape_zyx = stored.volume.shape[2:]
    tokens = math.prod(v // p for v, p in zip(shape_zyx, patch_zyx))
    every = torch.arange(tokens, device=ids.device).expand(len(ids), -1)
    wide = torch.promote_types(prediction.dtype, torch.float32)
    true = patch_gather_reference(stored, every, patch_zyx).to(wide)
    slots = slot_of_token(ids, tokens)[..., None].long().expand_as(true)
    mosaic = torch.where(slots >= 0, prediction.to(wide).gather(1, slots.clamp(min=0)), true)
    return volume_loss(_volumes(mosaic, shape_zyx, patch_zyx), _volumes(true, shape_zyx, patch_zyx), form)


def _z_scored(volumes: Tensor) -> Tensor:
    """(B,1,Z,Y,X), each volume by itself. A constant one becomes exactly 0, with gradient 0 through its deviation."""
    volumes = volumes.to(torch.promote_types(volumes.dtype, torch.float32))
    std, mean = torch.std_mean(volumes, dim=(1, 2, 3, 4), correction=1, keepdim=True)
    return (volumes - mean) / (std + STD_OFFSET)


def _volumes(tokens: Tensor, shape_zyx: Sequence[int], patch_zyx: Sequence[int]) -> Tensor:
    """All tokens (B,N,P) put back into volumes (B,1,Z,Y,X)."""
    gz, gy, gx = (v // p for v, p in zip(shape_zyx, patch_zyx))
    cells = tokens.reshape(len(tokens), gz, gy, gx, *patch_zyx).permute(0, 1, 4, 2, 5, 3, 6)
    return cells.reshape(len(tokens), 1, *shape_zyx)


def slot_of_token(ids: Tensor, tokens: int) -> Tensor:
    """(B, tokens) int32: which of the K ids names a token, the last one where several do; −1 for none."""
    slots = torch.full((len(ids), tokens), -1, dtype=torch.int32, device=ids.device)
    order = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
    return slots.scatter_reduce(1, ids, order.expand_as(ids), "amax")


# --------------------------------------------------------------------------------------------- kernels


@triton.jit
def _load_pair(
    volume, slots, scale, offset, low, high, prediction, sample, masked, num_tokens, grid_y, grid_x,
    stride_b, stride_z, stride_y, stride_x,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, PATCHES: tl.constexpr, ELEMENTS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of true values, the same of the mosaic, which tokens, and which elements are voxels."""
    VOXELS: tl.constexpr = PZ * PY * PX
    token = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    live = token < num_tokens
    row = token * 0 + sample
    offsets = patch_offsets(
        row, token, grid_y, grid_x, stride_b, stride_z, stride_y, stride_x, PZ, PY, PX, ELEMENTS, UNIT
    )
    inside = patch_mask(live, VOXELS, ELEMENTS)
    true = load_values(volume, offsets, inside, row, live, scale, offset, low, high)
    slot = tl.load(slots + sample.to(tl.int64) * num_tokens + token, mask=live, other=-1)
    at = (sample.to(tl.int64) * masked + slot)[:, None] * VOXELS + tl.arange(0, ELEMENTS)[None, :]
    hidden = (slot >= 0)[:, None]
    predicted = tl.load(prediction + at, mask=inside & hidden, other=0.0).to(tl.float32)
    return true, tl.where(hidden, predicted, true), token, live, inside


@triton.jit
def _moments(values, inside, count):
    """Mean and sum of squared distances from it of a tile's `count` voxels."""
    mean = tl.sum(tl.sum(tl.where(inside, values, 0.0), axis=1), axis=0) / count
    away = tl.where(inside, values - mean, 0.0)
    return mean, tl.sum(tl.sum(away * away, axis=1), axis=0)


@triton.jit(do_not_specialize=["first"])
def _moments_kernel(
    volume, slots, scale, offset, low, high, prediction, moments, first, masked, num_tokens, grid_y, grid_x,
    stride_b, stride_z, stride_y, stride_x,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, PATCHES: tl.constexpr, ELEMENTS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Per tile: voxels, mean and squared distances of the mosaic, then of the true volume (6 numbers)."""
    true, mosaic, _, live, inside = _load_pair(
        volume, slots, scale, offset, low, high, prediction, first + tl.program_id(1), masked, num_tokens, grid_y,
        grid_x, stride_b, stride_z, stride_y, stride_x, PZ, PY, PX, PATCHES, ELEMENTS, UNIT,
    )  # fmt: skip
    count = tl.sum(live.to(tl.int32), axis=0).to(tl.float32) * (PZ * PY * PX)
    out = moments + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 6
    mean, away = _moments(mosaic, inside, count)
    tl.store(out, count)
    tl.store(out + 1, mean)
    tl.store(out + 2, away)
    mean, away = _moments(true, inside, count)
    tl.store(out + 3, count)
    tl.store(out + 4, mean)
    tl.store(out + 5, away)


@triton.jit
def _statistics_kernel(moments, statistics, tiles, voxels, STD: tl.constexpr, TILES: tl.constexpr):
    """Over all tiles of a volume, in float64: mean, std + STD, and the factor of the gradient's second term."""
    which = tl.program_id(0)  # 2 · sample + (0 mosaic, 1 true)
    at = tl.arange(0, TILES)
    base = moments + (which // 2).to(tl.int64) * tiles * 6 + which % 2 * 3
    count = tl.load(base + at * 6, mask=at < tiles, other=0.0).to(tl.float64)
    means = tl.load(base + at * 6 + 1, mask=at < tiles, other=0.0).to(tl.float64)
    away = tl.load(base + at * 6 + 2, mask=at < tiles, other=0.0).to(tl.float64)
    mean = tl.sum(count * means, axis=0) / voxels
    far = tl.where(at < tiles, means - mean, 0.0)
    deviation = tl.sqrt(tl.sum(away + count * far * far, axis=0) / (voxels - 1))
    factor = (deviation + STD) / ((voxels - 1) * tl.where(deviation == 0.0, 1.0, deviation))
    out = statistics + which * 3
    tl.store(out, mean.to(tl.float32))
    tl.store(out + 1, (deviation + STD).to(tl.float32))
    tl.store(out + 2, tl.where(deviation == 0.0, 0.0, factor).to(tl.float32))


@triton.jit(do_not_specialize=["first"])
def _assemble_kernel(
    volume, slots, scale, offset, low, high, prediction, statistics, scored, first, masked, num_tokens, grid_y, grid_x,
    stride_b, stride_z, stride_y, stride_x, out_b, out_z, out_y,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, PATCHES: tl.constexpr, ELEMENTS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Z-scored mosaics, then true volumes, of a group: float32 (2, samples, Z, Y, X)."""
    sample = tl.program_id(1)
    true, mosaic, token, _, inside = _load_pair(
        volume, slots, scale, offset, low, high, prediction, first + sample, masked, num_tokens, grid_y, grid_x,
        stride_b, stride_z, stride_y, stride_x, PZ, PY, PX, PATCHES, ELEMENTS, UNIT,
    )  # fmt: skip
    at = patch_offsets(token * 0 + sample, token, grid_y, grid_x, out_b, out_z, out_y, 1, PZ, PY, PX, ELEMENTS, PX)
    of = statistics + sample * 6
    tl.store(scored + at, (mosaic - tl.load(of)) / tl.load(of + 1), mask=inside)
    scored += tl.num_programs(1).to(tl.int64) * out_b * PX
    tl.store(scored + at, (true - tl.load(of + 3)) / tl.load(of + 4), mask=inside)


@triton.jit
def _compare_kernel(
    spectra, sums, weight_z, weight_y, weight_x, least, amplitude, log_scale, log_offset,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """Half spectra (2, samples, Z, Y, X//2+1) of mosaics and true volumes → per block the sum of differences over the
    full spectrum and ⟨g,ŷ⟩; G is written over the mosaics' spectra."""
    HALF: tl.constexpr = X // 2 + 1
    BINS: tl.constexpr = Z * Y * HALF
    bins = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = bins < BINS
    z, y, x = bins // (Y * HALF), bins // HALF % Y, bins % HALF
    kz, ky, kx = tl.minimum(z, Z - z), tl.minimum(y, Y - y), x
    if WIDE:
        kz, ky, kx = kz.to(tl.int64), ky.to(tl.int64), kx.to(tl.int64)
    far = weight_z * kz * kz + weight_y * ky * ky + weight_x * kx * kx
    kept = ((far >= least) & live).to(tl.float32)
    twice = tl.where((x == 0) | (2 * x == X), 1.0, 2.0)

    pairs = tl.program_id(0) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    both = pairs < 2 * BINS
    mosaic = spectra + tl.program_id(1).to(tl.int64) * (BINS * 2)
    true = mosaic + tl.num_programs(1).to(tl.int64) * (BINS * 2)
    re, im = tl.split(tl.reshape(tl.load(mosaic + pairs, mask=both, other=0.0), (BLOCK, 2)))
    true_re, true_im = tl.split(tl.reshape(tl.load(true + pairs, mask=both, other=0.0), (BLOCK, 2)))
    if MODE == 2:
        error, by_re, by_im = compare_complex(re - true_re, im - true_im, kept, amplitude)
    else:
        wanted = feature(true_re, true_im, amplitude, log_scale, log_offset, MODE)
        error, by_re, by_im = compare_features(re, im, wanted, kept, amplitude, log_scale, log_offset, MODE)
    out = sums + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 2
    tl.store(out, tl.sum(twice * error, axis=0))
    if GRADIENT:
        tl.store(out + 1, tl.sum(twice * (by_re * re + by_im * im), axis=0))
        tl.store(mosaic + pairs, tl.reshape(tl.join(by_re, by_im), (2 * BLOCK,)), mask=both)


@triton.jit(do_not_specialize=["first"])
def _gradient_kernel(
    ids, slots, prediction, inverse, statistics, along, gradient, first, count, masked, num_tokens, grid_y, grid_x,
    stride_b, stride_z, stride_y,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, PATCHES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """∂L/∂x̂ at the predicted tokens of a group, from g and ⟨g,ŷ⟩; 0 for an id that a later one replaced."""
    VOXELS: tl.constexpr = PZ * PY * PX
    slot = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    live = slot < count
    sample = slot // masked
    every = first.to(tl.int64) * masked + slot
    token = load_tokens(ids, every, live, num_tokens)
    at = patch_offsets(sample, token, grid_y, grid_x, stride_b, stride_z, stride_y, 1, PZ, PY, PX, ELEMENTS, PX)
    inside = patch_mask(live, VOXELS, ELEMENTS)
    g = tl.load(inverse + at, mask=inside, other=0.0)
    out = every[:, None] * VOXELS + tl.arange(0, ELEMENTS)[None, :]
    predicted = tl.load(prediction + out, mask=inside, other=0.0).to(tl.float32)
    of = statistics + sample * 6
    mean = tl.load(of, mask=live, other=0.0)
    std = tl.load(of + 1, mask=live, other=1.0)
    turn = tl.load(of + 2, mask=live, other=0.0) * tl.load(along + sample, mask=live, other=0.0)
    scored = (predicted - mean[:, None]) / std[:, None]
    by = (g - scored * turn[:, None]) / std[:, None]
    owner = tl.load(slots + (first + sample).to(tl.int64) * num_tokens + token, mask=live, other=-1)
    by = tl.where((owner == slot % masked)[:, None], by, 0.0)
    tl.store(gradient + out, by.to(gradient.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------------- operator


@torch.library.custom_op("brainscale::spectral_volume", mutates_args=())
def spectral_volume_op(
    volume: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor, ids: Tensor, prediction: Tensor,
    patch_zyx: Sequence[int], mode: str, cutoff_fraction: float, log_scale: float, paper: bool, needs_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the gradient of the sum over bins and samples in prediction's dtype (empty where not needed)."""
    form = Form(mode, cutoff_fraction, log_scale, paper)
    stored = Stored(volume, *(v.contiguous() for v in (scale, offset, low, high)))
    ids, prediction = ids.contiguous(), prediction.contiguous()
    grid = [v // p for v, p in zip(volume.shape[2:], patch_zyx)]
    slots = slot_of_token(ids, math.prod(grid))
    gradient = torch.empty_like(prediction) if needs_gradient else prediction.new_empty(0)
    group = max(1, GROUP_VOXELS // math.prod(volume.shape[2:]))
    sums = [
        _group(stored, slots, ids, prediction, gradient, patch_zyx, form, first, min(group, len(ids) - first))
        for first in range(0, len(ids), group)
    ]
    return mean_of(torch.cat(sums), _terms(volume, form)), gradient


def _group(
    stored: Stored, slots: Tensor, ids: Tensor, prediction: Tensor, gradient: Tensor, patch_zyx: Sequence[int],
    form: Form, first: int, samples: int,
) -> Tensor:  # fmt: skip
    """The loss's sums of samples first, first + 1, …; their part of `gradient`, unless it is empty, is written."""
    volume, masked = stored.volume, ids.shape[1]
    z, y, x = volume.shape[2:]
    pz, py, px = patch_zyx
    grid = (z // pz) * (y // py) * (x // px), y // py, x // px
    strides, unit = volume_strides(volume, patch_zyx)
    patches, elements = tile(patch_zyx)
    tiles, warps = blocks(grid[0], patches), tile_warps(elements)
    flat = (z * y * x // px, y * x // px, x // px)
    shape: dict[str, Any] = {"PZ": pz, "PY": py, "PX": px, "PATCHES": patches, "ELEMENTS": elements}
    source = (volume, slots, *stored[1:], prediction)

    moments = prediction.new_empty((samples, tiles, 6), dtype=torch.float32)
    launch(
        _moments_kernel, (tiles, samples), *source, moments, first, masked, *grid, *strides, **shape, UNIT=unit,
        num_warps=warps,
    )  # fmt: skip
    statistics = prediction.new_empty((samples, 2, STATISTICS), dtype=torch.float32)
    launch(
        _statistics_kernel, (2 * samples,), moments, statistics, tiles, z * y * x, STD=STD_OFFSET,
        TILES=triton.next_power_of_2(tiles),
    )  # fmt: skip
    scored = prediction.new_empty((2, samples, z, y, x), dtype=torch.float32)
    launch(
        _assemble_kernel, (tiles, samples), *source, statistics, scored, first, masked, *grid, *strides, *flat,
        **shape, UNIT=unit, num_warps=warps,
    )  # fmt: skip
    spectra = torch.fft.rfftn(scored, dim=(2, 3, 4)).contiguous()
    del scored
    bins = blocks(z * y * (x // 2 + 1), BLOCK_BINS)
    sums = prediction.new_empty((samples, bins, 2), dtype=torch.float32)
    *weights, least = cutoff_integers((z, y, x), form.cutoff_fraction)
    least = max(least, 1)  # zero frequency is 0 in both, but for rounding
    launch(
        _compare_kernel, (bins, samples), torch.view_as_real(spectra), sums, *weights, least, *scales((z, y, x), form),
        Z=z, Y=y, X=x, BLOCK=BLOCK_BINS, MODE=MODES.index(form.mode), WIDE=3 * math.lcm(z, y, x) ** 2 >= 2**31,
        GRADIENT=bool(gradient.numel()),
    )  # fmt: skip
    if gradient.numel():
        inverse = torch.fft.irfftn(spectra[0], s=(z, y, x), dim=(1, 2, 3), norm="forward").contiguous()
        along = sums[..., 1].sum(1, dtype=torch.float64).float()
        launch(
            _gradient_kernel, (blocks(samples * masked, patches),), ids, slots, prediction, inverse, statistics, along,
            gradient, first, samples * masked, masked, *grid, *flat, **shape, num_warps=warps,
        )  # fmt: skip
    return sums[..., 0].sum(1, dtype=torch.float64)


def _terms(volume: Tensor, form: Form) -> float:
    z, y, x = (int(v) for v in volume.shape[2:])  # concrete also while a compiler traces
    return divisor((z, y, x), form) * len(volume)


@spectral_volume_op.register_fake
def _(
    volume: Tensor, scale: Tensor, offset: Tensor, low: Tensor, high: Tensor, ids: Tensor, prediction: Tensor,
    patch_zyx: Sequence[int], mode: str, cutoff_fraction: float, log_scale: float, paper: bool, needs_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return fake_loss(prediction, needs_gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the second output
    ctx.terms = _terms(inputs[0], Form(*inputs[8:12]))


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (unit,) = ctx.saved_tensors
    return *[None] * 6, grad if grad is None else unit_gradient(unit, grad, ctx.terms), *[None] * 6


spectral_volume_op.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------- public


def spectral_volume(stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Sequence[int], form: Form) -> Tensor:
    """The loss, a float32 scalar, by the kernels; differentiable in `prediction` (once). Errors: the reference's, and
    ValueError for predictions of another dtype than TOKEN_DTYPES."""
    check_prediction(stored, ids, prediction, patch_zyx)
    check_dtype(prediction)
    check_form(form)
    needs_gradient = prediction.requires_grad and torch.is_grad_enabled()
    return spectral_volume_op(*stored, ids, prediction, patch_zyx, *form, needs_gradient)[0]
