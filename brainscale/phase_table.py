"""A profile of steps as a table by phase: how long the host was in each, what it launched there, where the GPU idled.

The host's time is that of the loop's thread, and belongs to the innermost phase, so that all rows together are the
step. A kernel belongs to the phase in which it was launched, by any thread and whenever it ran. The backward pass is
split by autograd's sequence numbers: what computes the gradient of an operation belongs to the phase that the operation
was in. What the phases "other" and "checkpoint" do inside is theirs.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from brainscale.phases import PHASES

STEP = "step "
"""Begins the name of the range around every step that is profiled; its number follows."""
REST = "rest"
COMMUNICATION = "communication"
BACKWARD_OF = "backward of "
NODE = "autograd::engine::evaluate_function: "
OPAQUE = ("other", "checkpoint")
_AT = PHASES.index("backward") + 1
ROWS = (*PHASES[:_AT], *(BACKWARD_OF + name for name in PHASES), *PHASES[_AT:], COMMUNICATION, REST)
"""In the order of the table."""


class Event(NamedTuple):
    """What a profile holds. kind: as in the trace's "cat"; thread: torch's number of it; correlation: the same for a
    launch and what it launched; sequence: autograd's number of an operation, -1 for none; forward_thread: where the
    operation of a node of the backward pass ran, 0 in the forward pass."""

    kind: str
    name: str
    thread: int
    start_ns: int
    end_ns: int
    correlation: int = 0
    sequence: int = -1
    forward_thread: int = 0


class Range(NamedTuple):
    """A stretch of time by name."""

    start_ns: int
    end_ns: int
    label: str


@dataclass(frozen=True)
class Row:
    """Of one step in the mean. host_ms: of the loop's thread; device_ms: in which the GPU ran what was launched here;
    idle_ms: in which the GPU ran nothing while the host was here. The last two are None without a GPU."""

    phase: str
    calls: float
    host_ms: float
    device_ms: float | None
    idle_ms: float | None


@dataclass(frozen=True)
class Gap:
    """The longest time in which the GPU ran nothing, and what the host was at for most of it."""

    ms: float
    step: int
    phase: str


@dataclass(frozen=True)
class Table:
    """steps: (first, last); step_ms: mean time of a step; gap: None without a GPU."""

    steps: tuple[int, int]
    step_ms: float
    rows: tuple[Row, ...]
    gap: Gap | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make(events: Iterable[Event]) -> Table:
    """The table of a profile that holds at least one whole step. Pure."""
    steps: list[Range] = []
    phases: list[Event] = []
    nodes: list[Event] = []
    origins: dict[int, dict[int, int]] = defaultdict(dict)
    launched: dict[int, int] = {}
    device: list[Event] = []
    loop_thread = 0
    for event in events:
        if event.kind == "user_annotation":
            if re.fullmatch(STEP + r"\d+", event.name):
                steps.append(Range(event.start_ns, event.end_ns, event.name))
                loop_thread = event.thread
            elif event.name in PHASES:
                phases.append(event)
        elif event.kind == "cpu_op" and event.name.startswith(NODE):
            nodes.append(event)
        elif event.kind == "cpu_op" and event.sequence >= 0 and event.forward_thread == 0:
            made = origins[event.thread]  # the newest operation of a number is the one that made the node
            made[event.sequence] = max(made.get(event.sequence, 0), event.start_ns)
        elif event.kind in ("cuda_runtime", "cuda_driver"):
            launched[event.correlation] = event.start_ns
        elif event.kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            device.append(event)
    steps.sort()
    own = [Range(event.start_ns, event.end_ns, event.name) for event in phases if event.thread == loop_thread]
    inside = [one for one in own if steps[0].start_ns <= one.start_ns < steps[-1].end_ns]
    named = [*(step._replace(label=REST) for step in steps), *inside]
    forward = Timeline(named)
    whole = Timeline([*named, *_backward(nodes, origins[loop_thread], forward)])
    count, host = len(steps), _lengths(whole.stretches)
    calls = Counter(one.label for one in inside if forward.at(one.start_ns) == one.label)
    busy, idle, gap = _of_device(device, launched, whole, steps)
    rows = tuple(
        Row(
            name, calls[name] / count, host.get(name, 0) / 1e6 / count,
            busy.get(name, 0) / 1e6 / count if device else None, idle.get(name, 0) / 1e6 / count if device else None,
        )
        for name in ROWS if name == REST or name in host or name in busy
    )  # fmt: skip
    numbers = [int(step.label.removeprefix(STEP)) for step in steps]
    return Table((numbers[0], numbers[-1]), sum(s.end_ns - s.start_ns for s in steps) / 1e6 / count, rows, gap)


class Timeline:
    """Nested ranges cut into stretches that do not overlap, each of the innermost label."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self.stretches = list(_innermost(ranges))
        self.starts = [stretch.start_ns for stretch in self.stretches]

    def at(self, time_ns: int) -> str:
        """The label at a time, REST outside of all."""
        place = bisect_right(self.starts, time_ns) - 1
        return self.stretches[place].label if place >= 0 and time_ns < self.stretches[place].end_ns else REST

    def within(self, start_ns: int, end_ns: int) -> Iterator[Range]:
        """The stretches between two times, cut to them."""
        place = max(0, bisect_right(self.starts, start_ns) - 1)
        while place < len(self.stretches) and self.stretches[place].start_ns < end_ns:
            start, end, label = self.stretches[place]
            if end > start_ns:
                yield Range(max(start, start_ns), min(end, end_ns), label)
            place += 1


def _innermost(ranges: Iterable[Range]) -> Iterator[Range]:
    stack: list[Range] = []
    reached = 0

    def until(time_ns: int) -> Iterator[Range]:
        nonlocal reached
        if stack and time_ns > reached:
            yield Range(reached, time_ns, stack[-1].label)
        reached = max(reached, time_ns)

    for start, end, label in sorted(ranges, key=lambda one: (one.start_ns, -one.end_ns)):
        while stack and stack[-1].end_ns <= start:
            yield from until(stack[-1].end_ns)
            stack.pop()
        yield from until(start)
        if stack:
            end = min(end, stack[-1].end_ns)
            label = stack[-1].label if stack[-1].label in OPAQUE else label
        stack.append(Range(start, end, label))
    while stack:
        yield from until(stack[-1].end_ns)
        stack.pop()


def _backward(nodes: list[Event], origins: dict[int, int], forward: Timeline) -> Iterator[Range]:
    """The nodes of the backward pass, each by the phase that its operation was in, where that is known."""
    for event in nodes:
        if event.sequence in origins and forward.at(event.start_ns) == "backward":
            phase = forward.at(origins[event.sequence])
            label = "backward" if phase in (REST, "backward") else BACKWARD_OF + phase
            yield Range(event.start_ns, event.end_ns, label)


def _of_device(
    device: list[Event], launched: dict[int, int], timeline: Timeline, steps: list[Range]
) -> tuple[dict[str, int], dict[str, int], Gap | None]:
    """Nanoseconds in which the GPU ran what each phase launched, in which it idled during each, and its longest gap."""
    if not device:
        return {}, {}, None
    first, last = steps[0].start_ns, steps[-1].end_ns
    ran = defaultdict[str, list[Range]](list)
    for event in device:
        since = launched.get(event.correlation, event.start_ns)
        if first <= since < last:
            label = COMMUNICATION if event.name.lower().startswith("nccl") else timeline.at(since)
            ran[label].append(Range(event.start_ns, event.end_ns, label))
    busy = {label: sum(end - start for start, end in _union(ranges)) for label, ranges in ran.items()}
    idle, longest, gap = defaultdict[str, int](int), 0, None
    at = first
    together = _union(Range(event.start_ns, event.end_ns, "") for event in device)
    for start, end in [*together, (last, last)]:
        start, end = min(start, last), min(end, last)
        if start > at:
            parts = _lengths(timeline.within(at, start))
            for label, length in parts.items():
                idle[label] += length
            if start - at > longest and parts:
                longest = start - at
                number = next(step.label for step in reversed(steps) if step.start_ns <= at)
                gap = Gap(longest / 1e6, int(number.removeprefix(STEP)), max(parts, key=lambda name: parts[name]))
        at = max(at, end)
    return busy, idle, gap


def _union(ranges: Iterable[Range]) -> list[tuple[int, int]]:
    """Stretches that hold any of the ranges, in order."""
    found: list[tuple[int, int]] = []
    for start, end, _ in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _lengths(ranges: Iterable[Range]) -> dict[str, int]:
    lengths = defaultdict[str, int](int)
    for start, end, label in ranges:
        lengths[label] += end - start
    return lengths


def text(table: Table, where: str) -> str:
    """A table for people. where: which rank on which device."""
    steps = table.steps
    many = f"steps {steps[0]} to {steps[1]}" if steps[1] > steps[0] else f"step {steps[0]}"
    head = f"{'phase':28}{'calls':>7}{'host ms':>11}{'share':>8}"
    head += f"{'GPU ms':>11}{'GPU idle ms':>13}" if table.gap is not None else ""
    lines = [f"{many}, {table.step_ms:.2f} ms each, of {where}; all figures are of one step", "", head]
    for row in table.rows:
        calls = f"{row.calls:7.4g}" if row.calls else " " * 7
        line = f"{row.phase:28}{calls}{row.host_ms:11.3f}{row.host_ms / table.step_ms:8.1%}"
        if row.device_ms is not None and row.idle_ms is not None:
            line += f"{row.device_ms:11.3f}{row.idle_ms:13.3f}"
        lines.append(line)
    if table.gap is not None:
        idle_ms = sum(row.idle_ms or 0 for row in table.rows)
        lines += [
            "",
            f"the GPU idles {idle_ms / table.step_ms:.1%} of the time; its longest gap is {table.gap.ms:.3f} ms, in "
            f"step {table.gap.step}, while the host is at {table.gap.phase}",
        ]
    return "\n".join(lines) + "\n"
