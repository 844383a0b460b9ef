"""DeepSpeed, and nothing else. Its settings are computed from ours in zero.py; nobody writes a DeepSpeed file.

Bound to DeepSpeed 0.19.8 (setup.py pins it). What it forces on us:
- bf16 at stage 0 is another optimizer: it takes a step on zero gradients when it is made, so AdamW counts one too many
  (runtime/fp16/unfused_optimizer.py). Settings refuse it; stage 1 on one rank is the same thing done right.
- bf16 at stage 1 with a separate fp32 accumulator silently becomes BF16_Optimizer, which drops `overlap_comm`, so
  accumulation in bf16 runs at stage 2, where fp32 accumulation is kept. `grad_accum_dtype` is the model's by default.
- `overlap_comm` is on by default only for stage 3. Stages 1 and 2 all-reduce each bucket unless told to reduce each
  part to its owner, which moves half the bytes.
- stage 3 keeps up to 1e9 gathered elements between forward and backward, so that smaller models are never sharded: here
  a block's weights are kept or gathered ahead at most, and vectors alone are not sharded.
- stage 0 in fp32 neither skips a step with a gradient that is not finite nor reports the norm: `optim.GuardedAdamW`.
- optimizer state does not exist before the first step, and is linked to parameters after the first group's step, when
  the second group has none yet (then it cannot be read or saved); so `start` makes all of it at once.
- at stage 3 its setter of full tensors fails where the ranks do not divide a tensor (`narrow` past the end of the last
  part), so `fill` cuts and pads the parts itself; `safe_set_full_fp32_param` does not refresh the model's own copy.
- an optimizer on the CPU compiles an operator for a minute unless torch's AdamW is permitted; so does, on a CPU, the
  start of communication (gloo does that work here).
- per-block torch.compile is for stages 0 to 2: stage 3's gathering hooks break its graphs (pytorch issue 115484).
  There a block is one graph, or an error (`fullgraph`), of fixed shapes, of which a run has five at most; evaluations,
  whose batches have other sizes, run uncompiled, so that nothing is compiled after the first step.
- CUDA graphs of blocks (`mode="reduce-overhead"`) are not used, and whether they would pay was not measured: stages 1
  and 2 hang hooks on parameters that copy gradients into buckets and reduce these on a stream of their own while the
  backward pass goes on, from which memory that a graph replays into must be kept; gradients become None after every
  step; and norm and learning rate are read or written by the host in every step, so a step could not be
  one graph. What they save, launches, a larger micro-batch hides too.
- stages 1 and 2 look through every gradient for what is not finite, and then take the norm, whose own check finds it
  too. Without the search a bf16 step of ViT-S has 2,411 launches in place of 4,672 (`bench step`, counted on a CPU),
  and an all-reduce and a host read fewer.
- a step waits for the host's reading of the norm, that is of whether it is finite (tests/test_step.py lists where); at
  stage 0 `GuardedAdamW` reads it in DeepSpeed's place. Nothing else of ours is read in a step that is not logged.
- stages 1 to 3 hand AdamW a rank's part of each group as one flat tensor, so that the fused kernel of torch is a launch
  for every group (stage 3: for every sub-group of 1e9 elements), not for every parameter.
- its own `latest` may be published before other ranks have finished writing (engine.py, `save_checkpoint`: the barrier
  comes last), and its files carry no hashes: checkpoints are ours.
- stages 1 and 2 with offload keep the gradients of a step that was left out, which spoils all later ones when they are
  accumulated: `forget_gradients`.
- it holds a process group to the end, which aborts gloo's shutdown: leave by `distributed.leave`.
"""

import math
import warnings
from functools import partial
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional as F

from brainscale.config import Config
from brainscale.distributed import World
from brainscale.layers import Trunk, recompute_first
from brainscale.optim import make_optimizer
from brainscale.teacher import Gathered, Owned, Teacher, publish_whole
from brainscale.zero import deepspeed_config

warnings.filterwarnings("ignore", "`torch.distributed.[a-z_]+` is deprecated", FutureWarning)

MAX_COMPILED_FORMS = 16
"""Of a block: a run has five at most, those of encoder, predictor and its last block, teacher and its last block. One
more than this is an error."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state per parameter."""


def start(model: nn.Module, config: Config, world: World, recomputed: int = 0) -> deepspeed.DeepSpeedEngine:
    """Wrap an initialised fp32 model, moved to the world's device, and its AdamW. The process group must exist.

    recomputed: of how many blocks activations are computed again (`plan_recompute.decide`)."""
    if world.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    torch.set_float32_matmul_precision("highest")  # some containers switch TF32 on
    model = model.to(world.device)
    recompute_first(model, recomputed)
    if compiles(config, world):
        compile_blocks(model)
    settings = deepspeed_config(config, world.size)
    optimizer = make_optimizer(model, config, settings["zero_optimization"]["stage"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    make_optimizer_state(engine)
    if engine.zero_optimization_stage() in (1, 2) and not config.zero.offload_optimizer:
        engine.optimizer.check_overflow = _leave_it_to_the_norm
    return engine


def _leave_it_to_the_norm(partition_gradients: bool = True) -> None:
    """In place of DeepSpeed's search for what is not finite: the norm that it takes next is not finite either then, on
    any rank, and leads to the same step left out."""


def compiles(config: Config, world: World) -> bool:
    """What `train.compile` means here."""
    if config.train.compile == "auto":
        return world.device.type == "cuda" and config.zero.stage < 3
    return config.train.compile


def compile_blocks(model: nn.Module) -> None:
    """Compile every block of a model, at its first call in a training pass."""
    torch._dynamo.config.recompile_limit = MAX_COMPILED_FORMS
    for trunk in (module for module in model.modules() if isinstance(module, Trunk)):
        trunk.compiled = True
        for block in trunk.blocks:
            block.compile(fullgraph=True, dynamic=False)


def make_optimizer_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """AdamW's moments as zeros and its step count 0, for every group, linked to the parameters they belong to."""
    optimizer, stage = torch_optimizer(engine), engine.zero_optimization_stage()
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else owned:
        count = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": count, **{name: torch.zeros_like(parameter) for name in MOMENTS}}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def full(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, moment: str | None = None) -> torch.Tensor:
    """The whole fp32 master of a parameter, or one of its MOMENTS, at any stage. Collective."""
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if moment is None else torch_optimizer(engine).state[parameter][moment]
    return safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)


def fill(
    engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, value: torch.Tensor, moment: str | None = None
) -> None:
    """Write a whole fp32 master, and the copy that the model computes with, or a whole moment, at any stage.

    Collective; every rank gives the same value, of the parameter's shape.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        full(engine, parameter, moment).copy_(value)
    elif stage == 3:
        count, rank = parameter.ds_tensor.numel(), engine.global_rank  # type: ignore[attr-defined]
        part = F.pad(value.flatten(), (0, count * engine.world_size - value.numel()))[rank * count :][:count]
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def follow(engine: deepspeed.DeepSpeedEngine, student: nn.Module, teacher: nn.Module) -> Teacher:
    """An average of a student's fp32 masters for a teacher of the same shape, whose parameters are frozen. Collective.

    A rank owns, at stage 0, all of it; at 1 and 2 its part of each parameter group, which must hold nothing but the
    student (`optim.make_optimizer` sees to it); at 3 its part of every parameter. The teacher computes with views of
    its fp32 part where that is the whole, with views of what is gathered at stages 1 and 2; at stage 3 it is sharded as
    the student is, and DeepSpeed gathers it block by block.
    """
    stage, rank, ranks = engine.zero_optimization_stage(), engine.global_rank, engine.world_size
    pairs: list[tuple[Any, Any]] = list(zip(student.parameters(), teacher.parameters(), strict=True))
    if stage == 0:
        return Teacher(
            [Owned([t], [t.shape], partial(torch.flatten, s.detach()), 0, 1) for s, t in pairs],
            partial(publish_whole, [t for _, t in pairs]),
        )
    if stage == 3:
        shards = [Owned([t], [t.ds_shape], partial(safe_get_local_fp32_param, s), rank, ranks) for s, t in pairs]
        return Teacher(shards, partial(_publish_shards, [t for _, t in pairs]))
    twin, groups = {id(s): t for s, t in pairs}, []
    for params, part in zip(engine.optimizer.bit16_groups, engine.optimizer.single_partition_of_fp32_groups):
        if id(params[0]) in twin:
            twins = [twin.pop(id(parameter)) for parameter in params]
            groups.append(Owned(twins, [t.shape for t in twins], part.detach, rank, ranks))
    assert not twin, "a parameter of the student is in no group of the optimizer"
    return Teacher(groups, Gathered(groups))


def _publish_shards(parameters: list[Any], parts: list[Tensor]) -> None:
    """Stage 3: put shards in place; parameters too small to be sharded, which stay gathered, are gathered anew."""
    kept = [parameter for parameter in parameters if parameter.ds_persist]
    if kept:
        kept[0].partition(kept)
    for parameter, part in zip(parameters, parts):
        parameter.ds_tensor.data.copy_(part)
    if kept:
        kept[0].all_gather(kept)


def grad_norm(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Global gradient norm of the newest step before clipping; None when it was not finite."""
    norm = float(engine.get_global_grad_norm())
    return norm if math.isfinite(norm) else None


def forget_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """To be called after a step that was left out: with an offloaded optimizer and fp32 accumulation DeepSpeed keeps
    what it accumulated, and would leave out every later step."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)


def torch_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's sharded optimizer, whose learning rate we set and whose step count we restore."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Set the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
