"""Where the numbers of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A tracker is made, fed and closed in a thread of its own (W&B and MLflow are imported there too); the loop only puts
lines on a queue. One that raises, hangs or falls behind is named in one sentence and left out, and nothing else in the
run changes.
"""

import importlib
import importlib.util
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from brainscale.provenance import write_text
from brainscale.settings import InputError

PROJECT = "brainscale"
"""Name of the project (W&B) or experiment (MLflow) that runs are put into."""
MAX_BEHIND = 1000
"""Lines that may wait for a tracker before it is given up."""


class Tracker(Protocol):
    """Takes numbers; a method may raise or block for as long as it likes."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Take the numbers of a step, which may come in several lines."""

    def close(self) -> None:
        """Hand on what was taken; nothing follows."""


class TensorBoard:
    """Event files in RUN/tensorboard; what a killed process wrote after the checkpoint is marked as void."""

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any]) -> None:
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class WandB:
    """A W&B run with its files in RUN/wandb; `wandb sync` sends those that could not be sent.

    RUN/wandb_run_id names it, so that a resumed run continues it. The step is a number of its own ("step"), because W&B
    drops lines whose own step is not above the last, which those after a resume are not.
    """

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        named = run_dir / "wandb_run_id"
        if not named.is_file():
            write_text(named, uuid.uuid4().hex[:16])
        quiet = wandb.Settings(console="off", silent=True)  # leaves standard output alone
        wandb.setup(quiet)  # before `init`, which would ask for a key on a terminal
        self.run = wandb.init(
            project=PROJECT, name=run_dir.name, dir=run_dir, id=named.read_text(encoding="utf-8").strip(),
            resume="allow", config=config, settings=quiet,
        )  # fmt: skip
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """An MLflow run on the server MLFLOW_TRACKING_URI, or in RUN/mlflow.db where that is not set.

    RUN/mlflow_run_id names it, so that a resumed run continues it; lines after the checkpoint then stand there twice.
    """

    EVERY_S = 5.0
    """Lines are sent together, since a request costs up to 0.05 s of the processor."""
    MOST_NUMBERS, MOST_PARAMETERS = 500, 100  # of a request; MLflow takes 1000 numbers, which a line must not exceed

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        entities = importlib.import_module("mlflow.entities")
        self.metric, self.waiting, self.sent_s = entities.Metric, list[Any](), float("-inf")
        server = os.environ.get("MLFLOW_TRACKING_URI")
        files = None if server else (run_dir.resolve() / "mlflow").as_uri()
        self.client = mlflow.MlflowClient(server or f"sqlite:///{run_dir.resolve()}/mlflow.db")
        named = run_dir / "mlflow_run_id"
        if named.is_file():
            self.run_id = named.read_text(encoding="utf-8").strip()
            self.client.update_run(self.run_id, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT, files)
        self.run_id = self.client.create_run(experiment, run_name=run_dir.name).info.run_id
        write_text(named, self.run_id)
        parameters = [entities.Param(key, str(value)) for key, value in leaves(config)]
        for first in range(0, len(parameters), self.MOST_PARAMETERS):
            part = parameters[first : first + self.MOST_PARAMETERS]
            self.client.log_batch(self.run_id, params=part, synchronous=True)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        self.waiting += [self.metric(name, float(value), now_ms, step) for name, value in numbers.items()]
        if time.monotonic() - self.sent_s > self.EVERY_S or len(self.waiting) >= self.MOST_NUMBERS:
            self._send()

    def _send(self) -> None:
        self.client.log_batch(self.run_id, metrics=self.waiting, synchronous=True)
        self.waiting, self.sent_s = [], time.monotonic()

    def close(self) -> None:
        self._send()
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, Callable[[Path, int, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow,
}  # fmt: skip
"""What makes a tracker, from the run folder, the step resumed from and the effective settings."""
EXTRA = ("wandb", "mlflow")
"""Those whose package, of the same name, may be missing."""


def require(names: tuple[str, ...]) -> None:
    """Raises InputError, with the command to install it, when the package of a tracker is missing. Imports nothing."""
    for name in names:
        found = importlib.util.find_spec(name) if name in EXTRA else None
        if name in EXTRA and (found is None or found.origin is None):  # without origin: a folder, such as W&B leaves
            raise InputError(
                f"log.trackers names {name}, which is not installed; pip install 'brainscale-mri[trackers]', or leave "
                "it out of log.trackers"
            )


class Lane(threading.Thread):
    """The thread of a tracker. It ends with the tracker, whose failure it keeps; the process does not wait for it."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        super().__init__(name=name, daemon=True)
        self.make = make
        self.lines: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        """What the tracker has not taken yet; None: no more comes."""
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Feed the tracker until the end or its first failure, of which Python writes the traceback."""
        try:
            tracker = self.make()
            while (line := self.lines.get()) is not None:
                tracker.log(*line)
            tracker.close()
        finally:
            self.error = sys.exc_info()[1]


class Trackers:
    """The trackers of a run. No method raises for one, and only `close` waits for them."""

    def __init__(
        self, names: tuple[str, ...], run_dir: Path, step: int, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        """step: the step resumed from; say: tells a person a sentence. Raises InputError for a missing package."""
        require(names)
        self.say = say
        self.lanes = [Lane(name, partial(TRACKERS[name], run_dir, step, config)) for name in dict.fromkeys(names)]

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Pass on a line; a tracker that has failed, or is too far behind, is said and left out from here on."""
        for lane in [*self.lanes]:
            lane.lines.put((step, numbers))
            if not lane.is_alive():
                self._leave_out(lane, failure(lane.error))
            elif lane.lines.qsize() > MAX_BEHIND:
                self._leave_out(lane, f"is {MAX_BEHIND} lines behind")

    def _leave_out(self, lane: Lane, why: str) -> None:
        self.lanes.remove(lane)
        lane.lines.put(None)  # should it come back, it ends
        self.say(f"the tracker {lane.name} {why}; the run goes on without it, metrics.jsonl is complete")

    def close(self, timeout_s: float = 10.0) -> None:
        """Let the trackers finish, for so long at most in all; one that fails or does not end is said."""
        for lane in self.lanes:
            lane.lines.put(None)
        end = time.monotonic() + timeout_s
        for lane in self.lanes:
            lane.join(max(0.0, end - time.monotonic()))
            if lane.is_alive():
                self.say(
                    f"the tracker {lane.name} did not finish within {timeout_s:g} s; the run ends without it, "
                    "metrics.jsonl is complete"
                )
            elif lane.error is not None:
                self.say(f"the tracker {lane.name} {failure(lane.error)}; metrics.jsonl is complete")
        self.lanes = []


def failure(error: BaseException | None) -> str:
    """A failure in one line."""
    return f"failed ({' '.join(f'{type(error).__name__}: {error}'.split())[:300]})"


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
