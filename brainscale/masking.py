"""Which tokens are hidden: exact counts per sample, pure in (seed, global sample index).

Every cell of the grid is equally likely to be masked: the masked set is the head of a uniformly random permutation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from brainscale.config import Mask
from brainscale.sampling import MASK, words
from brainscale.settings import InputError


@dataclass(frozen=True)
class Masks:
    """Token ids of a batch, each row sorted: visible (B, Kv) and masked (B, Km) int64; Kv + Km = N."""

    visible: Tensor
    masked: Tensor

    def to(self, device: torch.device) -> "Masks":
        """The same masks on another device."""
        return Masks(self.visible.to(device, non_blocking=True), self.masked.to(device, non_blocking=True))


def masked_count(fraction: float, tokens: int) -> int:
    """round(fraction × tokens). Raises InputError when that hides nothing or everything."""
    count = round(fraction * tokens)
    if not 0 < count < tokens:
        raise InputError(
            f"mask.fraction = {fraction} of {tokens} tokens hides {count}: at least one must be hidden and one seen; "
            "use a larger grid, a smaller patch or another fraction"
        )
    return count


def draw_masks(mask: Mask, seed: int, sample_index: np.ndarray, tokens: int) -> Masks:
    """MAE masks of a batch. sample_index: (B,) global sample indices. Masks are on the CPU."""
    count = masked_count(mask.fraction, tokens)
    order = np.stack([np.argsort(words(seed, MASK, int(i), tokens), kind="stable") for i in sample_index])
    return Masks(
        visible=torch.from_numpy(np.sort(order[:, count:], axis=1)),
        masked=torch.from_numpy(np.sort(order[:, :count], axis=1)),
    )
