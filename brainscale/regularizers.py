"""The spectral term's place in a run: which form, and with what weight in which step.

The term itself, its formula and its source (arXiv 2606.13315) stand in `brainscale_kernels`: spectrum.py,
spectral_volume.py and spectral_patch.py. The paper writes it on un-normalised transforms and averages over all bins, so
that its weight depends on the size of the volume; the native form uses orthonormal transforms, one fixed logarithmic
scale and the mean over the bins that are kept.
"""

from brainscale.config import Spectral
from brainscale.schedules import linear_ramp
from brainscale_kernels.spectrum import Form


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
