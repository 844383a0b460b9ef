"""The masked autoencoder: encode visible tokens only, decode all, compare masked voxels; plus the spectral term.

Source: MAE (arXiv 2111.06377) in 3D with the FFT-magnitude loss of arXiv 2606.13315 on the mosaic (true voxels where
visible, predictions where masked). With `mae.decode_fraction` a training pass decodes a part of the masked tokens
(arXiv 2401.14391); all else decodes them all. Letters: B batch, N tokens, Kv visible, Km masked, P voxels of a patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from brainscale.config import Config
from brainscale.geometry import Zyx, token_grid, unpatchify
from brainscale.loader import Batch
from brainscale.masking import Masks
from brainscale.model_counts import model_flops, tokens_of
from brainscale.ops import patch_gather, patch_statistics, pixel_loss, spectral_loss
from brainscale.phases import phase
from brainscale.regularizers import full_weight, spectral_form, spectral_weight
from brainscale.vit import Decoder, Encoder
from brainscale_kernels.patch_gather import patch_statistics_reference
from brainscale_kernels.pixel_loss import VARIANCE_OFFSET


class MaeOutput(NamedTuple):
    """Each (). loss: what is differentiated; the others: its parts, detached; spectral_loss is NaN where it was not
    computed. A tuple, since ZeRO stage 3 looks for tensors in tuples alone."""

    loss: Tensor
    pixel_loss: Tensor
    spectral_loss: Tensor


class Mae(nn.Module):
    """Objective "mae"."""

    parts = MaeOutput._fields

    def __init__(self, config: Config, volume_zyx: Zyx) -> None:
        """volume_zyx: voxels of the volumes (or crops) it will see."""
        super().__init__()
        self.config = config
        self.volume_zyx = volume_zyx
        self.grid_zyx = token_grid(volume_zyx, config.model.patch_voxels_zyx)
        self.encoder = Encoder(config.model, self.grid_zyx)
        z, y, x = config.model.patch_voxels_zyx
        width, depth, heads = config.mae.decoder_width, config.mae.decoder_depth, config.mae.decoder_heads
        self.decoder = Decoder(config.model, self.grid_zyx, width, depth, heads, z * y * x)

    def forward(self, batch: Batch, masks: Masks, step: int | None) -> MaeOutput:
        """Loss of a batch whose tensors and masks are on the model's device, in optimizer step `step` (from 0), or
        (None) of an evaluation, where the spectral term has its full weight and all masked tokens are decoded."""
        masks = masks if step is None else masks.in_training
        settings, stored, patch = self.config.mae, batch.stored, self.config.model.patch_voxels_zyx
        weight = full_weight(self.config.spectral) if step is None else spectral_weight(self.config.spectral, step)
        kernels = self.config.kernels
        prediction = self.decode(self.gather(batch, masks.visible), masks)
        with phase("pixel_loss"):
            pixel = pixel_loss(
                stored, masks.masked, prediction, patch, settings.pixel_loss, settings.normalize_target, kernels
            )
        if weight == 0:
            return MaeOutput(pixel, pixel.detach(), torch.full_like(pixel, torch.nan))
        with phase("spectral"):
            if settings.normalize_target:
                mean, variance = patch_statistics(stored, masks.masked, patch, kernels)
                prediction = prediction * (variance + VARIANCE_OFFSET).sqrt() + mean
            form, scope = spectral_form(self.config.spectral), self.config.spectral.scope
            spectral = spectral_loss(stored, masks.masked, prediction, patch, form, scope, kernels)
        return MaeOutput(pixel + weight * spectral, pixel.detach(), spectral.detach())

    def gather(self, batch: Batch, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Clipped, z-scored patches (B,K,P) at the ids, in the model's dtype unless another is given."""
        patch, dtype = self.config.model.patch_voxels_zyx, dtype or self.dtype
        with phase("gather"):
            return patch_gather(batch.stored, ids, patch, dtype, self.config.kernels)

    def decode(self, visible_BKP: Tensor, masks: Masks) -> Tensor:
        """Predicted masked patches (B,Km,P), in the dtype the model computes in, from visible ones (B,Kv,P): in z-score
        units, or in units of each patch's own deviation with `mae.normalize_target`."""
        with phase("encoder"):
            encoded = self.encoder(visible_BKP, masks.visible)
        with phase("decoder"):
            return self.decoder(encoded, masks)

    def embed(self, batch: Batch, ids: Tensor) -> Tensor:
        """The encoder's tokens (B,K,C) float32 of the patches at ids (B,K)."""
        return self.encoder(self.gather(batch, ids), ids).float()

    def compare(self, batch: Batch, masks: Masks) -> tuple[Tensor, Tensor]:
        """Predicted and true masked patches (B,Km,P) float32, as the voxel loss compares them."""
        target = self.gather(batch, masks.masked, torch.float32)
        if self.config.mae.normalize_target:
            mean, std = patch_deviation(target)
            target = (target - mean) / std
        return self.predict(self.gather(batch, masks.visible), masks), target

    def predict(self, visible_BKP: Tensor, masks: Masks) -> Tensor:
        """The same in float32."""
        return self.decode(visible_BKP, masks).float()

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.decoder.head.weight.dtype

    def after_step(self, step: int) -> None:
        """Nothing follows an optimizer step in MAE (JEPA moves its teacher here)."""

    def flops(self) -> int:
        """FLOPs of one sample's forward and backward pass (`model_counts.model_flops`)."""
        return model_flops(self.config, tokens_of(self.config, self.volume_zyx))


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
