"""The one door to the kernels: which implementation of an operation runs, and the call that runs it."""

import torch
from torch import Tensor

from brainscale.geometry import Zyx
from brainscale.settings import InputError
from brainscale_kernels.patch_gather import patch_gather_reference


def choose(kernels: str, device: torch.device) -> str:
    """The implementation that the setting `kernels` means on a device: "reference", plain PyTorch, is the only one.

    Raises InputError for a setting other than "auto" and "reference".
    """
    if kernels not in ("auto", "reference"):
        raise InputError(f'kernels = "{kernels}" is not known on {device.type}; set "auto" or "reference"')
    return "reference"


def patch_gather(
    volume: Tensor,
    ids: Tensor,
    patch_zyx: Zyx,
    scale: Tensor,
    offset: Tensor,
    low: Tensor,
    high: Tensor,
    dtype: torch.dtype,
    kernels: str,
) -> Tensor:
    """Normalised tokens (B,K,P) of the selected patches of a stored volume (B,1,Z,Y,X). Contract, shapes and errors:
    `brainscale_kernels.patch_gather.patch_gather_reference`; `kernels` as for `choose`."""
    choose(kernels, volume.device)
    return patch_gather_reference(volume, ids, patch_zyx, scale, offset, low, high, dtype)
