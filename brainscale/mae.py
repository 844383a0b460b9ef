"""The masked autoencoder: encode visible tokens only, decode all, compare masked voxels; plus the spectral term.

Source: MAE (arXiv 2111.06377) in 3D with the FFT-magnitude loss of arXiv 2606.13315 on the mosaic (true voxels where
visible, predictions where masked). Letters: B batch, N tokens, Kv visible, Km masked, P voxels of a patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brainscale.config import Config
from brainscale.geometry import Zyx, token_coordinates, token_grid, unpatchify
from brainscale.layers import Trunk, block_flops
from brainscale.loader import Batch
from brainscale.masking import Masks, masked_count
from brainscale.ops import patch_gather
from brainscale.regularizers import spectral_patch_loss, spectral_volume_loss
from brainscale.vit import Encoder, encoder_flops

NORMALISE_EPSILON = 1e-6
"""Added to a patch's variance when targets are normalised per patch: background patches are constant."""


class Output(NamedTuple):
    """What an objective returns, each (). loss: what is differentiated; the others: its parts, detached; spectral_loss
    is NaN where it was not computed. A tuple, since ZeRO stage 3 looks for tensors in tuples alone."""

    loss: Tensor
    pixel_loss: Tensor
    spectral_loss: Tensor


class Decoder(nn.Module):
    """Encoded visible tokens in, voxels of masked patches out. A module of its own, since ZeRO stage 3 gathers weights
    when the module that owns them is called."""

    def __init__(self, config: Config, grid_zyx: Zyx) -> None:
        super().__init__()
        settings, (z, y, x) = config.mae, config.model.patch_voxels_zyx
        width = settings.decoder_width
        coordinates = torch.from_numpy(token_coordinates(grid_zyx))
        self.embed = nn.Linear(config.model.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.trunk = Trunk(width, settings.decoder_depth, settings.decoder_heads, coordinates, config.model.position)
        self.to_voxels = nn.Linear(width, z * y * x)

    def forward(self, encoded_BKC: Tensor, masks: Masks) -> Tensor:
        """(B,Kv,C) → (B,Km,P)."""
        seen = self.embed(encoded_BKC)
        hidden = self.mask_token.expand(*masks.masked.shape, -1).to(seen.dtype)
        ids = torch.cat((masks.visible, masks.masked), dim=1)
        decoded = self.trunk(torch.cat((seen, hidden), dim=1), ids)
        return self.to_voxels(decoded[:, masks.visible.shape[1] :])


class Mae(nn.Module):
    """Objective "mae"."""

    def __init__(self, config: Config, volume_zyx: Zyx) -> None:
        """volume_zyx: voxels of the volumes (or crops) it will see."""
        super().__init__()
        self.config = config
        self.volume_zyx = volume_zyx
        self.grid_zyx = token_grid(volume_zyx, config.model.patch_voxels_zyx)
        self.encoder = Encoder(config.model, self.grid_zyx)
        self.decoder = Decoder(config, self.grid_zyx)

    def forward(self, batch: Batch, masks: Masks, spectral_weight: float) -> Output:
        """Loss of a batch whose tensors and masks are on the model's device."""
        prediction = self.predict(self.gather(batch, masks.visible), masks)
        target = self.gather(batch, masks.masked, torch.float32)
        compared, wanted = prediction, target
        if self.config.mae.normalize_target:
            mean, std = patch_statistics(target)
            wanted = (target - mean) / std
            prediction = prediction * std + mean
        difference = F.mse_loss if self.config.mae.pixel_loss == "mse" else F.l1_loss
        pixel = difference(compared, wanted)
        if spectral_weight == 0:
            return Output(pixel, pixel.detach(), torch.full_like(pixel, torch.nan))
        spectral = self.spectral(batch, masks, prediction, target)
        return Output(pixel + spectral_weight * spectral, pixel.detach(), spectral.detach())

    def gather(self, batch: Batch, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Clipped, z-scored patches (B,K,P) at the ids, in the model's dtype unless another is given."""
        patch, dtype = self.config.model.patch_voxels_zyx, dtype or self.dtype
        return patch_gather(batch.stored, ids, patch, dtype, self.config.kernels)

    def predict(self, visible_BKP: Tensor, masks: Masks) -> Tensor:
        """Predicted masked patches (B,Km,P) float32 from visible ones (B,Kv,P): in z-score units, or in units of each
        patch's own deviation with `mae.normalize_target`."""
        return self.decoder(self.encoder(visible_BKP, masks.visible), masks).float()

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.decoder.to_voxels.weight.dtype

    def spectral(self, batch: Batch, masks: Masks, prediction: Tensor, target: Tensor) -> Tensor:
        """The spectral term of predictions (B,Km,P) against targets, both in z-score units."""
        settings, patch = self.config.spectral, self.config.model.patch_voxels_zyx
        if settings.scope == "patch":
            return spectral_patch_loss(prediction, target, patch, settings)
        visible = self.gather(batch, masks.visible, torch.float32)
        true = assemble(visible, target, masks, self.volume_zyx, patch)
        return spectral_volume_loss(assemble(visible, prediction, masks, self.volume_zyx, patch), true, settings)

    def after_step(self, step: int) -> None:
        """Nothing follows an optimizer step in MAE (JEPA moves its teacher here)."""


def assemble(visible: Tensor, masked: Tensor, masks: Masks, volume_zyx: Zyx, patch_zyx: Zyx) -> Tensor:
    """Put visible (B,Kv,P) and masked (B,Km,P) patches back into volumes (B,1,Z,Y,X)."""
    values = torch.cat((visible, masked), dim=1)
    ids = torch.cat((masks.visible, masks.masked), dim=1)
    tokens = torch.empty_like(values).scatter(1, ids[..., None].expand_as(values), values)
    return unpatchify(tokens, volume_zyx, patch_zyx)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B,K,1) of each patch (B,K,P)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
    return mean, (variance + NORMALISE_EPSILON).sqrt()


def mae_flops(config: Config, grid_zyx: Zyx) -> int:
    """FLOPs of one sample's forward and backward pass (3 × forward; the loss terms are not counted)."""
    tokens = grid_zyx[0] * grid_zyx[1] * grid_zyx[2]
    masked = masked_count(config.mask.fraction, tokens)
    z, y, x = config.model.patch_voxels_zyx
    width = config.mae.decoder_width
    forward = (
        encoder_flops(config.model, tokens - masked)
        + 2 * (tokens - masked) * config.model.width * width
        + config.mae.decoder_depth * block_flops(tokens, width)
        + 2 * masked * width * z * y * x
    )
    return 3 * forward
