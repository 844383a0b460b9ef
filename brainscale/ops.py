"""The one door to the kernels: which implementation of an operation runs, and the call that runs it.

Every operation has a plain PyTorch form, which is its definition, and a Triton form of the same contract; shapes, units
and errors stand in the file of each kernel. A Triton failure is an error, never a quiet change to the other form.
"""

import os

import torch
from torch import Tensor

from brainscale.geometry import Zyx
from brainscale.settings import InputError
from brainscale_kernels import patch_gather as gather
from brainscale_kernels import pixel_loss as pixel
from brainscale_kernels import spectral_patch as patches
from brainscale_kernels import spectral_volume as volumes
from brainscale_kernels.patch_gather import Stored
from brainscale_kernels.spectrum import Form

KERNELS = ("auto", "triton", "reference")


def choose(kernels: str, device: torch.device) -> str:
    """The implementation that the setting `kernels` means on a device: "triton" or "reference" (plain PyTorch).

    "auto" is Triton on a GPU and the reference on a CPU. Raises InputError for another setting, and for "triton" on a
    CPU outside Triton's interpreter.
    """
    if kernels not in KERNELS:
        raise InputError(f'kernels = "{kernels}" is not known; set "auto", "triton" or "reference"')
    if kernels == "auto":
        return "triton" if device.type == "cuda" else "reference"
    if kernels == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f'kernels = "triton" needs a GPU and got {device.type}; set kernels = "reference", or TRITON_INTERPRET=1 '
            "in the environment to run them, very slowly, in Triton's interpreter"
        )
    return kernels


def patch_gather(stored: Stored, ids: Tensor, patch_zyx: Zyx, dtype: torch.dtype, kernels: str) -> Tensor:
    """Normalised tokens (B,K,P) in `dtype` of the selected patches. Contract: `brainscale_kernels.patch_gather`."""
    if choose(kernels, stored.volume.device) == "triton":
        return gather.patch_gather(stored, ids, patch_zyx, dtype)
    return gather.patch_gather_reference(stored, ids, patch_zyx, dtype)


def patch_statistics(stored: Stored, ids: Tensor, patch_zyx: Zyx, kernels: str) -> tuple[Tensor, Tensor]:
    """Mean and variance (B,K,1) float32 of the values of the selected patches. Contract:
    `brainscale_kernels.patch_gather`."""
    if choose(kernels, stored.volume.device) == "triton":
        return gather.patch_gather_with_statistics(stored, ids, patch_zyx)[1:]
    return gather.patch_statistics_reference(gather.patch_gather_reference(stored, ids, patch_zyx))


def pixel_loss(
    stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Zyx, kind: str, normalize: bool, kernels: str
) -> Tensor:
    """Error of predicted patches (B,K,P), a scalar. Contract: `brainscale_kernels.pixel_loss`."""
    triton = choose(kernels, stored.volume.device) == "triton"
    run = pixel.pixel_loss if triton else pixel.pixel_loss_reference
    return run(stored, ids, prediction, patch_zyx, kind, normalize)


def spectral_loss(
    stored: Stored, ids: Tensor, prediction: Tensor, patch_zyx: Zyx, form: Form, scope: str, kernels: str
) -> Tensor:
    """Difference of spectra, a scalar: of the mosaic with predicted patches (B,K,P) (scope "volume"), or of each patch
    by itself ("patch"). Contracts: `brainscale_kernels.spectral_volume` and `spectral_patch`."""
    triton = choose(kernels, stored.volume.device) == "triton"
    if scope == "volume":
        run = volumes.spectral_volume if triton else volumes.spectral_volume_reference
    else:
        run = patches.spectral_patch if triton else patches.spectral_patch_reference
    return run(stored, ids, prediction, patch_zyx, form)


def refuse(kernels: str, device: torch.device, scope: str, patch_zyx: Zyx) -> None:
    """Raise InputError for what the chosen implementation of the spectral term would refuse in the first step."""
    if scope != "patch":
        return
    if max(patch_zyx) == 1:
        raise InputError(
            f'spectral.scope = "patch" got patches of {patch_zyx} voxels (z, y, x), which have no frequency but zero; '
            "use larger patches or spectral.weight = 0"
        )
    if choose(kernels, device) == "triton" and max(patch_zyx) > patches.LONGEST_AXIS:
        raise InputError(
            f'spectral.scope = "patch" got patches of {patch_zyx} voxels (z, y, x), and its kernel takes axes of at '
            f'most {patches.LONGEST_AXIS}; use smaller patches, spectral.scope = "volume" or kernels = "reference"'
        )
