"""What DeepSpeed keeps of a model on one rank: weights, gradients, optimizer states, buckets, a teacher; by formula.

Source: the sharded optimizers of DeepSpeed 0.19.8 (runtime/zero), as engine.py sets them up; checked on a CPU against
counted bytes (tests/test_plan_memory.py). Letters: Ψ trained elements, R ranks, e bytes of an element (bf16 2, fp32 4).
"""

from dataclasses import dataclass

from brainscale.config import Config
from brainscale.model_counts import encoder_sizes, teacher_sizes, trained_sizes
from brainscale.zero import batch_split, deepspeed_config, vector_elements

UNSHARDED_REDUCE_ELEMENTS = 500_000_000
"""Stage 0 reduces gradients in copies of at most this many elements (DeepSpeed's default)."""


@dataclass(frozen=True)
class Part:
    """A line of the table of memory. why: what it consists of."""

    name: str
    bytes: float
    why: str


@dataclass(frozen=True)
class States:
    """always: at every moment; forward: what is there besides from the second micro-batch of a step on, at the latest;
    backward: at the end of a backward pass, gradients among it; step: in the optimizer's step; host_bytes: of one rank,
    for an offloaded optimizer."""

    always: list[Part]
    forward: list[Part]
    backward: list[Part]
    step: list[Part]
    host_bytes: float


def states(config: Config, ranks: int) -> States:
    """Of one rank. Raises InputError when the ranks do not divide the global batch.

    An offloaded optimizer has fp32 master, moments and gradients and a copy of the weights in host memory:
    (16 + e)·Ψ/R, and a teacher's fp32 master.
    """
    e, zero = element_bytes(config), deepspeed_config(config, ranks)["zero_optimization"]
    stage, offload, accumulates = zero["stage"], config.zero.offload_optimizer, batch_split(config, ranks)[1] > 1
    trained, teacher = sum(trained_sizes(config)), sum(teacher_sizes(config))
    gradients, buckets, reducing = gradient_parts(config, ranks)
    always = weight_parts(config, ranks) + ([] if offload else optimizer_parts(config, ranks))
    always += [teacher_part(config, ranks)] if teacher else []
    backward = [gradients, buckets, reducing]
    if stage == 3:
        always, backward = [*always, gradients, buckets], [reducing]
    summed = Part("gradients", gradients.bytes / (2 if stage == 2 and e == 4 else 1), gradients.why)
    stays = [buckets] if accumulates and stage == 1 else []
    forward = [summed, *stays] if accumulates and stage < 3 else []
    many = {(1, True): ranks, (2, True): 2}.get((stage, accumulates and e == 4), 1)
    own = Part("gradients", gradients.bytes / many, gradients.why if many == 1 else share(ranks))
    copies = Part("step's copies", 0.0 if offload else step_bytes(config, ranks), "gradients of a group, flat and fp32")
    host_bytes = ((16 + e) * trained + 4 * teacher) / ranks if offload else 0.0
    return States(always, forward, backward, [copies] if stage == 3 else [own, *stays, copies], host_bytes)


def element_bytes(config: Config) -> int:
    """e: of weights and activations."""
    return 2 if config.train.precision == "bf16" else 4


def weight_parts(config: Config, ranks: int) -> list[Part]:
    """e·Ψ; at stage 3 e·Ψ/R and small vectors whole, beside a block that is gathered and one that is gathered ahead."""
    e, zero = element_bytes(config), deepspeed_config(config, ranks)["zero_optimization"]
    sizes = trained_sizes(config)
    if zero["stage"] < 3:
        return [Part("weights", e * sum(sizes), f"{sum(sizes):,}, whole")]
    vectors = sum(size for size in sizes if size < vector_elements(config)) if ranks > 1 else 0
    ahead = min(zero["stage3_max_live_parameters"] + zero["stage3_prefetch_bucket_size"], sum(sizes))
    return [
        Part("weights", e * (sum(sizes) / ranks + vectors), f"{share(ranks)} of {sum(sizes):,}, small vectors whole"),
        Part("gathered weights", e * ahead if ranks > 1 else 0, "a block, and one ahead"),
    ]


def optimizer_parts(config: Config, ranks: int) -> list[Part]:
    """fp32 master 4·Ψ/R, which at stage 0 is the weights themselves, and AdamW's moments 8·Ψ/R, at stage 0 8·Ψ."""
    stage, trained = deepspeed_config(config, ranks)["zero_optimization"]["stage"], sum(trained_sizes(config))
    if stage == 0:
        return [Part("AdamW's moments", 8 * trained, "fp32, whole")]
    return [
        Part("fp32 master", 4 * trained / ranks, share(ranks)),
        Part("AdamW's moments", 8 * trained / ranks, f"fp32, {share(ranks)}"),
    ]


def teacher_part(config: Config, ranks: int) -> Part:
    """Forward copy e·T, at stage 3 e·T/R and small vectors whole, and fp32 average 4·T/R, which is in host memory with
    an offloaded optimizer, and is the copy itself where the two are the same (fp32 on one rank, stage 0)."""
    e, stage = element_bytes(config), deepspeed_config(config, ranks)["zero_optimization"]["stage"]
    sizes = teacher_sizes(config)
    vectors = sum(size for size in sizes if size < vector_elements(config)) if ranks > 1 else 0
    copy = e * (sum(sizes) / ranks + vectors) if stage == 3 else e * sum(sizes)
    average = 4 * sum(sizes) / (ranks if stage else 1)
    if stage == 0 or (stage < 3 and e == 4 and ranks == 1 and not config.zero.offload_optimizer):
        return Part("teacher", average, "fp32, whole")
    if config.zero.offload_optimizer:
        return Part("teacher", copy, "forward copy")
    return Part("teacher", copy + average, f"forward copy, fp32 average ({share(ranks)})")


def gradient_parts(config: Config, ranks: int) -> tuple[Part, Part, Part]:
    """(gradients, buckets, what is copied to reduce them).

    Gradients. Stage 0: whole. Stages 1 and 2: a rank's own part, in fp32 where bf16 is accumulated; where fp32 is,
    whole at stage 1, and at stage 2 new ones beside the sum. Stage 3: a flat buffer of a rank's own part. An offloaded
    optimizer takes them at once, unless they are summed in fp32 on the GPU (bf16, stage 2). Buckets: two, in the
    weights' type; stage 3: one, in fp32. Copies: what goes to one owner, flat, and that in fp32.
    """
    e, zero = element_bytes(config), deepspeed_config(config, ranks)["zero_optimization"]
    stage, accumulates = zero["stage"], batch_split(config, ranks)[1] > 1
    trained = sum(trained_sizes(config))
    if stage == 0:
        copy = Part("reduction", 4 * min(trained, UNSHARDED_REDUCE_ELEMENTS), "a flat copy of the gradients")
        return Part("gradients", 4 * trained, "fp32, whole"), Part("buckets", 0, ""), copy
    width, whole = 4 if accumulates else e, stage == 1 and accumulates
    twice = 2 if stage == 2 and accumulates and e == 4 else 1
    size = width * twice * trained / (1 if whole else ranks)
    if config.zero.offload_optimizer and not (stage < 3 and e == 2 and accumulates):
        size = 0
    bucket = zero["reduce_bucket_size"]
    filled = min(bucket, trained if stage == 3 else trained / ranks)
    return (
        Part("gradients", size, f"{'whole' if whole else share(ranks)}, {'fp32' if width == 4 else 'bf16'}"),
        Part("buckets", 4 * bucket if stage == 3 else 2 * e * bucket, f"DeepSpeed's, of {bucket:,} elements"),
        Part("reduction", filled * (e + (4 if e == 2 else 0)), "copies of a bucket, flat and in fp32"),
    )


def step_bytes(config: Config, ranks: int) -> float:
    """Copies of the gradients of the largest group of parameters: flat, and in fp32 where they are not. None at stage
    0, nor where they were accumulated flat in fp32 (bf16, stage 2)."""
    e, accumulates = element_bytes(config), batch_split(config, ranks)[1] > 1
    stage = deepspeed_config(config, ranks)["zero_optimization"]["stage"]
    if stage == 0 or (stage == 2 and e == 2 and accumulates):
        return 0.0
    return (6 if e == 2 and stage < 3 else 4) * largest_group(config) / ranks


def largest_group(config: Config) -> int:
    """Elements of the largest group that AdamW has (optim.py): matrices, apart from those that a teacher follows."""
    encoder, every = (
        sum(size for size in sizes if size >= vector_elements(config))
        for sizes in (encoder_sizes(config.model), trained_sizes(config))
    )
    return max(encoder, every - encoder) if config.objective == "jepa" else every


def share(ranks: int) -> str:
    """How much one rank has, in words."""
    return "whole" if ranks == 1 else f"1/{ranks}"
