"""`brainscale bench step`: a training step against MONAI's MaskedAutoEncoderViT at the same FLOPs, and against this
project's own without kernels and without compilation; every objective, size and patch.

All variants of a model step in turn in one process, on the same volumes, of which there are more than caches hold. A
line is seconds of a whole step, until the device is done. `ratio` is that of times at the same batch, `flop_rate_ratio`
that of FLOPs per second: at the same FLOPs, whatever the objective. FLOPs of ours are those of MFU
(`model_counts.model_flops`), MONAI's those that torch counts. `spectral_share` is 1 - step without / step with the
term in the same form, pair by pair; `peak_bytes` weights, states and what a step takes beside them.

On a GPU: weights in bf16, volumes of 1 mm, and the largest batch (a power of two) at which a step of every variant fits
beside the weights of all. On a CPU: fp32, ViT-S/16 at 96³, which says how well oneDNN is used, and nothing of our
kernels; what stands in for a GPU there is counted (step_counts.py).
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed

import brainscale.distributed as distributed  # first: it tells DeepSpeed about the device
from brainscale import metrics
from brainscale.bench import kernels, step_counts, step_variants
from brainscale.bench.record import in_fresh_process, sample_lines, skipped
from brainscale.bench.step_peers import JEPA, MAE, SPECTRAL, SPECTRAL_PATCH, VCR, Case, in_world
from brainscale.bench.step_variants import GRAPHS, LEAST_BATCH, Builder, Given, Model, Variant, batches
from brainscale.geometry import Zyx
from brainscale.settings import InputError

BENCH = "step"
EXTRA = (
    "batch", "batch_by", "form", "flops_per_sample", "flop_rate_ratio", "samples_per_s", "voxels_per_s", "tflops",
    "mfu", "parameters", "peak_bytes", "spectral_share", "launches", "bytes_of",
)  # fmt: skip
"""What a line of this benchmark has beside the common keys; null where it says nothing."""
SIZES, PATCHES = ("S", "B", "L", "H"), (8, 12, 16)
OBJECTIVES = {"mae": MAE, "spectral": SPECTRAL, "spectral-patch": SPECTRAL_PATCH, "jepa": JEPA, "vcr": VCR}
QUICK_OBJECTIVES = ("mae", "spectral", "jepa", "vcr")
FULL_VOLUME: dict[int, Zyx] = {8: (160, 192, 160), 12: (144, 180, 144), 16: (160, 192, 160)}
CPU_VOLUME: Zyx = (96, 96, 96)
TABLE = (("B", 16), ("L", 16))
"""Sizes and patches of the table of steps, in all forms; then others, as configured."""
OTHERS = (("S", 16), ("H", 16), ("B", 12), ("B", 8))
CACHE_BYTES = 128 << 20
"""More than caches hold: the volumes that variants step through are no less."""
ROUNDS, QUICK_ROUNDS, WARMUP = 15, 3, 1
GRAPHS_TOLERANCE = 0.02
"""Of the loss: a graph whose memory something else writes to would not fail, but compute something else."""
WITHOUT_GPU = "there is no GPU: ratios to MONAI in bf16, MFU and the spectral term's share of a step need one"


def run(
    overrides: tuple[str, ...],
    quick: bool,
    sizes: tuple[str, ...] = (),
    patches: tuple[int, ...] = (),
    objectives: tuple[str, ...] = (),
    batch: int = 0,
) -> list[dict[str, Any]]:
    """Lines over steps, and over what is counted where there is no GPU.

    overrides: settings in the presets' place (data.crop_voxels_zyx is the volume); sizes, patches, objectives: all of
    these in all forms (none given: ViT-B/16 and L/16 so, others as configured; on a CPU ViT-S/16); batch: volumes, 0 to
    choose by memory; quick: few rounds, on a GPU B/16 alone, on a CPU two volumes and nothing compiled. Raises
    InputError for names that are not known and settings that cannot work.
    """
    for option, given, known in (
        ("sizes", sizes, SIZES),
        ("patches", patches, PATCHES),
        ("objectives", objectives, tuple(OBJECTIVES)),
    ):
        if wrong := [str(value) for value in given if value not in known]:
            raise InputError(f"--{option} {', '.join(wrong)} is not known; give some of {', '.join(map(str, known))}")
    if batch < 0:
        raise InputError(f"--batch is {batch}; give volumes, or 0 to choose by memory")
    if 0 < batch < LEAST_BATCH and (not objectives or "vcr" in objectives):
        raise InputError(f"--batch is {batch}, and vcr compares volumes; give 2 or more, or --objectives without vcr")
    on_gpu, cores = torch.cuda.is_available(), os.sched_getaffinity(0)
    measured = models(overrides, quick, sizes, patches, objectives, on_gpu)
    found = []
    for model in measured:
        if batch or (quick and not on_gpu):
            chosen, why = (batch, "given") if batch else (LEAST_BATCH, "quick")
        else:
            print(f"choosing a batch: {model.case.name}", file=sys.stderr, flush=True)
            chosen, why = in_fresh_process({}, cores, step_variants.fitting_batch, model)
        found += in_fresh_process({}, cores, model_lines, model, chosen, why, QUICK_ROUNDS if quick else ROUNDS)
    if not on_gpu:
        needing = models(overrides, False, sizes, patches, objectives, True)
        found += [skipped(BENCH, model.case.name, MAE, WITHOUT_GPU) for model in needing]
        found += stand_ins(measured[0], needing[0].case, quick)
    return [line if line["skipped"] else dict.fromkeys(EXTRA) | line for line in found]


def models(
    overrides: tuple[str, ...], quick: bool, sizes: tuple[str, ...], patches: tuple[int, ...],
    objectives: tuple[str, ...], on_gpu: bool,
) -> list[Model]:  # fmt: skip
    """What is measured, the most wanted first. Arguments and errors as in `run`."""
    names = tuple(OBJECTIVES[name] for name in objectives or (QUICK_OBJECTIVES if quick else OBJECTIVES))
    if sizes or patches or objectives or quick or not on_gpu:
        default = TABLE[0] if on_gpu else ("S", 16)
        pairs = [(size, patch, True) for size in sizes or default[:1] for patch in patches or default[1:]]
    else:
        pairs = [(*pair, True) for pair in TABLE] + [(*pair, False) for pair in OTHERS]
    found = []
    for size, patch, forms in pairs:
        volume = FULL_VOLUME[patch] if on_gpu else CPU_VOLUME
        case = Case(size, patch, volume, "bf16" if on_gpu else "fp32", overrides)
        settings = case.settings(names[0], 1)
        if settings.model.patch_voxels_zyx != (patch,) * 3:
            raise InputError("model.patch_voxels_zyx is set by --patches, such as --patches 8,16; leave it out")
        case = replace(case, volume_zyx=settings.data.crop_voxels_zyx or volume)
        found.append(Model(case, names, forms, on_gpu or not quick))
    return found


def stand_ins(model: Model, full: Case, quick: bool) -> list[dict[str, Any]]:
    """What is counted and compiled where there is no GPU: steps of the model that is timed; if not quick, with kernels
    in their interpreter too, steps and blocks of the model that a GPU would time first, and the kernels for sm_90."""
    cores, case = os.sched_getaffinity(0), replace(model.case, precision="bf16")
    if quick:
        return list(in_fresh_process({}, cores, step_counts.step_lines, case, (MAE,), False))
    return [
        *in_fresh_process(kernels.INTERPRETED, cores, step_counts.step_lines, case, (MAE, SPECTRAL), True),
        *in_fresh_process({}, cores, step_counts.step_lines, full, step_counts.COUNTED, False),
        *in_fresh_process({}, cores, step_counts.block_lines, full),
        *in_fresh_process({}, cores, step_counts.compiled_lines, "sm_90"),
    ]


# --------------------------------------------------------------------------------------------- time


class WallClock(kernels.Clock):
    """Wall time of what the device has finished."""

    def pause(self) -> None:
        """Nothing of the call before is left to do."""
        self.mark()

    def mark(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def model_lines(model: Model, batch: int, why: str, rounds: int) -> list[dict[str, Any]]:
    """Lines over all variants of a model, in a process of its own. why: how the batch was chosen."""
    world, case = in_world(), model.case
    title, voxels = f"{case.name}, batch {batch}", math.prod(case.volume_zyx)
    print(f"measuring: {title}", file=sys.stderr, flush=True)
    builder = Builder(model, batch, world)
    variants = builder.variants()
    copies = min(64, max(2, -(-CACHE_BYTES // (2 * batch * voxels))))
    given = list(batches(case, batch, copies, world, model.forms))
    peak_bytes: dict[str, int | None] = {}
    losses: dict[str, float] = {}
    for name in list(variants):
        try:
            peak_bytes[name] = first_steps(variants[name], given[0], world)
            losses[name] = variants[name].step.mean_loss()
            if GRAPHS in name and not math.isclose(losses[name], losses[MAE], rel_tol=GRAPHS_TOLERANCE):
                raise RuntimeError(f"its loss is {losses[name]:.4g}, and that of {MAE} {losses[MAE]:.4g}")
        except RuntimeError as error:
            if not isinstance(error, BackendCompilerFailed | torch.OutOfMemoryError) and GRAPHS not in name:
                raise
            del variants[name]
            builder.skipped[name] = str(error).splitlines()[0] if GRAPHS in name else kernels.why(error)
    found = [skipped(BENCH, title, name, reason) for name, reason in builder.skipped.items()]
    if not variants:
        return found
    calls: dict[str, Callable[[Given], None]] = {**variants}
    samples = kernels.measure_in_turn(calls, given, rounds, WallClock(world.device), WARMUP)
    reference = next(iter(variants))
    for line in sample_lines(BENCH, title, "s", samples, reference):
        name = line["variant"]
        step, per_s = variants[name].step, batch / line["median"]
        flops = step.flops_per_sample
        line |= {
            "batch": batch, "batch_by": why, "form": variants[name].form, "flops_per_sample": flops,
            "flop_rate_ratio": line["ratio"] * flops / variants[reference].step.flops_per_sample,
            "samples_per_s": per_s, "voxels_per_s": per_s * voxels, "tflops": per_s * flops / 1e12,
            "mfu": metrics.mfu(batch * flops, line["median"], world, case.precision), "parameters": step.parameters,
            "peak_bytes": peak_bytes[name], "spectral_share": spectral_share(name, samples),
        }  # fmt: skip
        found.append(line)
    return found


def first_steps(variant: Variant, given: Given, world: distributed.World) -> int | None:
    """Compile and warm up; the memory of a step with its own weights and states (None on a CPU)."""
    variant(given)
    if world.device.type != "cuda":
        return None
    variant(given)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    variant(given)
    return variant.state_bytes + torch.cuda.max_memory_allocated() - before


def spectral_share(name: str, samples: dict[str, list[float]]) -> float | None:
    """Of a variant with the spectral term: what part of its step that is; None of others. Pure."""
    objective, _, form = name.partition(", ")
    without = samples.get(f"{MAE}, {form}" if form else MAE)
    if objective not in (SPECTRAL, SPECTRAL_PATCH) or without is None:
        return None
    return statistics.median(1 - a / b for a, b in zip(without, samples[name]))
