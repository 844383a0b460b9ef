"""`brainscale bench kernels`: gathers and losses against what one would pick instead of the kernels.

On a GPU, time: variants in turn, between CUDA events, behind a pause that lets the launches queue up, as they do in
training, so that it is the device's time unless an operation is launched more slowly than it runs. Every call takes the
next of several copies of the inputs, so that none finds its own in the L2 cache. `gb_per_s` is the bytes that any form
must move by the time, `share_of_copy` that by the speed of a device-to-device copy among the same calls (read and write
counted), `peak_bytes` the memory beside the inputs. On a CPU, or when asked: counted bytes of one sample (see
kernel_bytes.py), which are exact, so that each stands for itself.

Losses are timed and counted with their backward pass. What a form returns is compared with the reference first.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from brainscale.bench.kernel_bytes import Counted, count
from brainscale.bench.kernel_peers import Inputs, make_inputs
from brainscale.bench.kernel_works import OURS, WORKS, Variant, Work
from brainscale.bench.record import in_fresh_process, paired_ratio, sample_lines, skipped
from brainscale.geometry import Zyx
from brainscale.settings import InputError

BENCH = "kernels"
FULL, QUICK = (160, 192, 160), (32, 48, 32)
PATCHES = ((16, 16, 16), (8, 8, 8))
INTERPRETED = {"TRITON_INTERPRET": "1"}
TOLERANCE = 1e-2
"""Largest relative distance (2-norm) from the reference: bfloat16 has 8 bits, and the interpreter cuts them off."""
WARMUP = 3
LEAST_ROUNDS, BUDGET_S = 3, 10.0
"""A variant that would take longer in all runs in fewer rounds, at least so many."""
PAUSE_CYCLES = 4_000_000
"""About 2 ms of the device, in which the launches of the next call queue up."""
L2_TIMES = 3
COPY = "copy"


def run(quick: bool, batch: int, counting: bool) -> list[dict[str, Any]]:
    """Lines over time on a GPU, or over bytes where there is none or `counting` is asked for.

    quick: patches of 16³ alone, few rounds, and what is counted on a small volume. batch: volumes of a call that is
    timed. Raises InputError for a batch below 1.
    """
    if batch < 1:
        raise InputError(f"--batch is {batch}; at least one volume is needed")
    patches = PATCHES[:1] if quick else PATCHES
    if torch.cuda.is_available() and not counting:
        rounds = 10 if quick else 100
        return [line for patch in patches for line in time_lines(FULL, patch, batch, rounds, torch.device("cuda"))]
    volume, cores = QUICK if quick else FULL, os.sched_getaffinity(0)
    everything = (in_fresh_process(INTERPRETED, cores, count_lines, volume, patch) for patch in patches)
    return [line for lines in everything for line in lines]


def case_name(work: Work, volume_zyx: Zyx, patch_zyx: Zyx, batch: int) -> str:
    """What a line's `case` says."""
    size, patch = ("×".join(map(str, shape)) for shape in (volume_zyx, patch_zyx))
    both = ", forward and backward" if work.leaf else ""
    return f"{work.name}{both}, {size} int16, patch {patch}, bf16, {batch} sample{'s' * (batch > 1)}"


def check(work: Work, name: str, patch_zyx: Zyx, inputs: Inputs, output: Tensor, gradient: Tensor | None) -> None:
    """Compare what a variant returned with what its reference does. Raises AssertionError where they differ."""
    same_as = work.variants[name].same_as
    if same_as is None:
        return
    wanted = same_as(inputs, patch_zyx)
    for what, got, true in (("", output, wanted), ("gradient of ", gradient, work.gradient(wanted, inputs))):
        if got is not None and true is not None:
            far = ((got.float() - true.float()).norm() / true.float().norm()).item()
            assert far <= TOLERANCE, f"{what}{work.name}, {name}: differs from the reference by {far:.3g} of its norm"


def why(error: RuntimeError) -> str:
    """The reason for a variant's line being empty."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory; give a smaller --batch"
    return f"torch.compile needs g++ and failed: {str(error).splitlines()[0]}"


# ------------------------------------------------------------------------------------------- bytes


def count_lines(
    volume_zyx: Zyx, patch_zyx: Zyx, works: Sequence[Work] = WORKS, compiled: bool = True
) -> list[dict[str, Any]]:
    """Lines over the bytes of every variant for one sample, in a process whose kernels are interpreted.

    compiled: also what torch.compile makes of the peers, which takes seconds each.
    """
    inputs = make_inputs(volume_zyx, patch_zyx, 1, 0, torch.device("cpu"))
    found = []
    for work in works:
        case = case_name(work, volume_zyx, patch_zyx, 1)
        print(f"counting: {case}", file=sys.stderr, flush=True)
        counts: dict[str, Counted] = {}
        for name, variant in work.variants.items():
            if variant.compile and not compiled:
                continue
            reason = variant.missing()
            if not reason:
                try:
                    counts[name] = count(work, bind(variant, patch_zyx), inputs, variant.compile)
                except BackendCompilerFailed as error:
                    reason = why(error)
            if reason:
                found.append(skipped(BENCH, case, name, reason))
                continue
            check(work, name, patch_zyx, inputs, counts[name].output, counts[name].gradient)
        samples = {name: [float(counted.traffic.bytes)] for name, counted in counts.items()}
        for line in _lines(case, "B", samples, work, work.minimum_bytes(inputs)):
            counted = counts[line["variant"]]
            line |= {
                "launches": counted.traffic.launches,
                "forward_bytes": counted.forward_bytes,
                "sector_bytes": counted.traffic.sector_bytes,
                "held_for_backward_bytes": counted.held_bytes,
                "bytes_of": dict(counted.traffic.bytes_of.most_common()),
            }
            found.append(line)
    return found


def bind(variant: Variant, patch_zyx: Zyx) -> Callable[[Inputs], Tensor]:
    """A variant as a function of its inputs alone."""
    return lambda inputs: variant.forward(inputs, patch_zyx)


def _lines(
    case: str, unit: str, samples: dict[str, list[float]], work: Work, minimum_bytes: int
) -> list[dict[str, Any]]:
    """`sample_lines`, and in ours its ratio to every other variant."""
    lines = sample_lines(BENCH, case, unit, samples, work.reference)
    for line in lines:
        others = {name: own for name, own in samples.items() if name != OURS} if line["variant"] == OURS else {}
        line["minimum_bytes"] = minimum_bytes
        line["ratios"] = {name: paired_ratio(unit, samples[OURS], other) for name, other in others.items()}
    return lines


# ------------------------------------------------------------------------------------------- time


class Clock:
    """Points in a device's stream of work, and the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def pause(self) -> None:
        """Keep the device busy while the next launches queue up."""
        if self.cuda:
            torch.cuda._sleep(PAUSE_CYCLES)

    def mark(self) -> Any:
        """This point."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two points, once the device has passed them."""
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def time_lines(
    volume_zyx: Zyx, patch_zyx: Zyx, batch: int, rounds: int, device: torch.device, compiled: bool = True
) -> list[dict[str, Any]]:
    """Lines over the time of every variant."""
    first = make_inputs(volume_zyx, patch_zyx, batch, 0, device)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    least = min(work.minimum_bytes(first) for work in WORKS)
    num_copies = max(2, -(-L2_TIMES * cache_bytes // least))
    copies = [first, *(make_inputs(volume_zyx, patch_zyx, batch, seed, device) for seed in range(1, num_copies))]
    source = torch.zeros(max(1 << 20, 16 * cache_bytes), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = []
    for work in WORKS:
        case = case_name(work, volume_zyx, patch_zyx, batch)
        print(f"measuring: {case}", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        steps: dict[str, Callable[[Inputs], Any]] = {}
        peaks: dict[str, int | None] = {}
        for name, variant in work.variants.items():
            if variant.compile and not compiled:
                continue
            reason = variant.missing()
            if not reason:
                try:
                    steps[name], peaks[name] = _prepare(work, name, patch_zyx, first)
                except (BackendCompilerFailed, torch.OutOfMemoryError) as error:
                    reason = why(error)
            if reason:
                found.append(skipped(BENCH, case, name, reason))
        samples = measure_in_turn({**steps, COPY: lambda _: target.copy_(source)}, copies, rounds, Clock(device))
        copy_gb_per_s = 2 * source.nbytes / 1e9 / statistics.median(samples.pop(COPY))
        minimum_bytes = work.minimum_bytes(first)
        for line in _lines(case, "s", samples, work, minimum_bytes):
            gb_per_s = minimum_bytes / 1e9 / line["median"]
            line |= {
                "gb_per_s": gb_per_s,
                "copy_gb_per_s": copy_gb_per_s,
                "share_of_copy": gb_per_s / copy_gb_per_s,
                "peak_bytes": peaks[line["variant"]],
            }
            found.append(line)
    return found


def _prepare(work: Work, name: str, patch_zyx: Zyx, inputs: Inputs) -> tuple[Callable[[Inputs], Any], int | None]:
    """A variant's call, compiled and checked, and the memory that it takes beside its inputs (None on a CPU)."""
    variant, device = work.variants[name], inputs.prediction.device
    forward = bind(variant, patch_zyx)
    if variant.compile:
        mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
        forward = torch.compile(forward, dynamic=False, fullgraph=True, mode=mode)

    def step(given: Inputs) -> tuple[Tensor, Tensor | None]:
        output = forward(given)
        return output, work.gradient(output, given)

    output, gradient = step(inputs)
    check(work, name, patch_zyx, inputs, output.detach(), gradient)
    del output, gradient
    if device.type != "cuda":
        return step, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(inputs)
    return step, torch.cuda.max_memory_allocated() - before


def measure_in_turn(
    steps: dict[str, Callable[[Any], Any]], copies: Sequence[Any], rounds: int, clock: Clock, warmup: int = WARMUP
) -> dict[str, list[float]]:
    """Seconds of each variant's calls, in turn as `record.measure` has them, each on the next of the inputs."""
    names, inputs = list(steps), itertools.cycle(copies)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    most = dict.fromkeys(names, rounds)
    for turn in range(-warmup, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if turn >= most[name]:
                continue
            given = next(inputs)
            clock.pause()
            begin = clock.mark()
            steps[name](given)
            end = clock.mark()
            if turn >= 0:
                marks[name].append((begin, end))
            elif turn == -1:
                most[name] = min(rounds, max(LEAST_ROUNDS, int(BUDGET_S / clock.seconds(begin, end))))
    return {name: [clock.seconds(*pair) for pair in pairs] for name, pairs in marks.items()}
