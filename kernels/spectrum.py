"""What the spectral losses compare: which bins count, how two spectra differ, and the gradient of the difference.

With F̂ and F the 3D Fourier transforms of a prediction and its target, `Form.mode` compares at every kept bin

    logmag     (log1p(s·|F̂|) − log1p(s·|F|))²
    magnitude  (|F̂| − |F|)²
    complex    |F̂ − F|²

A bin is kept when its radius (cycles per voxel, divided by the largest on the grid, so that the corner has 1) is at
least `Form.cutoff_fraction`. Native: orthonormal transforms, s = `Form.log_scale`, mean over the kept bins of the full
spectrum. `Form.paper`: un-normalised transforms, log1p(|F| + 1e-6), sum over the kept bins divided by all Z·Y·X of
them. Source: Ergün, Chandarana, Sodickson, Ünal, arXiv 2606.13315. Where |F̂| is 0 its gradient is taken as 0.

Gradient, for a sum L over the full spectrum: with d the difference at a bin and h' its derivative by |F̂|,

    G = 2·d·h'·F̂/|F̂|   (complex: 2·(F̂ − F)),   ∂L/∂x = un-normalised inverse transform of G

A half spectrum has shape (Z, Y, X//2+1), as `torch.fft.rfftn` gives it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Zyx = tuple[int, int, int]

MODES = ("logmag", "magnitude", "complex")
PAPER_LOG_OFFSET = 1e-6
"""Added to |F| inside log1p in the published form."""
RADIUS_TOLERANCE = 1e-9
"""Bins can lie exactly on the cut-off (0.3 on a cube of 160 voxels, 0.2 on one of 31): kept, whatever the rounding."""


class Form(NamedTuple):
    """Which form of the loss."""

    mode: str = "logmag"
    cutoff_fraction: float = 0.3
    log_scale: float = math.sqrt(160**3)
    paper: bool = False


def check_form(form: Form) -> None:
    """Raise ValueError for a mode that does not exist."""
    if form.mode not in MODES:
        raise ValueError(f"the spectral term got mode {form.mode!r}, wanted one of {MODES}")


# ------------------------------------------------------------------------------------------- reference


def hermitian_weights(shape_zyx: Zyx, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """(X//2+1,) how often a bin of the half spectrum stands in the full one: 1 where it is its own conjugate plane
    (index 0, and X/2 for an even X), else 2. Broadcasts over a half spectrum."""
    size_x = shape_zyx[2]
    weights = torch.full((size_x // 2 + 1,), 2.0, device=device, dtype=dtype)
    weights[0] = 1.0
    if size_x % 2 == 0:
        weights[-1] = 1.0
    return weights


def radius(shape_zyx: Zyx) -> Tensor:
    """(Z, Y, X//2+1) float64 on the CPU: length of each bin's frequency, divided by the largest on that grid.

    Raises ValueError for a grid of one voxel, which has no frequency but zero.
    """
    z, y = (torch.fft.fftfreq(n, dtype=torch.float64, device="cpu") for n in shape_zyx[:2])
    x = torch.fft.rfftfreq(shape_zyx[2], dtype=torch.float64, device="cpu")
    length = (z[:, None, None].square() + y[:, None].square() + x.square()).sqrt()
    largest = length.max()
    if largest == 0:
        raise ValueError(
            f"the spectral term got a grid of {tuple(shape_zyx)} voxels (z, y, x), which has no frequency but zero"
        )
    return length / largest


@lru_cache(maxsize=8)
def bin_weights(
    shape_zyx: Zyx, cutoff_fraction: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(Z, Y, X//2+1) Hermitian weights, zero below the cut-off, and their sum: the kept bins of the full spectrum."""
    # A tensor first made while evaluating under inference_mode could not be saved for a later backward.
    with torch.inference_mode(False):
        kept = radius(shape_zyx) >= cutoff_fraction - RADIUS_TOLERANCE
        weights = kept * hermitian_weights(shape_zyx, "cpu", torch.float64)
        return weights.to(device=device, dtype=dtype), weights.sum().item()


def spectral_error(prediction: Tensor, target: Tensor, form: Form) -> Tensor:
    """Mean over all leading axes of the squared difference of the spectra over the last three, a scalar.

    float32 or float64 in; autocast changes nothing: none of the operations used is one that it runs in lower precision.
    """
    norm, log_scale, log_offset = ("backward", 1.0, PAPER_LOG_OFFSET) if form.paper else ("ortho", form.log_scale, 0.0)
    predicted = torch.fft.rfftn(prediction, dim=(-3, -2, -1), norm=norm)
    true = torch.fft.rfftn(target, dim=(-3, -2, -1), norm=norm)
    if form.mode == "complex":
        squares = torch.view_as_real(predicted - true).square().sum(-1)
    elif form.mode == "magnitude":
        squares = (predicted.abs() - true.abs()).square()
    else:
        logs = (torch.log1p(log_scale * spectrum.abs() + log_offset) for spectrum in (predicted, true))
        squares = (next(logs) - next(logs)).square()
    z, y, x = prediction.shape[-3:]
    weights, _ = bin_weights((z, y, x), form.cutoff_fraction, prediction.device, squares.dtype)
    return (weights * squares).sum() / (divisor((z, y, x), form) * math.prod(prediction.shape[:-3]))


# --------------------------------------------------------------------------------------------- kernels


@lru_cache(maxsize=8)
def divisor(shape_zyx: Zyx, form: Form) -> float:
    """What the sum over the bins of one grid is divided by: the kept ones of the full spectrum, or (paper) all."""
    if form.paper:
        return float(math.prod(shape_zyx))
    return bin_weights(shape_zyx, form.cutoff_fraction, torch.device("cpu"), torch.float64)[1]


def scales(shape_zyx: Zyx, form: Form) -> tuple[float, float, float]:
    """(amplitude, log_scale, log_offset) for spectra of un-normalised transforms: the modes compare amplitude·|F| or
    log1p(log_scale·|F| + log_offset)."""
    if form.paper:
        return 1.0, 1.0, PAPER_LOG_OFFSET
    amplitude = 1 / math.sqrt(math.prod(shape_zyx))
    return amplitude, form.log_scale * amplitude, 0.0


def cutoff_integers(shape_zyx: Zyx, cutoff_fraction: float) -> tuple[int, int, int, int]:
    """(wz, wy, wx, least): a bin whose distances from zero frequency are kz, ky, kx (each at most half the axis) is
    kept when wz·kz² + wy·ky² + wx·kx² ≥ least. Exact, where a radius in float32 would lose bins on the cut-off.

    """
    common = math.lcm(*shape_zyx)
    wz, wy, wx = ((common // n) ** 2 for n in shape_zyx)
    largest = sum(w * (n // 2) ** 2 for w, n in zip((wz, wy, wx), shape_zyx))
    least = math.ceil(max(cutoff_fraction - RADIUS_TOLERANCE, 0.0) ** 2 * largest)
    return wz, wy, wx, least


@triton.jit
def feature(re, im, amplitude, log_scale, log_offset, MODE: tl.constexpr):
    """What a bin is compared by: its magnitude, or (MODE 0, logmag) what log1p is taken of. MODE 1: magnitude."""
    magnitude = tl.sqrt_rn(re * re + im * im)
    if MODE == 1:
        return amplitude * magnitude
    return log_scale * magnitude + log_offset


@triton.jit
def compare_features(re, im, true, kept, amplitude, log_scale, log_offset, MODE: tl.constexpr):
    """Squared differences of a spectrum's features from the `true` ones where `kept` is 1 (not 0), and the gradient
    spectrum G of their sum. NaN stays NaN."""
    magnitude = tl.sqrt_rn(re * re + im * im)
    if MODE == 1:
        slope = amplitude
        difference = amplitude * magnitude - true
    else:
        u = log_scale * magnitude + log_offset
        slope = log_scale / (1.0 + u)
        # One logarithm of a ratio: two would need more registers than spectral_patch has. It is good to 1e-7, whatever
        # the spectra, so that only log_scale·|F| below some 1e-3 at every bin would be worse than in the reference.
        difference = tl.log((1.0 + u) / (1.0 + true))
    gain = 2.0 * kept * difference * slope / tl.where(magnitude == 0.0, 1.0, magnitude)
    return kept * difference * difference, gain * re, gain * im


@triton.jit
def compare_complex(re, im, kept, amplitude):
    """The same for mode complex, from the difference of two spectra."""
    gain = 2.0 * kept * amplitude * amplitude
    return 0.5 * gain * (re * re + im * im), gain * re, gain * im
