"""The joint-embedding predictive architecture: predict, from visible tokens, what a teacher makes of the hidden ones.

Source: I-JEPA (arXiv 2301.08243) in 3D, with the L1 loss on layer-normed targets of V-JEPA (arXiv 2404.08471), the
variance-covariance terms of arXiv 2606.13315 and foreground weights. Letters: B batch, N tokens, Kv visible, Km masked,
C width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainscale.config import Config
from brainscale.geometry import Zyx, token_grid
from brainscale.loader import Batch
from brainscale.masking import Masks
from brainscale.model_counts import model_flops, tokens_of
from brainscale.ops import patch_gather
from brainscale.phases import phase
from brainscale.regularizers import sigreg, vcr, vcr_tokens
from brainscale.schedules import linear
from brainscale.teacher import Teacher
from brainscale.vit import Decoder, Encoder


class JepaOutput(NamedTuple):
    """Each (). loss: what is differentiated; the others: its parts before their weights, detached, NaN where they were
    not computed. A tuple, since ZeRO stage 3 looks for tensors in tuples alone."""

    loss: Tensor
    prediction_loss: Tensor
    variance_loss: Tensor
    covariance_loss: Tensor
    sigreg_loss: Tensor


class Jepa(nn.Module):
    """Objective "jepa". The teacher's parameters are frozen; `average` moves them once the engine has made it."""

    parts = JepaOutput._fields

    def __init__(self, config: Config, volume_zyx: Zyx) -> None:
        """volume_zyx: voxels of the volumes (or crops) it will see."""
        super().__init__()
        self.config = config
        self.volume_zyx = volume_zyx
        self.grid_zyx = token_grid(volume_zyx, config.model.patch_voxels_zyx)
        width, depth, heads = config.jepa.predictor_width, config.jepa.predictor_depth, config.jepa.predictor_heads
        self.encoder = Encoder(config.model, self.grid_zyx)
        self.predictor = Decoder(config.model, self.grid_zyx, width, depth, heads, config.model.width)
        self.teacher = Encoder(config.model, self.grid_zyx).requires_grad_(False)
        self.average: Teacher | None = None

    def forward(self, batch: Batch, masks: Masks, step: int | None) -> JepaOutput:
        """Loss of a batch whose tensors and masks are on the model's device, in optimizer step `step` (from 0), or
        (None) of an evaluation, which is without the regularizer: that needs many volumes, and all ranks."""
        patches = self.gather(batch, masks.visible)
        with phase("encoder"):
            context = self.encoder(patches, masks.visible)
        target = self.target(batch, masks)
        with phase("predictor"):
            predicted = self.predictor(context, masks)
        with phase("prediction_loss"):
            error = (predicted.float() - target).abs().mean(-1)
            prediction = weighted_mean(error, self.token_weight(batch, masks.masked))
        nothing = torch.full_like(prediction.detach(), torch.nan)
        loss, variance, covariance, normality = prediction, nothing, nothing, nothing
        settings = self.config.regularizer
        if settings.kind == "vcr" and step is not None:
            with phase("regularizer"):
                terms = (
                    vcr_tokens(torch.cat((context.float(), target), dim=1), settings.target_std)
                    if settings.compat == "paper"
                    else vcr(context.float().mean(1), settings.target_std)
                )
            both = settings.variance_weight * terms.variance + settings.covariance_weight * terms.covariance
            loss = loss + settings.weight * both
            variance, covariance = terms.variance.detach(), terms.covariance.detach()
        elif settings.kind == "sigreg" and step is not None:
            with phase("regularizer"):
                normality = sigreg(context.float().mean(1), settings, self.config.seed, step)
            loss, normality = loss + settings.weight * normality, normality.detach()
        return JepaOutput(loss, prediction.detach(), variance, covariance, normality)

    def gather(self, batch: Batch, ids: Tensor) -> Tensor:
        """Clipped, z-scored patches (B,K,P) at the ids, in the model's dtype."""
        dtype = self.predictor.head.weight.dtype
        with phase("gather"):
            return patch_gather(batch.stored, ids, self.config.model.patch_voxels_zyx, dtype, self.config.kernels)

    @torch.no_grad()
    def target(self, batch: Batch, masks: Masks) -> Tensor:
        """The teacher's masked tokens (B,Km,C) float32, made from all tokens of the volume, each layer-normed.

        Masked tokens come last, so that the last block makes them alone. Visible patches are gathered a second time
        (the student has them), since cutting them out of these would move as many bytes.
        """
        everything = torch.cat((masks.visible, masks.masked), dim=1)
        patches = self.gather(batch, everything)
        with phase("teacher"):
            tokens = self.teacher(patches, everything, masks.masked.shape[1]).float()
            return F.layer_norm(tokens, tokens.shape[-1:])

    def token_weight(self, batch: Batch, ids: Tensor) -> Tensor:
        """(B,K) weight in the loss: 1 where a token holds enough foreground, else the background's."""
        inside = batch.foreground.gather(1, ids) >= self.config.jepa.min_foreground_fraction
        return torch.where(inside, 1.0, self.config.jepa.background_weight)

    def embed(self, batch: Batch, ids: Tensor) -> Tensor:
        """The encoder's tokens (B,K,C) float32 of the patches at ids (B,K)."""
        return self.encoder(self.gather(batch, ids), ids).float()

    def compare(self, batch: Batch, masks: Masks) -> tuple[Tensor, Tensor]:
        """Predicted and true teacher's tokens (B,Km,C) float32 of masked patches."""
        context = self.encoder(self.gather(batch, masks.visible), masks.visible)
        return self.predictor(context, masks).float(), self.target(batch, masks)

    def after_step(self, step: int) -> None:
        """Move the teacher after optimizer step `step` (from 0). Collective."""
        assert self.average is not None
        settings, num_steps = self.config.jepa, self.config.train.num_steps
        final = settings.momentum if settings.final_momentum is None else settings.final_momentum
        with phase("ema"):
            self.average.move(linear(step, settings.momentum, final, num_steps))

    def flops(self) -> int:
        """FLOPs of one sample's forward and backward pass (`model_counts.model_flops`)."""
        return model_flops(self.config, tokens_of(self.config, self.volume_zyx))


def weighted_mean(error_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """Mean over volumes of each volume's weighted mean; a volume without any weight counts as an error of zero."""
    tiny = torch.finfo(weight_BK.dtype).tiny
    return ((error_BK * weight_BK).sum(1) / weight_BK.sum(1).clamp(min=tiny)).mean()
