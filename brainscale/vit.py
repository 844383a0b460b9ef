"""The encoder: gathered patches in, tokens out. Patch embedding is gather → linear, never a convolution over the whole
volume (only visible patches are touched, and bf16 Conv3d with kernel = stride is 10-20 times slower in current torch).
"""

import torch
from torch import Tensor, nn

from brainscale.config import ModelSettings
from brainscale.geometry import Zyx, token_coordinates
from brainscale.layers import Trunk
from brainscale.masking import Masks


class Encoder(nn.Module):
    """3D vision transformer over any subset of a volume's tokens."""

    def __init__(self, settings: ModelSettings, grid_zyx: Zyx) -> None:
        """grid_zyx: tokens per axis of the volumes it will see."""
        super().__init__()
        z, y, x = settings.patch_voxels_zyx
        self.embed = nn.Linear(z * y * x, settings.width)
        coordinates = torch.from_numpy(token_coordinates(grid_zyx))
        self.trunk = Trunk(settings.width, settings.depth, settings.heads, coordinates, settings.position)

    def forward(self, patches_BKP: Tensor, ids_BK: Tensor, outputs: int | None = None) -> Tensor:
        """Normalised patches (B,K,P) at grid ids (B,K) → tokens (B,K,C), or of the last `outputs` patches alone."""
        return self.trunk(self.embed(patches_BKP), ids_BK, outputs)


class Decoder(nn.Module):
    """Encoded visible tokens in, one vector for each masked token out: MAE's decoder (voxels) and JEPA's predictor
    (the teacher's tokens). A module of its own, since ZeRO stage 3 gathers weights when their module is called."""

    def __init__(
        self, settings: ModelSettings, grid_zyx: Zyx, width: int, depth: int, heads: int, outputs: int
    ) -> None:
        """settings: of the encoder; width, depth, heads: of the decoder's own blocks; outputs: length of a vector."""
        super().__init__()
        self.embed = nn.Linear(settings.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.trunk = Trunk(width, depth, heads, torch.from_numpy(token_coordinates(grid_zyx)), settings.position)
        self.head = nn.Linear(width, outputs)

    def forward(self, encoded_BKC: Tensor, masks: Masks) -> Tensor:
        """(B,Kv,C) → (B,Km,outputs)."""
        seen = self.embed(encoded_BKC)
        hidden = self.mask_token.expand(*masks.masked.shape, -1).to(seen.dtype)
        ids = torch.cat((masks.visible, masks.masked), dim=1)
        return self.head(self.trunk(torch.cat((seen, hidden), dim=1), ids, masks.masked.shape[1]))
