"""Which tokens are hidden: exact counts per sample, pure in (seed, global sample index).

Every cell of the grid is equally likely to be hidden. For single tokens: the hidden set is the head of a random
permutation. For blocks: they lie on a torus (what leaves the grid on one side comes in on the other), their corners are
uniform, and whatever happens afterwards does not know where the grid begins, so no cell is special.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brainscale.config import MAX_BLOCKS, Config, Mask
from brainscale.geometry import Zyx
from brainscale.sampling import DECODED, MASK, words
from brainscale.settings import InputError


@dataclass(frozen=True)
class Masks:
    """Token ids of a batch, each row sorted: visible (B, Kv) and masked (B, Km) int64; Kv + Km = N. blocks: (B,) how
    many blocks each sample needed; block_fraction: (B,) their mean share of the grid; zeros for single tokens.
    decoded: (B, Kd) those of the masked that a MAE predicts in training; None: all."""

    visible: Tensor
    masked: Tensor
    blocks: np.ndarray = field(default_factory=lambda: np.zeros(1))
    block_fraction: np.ndarray = field(default_factory=lambda: np.zeros(1))
    decoded: Tensor | None = None

    def to(self, device: torch.device) -> "Masks":
        """The same masks with their ids on another device."""
        visible, masked = (ids.to(device, non_blocking=True) for ids in (self.visible, self.masked))
        decoded = None if self.decoded is None else self.decoded.to(device, non_blocking=True)
        return replace(self, visible=visible, masked=masked, decoded=decoded)

    @property
    def in_training(self) -> "Masks":
        """With the decoded tokens alone for masked ones."""
        return self if self.decoded is None else replace(self, masked=self.decoded)


@dataclass(frozen=True)
class Blocks:
    """Blocks of S samples, K each. fraction, stretch: what was drawn, (S,K) share of the grid and (S,K,3) factor of
    each edge; edge, corner: (S,K,3) tokens in z, y, x."""

    fraction: np.ndarray
    stretch: np.ndarray
    edge: np.ndarray
    corner: np.ndarray


def masked_count(fraction: float, tokens: int) -> int:
    """round(fraction × tokens). Raises InputError when that hides nothing or everything."""
    count = round(fraction * tokens)
    if not 0 < count < tokens:
        raise InputError(
            f"mask.fraction = {fraction} of {tokens} tokens hides {count}: at least one must be hidden and one seen; "
            "use a larger grid, a smaller patch or another fraction"
        )
    return count


def decoded_count(config: Config, masked: int) -> int:
    """How many of `masked` tokens are predicted in training: round(`mae.decode_fraction` × masked), at least one, in a
    MAE, all in a JEPA. Source: CrossMAE (arXiv 2401.14391)."""
    return max(1, round(config.mae.decode_fraction * masked)) if config.objective == "mae" else masked


def draw_masks(config: Config, sample_index: np.ndarray, foreground: Tensor, grid_zyx: Zyx) -> Masks:
    """Masks of a batch, on the CPU. sample_index: (B,) global sample indices; foreground: (B,N) share of foreground of
    every token, looked at with `mask.foreground_aware` alone."""
    mask, tokens = config.mask, math.prod(grid_zyx)
    count = masked_count(mask.fraction, tokens)
    drawn = sample_index[:1] // config.train.global_batch_volumes if mask.shared else sample_index
    if mask.kind == "blocks" or (mask.kind == "auto" and config.objective == "jepa"):
        order, blocks, fraction = block_order(mask, config.seed, drawn, grid_zyx, count)
    else:
        order = np.stack([np.argsort(words(config.seed, MASK, int(i), tokens), kind="stable") for i in drawn])
        blocks, fraction = np.zeros(len(drawn), int), np.zeros(len(drawn))
    if mask.foreground_aware:
        order = head_by_stratum(order, foreground.numpy() > 0, mask.fraction, count)
    times = len(sample_index) // len(drawn)
    visible, masked = (np.sort(ids, axis=1).repeat(times, 0) for ids in (order[:, count:], order[:, :count]))
    decoded = draw_decoded(config.seed, sample_index, masked, decoded_count(config, count))
    ids = (torch.from_numpy(visible), torch.from_numpy(masked))
    return Masks(*ids, blocks.repeat(times), fraction.repeat(times), decoded)


def draw_decoded(seed: int, sample_index: np.ndarray, masked: np.ndarray, count: int) -> Tensor | None:
    """`count` of each sample's masked ids (B,Km), each equally likely, by words of its own, sorted: (B,count). None
    where that is all of them."""
    if count == masked.shape[1]:
        return None
    random = np.stack([words(seed, DECODED, int(index), masked.shape[1]) for index in sample_index])
    chosen = np.sort(np.argsort(random, axis=1, kind="stable")[:, :count], axis=1)
    return torch.from_numpy(np.take_along_axis(masked, chosen, axis=1))


def block_order(
    mask: Mask, seed: int, sample_index: np.ndarray, grid_zyx: Zyx, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, blocks, fraction): (S,N) token ids in the order of hiding, block by block, a block from one of its faces
    on, so that the last one is cut to a smaller block; how many blocks (S,) `count` tokens take, and (S,) their mean
    share of the grid."""
    tokens, longest = math.prod(grid_zyx), max(grid_zyx)
    raw = np.stack([words(seed, MASK, int(i), 1 + 8 * MAX_BLOCKS + tokens) for i in sample_index])
    blocks = draw_blocks(mask, uniform(raw[:, : 1 + 7 * MAX_BLOCKS]), grid_zyx)
    face = (raw[:, 1 + 7 * MAX_BLOCKS : 1 + 8 * MAX_BLOCKS] % 6).astype(int)
    # of every cell along an axis in every block, from the block's first layer: (S,n,K)
    depths = [(np.arange(n)[:, None] - blocks.corner[:, None, :, axis]) % n for axis, n in enumerate(grid_zyx)]
    z, y, x = (depth < blocks.edge[:, None, :, axis] for axis, depth in enumerate(depths))
    covered = (z[:, :, None, None] & y[:, None, :, None] & x[:, None, None]).reshape(len(raw), tokens, MAX_BLOCKS)
    first = covered.argmax(-1)  # (S,N) the first block that covers each cell; 0 where none does
    sample = np.arange(len(raw))[:, None]
    reached = covered[sample, np.arange(tokens), first]
    layer = np.zeros_like(first)
    for axis, at in enumerate(np.unravel_index(np.arange(tokens), grid_zyx)):
        depth, edge = depths[axis][sample, at, first], blocks.edge[sample, first, axis]
        layer = np.where(face[sample, first] == axis, depth, layer)
        layer = np.where(face[sample, first] == 3 + axis, edge - 1 - depth, layer)
    rank = np.where(reached, first * longest + layer, MAX_BLOCKS * longest).astype(np.uint64)
    order = np.argsort((rank << np.uint64(32)) | (raw[:, 1 + 8 * MAX_BLOCKS :] >> np.uint64(32)), axis=1)
    used = np.minimum(rank[sample, order][:, count - 1].astype(int) // longest + 1, MAX_BLOCKS)
    share = blocks.edge.prod(-1) / tokens
    mean = np.array([row[:number].mean() for row, number in zip(share, used)])
    return order, used, mean


def draw_blocks(mask: Mask, random: np.ndarray, grid_zyx: Zyx) -> Blocks:
    """Blocks from uniform numbers (S, 1 + 7K): a scale for the sample; of each block, a share of the grid within that
    scale, a factor for each edge, log-uniform within `mask.block_aspect` and divided by their geometric mean, and a
    corner, each from a number of its own. An edge has at least one token and at most the grid's."""
    scale = (random[:, 0] * len(mask.block_fractions)).astype(int)
    low, high = np.array(mask.block_fractions)[scale].T[..., None]
    each = random[:, 1:].reshape(len(random), -1, 7)
    fraction = low + (high - low) * each[..., 0]
    narrow, wide = np.log(mask.block_aspect)
    stretch = narrow + (wide - narrow) * each[..., 1:4]
    stretch = np.exp(stretch - stretch.mean(-1, keepdims=True))
    side = (fraction * math.prod(grid_zyx)) ** (1 / 3)
    edge = np.clip(np.round(side[..., None] * stretch).astype(int), 1, grid_zyx)
    return Blocks(fraction, stretch, edge, (each[..., 4:] * grid_zyx).astype(int))


def head_by_stratum(order: np.ndarray, inside: np.ndarray, fraction: float, count: int) -> np.ndarray:
    """`order` (S,N) with another head of `count` ids: of the ids that are `inside` (S,N bool, by id) the first
    round(fraction × their number), of the others the first ones that are left to hide."""
    inside = np.take_along_axis(inside, order, axis=1)
    total = inside.sum(1, keepdims=True)
    wanted = np.clip(np.round(fraction * total), count - (order.shape[1] - total), np.minimum(total, count))
    head = np.where(inside, np.cumsum(inside, 1) <= wanted, np.cumsum(~inside, 1) <= count - wanted)
    return np.take_along_axis(order, np.argsort(~head, axis=1, kind="stable"), axis=1)


def uniform(raw: np.ndarray) -> np.ndarray:
    """Random uint64 words as numbers in [0, 1)."""
    return (raw >> np.uint64(11)) * 2.0**-53


class Coverage:
    """What a run's masks were like: means since the last read, and how often each cell was hidden so far."""

    def __init__(self, tokens: int) -> None:
        self.counts, self.draws = np.zeros(tokens, int), 0
        self._zero()

    def _zero(self) -> None:
        self.sums, self.samples = np.zeros(4), 0

    def add(self, masks: Masks, foreground: Tensor) -> None:
        """Count a batch whose masks and foreground (B,N) are on the CPU."""
        hidden = foreground.gather(1, masks.masked).sum(1) / foreground.sum(1).clamp(min=1e-9)
        self.counts += np.bincount(masks.masked.flatten().numpy(), minlength=len(self.counts))
        fraction = masks.masked.shape[1] / len(self.counts)
        means = (fraction, float(hidden.mean()), masks.blocks.mean(), masks.block_fraction.mean())
        self.sums += len(hidden) * np.array(means)
        self.samples += len(hidden)
        self.draws += len(hidden)

    def save(self, path: Path, grid_zyx: Zyx) -> None:
        """Write how often each cell was hidden so far (`counts`, z, y, x) in how many `draws`, for the report."""
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, counts=self.counts.reshape(grid_zyx), draws=self.draws)
        temporary.replace(path)

    def read(self) -> dict[str, float]:
        """For the metrics line. mask_fraction: share of tokens hidden; mask_foreground_fraction: of foreground;
        mask_blocks, mask_block_fraction: blocks of a sample, and their share of the grid; mask_cell_spread: deviation
        of how often each cell was hidden so far, over what chance alone makes of it (1 where no cell is special)."""
        names = ("mask_fraction", "mask_foreground_fraction", "mask_blocks", "mask_block_fraction")
        line = dict(zip(names, (self.sums / max(1, self.samples)).tolist()))
        share = self.counts.sum() / max(1, self.draws) / len(self.counts)
        chance = math.sqrt(max(self.draws, 1) * share * (1 - share))
        self._zero()
        return {**line, "mask_cell_spread": float(self.counts.std()) / chance} if self.draws else line
