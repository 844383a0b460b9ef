"""`brainscale bench scaling`: the same steps on more and more ranks of one host, beside what `plan` predicts.

Weak: every rank has the micro-batch of the reference, one rank; efficiency is T(1) / T(n). Strong: the ranks share it;
efficiency is T(1) / (n · T(n)). T is the time of an optimizer step on the slowest rank, model, engine and losses as in
`pretrain`, on a batch that stays in memory. Groups of ranks of all sizes are alive at once and take their steps in
turn, so that a drift of the machine's speed meets all of them.

On a CPU each rank computes in one thread, and besides there are as many single ranks that compute side by side and send
nothing: what they lose against one alone is the machine's (shared caches, memory, hyper-threads), and the rest is what
communicating costs. `plan` knows no CPU, so its formulas are given what was measured here: computing from the ranks
side by side, the link from an all-reduce of one bucket, the latency from one of a single element. They assume that
reducing gradients hides behind the backward pass, as it does on a GPU's streams; gloo waits for each collective at
ZeRO 1 and 2. So a second prediction is without any overlap. On GPUs the prediction is `plan`'s own, for the preset of
the GPU's name. Nothing here measures a network between hosts.
"""

import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from brainscale import model_counts, plan_time
from brainscale.bench.record import sample_lines, skipped
from brainscale.bench.scaling_predict import Link, bus_gb_per_s, on_link, planned, preset
from brainscale.bench.scaling_ranks import Group, ask, groups
from brainscale.config import Config
from brainscale.geometry import Zyx
from brainscale.plan import volume_of
from brainscale.prep_plan import Plan
from brainscale.settings import InputError, load
from brainscale.stores import store_paths
from brainscale.zero import batch_split, deepspeed_config, zero_stage
from brainscale_data_prep.convert import convert
from brainscale_data_prep.phantom import make

BENCH, ALONE, SIDE_BY_SIDE = "scaling", "1 rank", "ranks side by side, nothing sent"
CASE = "weak and strong scaling"
STAGES, QUICK_STAGES, CPU_RANKS, GPU_RANKS = (1, 2, 3), (1,), (1, 2, 4), (1, 2, 4, 8)
CPU = (
    "model.width=384", "model.depth=6", "model.heads=6", "mae.decoder_width=192", "mae.decoder_depth=2",
    "mae.decoder_heads=3", "spectral.weight=0", 'train.precision="fp32"', "train.global_batch_volumes=4",
)  # fmt: skip
"""13 million parameters, 150 tokens: a step of a third of a second on one core."""
QUICK = ("model.width=192", "model.depth=3", "model.heads=3", "train.global_batch_volumes=2")
"""In place of some of CPU: 2 million parameters."""
GPU = ("model.patch_voxels_zyx=[8, 8, 8]", "spectral.weight=0", "train.global_batch_volumes=32")
"""ViT-B, 1,200 tokens, as patches of 16³ have at 1 mm."""
PLAN = Plan(grid_voxels_xyz=(80, 96, 80), spacing_mm_xyz=(2.0, 2.0, 2.0))
ROUNDS, QUICK_ROUNDS, STEPS, PROFILED = 7, 3, 2, 3
"""Of every variant; a round's figure is the median of its steps."""
EXTRA = (
    "ranks", "zero_stage", "efficiency", "predicted_efficiency", "predicted_efficiency_no_overlap", "sent_bytes",
    "predicted_sent_bytes", "collectives", "predicted_collectives", "communication_share", "exposed_share",
    "predicted_exposed_share",
)  # fmt: skip
"""What a line of this benchmark has beside the common keys; null where it says nothing. Bytes and collectives are those
of one rank and step, shares those of a step: in which a collective was under way, and in which a rank did nothing
else."""


class Variant(NamedTuple):
    """Ranks that take steps at once. groups: one of all ranks, or (side by side) one of each."""

    name: str
    ranks: int
    groups: list[Group]
    config: Config

    @property
    def batch(self) -> int:
        """Volumes of a step of a group; also what ranks call it by."""
        return self.config.train.global_batch_volumes


class Reduced(NamedTuple):
    """Seconds of an all-reduce of so many bytes, and of one of a single element."""

    size_bytes: int
    seconds: float
    empty_s: float


def run(
    overrides: tuple[str, ...],
    quick: bool,
    config: Path | None = None,
    ranks: Sequence[int] = (),
    stages: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Lines over weak and strong scaling at each ZeRO stage, and over the link.

    overrides, config: the run that is measured (none: CPU or GPU); its train.global_batch_volumes is the batch of one
    rank (weak) and of all (strong). quick: a small model and few rounds. ranks: sizes, besides 1 (none: those that have
    a core or GPU for each rank, and a skipped line for others); stages: of ZeRO (none: 1, 2 and 3; quick: 1). Raises
    InputError for settings that cannot work, LostRank when a rank dies.
    """
    on_gpu = torch.cuda.is_available()
    sizes, found = choose(ranks, torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0)), on_gpu)
    stages = stages or (QUICK_STAGES if quick else STAGES)
    base = () if config else GPU if on_gpu else CPU + QUICK if quick else CPU
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with TemporaryDirectory(prefix="brainscale-bench-") as name:
        scratch = Path(name)
        wanted = (*base, *overrides, "data.holdout_fraction=0", "data.workers=1")
        settings = [load(Config, config, (*wanted, f"zero.stage={stage}")) for stage in stages]
        for one, size in itertools.product(settings, sizes):
            batch_split(one, size)
        if not store_paths(settings[0].data):
            make(scratch / "phantoms", 2, seed=0, spacing_mm=4.0)
            convert(scratch / "phantoms", scratch / "store", PLAN, workers=1)
            wanted = (*wanted, f"data.store={scratch / 'store'}")
            settings = [load(Config, config, (*wanted, f"zero.stage={stage}")) for stage in stages]
        singles = 1 if on_gpu else sizes[-1]
        print(f"{BENCH}: starting {sum(sizes[1:]) + singles} ranks", file=sys.stderr, flush=True)
        links: dict[int, list[Reduced]] = {size: [] for size in sizes[1:]}
        with groups([*[1] * singles, *sizes[1:]], 1, scratch) as started:
            alone, together = started[:singles], dict(zip(sizes[1:], started[singles:]))
            for one, kind in itertools.product(settings, ("weak", "strong")):
                print(f"{BENCH}: {kind} scaling, ZeRO {one.zero.stage}", file=sys.stderr, flush=True)
                found += lines(kind, one, alone, together, rounds, links)
        found += link_lines(links, backend(on_gpu))
    return [line if line["skipped"] else dict.fromkeys(EXTRA) | line for line in found]


def choose(ranks: Sequence[int], places: int, on_gpu: bool) -> tuple[list[int], list[dict[str, Any]]]:
    """Sizes to measure, with 1 among them, and skipped lines for those that are not. places: cores or GPUs. Raises
    InputError for a size below 1, and for more ranks than GPUs."""
    if bad := [size for size in ranks if size < 1]:
        raise InputError(f"--ranks {bad[0]}: give sizes of at least one rank, such as 1,2,4")
    if on_gpu and (more := [size for size in ranks if size > places]):
        raise InputError(f"--ranks {more[0]}: every rank needs a GPU, and there are {places}; give at most {places}")
    usual = GPU_RANKS if on_gpu else CPU_RANKS
    why = (
        f"there are {places} GPUs"
        if on_gpu
        else f"there are {places} cores; --ranks {max(usual)} lets ranks share them"
    )
    left_out = [] if ranks else [size for size in usual if size > places]
    found = [skipped(BENCH, CASE, f"{size} ranks", why) for size in left_out]
    if not on_gpu:
        found.append(skipped(BENCH, f"{CASE}, NCCL", "1 to 8 GPUs", "there is no GPU"))
    return sorted({1, *(ranks or (size for size in usual if size <= places))}), found


def variants_of(kind: str, config: Config, alone: list[Group], together: dict[int, Group]) -> list[Variant]:
    """The reference, and for each other size all ranks in one group, and as many single ones side by side if there are.

    The batch of a group of n is n times that of the settings (weak) or the same (strong); a rank beside others has as
    much as one of the group."""
    batch = config.train.global_batch_volumes
    found = [Variant(ALONE, 1, alone[:1], config)]
    for size, group in together.items():
        each = batch if kind == "weak" else batch // size
        found.append(Variant(f"{size} ranks", size, [group], with_batch(config, each * size)))
        if size <= len(alone):
            found.append(Variant(f"{size} {SIDE_BY_SIDE}", size, alone[:size], with_batch(config, each)))
    return found


def with_batch(config: Config, volumes: int) -> Config:
    """The same settings for another batch over all ranks."""
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_volumes": volumes})})


def lines(
    kind: str, config: Config, alone: list[Group], together: dict[int, Group], rounds: int,
    links: dict[int, list[Reduced]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Lines over weak or strong scaling at one ZeRO stage. alone: groups of one rank, the first of which is the
    reference; together: a group of each other size; links: what is measured of each is added."""
    variants = {variant.name: variant for variant in variants_of(kind, config, alone, together)}
    for variant in variants.values():
        ask(variant.groups, "prepare", variant.batch, variant.config)
    for variant in variants.values():
        ask(variant.groups, "steps", variant.batch, 1)
    names, seconds = list(variants), {name: list[float]() for name in variants}
    own: dict[int, list[Reduced]] = {size: [] for size in together}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(slowest(ask(variants[name].groups, "steps", variants[name].batch, STEPS)))
        for size, group in together.items():
            elements = bucket_elements(config, size)
            large, empty = (slowest(ask([group], "all_reduce", count, 3)) for count in (elements, 1))
            own[size].append(Reduced(4 * elements, large, empty))
    found = sample_lines(BENCH, f"{kind} scaling, {described(kind, config)}", "s", seconds, ALONE)
    for line in found:
        variant = variants[line["variant"]]
        line |= {"ranks": variant.ranks, "zero_stage": stage_of(variant.config, len(variant.groups[0]))}
        line["efficiency"] = line["ratio"] / (1 if kind == "weak" else variant.ranks)
        if len(variant.groups[0]) > 1:
            line |= communicated(variant)
            line |= predicted(kind, config, variant, seconds, own[variant.ranks])
    for variant in variants.values():
        ask(variant.groups, "forget")
    for size, reduced in own.items():
        links[size] += reduced
    return found


def slowest(answers: list[list[list[float]]]) -> float:
    """Median over steps of the seconds of the slowest rank. answers: by group, rank and step. Pure."""
    return statistics.median(max(each) for each in zip(*(steps for group in answers for steps in group)))


def communicated(variant: Variant) -> dict[str, Any]:
    """What was counted and profiled in steps that were not timed, as means over ranks, and `plan`'s bytes and
    collectives."""
    ranks = variant.ranks
    (counted,) = ask(variant.groups, "count", variant.batch)
    (shares,) = ask(variant.groups, "shares", variant.batch, PROFILED)
    under_way, exposed = (
        statistics.median(statistics.fmean(step[which] for step in each) for each in zip(*shares)) for which in (0, 1)
    )
    return {
        "sent_bytes": sum(sum(sent.values()) for sent, _ in counted) / ranks,
        "predicted_sent_bytes": sum(plan_time.sent_bytes(variant.config, ranks).values()),
        "collectives": sum(sum(calls.values()) for _, calls in counted) / ranks,
        "predicted_collectives": sum(plan_time.message_count(variant.config, ranks).values()),
        "communication_share": under_way, "exposed_share": exposed,
    }  # fmt: skip


def predicted(
    kind: str, config: Config, variant: Variant, seconds: dict[str, list[float]], reduced: list[Reduced]
) -> dict[str, float | None]:
    """Efficiency and waiting by `plan`: on GPUs its own, else from what was measured; config: that of the reference."""
    beside = seconds.get(f"{variant.ranks} {SIDE_BY_SIDE}")
    if beside is not None:
        one_s = statistics.median(seconds[ALONE])
        many = on_link(variant.config, variant.ranks, statistics.median(beside), link_of(variant.ranks, reduced))
    elif (gpu := preset(torch.cuda.get_device_name())) is not None:
        tokens = model_counts.tokens_of(config, shape_of(config))
        one_s, many = planned(config, tokens, 1, gpu).step_s, planned(variant.config, tokens, variant.ranks, gpu)
    else:
        return {}
    parts = 1 if kind == "weak" else variant.ranks
    return {
        "predicted_efficiency": one_s / (parts * many.step_s),
        "predicted_efficiency_no_overlap": one_s / (parts * many.no_overlap_s),
        "predicted_exposed_share": many.exposed_s / many.step_s,
    }


def link_of(ranks: int, reduced: list[Reduced]) -> Link:
    """From medians. Pure."""
    rate = statistics.median(bus_gb_per_s(ranks, one.size_bytes, one.seconds) for one in reduced)
    return Link(rate, statistics.median(one.empty_s for one in reduced))


def link_lines(links: dict[int, list[Reduced]], how: str) -> list[dict[str, Any]]:
    """Lines over all-reduces; mb_per_s is the bus bandwidth, which `plan` takes as --link-gb-per-s."""
    if not links:
        return []
    size, first = next(iter(links.values()))[0].size_bytes, f"{min(links)} ranks"
    found = []
    for what, at in ((f"of {size / 1e6:.1f} MB, one bucket", 1), ("of 4 bytes", 2)):
        samples = {f"{ranks} ranks": [reduced[at] for reduced in own] for ranks, own in links.items()}
        own_lines = sample_lines(BENCH, f"all-reduce {what}, {how}", "s", samples, first)
        for line, (ranks, own) in zip(own_lines, links.items()):
            line |= {"ranks": ranks, "mb_per_s": 1e3 * link_of(ranks, own).bus_gb_per_s if at == 1 else None}
        found += own_lines
    return found


def bucket_elements(config: Config, ranks: int) -> int:
    """Of the gradients that are reduced at once."""
    trained = sum(model_counts.trained_sizes(config))
    return min(trained, deepspeed_config(config, ranks)["zero_optimization"].get("reduce_bucket_size", trained))


def stage_of(config: Config, ranks: int) -> int:
    """The ZeRO stage that runs."""
    return zero_stage(config, batch_split(config, ranks)[1])


def shape_of(config: Config) -> Zyx:
    """Of a volume, in voxels."""
    return volume_of(config).shape_zyx


def backend(on_gpu: bool) -> str:
    """Who communicates, and what a rank has."""
    return "NCCL, a GPU a rank" if on_gpu else "gloo, 1 thread a rank"


def described(kind: str, config: Config) -> str:
    """What is trained, in words."""
    trained, (z, y, x) = sum(model_counts.trained_sizes(config)), shape_of(config)
    return (
        f"ZeRO {config.zero.stage}: {config.objective}, {trained / 1e6:.1f} million parameters, "
        f"{config.train.precision}, {config.train.global_batch_volumes} volumes of {x}×{y}×{z} "
        f"{'a rank' if kind == 'weak' else 'in all'}, {backend(torch.cuda.is_available())}"
    )
