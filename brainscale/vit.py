"""The encoder: gathered patches in, tokens out. Patch embedding is gather → linear, never a convolution over the whole
volume (only visible patches are touched, and bf16 Conv3d with kernel = stride is 10-20 times slower in current torch).
"""

import torch
from torch import Tensor, nn

from brainscale.config import ModelSettings
from brainscale.geometry import Zyx, token_coordinates
from brainscale.layers import Trunk, block_flops


class Encoder(nn.Module):
    """3D vision transformer over any subset of a volume's tokens."""

    def __init__(self, settings: ModelSettings, grid_zyx: Zyx) -> None:
        """grid_zyx: tokens per axis of the volumes it will see."""
        super().__init__()
        z, y, x = settings.patch_voxels_zyx
        self.embed = nn.Linear(z * y * x, settings.width)
        coordinates = torch.from_numpy(token_coordinates(grid_zyx))
        self.trunk = Trunk(settings.width, settings.depth, settings.heads, coordinates, settings.position)

    def forward(self, patches_BKP: Tensor, ids_BK: Tensor) -> Tensor:
        """Normalised patches (B,K,P) at grid ids (B,K) → tokens (B,K,C)."""
        return self.trunk(self.embed(patches_BKP), ids_BK)


def encoder_flops(settings: ModelSettings, tokens: int) -> int:
    """Forward FLOPs of one sample with `tokens` tokens."""
    z, y, x = settings.patch_voxels_zyx
    return 2 * tokens * z * y * x * settings.width + settings.depth * block_flops(tokens, settings.width)
