"""What a loss gets beside its reconstruction: the spectral term's form and weight, and what keeps embeddings apart.

The spectral term itself, its formula and its source (arXiv 2606.13315) stand in `brainscale_kernels`: spectrum.py,
spectral_volume.py and spectral_patch.py. The paper writes it on un-normalised transforms and averages over all bins, so
that its weight depends on the size of the volume; the native form uses orthonormal transforms, one fixed logarithmic
scale and the mean over the bins that are kept.

`vcr` and `sigreg` judge the embeddings of the volumes of all ranks at once, and every rank returns the loss of the
whole batch. A sum over ranks adds up the ranks' gradients in its backward pass, so what a rank's parameters get is its
volumes' part of the gradient times the number of ranks, and the usual averaging of gradients over ranks (DDP,
DeepSpeed) makes of these the gradient of one process with the whole batch: no further factor is needed.

Letters: B volumes of this rank, n volumes of all ranks, T tokens, C width, S slices, K knots.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from brainscale.config import Regularizer, Spectral
from brainscale.sampling import words
from brainscale.schedules import linear_ramp
from brainscale.settings import InputError
from brainscale_kernels.spectrum import Form

DIRECTIONS = 3
"""Stream of `sampling.words` from which sigreg's slices are seeded."""
EPSILON = 1e-4
"""Added to variances, so that the root has a slope at 0 (VICReg)."""


class Vcr(NamedTuple):
    """Each (), not weighted. variance: how far standard deviations fall short; covariance: of different dims."""

    variance: Tensor
    covariance: Tensor


def spectral_form(settings: Spectral) -> Form:
    """The form of the loss that the settings ask for."""
    return Form(settings.mode, settings.cutoff_fraction, settings.log_scale, settings.compat == "paper")


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


def vcr(pooled_BC: Tensor, target_std: float) -> Vcr:
    """Variance and covariance terms of one vector per volume: the mean over C of max(0, target_std − sqrt(var + 1e-4)),
    and the sum of squared off-diagonal covariances / C, both with the n − 1 estimate over the volumes of all ranks.

    Computed in float64 for float64 input and in float32 for any other, under autocast too. Collective; every rank gives
    one volume at least. Raises InputError when there is one volume in all.
    Source: VICReg (arXiv 2105.04906) with moments over all ranks.
    """
    with torch.autocast(pooled_BC.device.type, enabled=False):
        x_BC = _at_least_float32(pooled_BC)
        covariance_CC = _covariance(x_BC, _volumes(x_BC))
        return Vcr(_shortfall(covariance_CC.diagonal(), target_std), _off_diagonal(covariance_CC))


def vcr_tokens(tokens_BTC: Tensor, target_std: float) -> Vcr:
    """The same terms of all tokens, whose positions all volumes of all ranks share: standard deviations over the n
    volumes for each of the T·C pairs of position and dim, and the covariance of C over all n·T tokens.

    Precision, ranks and errors as in `vcr`. Source: arXiv 2606.13315, whose statistics are those of each rank.
    """
    with torch.autocast(tokens_BTC.device.type, enabled=False):
        x_BTC = _at_least_float32(tokens_BTC)
        n = _volumes(x_BTC)
        variance_TC = sum_over_ranks(_centred(x_BTC, n).square().sum(dim=0)) / (n - 1)
        covariance_CC = _covariance(x_BTC.flatten(0, 1), n * x_BTC.shape[1])
        return Vcr(_shortfall(variance_TC, target_std), _off_diagonal(covariance_CC))


def sigreg(pooled_BC: Tensor, settings: Regularizer, seed: int, step: int) -> Tensor:
    """Distance () of one vector per volume to a standard normal: the Epps–Pulley statistic of their projections, mean
    over `settings.slices` random directions, which are drawn anew in every step and are the same on all ranks.

    Per slice n ∫ |φ(t) − exp(−t²/2)|² exp(−t²/2) dt, with φ the characteristic function of the n projections, by the
    trapezoid rule on `settings.knots` points in 0..3, twice, since the integrand is even. Precision, ranks and errors
    as in `vcr`. Source: LeJEPA (arXiv 2511.08544).
    """
    with torch.autocast(pooled_BC.device.type, enabled=False):
        x_BC = _at_least_float32(pooled_BC)
        n = _volumes(x_BC)
        directions_SC = directions(x_BC.shape[1], settings.slices, seed, step, x_BC.dtype)
        directions_SC = directions_SC.to(x_BC.device, non_blocking=True)  # else the host waits for the GPU
        t_K = torch.linspace(0, 3, settings.knots, dtype=x_BC.dtype, device=x_BC.device)
        normal_K = (-t_K.square() / 2).exp()
        angle_BSK = (x_BC @ directions_SC.T)[..., None] * t_K
        sums = torch.stack((angle_BSK.cos().sum(dim=0), angle_BSK.sin().sum(dim=0)))
        real_SK, imaginary_SK = sum_over_ranks(sums) / n
        error_SK = (real_SK - normal_K).square() + imaginary_SK.square()
        return (2 * n * torch.trapezoid(error_SK * normal_K, t_K)).mean()


def directions(width: int, slices: int, seed: int, step: int, dtype: torch.dtype) -> Tensor:
    """(S,C) unit vectors on the CPU, uniform on the sphere and pure in the arguments."""
    generator = torch.Generator().manual_seed(int(words(seed, DIRECTIONS, step, 1)[0]))
    return F.normalize(torch.randn(slices, width, generator=generator, dtype=dtype), dim=1)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of a tensor of equal shape over all ranks, on every rank; its gradient is the sum of the ranks' gradients.

    `torch.distributed.nn.functional.all_reduce` does the same and is deprecated from torch 2.13 on.
    """
    return _SumOverRanks.apply(x) if _ranks() > 1 else x


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _volumes(x: Tensor) -> Tensor:
    """n, as a () tensor of x's dtype and device, so that the host does not wait for it."""
    if _ranks() == 1 and len(x) < 2:
        raise InputError(
            f"the regularizer got {len(x)} volume over all ranks, and needs at least 2 to see how embeddings differ; "
            "set a larger train.micro_batch_volumes or start more ranks"
        )
    return sum_over_ranks(x.new_full((), len(x)))


def _centred(x: Tensor, n: Tensor) -> Tensor:
    """x less its mean over the n rows of all ranks."""
    return x - sum_over_ranks(x.sum(dim=0)) / n


def _covariance(x_NC: Tensor, n: Tensor) -> Tensor:
    """(C,C) over the n rows of all ranks. Centred first: E[x²] − E[x]² loses its digits when the mean is large."""
    centred_NC = _centred(x_NC, n)
    return sum_over_ranks(centred_NC.T @ centred_NC) / (n - 1)


def _shortfall(variance: Tensor, target_std: float) -> Tensor:
    return F.relu(target_std - (variance + EPSILON).sqrt()).mean()


def _off_diagonal(covariance_CC: Tensor) -> Tensor:
    return 2 * covariance_CC.triu(1).square().sum() / len(covariance_CC)
