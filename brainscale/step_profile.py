"""What a step consists of, sampled by torch's profiler: data, copies to the GPU, compute, communication, host.

On a GPU the shares are those of what it does: kernels of compute; NCCL's kernels, which also wait for the other ranks,
where no other kernel runs beside them; copies from the host where neither does; the loop's waiting for data where the
GPU is idle; and the rest, host: the GPU idles while Python launches too slowly, or reads something back. On a CPU the
loop's waiting for data comes first, then gloo where the loop's thread computes nothing, and all else is compute.

A sample changes no result: it waits for the GPU before and after the step, and records. What starting and reading the
profiler takes is counted as other than training, and `metrics.Clock.slowed` keeps the step out of the means.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from brainscale.distributed import World
from brainscale.metrics import Clock

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
"""Read when the profiler starts first, which otherwise writes two lines about every sample to standard error."""

KINDS = ("data", "host_to_device", "compute", "communication", "host")
FIRST_STEP = 20
"""Step of a process that is sampled first: warm and compiled by then."""
STEP = "brainscale.step"
GPU_ORDER = ("compute", "communication", "host_to_device", "data")
CPU_ORDER = ("data", "compute", "communication")
"""Who is given the time at which several kinds happen."""


class Span(NamedTuple):
    """Something that happened between two times of one clock, in any unit."""

    kind: str
    start: float
    end: float


def wanted(step: int, process_step: int, every_steps: int) -> bool:
    """Whether to sample step number `step`, which is number `process_step` of this process (both from 1)."""
    if not every_steps or process_step < FIRST_STEP:
        return False
    return process_step == FIRST_STEP or step % every_steps == 0


class Sampler:
    """Samples the steps of rank 0 that are `wanted`; one that `train.profile` has is made up for by the next that it
    does not have."""

    def __init__(self, world: World, clock: Clock, say: Callable[[str], None], every_steps: int, first: int) -> None:
        """first: steps that were finished when the process began."""
        self.world, self.clock, self.say, self.every_steps, self.first = world, clock, say, every_steps, first
        self.owed = False

    def around(self, step: int, recorded: bool) -> AbstractContextManager[dict[str, float]]:
        """Around the work of a step: a dict that holds its shares afterwards if it was sampled. recorded: by
        `train.profile`, which slows the step too."""
        self.owed = self.owed or wanted(step, step - self.first, self.every_steps)
        if recorded:
            return self.clock.slowed()
        if not self.owed or not self.world.is_first:
            return nullcontext({})
        self.owed = False
        return sampling(self.world.device, self.clock, self.say)


@contextmanager
def sampling(device: torch.device, clock: Clock, say: Callable[[str], None]) -> Iterator[dict[str, float]]:
    """Around one step: a dict that holds its shares (KINDS, sum 1) afterwards, or stays empty where they cannot be
    measured, which `say` tells."""
    found: dict[str, float] = {}
    if torch.autograd._profiler_enabled():
        say("this step is not sampled for `brainscale doctor`: another profiler is active")
        with clock.slowed():
            yield found
        return
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with clock.span("other_s"):
        if on_gpu:
            torch.cuda.synchronize(device)
        recorder = profile(activities=activities)
        recorder.start()
    try:
        with clock.slowed(), record_function(STEP):
            yield found
            if on_gpu:
                torch.cuda.synchronize(device)
    finally:
        with clock.span("other_s"):
            recorder.stop()
    with clock.span("other_s"):
        events = recorder.profiler.kineto_results.events()  # type: ignore[union-attr]
        whole = next(event for event in events if event.name() == STEP and is_annotation(event))
        spans = list(gpu_spans(events) if on_gpu else cpu_spans(events, whole.start_thread_id()))
        if on_gpu and not any(span.kind == "compute" for span in spans):
            say("this step is not sampled for `brainscale doctor`: no kernel was recorded; does another tool trace it?")
            return
        order, rest = (GPU_ORDER, "host") if on_gpu else (CPU_ORDER, "compute")
        found.update(shares(spans, whole.start_ns(), whole.end_ns(), order, rest))


def shares(spans: Iterable[Span], start: float, end: float, order: tuple[str, ...], rest: str) -> dict[str, float]:
    """Share of start..end of each of KINDS, sum 1. Time at which several kinds happen belongs to the first of them in
    `order`, time at which none does to `rest`; spans of other kinds do not count. Pure."""
    inside = [Span(s.kind, max(s.start, start), min(s.end, end)) for s in spans if s.end > start and s.start < end]
    found = dict.fromkeys(KINDS, 0.0)
    taken: list[Span] = []
    before = 0.0
    for kind in order:
        taken += [span for span in inside if span.kind == kind]
        after = covered(taken)
        found[kind] += (after - before) / (end - start)
        before = after
    found[rest] += 1 - before / (end - start)
    return found


def covered(spans: list[Span]) -> float:
    """Length of the union of spans."""
    length, reached = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span.start):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def gpu_spans(events: Iterable[Any]) -> Iterator[Span]:
    """What the GPU did, and the loop's waiting for data, of a profile's events."""
    for event in events:
        activity, name = event.activity_type(), event.name()
        kind = ""
        if activity == "kernel":
            kind = "communication" if name.lower().startswith("nccl") else "compute"
        elif activity == "gpu_memset" or (activity == "gpu_memcpy" and "DtoD" in name):
            kind = "compute"
        elif activity == "gpu_memcpy" and "HtoD" in name:
            kind = "host_to_device"
        elif name == "data" and is_annotation(event):
            kind = "data"
        if kind:
            yield Span(kind, event.start_ns(), event.end_ns())


def cpu_spans(events: Iterable[Any], loop_thread: int) -> Iterator[Span]:
    """What the loop's thread computed and waited for, and gloo in its own threads, of a profile's events."""
    for event in events:
        name = event.name()
        kind = ""
        if name.startswith(("gloo:", "c10d::")):
            kind = "communication"
        elif event.start_thread_id() == loop_thread and name.startswith("aten::"):
            kind = "compute"
        elif name == "data" and is_annotation(event):
            kind = "data"
        if kind:
            yield Span(kind, event.start_ns(), event.end_ns())


def is_annotation(event: Any) -> bool:
    """Whether an event is a `record_function` of the host; a GPU has copies of them."""
    return event.activity_type() == "user_annotation"
