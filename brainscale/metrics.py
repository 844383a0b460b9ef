"""What a run measures: means on the device, one JSON line per logged step, trackers beside it.

`metrics.jsonl` is the truth. Floats are written by `repr`, so two runs compare bit for bit.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from brainscale.config import Config
from brainscale.distributed import World
from brainscale.geometry import Zyx
from brainscale.hardware import peak_flops
from brainscale.objective import Output
from brainscale.phases import phase
from brainscale.provenance import write_text
from brainscale.trackers import Trackers


class Meter:
    """Sums of an objective's outputs between two reads. Nothing leaves the device until `read`."""

    def __init__(self, world: World, parts: tuple[str, ...]) -> None:
        """parts: names of the outputs, "loss" first."""
        self.world, self.parts = world, parts
        self._zero()

    def _zero(self) -> None:
        self.sums, self.counts = torch.zeros(2, len(self.parts), dtype=torch.float64, device=self.world.device)

    def add(self, out: Output) -> None:
        """Count one micro-batch."""
        values = torch.stack([part.detach() for part in out]).double()
        skipped = torch.isnan(values)
        skipped[0] = False  # parts may be left out of a step; the loss may not, and is NaN if a part in it is
        self.sums += values.masked_fill(skipped, 0.0)
        self.counts += ~skipped

    def total(self) -> list[list[float]]:
        """Sums and counts over micro-batches and ranks since the last read, to be continued by `resume`. Collective."""
        both = torch.stack((self.sums, self.counts))
        if self.world.size > 1:
            dist.all_reduce(both)
        return both.tolist()

    def resume(self, total: list[list[float]]) -> None:
        """Go on from what `total` gave before a stop."""
        if total and self.world.is_first:
            self.sums, self.counts = torch.tensor(total, dtype=torch.float64, device=self.world.device)

    def read(self) -> dict[str, float | None]:
        """Means over micro-batches and ranks since the last read; None for a part never computed. Collective."""
        sums, counts = self.total()
        self._zero()
        return {part: total / count if count else None for part, total, count in zip(self.parts, sums, counts)}


class Writer:
    """Appends metric lines on rank 0 and passes their numbers on to the trackers."""

    def __init__(
        self, run_dir: Path, step: int, config: Config | None = None, say: Callable[[str], None] = print
    ) -> None:
        """step: the step resumed from. Lines and held-out files of later steps, and a line torn by a kill, are what a
        killed process left: this one makes them again, so they go. config: `log.trackers` of it is used, and all of it
        is told to them. say: tells a person a sentence. Raises InputError when the package of a tracker is missing."""
        self.path = run_dir / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for at, line in read(self.path).items() if at <= step]
        write_text(self.path, "".join(kept))
        for file in (run_dir / "holdout").glob("step-*.npz"):
            if int(file.name[5:13]) > step:
                file.unlink()
        (run_dir / "reconstruction.json").unlink(missing_ok=True)
        config = config or Config()
        self.trackers = Trackers(config.log.trackers, run_dir, step, config.model_dump(mode="json"), say)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it must carry "step"."""
        with phase("log"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            numbers = {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
            self.trackers.log(line["step"], numbers)

    def close(self) -> None:
        """Let the trackers finish; returns within seconds even where one hangs."""
        self.trackers.close()


class Clock:
    """Where the time of the loop goes between two reads of the metrics."""

    def __init__(self, step: int, before_s: float) -> None:
        """step: finished steps; before_s: seconds of training before this process."""
        self.before_s, self.start, self.first = before_s, time.monotonic(), step
        self._mark(step, self.start)

    def _mark(self, step: int, now: float) -> None:
        self.at_step, self.since = step, now
        self.seconds = {"data_s": 0.0, "other_s": 0.0, "checkpoint_s": 0.0}
        self.left_out, self.left_out_s, self.left_out_data_s = 0, 0.0, 0.0

    def total_s(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.before_s + time.monotonic() - self.start

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count a block as waiting for data, as a checkpoint, or as other than training. A profiler sees it by name."""
        begin = time.monotonic()
        with phase(name.removesuffix("_s")):
            yield
        self.seconds[name] += time.monotonic() - begin

    @contextmanager
    def slowed(self) -> Iterator[dict[str, float]]:
        """A step that is slower for being measured: left out of the means, unless the interval has no other. Yields a
        dict for what is found."""
        begin, data_s = time.monotonic(), self.seconds["data_s"]
        yield {}
        self.left_out += 1
        self.left_out_s += time.monotonic() - begin
        self.left_out_data_s += self.seconds["data_s"] - data_s

    def read(
        self, step: int, samples: int, volume_zyx: Zyx, flops_per_sample: float, world: World, precision: str = "bf16"
    ) -> dict[str, float | None]:
        """Seconds per step and rates since the last read, and seconds of checkpoints and of all else that is no
        training. samples: per optimizer step; precision: `train.precision`. Collective."""
        now, steps, data_s = time.monotonic(), step - self.at_step, self.seconds["data_s"]
        apart = self.seconds["other_s"] + self.seconds["checkpoint_s"]
        if steps > self.left_out:
            steps, data_s, apart = steps - self.left_out, data_s - self.left_out_data_s, apart + self.left_out_s
        step_s = max(1e-9, now - self.since - apart) / steps
        waits = torch.tensor(data_s / steps / step_s, dtype=torch.float64, device=world.device)
        if world.size > 1:
            dist.all_reduce(waits, dist.ReduceOp.MAX)
        line = {
            "time_s": self.total_s(), "process_steps": step - self.first, "step_s": step_s, "data_s": data_s / steps,
            "data_wait_fraction": data_s / steps / step_s, "data_wait_max_fraction": float(waits),
            "checkpoint_s": self.seconds["checkpoint_s"], "other_s": self.seconds["other_s"],
            "voxels_per_s": samples * volume_zyx[0] * volume_zyx[1] * volume_zyx[2] / step_s,
            "tflops_per_s": samples * flops_per_sample / step_s / 1e12,
            "mfu": mfu(samples * flops_per_sample, step_s, world, precision),
        }  # fmt: skip
        self._mark(step, now)
        return line


class Voice:
    """What a person sees of a run: a progress bar on a terminal, a plain line every few seconds otherwise."""

    EVERY_S = 10.0

    def __init__(self, world: World, num_steps: int, step: int) -> None:
        self.speaks, self.num_steps, self.spoken = world.is_first, num_steps, float("-inf")
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console) if self.speaks and console.is_terminal else None
        if self.bar is not None:
            self.task = self.bar.add_task("pretraining", total=num_steps, completed=step)
            self.bar.start()

    def line(self, text: str) -> None:
        """Say a sentence (rank 0 only)."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        elif self.speaks:
            print(text, flush=True)

    def step(self, line: dict[str, Any]) -> None:
        """Show a metric line."""
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = (
            f"loss {loss}  {line['step_s']:.2f} s/step  {line['voxels_per_s'] / 1e6:.2f} Mvoxel/s  "
            f"{rate(line)}  data wait {line['data_wait_fraction']:.0%}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=line["step"], description=text)
        elif time.monotonic() - self.spoken > self.EVERY_S or line["step"] == self.num_steps:
            self.spoken = time.monotonic()
            self.line(f"step {line['step']}/{self.num_steps}  {text}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


def read(path: Path) -> dict[int, dict[str, Any]]:
    """Metric lines by step. A later line of the same step replaces the earlier's keys and adds to its warnings; a torn
    last line is left out."""
    steps: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
            line = json.loads(text)
            at = steps.setdefault(line["step"], {})
            both = {**at.get("warnings", {}), **line.get("warnings", {})}
            at.update(line, **({"warnings": both} if both else {}))
    return dict(sorted(steps.items()))


def rate(line: dict[str, Any]) -> str:
    """MFU of a metric line in words, or the model's FLOP/s on all ranks where the device's peak is not known."""
    if line["mfu"] is not None:
        return f"MFU {line['mfu']:.1%}"
    rate = line["tflops_per_s"]
    return f"{rate:.3g} TFLOP/s" if rate >= 0.1 else f"{1e3 * rate:.3g} GFLOP/s"


def peak(world: World, precision: str = "bf16") -> float | None:
    """FLOP/s of a rank's device that MFU is a share of; None on a CPU and on a GPU that `hardware.py` does not know."""
    on_gpu = world.device.type == "cuda"
    return peak_flops(torch.cuda.get_device_name(world.device), precision) if on_gpu else None


def mfu(flops_per_step: float, step_s: float, world: World, precision: str = "bf16") -> float | None:
    """Model FLOPs utilisation 0..1, or None where the device's `peak` is not known."""
    known = peak(world, precision)
    return None if known is None else flops_per_step / step_s / (known * world.size)
