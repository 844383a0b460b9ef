"""What a model consists of and computes, by formula: tokens, tensors, FLOPs. No model is made.

A multiply-add is two FLOPs; norms, activations, softmax, positions and losses are left out, as is usual (below 1 % of
the presets' work). Letters: n tokens, m of them that are wanted, d width, P voxels of a patch.
"""

from dataclasses import dataclass

from brainscale.config import Config, ModelSettings
from brainscale.geometry import Zyx, token_grid
from brainscale.masking import decoded_count, masked_count


@dataclass(frozen=True)
class Tokens:
    """Tokens of one volume, those the encoder sees, the hidden ones, voxels of a patch, and those of the hidden ones
    that are predicted in training."""

    total: int
    visible: int
    masked: int
    patch_voxels: int
    decoded: int

    @property
    def behind(self) -> int:
        """Tokens that go through the decoder or predictor."""
        return self.visible + self.decoded


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
    return Tokens(z * y * x, z * y * x - masked, masked, patch_voxels(config.model), decoded_count(config, masked))


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
    """Of a decoder, as they are used: embedding, mask token, blocks, final norm, head."""
    width = decoder.width
    ends = [width, width, width * decoder.outputs, decoder.outputs]
    return [encoder_width * width, width, width, *(block_sizes(width) * decoder.depth), *ends]


def trained_sizes(config: Config) -> list[int]:
    """Of all that is trained."""
    return encoder_sizes(config.model) + decoder_sizes(config.model.width, decoder_of(config))


def teacher_sizes(config: Config) -> list[int]:
    """Of a JEPA's teacher; none in a MAE."""
    return encoder_sizes(config.model) if config.objective == "jepa" else []


# ----------------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class BlockShape:
    """What goes through one block: n tokens of width d, and m of them that come out (all but in a last block)."""

    tokens: int
    width: int
    heads: int
    outputs: int


def block_shapes(config: Config, tokens: Tokens) -> list[BlockShape]:
    """Of every block that is trained, in the order of computing: the encoder's, then the decoder's or predictor's, of
    which the last makes the predicted tokens alone."""
    model, decoder = config.model, decoder_of(config)
    seen = BlockShape(tokens.visible, model.width, model.heads, tokens.visible)
    every = BlockShape(tokens.behind, decoder.width, decoder.heads, tokens.behind)
    last = BlockShape(tokens.behind, decoder.width, decoder.heads, tokens.decoded)
    return [seen] * model.depth + [every] * (decoder.depth - 1) + [last]


def block_count(config: Config) -> int:
    """Blocks that are trained."""
    return config.model.depth + decoder_of(config).depth


def recomputed_or(config: Config, recomputed: int | None) -> int:
    """How many blocks, from the first on, are computed again in the backward pass: the number, or where it is None all
    with `train.activation_checkpointing = true` and none otherwise ("auto" is decided in plan_recompute.py)."""
    if recomputed is not None:
        return recomputed
    return block_count(config) if config.train.activation_checkpointing is True else 0


def block_flops(shape: BlockShape) -> int:
    """Forward FLOPs of one block: queries, keys and values 6·n·d², projection and MLP 18·m·d², attention 4·n·m·d. In
    all but a last block 24·n·d² + 4·n²·d. (A last block makes the other tokens' queries too: 2·d² each.)"""
    n, m, d = shape.tokens, shape.outputs, shape.width
    return 6 * n * d**2 + 18 * m * d**2 + 4 * n * m * d


def embedding_flops(settings: ModelSettings, tokens: int) -> int:
    """Forward FLOPs of the patch embedding."""
    return 2 * tokens * patch_voxels(settings) * settings.width


def student_flops(config: Config, tokens: Tokens) -> int:
    """Forward FLOPs of one sample in all that is trained: patch embedding, blocks, and the decoder's ends: its
    embedding of the encoder's tokens, and the head of the predicted ones."""
    decoder = decoder_of(config)
    ends = (
        2 * tokens.visible * config.model.width * decoder.width + 2 * tokens.decoded * decoder.width * decoder.outputs
    )
    blocks = sum(block_flops(shape) for shape in block_shapes(config, tokens))
    return embedding_flops(config.model, tokens.visible) + blocks + ends


def teacher_flops(config: Config, tokens: Tokens) -> int:
    """Forward FLOPs of one sample in a JEPA's teacher: all tokens go in, the targets come out. 0 in a MAE."""
    if config.objective != "jepa":
        return 0
    model = config.model
    every = BlockShape(tokens.total, model.width, model.heads, tokens.total)
    last = BlockShape(tokens.total, model.width, model.heads, tokens.decoded)
    return embedding_flops(model, tokens.total) + (model.depth - 1) * block_flops(every) + block_flops(last)


def model_flops(config: Config, tokens: Tokens) -> int:
    """FLOPs of one sample as MFU counts them: 3 × forward of what is trained, less the gradient to the patches, which
    nobody wants (2·n·P·d), and 1 × the teacher's forward. Nothing that is computed twice counts twice. Source: PaLM
    (arXiv 2204.02311, appendix B)."""
    unwanted = embedding_flops(config.model, tokens.visible)
    return 3 * student_flops(config, tokens) - unwanted + teacher_flops(config, tokens)


def executed_flops(config: Config, tokens: Tokens, fused_attention: bool = True, recomputed: int | None = None) -> int:
    """FLOPs of one sample that a GPU does: `model_flops` and

    - with fused attention (FlashAttention, memory-efficient), scores made again in the backward pass: 2·n·m·d per block
      (arXiv 2205.14135, §3);
    - of blocks that are computed again (`recomputed_or`), the forward pass up to the last matrix: less 8·m·d²;
    - token-level VCR: the covariance and its gradient, 6·n·d².

    Left out: pooled VCR and SIGReg (per volume, not per token), and transforms of the spectral term, which are bound by
    memory (`plan_time`).
    """
    flops, shapes = model_flops(config, tokens), block_shapes(config, tokens)
    if fused_attention:
        flops += sum(2 * shape.tokens * shape.outputs * shape.width for shape in shapes)
    again = shapes[: recomputed_or(config, recomputed)]
    flops += sum(block_flops(shape) - 8 * shape.outputs * shape.width**2 for shape in again)
    if config.regularizer.kind == "vcr" and config.regularizer.compat == "paper":
        flops += 6 * tokens.total * config.model.width**2
    return flops
