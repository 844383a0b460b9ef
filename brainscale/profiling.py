"""`train.profile`: steps of a run as a trace for ui.perfetto.dev and as a table by phase (`phase_table.py`).

Rank 0 alone is recorded, into RUN/profile. Nothing in the results changes; what starting and reading the profiler takes
counts as other than training, and the steps are left out of the means. A run that ends in between writes what it has.
"""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from brainscale import phase_table
from brainscale.distributed import World
from brainscale.metrics import Clock
from brainscale.phase_table import STEP, Event
from brainscale.provenance import write_text
from brainscale.run_folder import device_name


class Recorder:
    """Records the wanted steps among those that the loop goes through."""

    def __init__(self, wanted: range, run_dir: Path, world: World, clock: Clock, say: Callable[[str], None]) -> None:
        """wanted: steps, counted from 1; clock: of the loop; say: tells a person a sentence."""
        self.wanted, self.folder, self.world, self.clock, self.say = wanted, run_dir / "profile", world, clock, say
        self.on_gpu = world.device.type == "cuda"
        self.recorder: profile | None = None
        self.range: record_function | None = None
        self.steps: list[int] = []

    def begin(self, step: int) -> bool:
        """A step begins, and the one before it has ended. Returns whether it is recorded."""
        if not self.world.is_first or not self.wanted:
            return False
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        if step not in self.wanted:
            self.close()
            return False
        if self.recorder is None and not self._start():
            self.wanted = range(0)
            return False
        self.steps.append(step)
        self.range = record_function(f"{STEP}{step}")
        self.range.__enter__()
        return True

    def _start(self) -> bool:
        if torch.autograd._profiler_enabled():
            self.say("train.profile: nothing is recorded, since another profiler is active")
            return False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        with self.clock.span("other_s"):
            if self.on_gpu:
                torch.cuda.synchronize(self.world.device)
            self.recorder = profile(activities=activities)
            self.recorder.start()
        return True

    def close(self) -> None:
        """Write what was recorded, if that was not done yet: to be called when the loop has ended."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        if self.recorder is None:
            return
        with self.clock.span("other_s"):
            if self.on_gpu:
                torch.cuda.synchronize(self.world.device)
            self.recorder.stop()
            try:
                self.say(self._write(self.recorder))
            except OSError as error:
                self.say(f"train.profile: {self.folder} could not be written ({error}); the run goes on")
        self.recorder, self.wanted = None, range(0)

    def _write(self, recorder: profile) -> str:
        table = phase_table.make(read(recorder))
        first, last = table.steps
        stem = f"steps-{first:06d}-{last:06d}"
        trace, raw = self.folder / f"{stem}.trace.json.gz", self.folder / f"{stem}.trace.json.partial"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            recorder.export_chrome_trace(str(raw))
            with raw.open("rb") as file, gzip.open(trace, "wb", compresslevel=5) as packed:
                shutil.copyfileobj(file, packed, 1 << 20)
        finally:
            raw.unlink(missing_ok=True)
        device = device_name(self.world)
        where = f"rank 0 of {self.world.size} on {device}"
        text = phase_table.text(table, where)
        if self.on_gpu and table.gap is None:
            text += "\nno kernel was recorded, so nothing is said of the GPU; does another tool trace it?\n"
        about = {"rank": 0, "ranks": self.world.size, "device": device, **table.as_dict()}
        write_text(self.folder / f"{stem}.txt", text)
        write_text(self.folder / f"{stem}.json", json.dumps(about, indent=1) + "\n")
        return f"{text}\ntrace for https://ui.perfetto.dev: {trace}; the table is beside it"


def read(recorder: profile) -> Iterator[Event]:
    """The events of a profile that has been stopped."""
    for event in recorder.profiler.kineto_results.events():  # type: ignore[union-attr]
        yield Event(
            event.activity_type(), event.name(), event.start_thread_id(), event.start_ns(), event.end_ns(),
            event.correlation_id(), event.sequence_nr(), event.fwd_thread_id(),
        )  # fmt: skip


def foretell(wanted: range, step: int) -> str:
    """A sentence for a run that goes on after `step` steps, past some of the steps that are wanted, or ""."""
    if not wanted or step < wanted.start:
        return ""
    what = f"train.profile asks for steps {wanted.start} to {wanted.stop - 1}, and the run goes on at step {step + 1}"
    return f"{what}: nothing is profiled" if step >= wanted.stop - 1 else f"{what}: the profile begins there"
