"""Transformer blocks and 3D positions.

Letters: B batch, K tokens given, C width, H heads, D head width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROPE_BASE = 100.0
"""Wavelengths from 2π tokens to 2π·100 tokens: brain grids are 4 to 40 tokens long (10000, usual for text, would leave
most rotations unused)."""


def rope_angles(coordinates: Tensor, head_width: int) -> Tensor:
    """Rotary angles (B,K,D/2) of token positions (B,K,3) in z, y, x; each axis turns D//6 pairs, the rest stay still.

    Source: rotary embeddings (arXiv 2104.09864) applied per axis.
    """
    pairs = head_width // 6
    frequency = ROPE_BASE ** (-torch.arange(pairs, device=coordinates.device, dtype=torch.float32) / max(1, pairs))
    angles = (coordinates.float()[..., None] * frequency).flatten(-2)
    return F.pad(angles, (0, head_width // 2 - angles.shape[-1]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (x_i, x_{i+D/2}) of (B,H,K,D) by the angles whose cos and sin are (B,1,K,D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def sincos_positions(coordinates: Tensor, width: int) -> Tensor:
    """Fixed position vectors (N,C) of integer coordinates (N,3): sines and cosines of geometric wavelengths."""
    per_axis = width // 6
    frequency = ROPE_BASE ** (
        -torch.arange(per_axis, dtype=torch.float64, device=coordinates.device) / max(1, per_axis)
    )
    angles = coordinates.double()[..., None] * frequency
    vectors = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)
    return F.pad(vectors, (0, width - vectors.shape[-1])).float()


class Attention(nn.Module):
    """Multi-head self-attention with optional rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x_BKC: Tensor, turn: tuple[Tensor, Tensor] | None, outputs: int | None = None) -> Tensor:
        """(B,K,C) → (B,K,C), or of the last `outputs` tokens alone; turn: (cos, sin), each (B,1,K,D/2)."""
        b, k, c = x_BKC.shape
        q, key, v = self.qkv(x_BKC).view(b, k, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if turn is not None:
            q, key = rotate(q, *turn), rotate(key, *turn)
        if outputs is not None:
            q = q[:, :, k - outputs :]
        out = F.scaled_dot_product_attention(q, key, v)
        return self.project(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) with a hidden layer of 4C."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BKC: Tensor, turn: tuple[Tensor, Tensor] | None, outputs: int | None = None) -> Tensor:
        """(B,K,C) → (B,K,C), or of the last `outputs` tokens alone, which look at all."""
        attended = self.attention(self.norm1(x_BKC), turn, outputs)
        x_BKC = (x_BKC if outputs is None else x_BKC[:, x_BKC.shape[1] - outputs :]) + attended
        return x_BKC + self.mlp(self.norm2(x_BKC))


class Trunk(nn.Module):
    """A stack of blocks over tokens at known grid positions, with a final norm.

    recompute: of how many blocks, from the first on, a training pass keeps the input alone and computes the others
    again in the backward pass. compiled: blocks are compiled, and run as they are in evaluations alone.
    """

    coordinates: Tensor
    fixed: Tensor

    def __init__(self, width: int, depth: int, heads: int, coordinates: Tensor, position: str) -> None:
        """coordinates: (N,3) z, y, x of every token id of the grid; position: "rope" or "sincos"."""
        super().__init__()
        self.head_width = width // heads
        self.position = position
        self.register_buffer("coordinates", coordinates, persistent=False)
        if position == "sincos":
            self.register_buffer("fixed", sincos_positions(coordinates, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.recompute = 0
        self.compiled = False
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BKC: Tensor, ids_BK: Tensor, outputs: int | None = None) -> Tensor:
        """Tokens (B,K,C) at grid ids (B,K) → (B,K,C), or of the last `outputs` tokens alone: what the last block and
        the norm would make of the others is not computed."""
        turn = None
        if self.position == "sincos":
            x_BKC = x_BKC + self.fixed[ids_BK].to(x_BKC.dtype)
        else:
            angles = rope_angles(self.coordinates[ids_BK], self.head_width)[:, None]
            turn = angles.cos().to(x_BKC.dtype), angles.sin().to(x_BKC.dtype)
        for number, block in enumerate(self.blocks):
            given = (x_BKC, turn) if number < len(self.blocks) - 1 or outputs is None else (x_BKC, turn, outputs)
            if number < self.recompute and self.training and torch.is_grad_enabled():
                x_BKC = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BKC = block.forward(*given) if self.compiled and not self.training else block(*given)
        return self.norm(x_BKC)


def recompute_first(model: nn.Module, blocks: int) -> None:
    """Let the first `blocks` blocks of a model be computed again in the backward pass, trunk after trunk: an
    objective's encoder comes before what stands behind it."""
    for trunk in (module for module in model.modules() if isinstance(module, Trunk)):
        trunk.recompute = min(blocks, len(trunk.blocks))
        blocks -= trunk.recompute


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """All weights of a model in one place: Xavier-uniform matrices, zero biases, unit norms, normal(0, 0.02) vectors.

    Goes through parameters in their order of definition, so that one generator gives the same model everywhere.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2:
                fan_out, fan_in = parameter.shape
                bound = math.sqrt(6 / (fan_in + (fan_out // 3 if "qkv" in name else fan_out)))
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
