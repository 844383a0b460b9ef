"""What a model consists of and computes, by formula: tokens, tensors, FLOPs. No model is made.

A multiply-add is two FLOPs; norms, activations, softmax, positions and losses are left out, as is usual (below 1 % of
the presets' work). Letters: n tokens, d width, P voxels of a patch.
"""

from dataclasses import dataclass

from brainscale.config import Config, ModelSettings
from brainscale.geometry import Zyx, token_grid
from brainscale.masking import masked_count


@dataclass(frozen=True)
class Tokens:
    """Tokens of one volume, those the encoder sees and those that are predicted, and voxels of a patch."""

    total: int
    visible: int
    masked: int
    patch_voxels: int


@dataclass(frozen=True)
class Decoder:
    """What stands behind the encoder: MAE's decoder or JEPA's predictor. outputs: length of a predicted vector."""

    width: int
    depth: int
    heads: int
    outputs: int


def tokens_of(config: Config, volume_zyx: Zyx) -> Tokens:
    """Raises InputError when the patch does not divide the volume, or the mask hides nothing or everything."""
    z, y, x = token_grid(volume_zyx, config.model.patch_voxels_zyx)
    masked = masked_count(config.mask.fraction, z * y * x)
    return Tokens(z * y * x, z * y * x - masked, masked, patch_voxels(config.model))


def patch_voxels(settings: ModelSettings) -> int:
    """P."""
    z, y, x = settings.patch_voxels_zyx
    return z * y * x


def decoder_of(config: Config) -> Decoder:
    """The objective's decoder or predictor."""
    if config.objective == "mae":
        mae = config.mae
        return Decoder(mae.decoder_width, mae.decoder_depth, mae.decoder_heads, patch_voxels(config.model))
    jepa = config.jepa
    return Decoder(jepa.predictor_width, jepa.predictor_depth, jepa.predictor_heads, config.model.width)


# --------------------------------------------------------------------------------------------- tensors


def block_sizes(width: int) -> list[int]:
    """Elements of each parameter of a block, in all 12·d² + 13·d: two norms, qkv, projection, an MLP of 4·d."""
    norms = [width] * 4
    return [*norms, 3 * width**2, 3 * width, width**2, width, 4 * width**2, 4 * width, 4 * width**2, width]


def encoder_sizes(settings: ModelSettings) -> list[int]:
    """Of an encoder: patch embedding (P·d + d), blocks, final norm."""
    width = settings.width
    return [patch_voxels(settings) * width, width, *(block_sizes(width) * settings.depth), width, width]


def decoder_sizes(encoder_width: int, decoder: Decoder) -> list[int]:
    """Of a decoder: embedding, mask token, blocks, final norm, head."""
    width = decoder.width
    ends = [encoder_width * width, width, width, width, width, width * decoder.outputs, decoder.outputs]
    return ends + block_sizes(width) * decoder.depth


def trained_sizes(config: Config) -> list[int]:
    """Of all that is trained."""
    return encoder_sizes(config.model) + decoder_sizes(config.model.width, decoder_of(config))


def teacher_sizes(config: Config) -> list[int]:
    """Of a JEPA's teacher; none in a MAE."""
    return encoder_sizes(config.model) if config.objective == "jepa" else []


# ----------------------------------------------------------------------------------------------- FLOPs


def block_flops(tokens: int, width: int) -> int:
    """Forward FLOPs of one block: 24·n·d² for the matrices, 4·n²·d for attention."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def encoder_flops(settings: ModelSettings, tokens: int) -> int:
    """Forward FLOPs of one sample with `tokens` tokens."""
    return embedding_flops(settings, tokens) + settings.depth * block_flops(tokens, settings.width)


def embedding_flops(settings: ModelSettings, tokens: int) -> int:
    """Forward FLOPs of the patch embedding."""
    return 2 * tokens * patch_voxels(settings) * settings.width


def decoder_flops(encoder_width: int, decoder: Decoder, tokens: Tokens) -> int:
    """Forward FLOPs of one sample: all tokens go through the blocks, the masked ones through the head."""
    ends = 2 * tokens.visible * encoder_width * decoder.width + 2 * tokens.masked * decoder.width * decoder.outputs
    return ends + decoder.depth * block_flops(tokens.total, decoder.width)


def model_flops(config: Config, tokens: Tokens) -> int:
    """FLOPs of one sample as MFU counts them: 3 × forward of what is trained, 1 × the teacher's forward. Nothing that
    is computed twice counts twice. Source: PaLM (arXiv 2204.02311, appendix B)."""
    student = encoder_flops(config.model, tokens.visible)
    student += decoder_flops(config.model.width, decoder_of(config), tokens)
    return 3 * student + (encoder_flops(config.model, tokens.total) if config.objective == "jepa" else 0)


def executed_flops(config: Config, tokens: Tokens, fused_attention: bool = True) -> int:
    """FLOPs of one sample that a GPU does: `model_flops` and

    - less the gradient to the patches, which nobody wants: 2·n·P·d once;
    - with fused attention (FlashAttention, memory-efficient), scores made again in the backward pass: 2·n²·d per block
      (arXiv 2205.14135, §3);
    - with activation checkpointing, each block's forward pass again up to its last matrix: 16·n·d² + 4·n²·d;
    - token-level VCR: the covariance and its gradient, 6·n·d².

    Left out: pooled VCR and SIGReg (per volume, not per token), and transforms of the spectral term, which are bound by
    memory (`plan_time`).
    """
    decoder = decoder_of(config)
    flops = model_flops(config, tokens) - embedding_flops(config.model, tokens.visible)
    stacks = (
        (config.model.depth, tokens.visible, config.model.width),
        (decoder.depth, tokens.total, decoder.width),
    )
    for depth, n, width in stacks:
        if fused_attention:
            flops += depth * 2 * n**2 * width
        if config.train.activation_checkpointing:
            flops += depth * (16 * n * width**2 + 4 * n**2 * width)
    if config.regularizer.kind == "vcr" and config.regularizer.compat == "paper":
        flops += 6 * tokens.total * config.model.width**2
    return flops
