"""How long a step takes, by formula: FLOPs, bytes of memory, bytes between GPUs, and what of it overlaps.

Nothing here was measured on a GPU. The fractions below say how much of a data sheet's rate is attained; each is a guess
with a source, can be given on the command line where it matters most, and decides the result: read hours as ± a third.
"""

import math
from dataclasses import dataclass

from brainscale.config import Config
from brainscale.hardware import Gpu, Network
from brainscale.model_counts import Tokens, executed_flops, model_flops, teacher_sizes, trained_sizes
from brainscale.plan_states import element_bytes
from brainscale.settings import InputError
from brainscale.zero import batch_split, collective_bytes, deepspeed_config, vector_elements

ATTAINED_COMPUTE = 0.40
"""Of the dense peak, by matrices and attention together. A guess between torchtitan's Llama 8B on H100 (33 to 39 % MFU,
benchmarks/llama3_h100_202412_torchtitan.md) and its A100 figures (57 %); a small compiled ViT-S on H100 reached 23 %
(nvSubquadratic v0.2.0)."""
COMPUTE_RANGE = (0.30, 0.50)
"""What the hours are given for, besides."""
ATTAINED_MEMORY = 0.80
"""Of the memory's peak, by kernels that stream. A guess; 90 % was the copy rate of one H200."""
OVERLAP = 0.80
"""Of computing, that can hide communication (DeepSpeed's overlap_comm). A guess."""
LATENCY_S = {"node": 10e-6, "network": 30e-6}
"""Of one collective. A guess."""
SPECTRAL_BYTES_PER_VOXEL = {
    ("triton", "volume"): 110,
    ("triton", "patch"): 9,
    ("reference", "volume"): 442,
    ("reference", "patch"): 202,
}
"""Moved by the spectral term, forward and backward: counted by `brainscale bench kernels` on 160×192×160 voxels (541,
44, 2,171 and 995 MB)."""
ADAM_BYTES = 30
"""Per owned element and step: gradient, master and moments in, the last three and 16-bit weights out."""
HOST_ADAM_S = 4e-9
"""Per owned element of an offloaded optimizer: 40 bytes at 10 GB/s of torch's AdamW on a CPU. A guess."""


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step. compute: matrices and attention; memory: optimizer, copies, spectral term;
    offload: to and on the host; communication: all of it, of which exposed is waited for."""

    compute_s: float
    memory_s: float
    offload_s: float
    communication_s: float
    exposed_s: float
    sent_bytes: float
    bus_gb_per_s: float
    mfu: float

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.compute_s + self.memory_s + self.offload_s + self.exposed_s

    @property
    def limit(self) -> str:
        """What takes the largest part."""
        parts = {
            "computing": self.compute_s, "memory bandwidth": self.memory_s, "offloading": self.offload_s,
            "communication": self.exposed_s,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


def predict(
    config: Config, tokens: Tokens, nodes: int, gpus_per_node: int, gpu: Gpu, network: Network,
    attained: float = ATTAINED_COMPUTE, kernels: str = "triton", recomputed: int | None = None,
) -> Time:  # fmt: skip
    """One step. recomputed: blocks that are computed again (`model_counts.recomputed_or`). Raises InputError where the
    GPU has no bf16, or the ranks do not divide the global batch."""
    bf16, ranks = config.train.precision == "bf16", nodes * gpus_per_node
    if bf16 and not gpu.bf16_tflops:
        raise InputError(
            f'{gpu.name} has no bf16 in its tensor cores, which came with Ampere (A100); set train.precision="fp32", '
            "or take another GPU"
        )
    peak = 1e12 * (gpu.bf16_tflops if bf16 else gpu.fp32_tflops)
    micro, accumulation = batch_split(config, ranks)
    volumes = micro * accumulation
    compute_s = volumes * executed_flops(config, tokens, recomputed=recomputed) / (peak * attained)
    memory_s = memory_bytes(config, tokens, ranks, kernels) / (1e9 * gpu.memory_gb_per_s * ATTAINED_MEMORY)
    sent, messages = sent_bytes(config, ranks), message_count(config, ranks)
    bus = gpu.link_gb_per_s if nodes == 1 else min(gpu.link_gb_per_s, network.node_gb_per_s(gpus_per_node))
    latency = LATENCY_S["node" if nodes == 1 else "network"]
    gradients_s, weights_s = (
        sent[kind] / (1e9 * bus) + messages[kind] * latency if ranks > 1 else 0.0 for kind in ("gradients", "weights")
    )
    exposed_s = exposed(config, ranks, compute_s, gradients_s, weights_s)
    offload_s = 0.0
    if config.zero.offload_optimizer:
        owned, e = sum(trained_sizes(config)) / ranks, element_bytes(config)
        offload_s = owned * (2 * e / (1e9 * gpu.host_gb_per_s) + HOST_ADAM_S)
    step_s = compute_s + memory_s + offload_s + exposed_s
    return Time(
        compute_s, memory_s, offload_s, gradients_s + weights_s, exposed_s, sum(sent.values()), bus,
        volumes * model_flops(config, tokens) / step_s / peak,
    )  # fmt: skip


def exposed(config: Config, ranks: int, compute_s: float, gradients_s: float, weights_s: float) -> float:
    """What is waited for. Stage 0 reduces after the backward pass; 1 and 2 during it (two thirds of computing; stage 1
    during that of the last micro-batch alone) and gather weights after the step; 3 does both while it computes."""
    stage = deepspeed_config(config, ranks)["zero_optimization"]["stage"]
    if stage == 0:
        return gradients_s + weights_s
    if stage == 3:
        return max(0.0, gradients_s + weights_s - OVERLAP * compute_s)
    backward_s = compute_s * 2 / 3 / (batch_split(config, ranks)[1] if stage == 1 else 1)
    return max(0.0, gradients_s - OVERLAP * backward_s) + weights_s


def sent_bytes(config: Config, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends per step (`zero.collective_bytes`), of gradients and of weights."""
    stage = deepspeed_config(config, ranks)["zero_optimization"]["stage"]
    trained, teacher = (
        (sum(sizes), sum(size for size in sizes if size < vector_elements(config)))
        for sizes in (trained_sizes(config), teacher_sizes(config))
    )
    accumulation, bf16 = batch_split(config, ranks)[1], config.train.precision == "bf16"
    return collective_bytes(*trained, ranks, stage, accumulation, bf16, teacher, sum(kept_matrices(config)))


def matrices(config: Config, sizes: list[int]) -> list[int]:
    """Those of the tensors that stage 3 shards."""
    return [size for size in sizes if size >= vector_elements(config)]


def kept_matrices(config: Config) -> list[int]:
    """Which stage 3 has at hand when the backward pass begins: the last of the forward pass, as many as fit into what
    it may keep alive (`zero.deepspeed_config`: an encoder block)."""
    kept: list[int] = []
    for size in reversed(matrices(config, trained_sizes(config))):
        if sum(kept) + size > 12 * config.model.width**2:
            break
        kept.append(size)
    return kept


def message_count(config: Config, ranks: int) -> dict[str, float]:
    """Collectives per step, but for flags and norms: a bucket's parts by owner, and whole groups of parameters
    (optim.py: matrices, vectors; of a JEPA those of encoder, predictor and teacher). At stage 3 every matrix each time
    it is used, which is the most, since small ones in a row may go together, and after the step every vector."""
    zero, accumulation = deepspeed_config(config, ranks)["zero_optimization"], batch_split(config, ranks)[1]
    stage, trained = zero["stage"], sum(trained_sizes(config))
    if stage == 3:
        all_of_it = trained_sizes(config), teacher_sizes(config)
        own, teacher = (len(matrices(config, sizes)) for sizes in all_of_it)
        vectors = sum(map(len, all_of_it)) - own - teacher
        used = 2 * own - len(kept_matrices(config)) + teacher
        reductions = accumulation * math.ceil(trained / zero["reduce_bucket_size"])
        return {"gradients": reductions, "weights": accumulation * used + vectors}
    buckets = math.ceil(trained / zero.get("reduce_bucket_size", trained))
    reductions = accumulation if stage == 2 else 1
    groups = 6 if config.objective == "jepa" else 2
    return {"gradients": reductions * (buckets + ranks - 1 if stage else 1), "weights": groups if stage else 0}


def memory_bytes(config: Config, tokens: Tokens, ranks: int, kernels: str) -> float:
    """Bytes through a GPU's memory per step that no matrix hides: AdamW on what a rank owns, a teacher's average (12
    bytes an element owned, and its copy), gradients into buckets and in fp32 out of them, and the spectral term."""
    e, (micro, accumulation) = element_bytes(config), batch_split(config, ranks)
    stage = deepspeed_config(config, ranks)["zero_optimization"]["stage"]
    trained, teacher = sum(trained_sizes(config)), sum(teacher_sizes(config))
    owners = ranks if stage else 1
    moved = 0.0 if config.zero.offload_optimizer else ADAM_BYTES * trained / owners
    moved += 12 * teacher / owners + e * teacher
    moved += (2 * e + e + 4) * trained * (accumulation if stage >= 2 else 1)
    spectral = config.spectral
    if config.objective == "mae" and spectral.weight > 0:
        voxels = micro * accumulation * tokens.total * tokens.patch_voxels * tokens.decoded / tokens.masked
        moved += SPECTRAL_BYTES_PER_VOXEL[kernels, spectral.scope] * voxels / spectral.every_steps
    return moved
