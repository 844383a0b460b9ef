"""`brainscale bench roofline`: what limits each preset, by formula: FLOPs and bytes of the parts of a step against the
roofs of a GPU, communication on eight of them, and volumes that must be read.

A part takes at least max(FLOPs / peak, bytes / bandwidth): S. Williams et al., "Roofline" (CACM 2009). Bytes are the
least that torch's kernels move: a matrix product reads both factors and writes the result, once forward and twice
backward; fused attention never writes its scores; norms, GELU, residuals and rotations each read and write, as without
torch.compile. Optimizer, spectral term, overlap and communication are `plan_time`'s. Nothing is measured here, but for
the pace of reading, which is a kept line of `bench loader`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from brainscale import plan_time
from brainscale.config import Config
from brainscale.hardware import GPUS, NETWORKS, Gpu
from brainscale.model_counts import Tokens, block_shapes, decoder_of, tokens_of, trained_sizes
from brainscale.plan import DEFAULT_VOLUME
from brainscale.settings import InputError, load
from brainscale.zero import batch_split

CONFIGS = Path(__file__).parents[2] / "configs"
LOADER_LINES = Path(__file__).with_name("results") / "loader.jsonl"
NODE_GPUS, NODE_CORES = 8, 112
"""Of an NVIDIA DGX H100 or H200 (data sheet: two processors of 56 cores)."""
OBJECTIVES = {"MAE": "mae_spectral", "JEPA": "jepa_vcr"}
FINE = ("model.patch_voxels_zyx=[8, 8, 8]", "data.crop_voxels_zyx=[128, 128, 128]")
"""Finer tokens, as the presets' first lines say them."""
MATRICES, ATTENTION, SMALL, OPTIMIZER, GATHER, SPECTRAL, TEACHER = (
    "encoder, decoder", "attention", "norms, GELU, residuals", "optimizer, gradients", "gather, pixel loss",
    "spectral term", "teacher's matrices",
)  # fmt: skip
COMMUNICATION = "communication"
ELEMENTWISE_ELEMENTS, BACKWARD_TIMES = 22, 3
"""Moved forward per token and width of a block: two norms 4, GELU 8, two residuals 6, rotated queries and keys 4; and
how many times that with the backward pass, which reads what was kept and the gradient."""
ADAM_FLOPS = 15
"""Per element."""


class Part(NamedTuple):
    """Of an optimizer step of one GPU."""

    name: str
    flops: float
    moved_bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.moved_bytes

    def roof_s(self, gpu: Gpu) -> float:
        """The least time."""
        return max(self.flops / (1e12 * gpu.bf16_tflops), self.moved_bytes / (1e9 * gpu.memory_gb_per_s))


@dataclass(frozen=True)
class Preset:
    """A preset on one of NODE_GPUS GPUs. volumes: of a step; exposed_s and planned_s: of a step by `plan`, what waits
    for communication and the whole."""

    size: str
    patch: int
    objective: str
    parts: list[Part]
    volumes: int
    exposed_s: float
    planned_s: float

    @property
    def name(self) -> str:
        """As in the field."""
        return f"{self.objective} ViT-{self.size}/{self.patch}"

    @property
    def intensity(self) -> float:
        """FLOPs per byte of all parts."""
        return sum(part.flops for part in self.parts) / sum(part.moved_bytes for part in self.parts)

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """The least time of each part, and what waits for communication."""
        return {part.name: part.roof_s(gpu) for part in self.parts} | {COMMUNICATION: self.exposed_s}


def presets(gpu: Gpu) -> list[Preset]:
    """All presets S to H, patches of 16 and 8, on NODE_GPUS of these. Raises InputError outside a checkout, whose
    configs are read."""
    if not CONFIGS.is_dir():
        raise InputError(f"{CONFIGS} is not there; run it from a checkout, whose presets it reads")
    return [
        preset(objective, size, patch, gpu)
        for objective in OBJECTIVES for patch in (16, 8) for size in "SBLH"
    ]  # fmt: skip


def preset(objective: str, size: str, patch: int, gpu: Gpu) -> Preset:
    """One preset, as its file has it but for finer tokens."""
    file = CONFIGS / f"{OBJECTIVES[objective]}_vit_{size.lower()}.toml"
    config = load(Config, file, FINE if patch == 8 else ())
    tokens = tokens_of(config, config.data.crop_voxels_zyx or DEFAULT_VOLUME)
    micro, accumulation = batch_split(config, NODE_GPUS)
    time = plan_time.predict(config, tokens, 1, NODE_GPUS, gpu, NETWORKS["ib-ndr400"])  # the network is not used
    return Preset(
        size, patch, objective, parts(config, tokens), micro * accumulation, time.exposed_s, time.step_s
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ parts


def parts(config: Config, tokens: Tokens) -> list[Part]:
    """Of an optimizer step of one of NODE_GPUS GPUs, without blocks that are computed again. Pure."""
    micro, accumulation = batch_split(config, NODE_GPUS)
    volumes, width, decoder = micro * accumulation, config.model.width, decoder_of(config)

    def product(rows: int, inputs: int, outputs: int, passes: int = 3) -> Part:
        """A matrix over all volumes: passes of 2·rows·inputs·outputs, each over three matrices in 16 bits."""
        moved = micro * rows * (inputs + outputs) + inputs * outputs
        return Part("", 2.0 * passes * volumes * rows * inputs * outputs, 2.0 * passes * accumulation * moved)

    def block(n: int, m: int, d: int, passes: int = 3) -> list[Part]:
        return [product(n, d, 3 * d, passes), product(m, d, d, passes), product(m, d, 4 * d, passes),
                product(m, 4 * d, d, passes)]  # fmt: skip

    shapes = block_shapes(config, tokens)
    own = [product(tokens.visible, tokens.patch_voxels, width, 2)]
    own += [product(tokens.visible, width, decoder.width), product(tokens.decoded, decoder.width, decoder.outputs)]
    own += [one for s in shapes for one in block(s.tokens, s.outputs, s.width)]
    attention = [
        Part("", 14.0 * volumes * s.tokens * s.outputs * s.width, 12.0 * volumes * (s.tokens + s.outputs) * s.width)
        for s in shapes
    ]
    elements = BACKWARD_TIMES * sum((s.tokens + s.outputs) / 2 * s.width for s in shapes)
    gathered, lost, teacher = tokens.visible, tokens.decoded if config.objective == "mae" else 0, list[Part]()
    if config.objective == "jepa":
        gathered += tokens.total
        teacher = [product(tokens.total, tokens.patch_voxels, width, 1)]
        for m in [tokens.total] * (config.model.depth - 1) + [tokens.decoded]:
            teacher += block(tokens.total, m, width, 1)
            both = tokens.total + m
            attention.append(Part("", 4.0 * volumes * tokens.total * m * width, 4.0 * volumes * both * width))
            elements += both / 2 * width
    moved = volumes * ELEMENTWISE_ELEMENTS * elements
    voxels = volumes * tokens.patch_voxels
    plain = config.model_copy(update={"spectral": config.spectral.model_copy(update={"weight": 0.0})})
    optimizer = plan_time.memory_bytes(plain, tokens, NODE_GPUS, "triton")
    spectral = plan_time.memory_bytes(config, tokens, NODE_GPUS, "triton") - optimizer
    grid = tokens.total * tokens.patch_voxels
    found = [
        added(MATRICES, own), added(ATTENTION, attention), Part(SMALL, moved, 2.0 * moved),
        Part(OPTIMIZER, ADAM_FLOPS * sum(trained_sizes(config)) / NODE_GPUS, optimizer),
        Part(GATHER, 4.0 * voxels * (gathered + lost), voxels * (4.0 * gathered + 6.0 * lost)),
    ]  # fmt: skip
    if spectral:
        found.append(Part(SPECTRAL, volumes * grid * (3 * 2.5 * math.log2(grid) + 30), spectral))
    if teacher:
        found.append(added(TEACHER, teacher))
    return found


def added(name: str, several: list[Part]) -> Part:
    """All of them as one."""
    return Part(name, sum(one.flops for one in several), sum(one.moved_bytes for one in several))


# ------------------------------------------------------------------------------------------------ limits


def read_per_core(lines: Path = LOADER_LINES) -> tuple[float, str]:
    """Whole cold volumes a second that one core of ours delivered, and on which processor, by the newest kept line.
    Raises InputError where there is none."""
    found = [
        line
        for line in map(json.loads, lines.read_text(encoding="utf-8").splitlines())
        if line["case"].startswith("whole volumes, cold, 1 worker") and "160×192×160" in line["case"]
        and line["variant"] == "brainscale, torch loader" and not line["skipped"]
    ]  # fmt: skip
    if not found:
        raise InputError(f"{lines} has no line of cold whole volumes at 1 mm; brainscale bench loader --json {lines}")
    newest = max(found, key=lambda line: line["utc"])
    return newest["volumes_per_s"], newest["machine"]["cpu"]


def limit(one: Preset, gpu: Gpu, per_core: float) -> str:
    """In words: data, where more cores must read than a node has for a GPU; else the kind of work that takes most."""
    if cores(one, per_core) > NODE_CORES / NODE_GPUS:
        return "reading volumes"
    kinds = grouped(one, gpu)
    return max(kinds, key=lambda kind: kinds[kind])


def grouped(one: Preset, gpu: Gpu) -> dict[str, float]:
    """Share of the least time by what bounds it."""
    seconds = one.seconds(gpu)
    found = {
        "matrices": seconds[MATRICES] + seconds.get(TEACHER, 0.0),
        "attention": seconds[ATTENTION],
        "memory bandwidth": sum(seconds.get(name, 0.0) for name in (SMALL, OPTIMIZER, GATHER, SPECTRAL)),
        "communication": seconds[COMMUNICATION],
    }
    return {kind: each / sum(seconds.values()) for kind, each in found.items()}


def cores(one: Preset, per_core: float) -> float:
    """That must read for one GPU at the plan's pace."""
    return one.volumes / one.planned_s / per_core


def markdown(found: list[Preset], gpu: Gpu) -> str:
    """What limits each preset, as a table."""
    per_core, cpu = read_per_core()
    rows = []
    for one in found:
        shares = grouped(one, gpu)
        rows.append(
            f"| {one.name} | {one.intensity:.0f} | "
            + " | ".join(f"{share:.0%}".replace("%", " %") for share in shares.values())
            + f" | {one.volumes / sum(one.seconds(gpu).values()):,.0f} | {one.volumes / one.planned_s:,.0f} | "
            f"{cores(one, per_core):.1f} | {limit(one, gpu, per_core)} |"
        )
    said = [
        f"Predicted from formulas for {NODE_GPUS} {gpu.name.upper()}; nothing here was measured on a GPU.",
        "Shares are those of the least time that the roofs allow: of matrices, of attention, of what memory bandwidth",
        "bounds (norms, GELU, residuals, optimizer, gather, losses), and of waiting for communication. The pace is in",
        "volumes a second and GPU: at the roofs, and by `brainscale plan`, at "
        f"{100 * plan_time.ATTAINED_COMPUTE:.0f} % of the peak. /16: volumes of",
        f"160×192×160; /8: crops of 128³. A core reads {per_core:.0f} whole volumes a second, cold, as measured on one "
        "core of an",
        f"{cpu}; a node has {NODE_CORES // NODE_GPUS} cores for a GPU.",
    ]
    head = (
        "preset", "FLOP/byte", "matrices", "attention", "memory", "communication", "at the roofs", "plan",
        "cores to read", "limited by",
    )  # fmt: skip
    return "\n".join([*said, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows, ""])


def gpu_of(name: str) -> Gpu:
    """Raises InputError for a name that is not known, or a GPU without bf16."""
    if name not in GPUS or not GPUS[name].bf16_tflops:
        known = ", ".join(key for key, gpu in GPUS.items() if gpu.bf16_tflops)
        raise InputError(f"--gpu {name} is not known, or has no bf16; give one of {known}")
    return GPUS[name]
