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
from brainscale_kernels.patch_gather import Stored

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
