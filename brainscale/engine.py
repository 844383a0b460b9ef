"""DeepSpeed, and nothing else. One pure function computes its settings from ours; nobody writes a DeepSpeed file.

Bound to DeepSpeed 0.19.8. What it forces on us:
- bf16 with stage 1 and a separate fp32 accumulator silently becomes another optimizer (BF16_Optimizer, which drops
  `overlap_comm`), so accumulation in bf16 runs at stage 2, where fp32 accumulation is kept.
- `overlap_comm` is on by default only for stage 3.
- its optimizer state does not exist before the first step, and is linked to parameters after the first group's step,
  when the second group has none yet (then it cannot be read or saved); so `start` makes all of it at once.
- on a CPU it would compile a shared-memory operator for a minute at start; gloo does that work here.
"""

import warnings
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from torch import nn

from brainscale.config import Config, InputError
from brainscale.distributed import World
from brainscale.optim import make_optimizer

warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)

BUCKET_ELEMENTS = 50_000_000
"""DeepSpeed's default of 5e8 elements costs 2 GB; the encoders here have 2e7 to 6e8 parameters."""


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
    """The stage that runs: bf16 with accumulation needs stage 2 (see the module's docstring)."""
    return 2 if config.train.precision == "bf16" and accumulation > 1 else config.zero.stage


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Our settings in DeepSpeed's words. Pure."""
    micro, accumulation = batch_split(config, world_size)
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_volumes,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.grad_clip,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": zero_stage(config, accumulation),
            "overlap_comm": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "fp32"
        if accumulation > 1:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def start(model: nn.Module, config: Config, world: World) -> deepspeed.DeepSpeedEngine:
    """Wrap an initialised fp32 model, moved to the world's device, and its AdamW. The process group must exist."""
    if world.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    model = model.to(world.device)
    optimizer = make_optimizer(model, config.optim)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, world.size), dist_init_required=False
    )
    make_optimizer_state(engine)
    return engine


def make_optimizer_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """AdamW's moments as zeros and its step count 0, for every group, linked to the parameters they belong to."""
    optimizer = torch_optimizer(engine)
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, (lr, weight_decay) in zip(optimizer.param_groups, kept):
        group["lr"], group["weight_decay"] = lr, weight_decay
        for parameter in group["params"]:
            parameter.grad = None
    for slot in optimizer.state.values():
        slot["step"].zero_()
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def torch_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's sharded optimizer, whose learning rate we set and whose step count we restore."""
    return engine.optimizer.optimizer


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Set the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
