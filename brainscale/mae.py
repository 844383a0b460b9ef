"""The masked autoencoder: encode visible tokens only, decode all, compare masked voxels; plus the spectral term.

Source: MAE (arXiv 2111.06377) in 3D with the FFT-magnitude loss of arXiv 2606.13315 on the mosaic (true voxels where
visible, predictions where masked). Letters: B batch, N tokens, Kv visible, Km masked, P voxels of a patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from brainscale.config import Config
from brainscale.geometry import Zyx, token_coordinates, token_grid, unpatchify
from brainscale.layers import Trunk, block_flops
from brainscale.loader import Batch
from brainscale.masking import Masks, masked_count
from brainscale.ops import patch_gather, patch_statistics, pixel_loss, spectral_loss
from brainscale.regularizers import spectral_form
from brainscale.vit import Encoder, encoder_flops
from brainscale_kernels.patch_gather import patch_statistics_reference
from brainscale_kernels.pixel_loss import VARIANCE_OFFSET


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
        settings, stored, patch = self.config.mae, batch.stored, self.config.model.patch_voxels_zyx
        kernels = self.config.kernels
        prediction = self.decode(self.gather(batch, masks.visible), masks)
        pixel = pixel_loss(
            stored, masks.masked, prediction, patch, settings.pixel_loss, settings.normalize_target, kernels
        )
        if spectral_weight == 0:
            return Output(pixel, pixel.detach(), torch.full_like(pixel, torch.nan))
        if settings.normalize_target:
            mean, variance = patch_statistics(stored, masks.masked, patch, kernels)
            prediction = prediction * (variance + VARIANCE_OFFSET).sqrt() + mean
        form, scope = spectral_form(self.config.spectral), self.config.spectral.scope
        spectral = spectral_loss(stored, masks.masked, prediction, patch, form, scope, kernels)
        return Output(pixel + spectral_weight * spectral, pixel.detach(), spectral.detach())

    def gather(self, batch: Batch, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Clipped, z-scored patches (B,K,P) at the ids, in the model's dtype unless another is given."""
        patch, dtype = self.config.model.patch_voxels_zyx, dtype or self.dtype
        return patch_gather(batch.stored, ids, patch, dtype, self.config.kernels)

    def decode(self, visible_BKP: Tensor, masks: Masks) -> Tensor:
        """Predicted masked patches (B,Km,P), in the dtype the model computes in, from visible ones (B,Kv,P): in z-score
        units, or in units of each patch's own deviation with `mae.normalize_target`."""
        return self.decoder(self.encoder(visible_BKP, masks.visible), masks)

    def predict(self, visible_BKP: Tensor, masks: Masks) -> Tensor:
        """The same in float32."""
        return self.decode(visible_BKP, masks).float()

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.decoder.to_voxels.weight.dtype

    def after_step(self, step: int) -> None:
        """Nothing follows an optimizer step in MAE (JEPA moves its teacher here)."""


def assemble(visible: Tensor, masked: Tensor, masks: Masks, volume_zyx: Zyx, patch_zyx: Zyx) -> Tensor:
    """Put visible (B,Kv,P) and masked (B,Km,P) patches back into volumes (B,1,Z,Y,X)."""
    values = torch.cat((visible, masked), dim=1)
    ids = torch.cat((masks.visible, masks.masked), dim=1)
    tokens = torch.empty_like(values).scatter(1, ids[..., None].expand_as(values), values)
    return unpatchify(tokens, volume_zyx, patch_zyx)


def patch_deviation(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B,K,1) of each patch (B,K,P), as targets normalised per patch are made with."""
    mean, variance = patch_statistics_reference(patches)
    return mean, (variance + VARIANCE_OFFSET).sqrt()


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
