"""The spectral term of the masked autoencoder: how far a reconstruction's Fourier magnitudes are from the target's.

Formula and published form: Ergün, Chandarana, Sodickson, Ünal, arXiv 2606.13315. The paper writes it on un-normalised
transforms and averages over all bins, so that its weight depends on the size of the volume; the native form here uses
orthonormal transforms, one fixed logarithmic scale and the mean over the bins that are kept. Letters: B batch, K masked
tokens, P voxels of a patch, Z Y X voxels. A half spectrum has shape (Z, Y, X//2+1), as `torch.fft.rfftn` gives it.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from brainscale.config import Spectral
from brainscale.geometry import Zyx
from brainscale.schedules import linear_ramp
from brainscale.settings import InputError

STD_OFFSET = 1e-6
"""Added to a volume's standard deviation in its z-score (the paper's constant)."""
PAPER_LOG_OFFSET = 1e-6
"""Added to |F| inside log1p in the published form."""
RADIUS_TOLERANCE = 1e-9
"""Bins can lie exactly on the cut-off (0.3 on a cube of 160 voxels, 0.2 on one of 31): kept, whatever the rounding."""


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
    """(Z, Y, X//2+1) float64 on the CPU: length of each bin's frequency in cycles per voxel, divided by the largest on
    that grid, so that the corner has 1 (the paper's corner-normalised radius).

    Raises InputError for a grid of one voxel, which has no frequency but zero.
    """
    z, y = (torch.fft.fftfreq(n, dtype=torch.float64, device="cpu") for n in shape_zyx[:2])
    x = torch.fft.rfftfreq(shape_zyx[2], dtype=torch.float64, device="cpu")
    length = (z[:, None, None].square() + y[:, None].square() + x.square()).sqrt()
    largest = length.max()
    if largest == 0:
        raise InputError(
            f"the spectral term got a grid of {shape_zyx} voxels (z, y, x), which has no frequency but zero; "
            "use a larger patch or spectral.weight = 0"
        )
    return length / largest


@lru_cache(maxsize=8)
def _bin_weights(
    shape_zyx: Zyx, cutoff_fraction: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(Z, Y, X//2+1) Hermitian weights, zero below the cut-off, and their sum: the kept bins of the full spectrum."""
    # A tensor first made while evaluating under inference_mode could not be saved for a later backward.
    with torch.inference_mode(False):
        kept = radius(shape_zyx) >= cutoff_fraction - RADIUS_TOLERANCE
        weights = kept * hermitian_weights(shape_zyx, "cpu", torch.float64)
        return weights.to(device=device, dtype=dtype), weights.sum().item()


def spectral_volume_loss(mosaic: Tensor, target: Tensor, settings: Spectral) -> Tensor:
    """Mean squared difference of the spectra of two volumes (B,1,Z,Y,X) of any dtype; a scalar, at least float32.

    `mosaic` holds true voxels where tokens are visible and predictions where they are masked; `target` the true ones.
    Each volume of both is z-scored by itself, x ↦ (x − mean) / (std + 1e-6) with std over N−1, so the term sees neither
    gain nor offset. With F̂ and F their 3D transforms, `settings.mode` compares

        logmag     (log1p(s·|F̂|) − log1p(s·|F|))²
        magnitude  (|F̂| − |F|)²
        complex    |F̂ − F|²

    at the bins whose `radius` is at least `settings.cutoff_fraction`. Native: orthonormal transform, s =
    `settings.log_scale`, mean over the kept bins of the full spectrum and over the batch. `compat = "paper"`:
    un-normalised transform, log1p(|F| + 1e-6), sum over the kept bins divided by all Z·Y·X of them. Where |F̂| is 0 the
    gradient of |F̂| is taken as 0. float64 stays float64; lower precisions are widened to float32. autocast changes
    nothing: none of the operations used is one that it runs in lower precision.

    Raises InputError when the two are not volumes of one shape.
    """
    if mosaic.shape != target.shape or mosaic.ndim != 5 or mosaic.shape[1] != 1:
        raise InputError(
            f"the spectral term got a mosaic of shape {tuple(mosaic.shape)} and a target of {tuple(target.shape)}; "
            "both must be (B, 1, Z, Y, X) of one shape"
        )
    return _spectral_error(_z_scored(_widened(mosaic)), _z_scored(_widened(target)), settings)


def spectral_patch_loss(prediction: Tensor, target: Tensor, patch_zyx: Zyx, settings: Spectral) -> Tensor:
    """The native form on each masked patch by itself: prediction and target (B,K,P) with P = pz·py·px in z, y, x order
    (as `geometry.patchify` gives it) → the mean over kept bins, patches and batch; a scalar, at least float32.

    The values are taken as they come, in units of the volume's standard deviation: a patch is not z-scored again, since
    that would blow up the noise of flat patches. Its mean is the bin at radius 0, which any `cutoff_fraction` above 0
    leaves out; at 0 it is compared like every other bin.

    Raises InputError for shapes that do not fit and for `compat = "paper"`, which is defined on whole volumes only.
    """
    if settings.compat == "paper":
        raise InputError('spectral.compat = "paper" is defined on whole volumes; set spectral.scope = "volume"')
    if prediction.shape != target.shape or prediction.ndim != 3 or prediction.shape[2] != math.prod(patch_zyx):
        raise InputError(
            f"the spectral term got predictions of shape {tuple(prediction.shape)} and targets of "
            f"{tuple(target.shape)}; both must be (B, K, {math.prod(patch_zyx)}) for patches of {patch_zyx} (z, y, x)"
        )
    return _spectral_error(
        _widened(prediction).unflatten(2, patch_zyx), _widened(target).unflatten(2, patch_zyx), settings
    )


def full_weight(settings: Spectral) -> float:
    """The weight of a step that is due after the warm-up."""
    return spectral_weight(settings, settings.every_steps * settings.warmup_steps)


def spectral_weight(settings: Spectral, step: int) -> float:
    """Weight of the term in the loss of optimizer step `step` (from 0): λ times a linear ramp on every
    `settings.every_steps`-th step, 0.0 on the others, where the term need not be computed.

    `compat = "paper"` divides by `every_steps` as well (the published amortisation: the gradient's mean weight is
    λ / every_steps²). Two habits of the published code are left out: between due steps it adds the last value as a
    constant, which moves the reported loss and no parameter; and it replaces a loss that is not finite or above 1000
    by 0, where a run here stops.
    """
    if step % settings.every_steps:
        return 0.0
    weight = settings.weight * linear_ramp(step, settings.warmup_steps)
    return weight / settings.every_steps if settings.compat == "paper" else weight


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _z_scored(volumes: Tensor) -> Tensor:
    """(B,1,Z,Y,X), each volume by itself. A constant one becomes exactly 0, with gradient 0 through its deviation."""
    std, mean = torch.std_mean(volumes, dim=(1, 2, 3, 4), correction=1, keepdim=True)
    return (volumes - mean) / (std + STD_OFFSET)


def _spectral_error(prediction: Tensor, target: Tensor, settings: Spectral) -> Tensor:
    """Mean over all leading axes of the squared difference of the spectra over the last three."""
    paper = settings.compat == "paper"
    norm, log_scale, log_offset = ("backward", 1.0, PAPER_LOG_OFFSET) if paper else ("ortho", settings.log_scale, 0.0)
    predicted = torch.fft.rfftn(prediction, dim=(-3, -2, -1), norm=norm)
    true = torch.fft.rfftn(target, dim=(-3, -2, -1), norm=norm)
    if settings.mode == "complex":
        squares = torch.view_as_real(predicted - true).square().sum(-1)
    elif settings.mode == "magnitude":
        squares = (predicted.abs() - true.abs()).square()
    else:
        logs = (torch.log1p(log_scale * spectrum.abs() + log_offset) for spectrum in (predicted, true))
        squares = (next(logs) - next(logs)).square()
    z, y, x = prediction.shape[-3:]
    weights, kept_bins = _bin_weights((z, y, x), settings.cutoff_fraction, prediction.device, squares.dtype)
    bins = z * y * x if paper else kept_bins
    return (weights * squares).sum() / (bins * math.prod(prediction.shape[:-3]))
