"""Activation checkpointing only where memory needs it: of how many blocks, decided from the plan's prediction.

Blocks are taken in the order of computing, the encoder's first. For a byte that it saves, an encoder's block costs
less computing than a decoder's where memory is short (patches of 8³; arXiv 2205.05198 has the idea of choosing what is
computed again by what it saves for its cost).
"""

from bisect import bisect_left

import torch

from brainscale.config import Config
from brainscale.distributed import World, gather
from brainscale.model_counts import Tokens, block_count, recomputed_or
from brainscale.plan_memory import GIB, predict
from brainscale.zero import batch_split

USABLE_FRACTION = 0.9
"""Of a GPU's memory, that a prediction may fill: it is within 10 % of what is needed."""


def decide(
    config: Config, tokens: Tokens, ranks: int, memory_bytes: float | None, voxel_bytes: int = 2,
    kernels: str = "triton", fused: bool = True,
) -> int:  # fmt: skip
    """How many blocks, from the first on, are computed again in the backward pass. "auto": the fewest with which the
    prediction fills no more than USABLE_FRACTION of a GPU's memory_bytes; all where no number does; none where it is
    None (a CPU). Otherwise what `train.activation_checkpointing` says: all or none. Pure."""
    if config.train.activation_checkpointing != "auto" or memory_bytes is None:
        return recomputed_or(config, None)

    def fits(recomputed: int) -> bool:
        needed = predict(config, tokens, ranks, voxel_bytes, kernels, fused, recomputed).total_bytes
        return needed <= USABLE_FRACTION * memory_bytes

    every = block_count(config)
    return bisect_left(range(every), True, key=fits) if fits(every - 1) else every


def at_start(
    config: Config, tokens: Tokens, world: World, voxel_bytes: int, kernels: str, fused: bool
) -> tuple[int, str]:
    """Collective: (what `decide` says for the GPU with the least memory, the same on every rank; a sentence about it,
    "" where there is nothing to say)."""
    memory_bytes = min(gather(memory_of_gpu(world), world)) if world.device.type == "cuda" else None
    recomputed, every = (
        decide(config, tokens, world.size, memory_bytes, voxel_bytes, kernels, fused),
        block_count(config),
    )
    if memory_bytes is None:
        return recomputed, f"activation checkpointing of all {every} blocks" if recomputed else ""
    needed = predict(config, tokens, world.size, voxel_bytes, kernels, fused, recomputed).total_bytes
    how = f"{recomputed} of {every} blocks" if recomputed else "off"
    said = f"activation checkpointing: {how}; {needed / GIB:.1f} of {memory_bytes / GIB:.1f} GiB predicted"
    if recomputed and batch_split(config, world.size)[0] > 1:
        said += "; a smaller train.micro_batch_volumes may cost less (`brainscale plan`)"
    if needed > memory_bytes:
        said += "; WARNING: that is more than there is (±10 %): `brainscale plan` says what would fit"
    return recomputed, said


def memory_of_gpu(world: World) -> int:
    """Bytes of this rank's GPU that this process has or can get: what other processes hold is not among them."""
    free, _ = torch.cuda.mem_get_info(world.device)
    return free + torch.cuda.memory_reserved(world.device)
