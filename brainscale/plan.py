"""What a run will need and take, before it is started: memory (plan_memory.py), time (plan_time.py), data, checkpoints,
and other settings that fit where these do not. Formulas alone; nothing is measured.
"""

from dataclasses import dataclass

from pydantic import ValidationError

from brainscale import plan_memory, plan_recompute, plan_time
from brainscale.config import Config
from brainscale.geometry import Zyx
from brainscale.hardware import Gpu, Network
from brainscale.model_counts import (
    Tokens,
    block_count,
    executed_flops,
    model_flops,
    teacher_sizes,
    tokens_of,
    trained_sizes,
)
from brainscale.plan_memory import GIB, Memory
from brainscale.plan_recompute import USABLE_FRACTION
from brainscale.plan_time import Time
from brainscale.reader import Reader
from brainscale.settings import InputError, set_override
from brainscale.stores import open_stores, store_paths
from brainscale.zero import batch_split, zero_stage

DEFAULT_VOLUME: Zyx = (160, 192, 160)
"""Of configs/prep/brain_1mm.toml, in z, y, x."""
MAX_ALTERNATIVES = 4
READER_GB_PER_S = 0.6
"""Of decoded voxels by one thread, cold: `brainscale bench loader` on an Intel Xeon (62 volumes/s of 9.8 MB)."""
MORE_NODES = (1, 2, 4, 8)
"""Times as many nodes, at which an alternative is looked for."""


@dataclass(frozen=True)
class Volume:
    """What a model sees. origin: in words; voxel_bytes: of a stored voxel; rows: scans of the store, 0 where none is
    given."""

    shape_zyx: Zyx
    origin: str
    voxel_bytes: int
    rows: int


@dataclass(frozen=True)
class Alternative:
    """Settings that fit: overrides to add, nodes, and what comes of them."""

    overrides: tuple[str, ...]
    nodes: int
    memory_gib: float
    step_s: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """All that is predicted for one shape. bytes are of one GPU, data_bytes_per_s too; recomputed_blocks: those whose
    activations are computed again; hours_range: at the fractions of `plan_time.COMPUTE_RANGE`."""

    config: Config
    volume: Volume
    tokens: Tokens
    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network: Network
    attained: float
    parameters: int
    teacher_parameters: int
    flops_per_sample: int
    executed_flops_per_sample: int
    micro_batch_volumes: int
    accumulation: int
    zero_stage: int
    recomputed_blocks: int
    memory: Memory
    time: Time
    hours: float
    hours_range: tuple[float, float]
    checkpoint_bytes: float
    data_bytes_per_s: float
    warnings: list[str]
    alternatives: list[Alternative]

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.memory.total_bytes <= self.gpu.memory_gib * GIB

    @property
    def samples_per_s(self) -> float:
        """Of all GPUs."""
        return self.config.train.global_batch_volumes / self.time.step_s

    @property
    def gpu_hours(self) -> float:
        """GPUs × hours."""
        return self.hours * self.ranks


def volume_of(config: Config) -> Volume:
    """From the store, the crop, or the default plan. Raises InputError or the system's error for a store that cannot be
    opened."""
    crop = config.data.crop_voxels_zyx
    if paths := store_paths(config.data):
        store = open_stores(paths)
        shape = Reader(store, config.model.patch_voxels_zyx, crop).volume_zyx
        return Volume(shape, str(paths[0]), store.dtype.itemsize, len(store.rows))
    if crop is not None:
        return Volume(crop, "data.crop_voxels_zyx", 2, 0)
    return Volume(DEFAULT_VOLUME, "the default plan; give data.store=STORE for the real one", 2, 0)


def make(
    config: Config, volume: Volume, nodes: int, gpus_per_node: int, gpu: Gpu, network: Network,
    attained: float = plan_time.ATTAINED_COMPUTE, fused: bool = True,
) -> Plan:  # fmt: skip
    """The plan; alternatives are looked for where it does not fit. Raises InputError where no run would start."""
    for name, value in (("nodes", nodes), ("gpus-per-node", gpus_per_node)):
        if value < 1:
            raise InputError(f"--{name} is {value}; give 1 or more")
    if not 0 < attained <= 1:
        raise InputError(f"--attained is {attained}; give the share of the peak that is attained, above 0, at most 1")
    tokens, ranks = tokens_of(config, volume.shape_zyx), nodes * gpus_per_node
    kernels = kernels_of(config)
    recomputed = plan_recompute.decide(config, tokens, ranks, gpu.memory_gib * GIB, volume.voxel_bytes, kernels, fused)
    memory = plan_memory.predict(config, tokens, ranks, volume.voxel_bytes, kernels, fused, recomputed)
    time, slow, fast = (
        plan_time.predict(config, tokens, nodes, gpus_per_node, gpu, network, fraction, kernels, recomputed)
        for fraction in (attained, *plan_time.COMPUTE_RANGE)
    )
    micro, accumulation = batch_split(config, ranks)
    trained, teacher = sum(trained_sizes(config)), sum(teacher_sizes(config))
    hours = config.train.num_steps / 3600
    voxels = tokens.total * tokens.patch_voxels
    plan = Plan(
        config=config, volume=volume, tokens=tokens, nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu, network=network,
        attained=attained, parameters=trained, teacher_parameters=teacher, flops_per_sample=model_flops(config, tokens),
        executed_flops_per_sample=executed_flops(config, tokens, fused, recomputed), micro_batch_volumes=micro,
        accumulation=accumulation, zero_stage=zero_stage(config, accumulation), recomputed_blocks=recomputed,
        memory=memory, time=time,
        hours=hours * time.step_s, hours_range=(hours * fast.step_s, hours * slow.step_s),
        checkpoint_bytes=checkpoint_bytes(trained, teacher),
        data_bytes_per_s=micro * accumulation * voxels * volume.voxel_bytes / time.step_s, warnings=[], alternatives=[],
    )  # fmt: skip
    plan.warnings.extend(warnings(plan, fused))
    if not plan.fits:
        plan.alternatives.extend(alternatives(plan, fused))
    return plan


def kernels_of(config: Config) -> str:
    """Which kernels run on a GPU (ops.py)."""
    return "reference" if config.kernels == "reference" else "triton"


def checkpoint_bytes(trained: int, teacher: int) -> float:
    """fp32 weights and teacher, and two moments of what is trained (checkpoint_files.py)."""
    return 12 * trained + 4 * teacher


def warnings(plan: Plan, fused: bool) -> list[str]:
    """Sentences about what is other than asked for, or not looked at, or better otherwise."""
    config, said = plan.config, []
    if plan.micro_batch_volumes < min(
        config.train.micro_batch_volumes, config.train.global_batch_volumes // plan.ranks
    ):
        said.append(
            f"micro-batches are of {plan.micro_batch_volumes} volumes: train.micro_batch_volumes = "
            f"{config.train.micro_batch_volumes} does not divide a rank's "
            f"{config.train.global_batch_volumes // plan.ranks}"
        )
    if config.train.activation_checkpointing == "auto" and plan.recomputed_blocks:
        said += _smaller_batches(plan, fused)
    if plan.zero_stage != config.zero.stage:
        said.append(f"ZeRO stage {plan.zero_stage} in place of {config.zero.stage}: bf16 with accumulation needs it")
    if config.train.precision == "fp32":
        said.append('fp32 leaves the tensor cores idle; train.precision="bf16" is several times faster')
    if config.kernels == "reference":
        said.append('kernels = "reference" is not for GPUs: its memory is roughly estimated')
    if plan.fits and plan.memory.total_bytes > USABLE_FRACTION * plan.gpu.memory_gib * GIB:
        said.append(f"more than {USABLE_FRACTION:.0%} of the GPU's memory; the guesses above may not hold")
    readers = plan.data_bytes_per_s / 1e9 / READER_GB_PER_S
    if readers > config.data.workers:
        said.append(
            f"a GPU waits for data unless about {readers:.0f} readers feed it ({READER_GB_PER_S} GB/s each), and "
            f"data.workers is {config.data.workers}; `brainscale bench loader` measures yours"
        )
    if plan.time.exposed_s > 0.2 * plan.time.step_s:
        said.append("over a fifth of the step waits for communication; fewer nodes, or larger batches, waste less")
    return said


def _smaller_batches(plan: Plan, fused: bool) -> list[str]:
    """A sentence where accumulating over smaller micro-batches takes less time than computing blocks again."""
    share, found = plan.config.train.global_batch_volumes // plan.ranks, []
    for micro in (m for m in range(plan.micro_batch_volumes - 1, 0, -1) if share % m == 0):
        change = (f"train.micro_batch_volumes={micro}",)
        made = _changed(plan.config, change)
        if made and (one := _alternative(plan, made, change, plan.nodes, fused)):
            found.append(one)
    best = min(found, key=lambda one: one.step_s, default=None)
    if best is None or best.step_s >= plan.time.step_s:
        return []
    told = f"{plan.recomputed_blocks} of {block_count(plan.config)} blocks are computed again"
    return [f"{told}; {best.overrides[0]} would take {best.step_s:.3f} s a step"]


# ---------------------------------------------------------------------------------------- alternatives


def alternatives(plan: Plan, fused: bool = True) -> list[Alternative]:
    """What would fit on the same GPUs: of every set of settings that may change, the one that takes the fewest
    GPU-hours; the cheapest first. Searched: micro-batches that divide a rank's share, activation checkpointing, ZeRO
    stages from the present one, an offloaded optimizer, and up to eight times as many nodes."""
    found: dict[tuple[str, ...], Alternative] = {}
    for times in MORE_NODES:
        nodes, ranks = plan.nodes * times, plan.ranks * times
        share, rest = divmod(plan.config.train.global_batch_volumes, ranks)
        if rest:
            continue
        present = min(plan.config.train.micro_batch_volumes, share)
        for micro in (m for m in range(present, 0, -1) if share % m == 0):
            for changes in _changes(plan.config, micro if micro < present else None):
                made = _changed(plan.config, changes)
                one = made and _alternative(plan, made, changes, nodes, fused)
                keys = (*(change.split("=")[0] for change in changes), *(["nodes"] if times > 1 else []))
                if one and (keys not in found or one.gpu_hours < found[keys].gpu_hours):
                    found[keys] = one
    ranked = sorted(found.values(), key=lambda one: (one.gpu_hours, one.nodes, len(one.overrides)))
    told = [one for at, one in enumerate(ranked) if not any(_simpler(other, one) for other in ranked[:at])]
    return told[:MAX_ALTERNATIVES]


def _simpler(one: Alternative, other: Alternative) -> bool:
    """Whether one asks for nothing that the other does not ask for as well."""
    keys, others = ({change.split("=")[0] for change in each.overrides} for each in (one, other))
    return keys <= others and one.nodes <= other.nodes


def _changes(config: Config, micro: int | None) -> list[tuple[str, ...]]:
    lists = [
        [()] if micro is None else [(f"train.micro_batch_volumes={micro}",)],
        [(), ("train.activation_checkpointing=auto",)] if not config.train.activation_checkpointing else [()],
        [() if stage == config.zero.stage else (f"zero.stage={stage}",) for stage in range(config.zero.stage, 4)],
        [(), ("zero.offload_optimizer=true",)] if not config.zero.offload_optimizer else [()],
    ]
    together: list[tuple[str, ...]] = [()]
    for choices in lists:
        together = [(*before, *choice) for before in together for choice in choices]
    return together


def _changed(config: Config, changes: tuple[str, ...]) -> Config | None:
    """The config with overrides; None where the settings do not go together."""
    tree = config.model_dump()
    for change in changes:
        set_override(tree, change)
    try:
        return Config.model_validate(tree)
    except ValidationError:
        return None


def _alternative(plan: Plan, config: Config, changes: tuple[str, ...], nodes: int, fused: bool) -> Alternative | None:
    """What comes of it, or None where it does not fit."""
    ranks, kernels = nodes * plan.gpus_per_node, kernels_of(config)
    capacity, voxel_bytes = plan.gpu.memory_gib * GIB, plan.volume.voxel_bytes
    recomputed = plan_recompute.decide(config, plan.tokens, ranks, capacity, voxel_bytes, kernels, fused)
    memory = plan_memory.predict(config, plan.tokens, ranks, voxel_bytes, kernels, fused, recomputed)
    if memory.total_bytes > capacity:
        return None
    time = plan_time.predict(
        config, plan.tokens, nodes, plan.gpus_per_node, plan.gpu, plan.network, plan.attained, kernels, recomputed
    )
    gpu_hours = config.train.num_steps * time.step_s / 3600 * ranks
    return Alternative(changes, nodes, memory.total_bytes / GIB, time.step_s, gpu_hours)
