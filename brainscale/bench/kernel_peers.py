"""What the kernels do, in every form: this project's, and what one would pick instead, written as one would write it.

All forms of an operation take the same `Inputs` and a patch size and return the same: selected tokens, embedded tokens,
or a loss. The paper's form: arXiv 2606.13315, by its description. Letters: B batch, K selected tokens, P voxels of a
patch, C width, Z Y X voxels of a volume.
"""

import importlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brainscale.config import Config, Mask
from brainscale.geometry import Zyx, patchify, token_grid, unpatchify
from brainscale.masking import draw_masks
from brainscale_kernels.patch_gather import Stored, patch_gather, patch_gather_reference
from brainscale_kernels.pixel_loss import pixel_loss, pixel_loss_reference
from brainscale_kernels.spectral_patch import spectral_patch, spectral_patch_reference
from brainscale_kernels.spectral_volume import STD_OFFSET, spectral_volume, spectral_volume_reference
from brainscale_kernels.spectrum import PAPER_LOG_OFFSET, Form, bin_weights

TOKENS = torch.bfloat16
WIDTH = 768
"""Of the patch embedding: ViT-B."""
MASK = Mask(fraction=0.75)
NATIVE, PAPER = Form(), Form(paper=True)


class Inputs(NamedTuple):
    """What every form is given. visible (B,Kv), masked (B,Km) int64; prediction (B,Km,P), weight (C,P), cotangent (of
    embedded tokens, B,Kv,C) bfloat16. volume_bins, patch_bins: weights of kept bins over a half spectrum, summing to
    1 over the full one."""

    stored: Stored
    visible: Tensor
    masked: Tensor
    prediction: Tensor
    weight: Tensor
    cotangent: Tensor
    volume_bins: Tensor
    patch_bins: Tensor


def make_inputs(volume_zyx: Zyx, patch_zyx: Zyx, batch: int, seed: int, device: torch.device) -> Inputs:
    """Random int16 volumes, clipped at three standard deviations, masks as in training and random predictions."""
    draw = torch.Generator(device).manual_seed(seed)
    voxels, tokens = math.prod(patch_zyx), math.prod(volume_zyx) // math.prod(patch_zyx)
    config, index, grid = Config(mask=MASK, seed=seed), np.arange(batch), token_grid(volume_zyx, patch_zyx)
    masks = draw_masks(config, index, torch.ones(batch, tokens), grid).to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device)

    def bins(shape_zyx: Zyx) -> Tensor:
        weights, total = bin_weights(shape_zyx, NATIVE.cutoff_fraction, device, torch.float32)
        return weights / total

    volume = (normal(batch, 1, *volume_zyx) * 300).to(torch.int16)
    parameters = (torch.full((batch,), value, device=device) for value in (1 / 300, 0.0, -3.0, 3.0))
    return Inputs(
        Stored(volume, *parameters),
        masks.visible,
        masks.masked,
        normal(batch, masks.masked.shape[1], voxels).to(TOKENS).requires_grad_(),
        (normal(WIDTH, voxels) / math.sqrt(voxels)).to(TOKENS).requires_grad_(),
        normal(batch, masks.visible.shape[1], WIDTH).to(TOKENS),
        bins(volume_zyx),
        bins(patch_zyx),
    )


# ------------------------------------------------------------------------------------------- tokens


def gather_ours(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return patch_gather(inputs.stored, inputs.visible, patch_zyx, TOKENS)


def gather_selected(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    """Pick first, then normalise: as well as plain PyTorch does it."""
    return _selected(inputs.stored, inputs.visible, patch_zyx).to(TOKENS)


def gather_reference(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return patch_gather_reference(inputs.stored, inputs.visible, patch_zyx, TOKENS)


def gather_whole(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    """Normalise and cut the whole volume, then pick, as published code does."""
    return _select(patchify(_values(inputs.stored).to(TOKENS), patch_zyx), inputs.visible)


def _values(stored: Stored) -> Tensor:
    """Whole volumes (B,1,Z,Y,X) float32, scaled and clipped."""
    scale, offset, low, high = (v[:, None, None, None, None] for v in stored[1:])
    return (stored.volume.float() * scale + offset).clamp(low, high)


def _selected(stored: Stored, ids: Tensor, patch_zyx: Zyx) -> Tensor:
    """Tokens (B,K,P) float32, of which alone voxels are read and converted."""
    z, y, x = stored.volume.shape[2:]
    (gz, gy, gx), (pz, py, px) = token_grid((z, y, x), patch_zyx), patch_zyx
    cells = stored.volume.reshape(-1, gz, pz, gy, py, gx, px).permute(0, 1, 3, 5, 2, 4, 6)
    row = torch.arange(len(ids), device=ids.device)[:, None]
    patches = cells[row, ids // (gy * gx), ids // gx % gy, ids % gx].flatten(2)
    scale, offset, low, high = (v[:, None, None] for v in stored[1:])
    return (patches.float() * scale + offset).clamp(low, high)


def _select(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))


def embed_ours(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return F.linear(gather_ours(inputs, patch_zyx), inputs.weight)


def embed_reference(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return F.linear(gather_reference(inputs, patch_zyx), inputs.weight)


def embed_conv3d(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    """Embed every patch by a convolution whose stride is its size, then pick: as MONAI, nnssl and the paper's code."""
    kernel = inputs.weight.unflatten(1, (1, *patch_zyx))
    everything = F.conv3d(_values(inputs.stored).to(TOKENS), kernel, stride=patch_zyx)
    return _select(everything.flatten(2).transpose(1, 2), inputs.visible)


# ------------------------------------------------------------------------------------------- losses


def pixel_ours(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return pixel_loss(inputs.stored, inputs.masked, inputs.prediction, patch_zyx, "mse", False)


def pixel_selected(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return F.mse_loss(inputs.prediction.float(), _selected(inputs.stored, inputs.masked, patch_zyx))


def pixel_reference(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return pixel_loss_reference(inputs.stored, inputs.masked, inputs.prediction, patch_zyx, "mse", False)


def pixel_whole(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return F.mse_loss(inputs.prediction.float(), _select(patchify(_values(inputs.stored), patch_zyx), inputs.masked))


def volume_ours(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return spectral_volume(inputs.stored, inputs.masked, inputs.prediction, patch_zyx, NATIVE)


def volume_reference(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return spectral_volume_reference(inputs.stored, inputs.masked, inputs.prediction, patch_zyx, NATIVE)


def volume_paper_reference(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return spectral_volume_reference(inputs.stored, inputs.masked, inputs.prediction, patch_zyx, PAPER)


def volume_paper(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    """Full complex transforms of real volumes, a mask of frequencies made anew, mean squared error over all bins."""
    mosaic, target = _mosaic_and_target(inputs, patch_zyx)
    frequencies = (torch.fft.fftfreq(n).to(mosaic.device) for n in mosaic.shape[2:])
    kz, ky, kx = torch.meshgrid(*frequencies, indexing="ij")
    radius = torch.sqrt(kz**2 + ky**2 + kx**2)
    kept = (radius / radius.max() >= PAPER.cutoff_fraction).float()
    predicted, true = (
        torch.log1p(torch.fft.fftn(v, dim=(-3, -2, -1)).abs() + PAPER_LOG_OFFSET) * kept for v in (mosaic, target)
    )
    return F.mse_loss(predicted, true)


def volume_tuned(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    """The native form as well as plain PyTorch does it: real transforms, weights kept from call to call."""
    return _compare(*_mosaic_and_target(inputs, patch_zyx), inputs.volume_bins)


def volume_jukebox(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    """MONAI's loss of the same two volumes: amplitudes of full complex transforms, no logarithm and no cut-off."""
    loss = importlib.import_module("monai.losses").JukeboxLoss(spatial_dims=3)
    return loss(*_mosaic_and_target(inputs, patch_zyx))


def _mosaic_and_target(inputs: Inputs, patch_zyx: Zyx) -> tuple[Tensor, Tensor]:
    """Z-scored volumes (B,1,Z,Y,X) float32: with predictions in place of the masked patches, and the true ones."""
    true = _values(inputs.stored)
    z, y, x = true.shape[2:]
    index = inputs.masked[..., None].expand_as(inputs.prediction)
    tokens = patchify(true, patch_zyx).scatter(1, index, inputs.prediction.float())
    return _z_scored(unpatchify(tokens, (z, y, x), patch_zyx)), _z_scored(true)


def _z_scored(volumes: Tensor) -> Tensor:
    std, mean = torch.std_mean(volumes, dim=(1, 2, 3, 4), keepdim=True)
    return (volumes - mean) / (std + STD_OFFSET)


def patch_ours(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return spectral_patch(inputs.stored, inputs.masked, inputs.prediction, patch_zyx, NATIVE)


def patch_reference(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    return spectral_patch_reference(inputs.stored, inputs.masked, inputs.prediction, patch_zyx, NATIVE)


def patch_tuned(inputs: Inputs, patch_zyx: Zyx) -> Tensor:
    """The native form on each masked patch by itself, in plain PyTorch."""
    target = _selected(inputs.stored, inputs.masked, patch_zyx)
    return _compare(
        inputs.prediction.float().unflatten(2, patch_zyx), target.unflatten(2, patch_zyx), inputs.patch_bins
    )


def _compare(prediction: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    predicted, true = (
        torch.log1p(NATIVE.log_scale * torch.fft.rfftn(v, dim=(-3, -2, -1), norm="ortho").abs())
        for v in (prediction, target)
    )
    return (bins * (predicted - true).square()).sum() / math.prod(prediction.shape[:-3])
