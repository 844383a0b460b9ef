"""What DeepSpeed is told, and the bytes that it moves, as pure functions of our settings. No DeepSpeed in here, so that
a plan can be made without it; why the settings are these is in engine.py.
"""

import math
from typing import Any

import torch

from brainscale.config import Config
from brainscale.model_counts import trained_sizes
from brainscale.settings import InputError

BUCKETS = 8
"""Gradients are reduced a bucket at a time while the backward pass goes on, so only the last bucket is waited for; one
bucket for all would overlap with nothing."""
BUCKET_RANGE = (5_000_000, 50_000_000)
"""Elements of a bucket. At least 20 MB of fp32 (torch's DistributedDataParallel takes 25): they take 0.4 ms at the 50
GB/s of a 400 Gbit/s port, over ten times the latency of a collective (`plan_time.LATENCY_S`), and hold the largest
matrix of ViT-L. At most 200 MB, twice of which lie in memory (DeepSpeed's default of 5e8 elements costs 2 GB)."""


def bucket_elements(config: Config) -> int:
    """Gradients that are reduced at once: an eighth of what is trained, in whole millions, within BUCKET_RANGE. The
    presets of ViT-S, B and L have 7 or 8 buckets, those of ViT-H 13."""
    low, high = BUCKET_RANGE
    return min(high, max(low, 10**6 * math.ceil(sum(trained_sizes(config)) / BUCKETS / 10**6)))


def batch_split(config: Config, world_size: int) -> tuple[int, int]:
    """(micro-batch per rank, accumulation steps) whose product over ranks is the global batch.

    The micro-batch is the largest divisor of a rank's share that is at most `train.micro_batch_volumes`.
    Raises InputError when the ranks do not divide the global batch.
    """
    total = config.train.global_batch_volumes
    if total % world_size:
        raise InputError(
            f"train.global_batch_volumes = {total} is no multiple of {world_size} ranks; choose a multiple, since a "
            "sample must belong to one rank"
        )
    share = total // world_size
    micro = max(m for m in range(1, min(share, config.train.micro_batch_volumes) + 1) if share % m == 0)
    return micro, share // micro


def zero_stage(config: Config, accumulation: int) -> int:
    """The stage that runs: bf16 with accumulation needs stage 2 at least (see engine.py)."""
    needs_2 = config.train.precision == "bf16" and accumulation > 1
    return max(config.zero.stage, 2) if needs_2 else config.zero.stage


def vector_elements(config: Config) -> int:
    """Tensors of fewer elements are not sharded at stage 3: biases and norms."""
    return 16 * config.model.width


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Our settings in DeepSpeed's words. Pure."""
    micro, accumulation = batch_split(config, world_size)
    stage = zero_stage(config, accumulation)
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        zero |= {"overlap_comm": True, "reduce_bucket_size": bucket_elements(config)}
    if stage in (1, 2):
        zero |= {"allgather_bucket_size": BUCKET_RANGE[1], "use_multi_rank_bucket_allreduce": False}
    if stage == 3:
        block = 12 * config.model.width**2
        zero |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": block}
        zero |= {"stage3_prefetch_bucket_size": block, "stage3_param_persistence_threshold": vector_elements(config)}
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_volumes,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.grad_clip if stage else 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["communication_data_type"] = "fp32"
        if accumulation > 1:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def collective_bytes(
    parameters: int,
    vectors: int,
    world_size: int,
    stage: int,
    accumulation: int,
    bf16: bool,
    teacher: tuple[int, int] = (0, 0),
    kept: int = 0,
) -> dict[str, float]:
    """Bytes that one rank sends per optimizer step, by kind, for `parameters` trained elements, `vectors` of which are
    in tensors too small to be sharded; teacher: the same two numbers of a JEPA's teacher; kept: elements that stage 3
    need not gather again for the backward pass. Pure.

    Source: notes of ZeRO (arXiv 1910.02054, §7) with rings: reducing and gathering n·b bytes each cost n·b·(W−1)/W.
    Gradients travel in fp32. Stage 0 all-reduces (twice the bytes of reducing); stages 1 and 2 reduce to owners and
    gather updated weights; stage 3 gathers weights for every forward and backward pass (and vectors once), but for what
    it keeps between the two. Stages 2 and 3 reduce after every micro-batch. A teacher has no gradient and no
    backward pass: stages 1 and 2 gather it after every step, stage 3 for every forward pass.
    """
    share, width = (world_size - 1) / world_size, 2 if bf16 else 4
    reductions = accumulation if stage >= 2 else 1
    gathers = 2 * accumulation if stage == 3 else min(stage, 1)
    gradients = 4 * parameters * reductions * (2 if stage == 0 else 1)
    gathered = gathers * (parameters - vectors) + min(stage, 1) * vectors
    gathered -= accumulation * kept if stage == 3 else 0
    gathered += (accumulation if stage == 3 else min(stage, 1)) * (teacher[0] - teacher[1]) + min(stage, 1) * teacher[1]
    return {"gradients": gradients * share, "weights": width * gathered * share}
