"""Where numbers go besides metrics.jsonl: what arrives there, and that a tracker that fails changes nothing."""

import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import losses
from processes import finish, start_function
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from brainscale import cli, metrics, trackers
from brainscale.config import Config
from brainscale.monitor_settings import Log
from brainscale.settings import InputError

COMPLETE = "metrics.jsonl is complete"


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any]) -> None:
        self.run_dir, self.step, self.config = run_dir, step, config
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.thread = threading.current_thread()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.lines.append((step, numbers))

    def close(self) -> None:
        self.closed = True


class Failing(Kept):
    """Calls `fail` at one of its moments: "start", "log" (the third line) or "close"."""

    def __init__(self, moment: str, fail: Callable[[], None], *of_the_run: Any) -> None:
        super().__init__(*of_the_run)
        self.moment, self.fail = moment, fail
        if moment == "start":
            fail()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        super().log(step, numbers)
        if self.moment == "log" and len(self.lines) == 3:
            self.fail()

    def close(self) -> None:
        super().close()
        if self.moment == "close":
            self.fail()


def refuse() -> None:
    raise ConnectionError("no route to\nthe host")


def wait(event: threading.Event) -> None:
    event.wait()


@pytest.fixture
def hang() -> Iterator[Callable[[], None]]:
    """Waits until the test is over."""
    over = threading.Event()
    yield partial(wait, over)
    over.set()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Kept]]:
    """Put a kind of tracker in the place of another, whose package need not be there; gives the list of those made."""
    monkeypatch.setattr(trackers, "EXTRA", ())

    def use(name: str, make: Callable[..., Kept]) -> list[Kept]:
        made: list[Kept] = []

        def keep(*of_the_run: Any) -> Kept:
            made.append(make(*of_the_run))
            return made[-1]

        monkeypatch.setitem(trackers.TRACKERS, name, keep)
        return made

    return use


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "skipped_steps": 0, "mfu": None}


def write(writer: metrics.Writer, steps: range) -> None:
    for step in steps:
        writer.write(line(step))


def test_numbers_go_to_every_tracker_named(tmp_path, use):
    first, second = use("wandb", Kept), use("tensorboard", Kept)
    both = trackers.Trackers(("tensorboard", "wandb"), tmp_path, 3, {"seed": 7}, pytest.fail)
    both.log(4, {"loss": 0.5})
    both.close()
    for (made,) in (first, second):
        assert (made.run_dir, made.step, made.config) == (tmp_path, 3, {"seed": 7})
        assert made.lines == [(4, {"loss": 0.5})] and made.closed
        assert made.thread is not threading.main_thread() and made.thread.daemon


def test_writer_passes_numbers_and_settings_on(tmp_path, use):
    made = use("tensorboard", Kept)
    writer = metrics.Writer(tmp_path, 0, Config(seed=5), pytest.fail)
    write(writer, range(1, 3))
    writer.close()
    assert made[0].lines == [(1, {"loss": 1.0, "skipped_steps": 0}), (2, {"loss": 0.5, "skipped_steps": 0})]
    assert made[0].config["seed"] == 5 and made[0].config["log"]["trackers"] == ["tensorboard"]


def test_no_tracker_at_all(tmp_path, use):
    made = use("tensorboard", Kept)
    writer = metrics.Writer(tmp_path, 0, Config(log=Log(trackers=())), pytest.fail)
    write(writer, range(1, 4))
    writer.close()
    assert not made and list(metrics.read(tmp_path / "metrics.jsonl")) == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("moment", ["start", "log", "close"])
def test_tracker_that_raises_is_said_once(tmp_path, use, moment):
    """All lines are kept, and the other tracker gets them all."""
    use("wandb", partial(Failing, moment, refuse))
    good = use("mlflow", Kept)
    said: list[str] = []
    writer = metrics.Writer(tmp_path, 0, Config(log=Log(trackers=("wandb", "mlflow"))), said.append)
    write(writer, range(1, 20))
    writer.close()
    assert len(said) == 1 and said[0].startswith("the tracker wandb failed (ConnectionError: no route to the host); ")
    assert said[0].endswith(COMPLETE)
    assert [step for step, _ in good[0].lines] == list(range(1, 20)) and good[0].closed
    assert metrics.read(tmp_path / "metrics.jsonl") == {step: line(step) for step in range(1, 20)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tracker_that_raises_is_left_out_while_the_run_goes_on(tmp_path, use):
    made = use("bad", partial(Failing, "log", refuse))
    said: list[str] = []
    bad = trackers.Trackers(("bad",), tmp_path, 0, {}, said.append)
    (lane,) = bad.lanes
    for step in range(1, 4):
        bad.log(step, {"loss": 1.0})
    lane.join()
    assert not said
    bad.log(4, {"loss": 1.0})
    assert said == [
        f"the tracker bad failed (ConnectionError: no route to the host); the run goes on without it, {COMPLETE}"
    ]
    bad.log(5, {"loss": 1.0})
    bad.close()
    assert len(said) == 1 and [step for step, _ in made[0].lines] == [1, 2, 3] and not made[0].closed


@pytest.mark.parametrize("moment", ["start", "log", "close"])
def test_tracker_that_hangs_holds_up_neither_the_lines_nor_the_end(tmp_path, use, hang, moment):
    use("tensorboard", partial(Failing, moment, hang))
    said: list[str] = []
    writer = metrics.Writer(tmp_path, 0, say=said.append)
    write(writer, range(1, 20))
    assert not said
    writer.trackers.close(timeout_s=0.0)
    writer.close()
    assert said == [f"the tracker tensorboard did not finish within 0 s; the run ends without it, {COMPLETE}"]
    assert metrics.read(tmp_path / "metrics.jsonl") == {step: line(step) for step in range(1, 20)}


def test_tracker_far_behind_is_given_up_and_ends_if_it_comes_back(tmp_path, use):
    over = threading.Event()
    made = use("slow", partial(Failing, "log", partial(wait, over)))
    said: list[str] = []
    slow = trackers.Trackers(("slow",), tmp_path, 0, {}, said.append)
    (lane,) = slow.lanes
    for step in range(2 * trackers.MAX_BEHIND):
        slow.log(step, {"loss": 1.0})
    assert said == [f"the tracker slow is 1000 lines behind; the run goes on without it, {COMPLETE}"]
    slow.close()
    over.set()
    lane.join()
    assert len(said) == 1 and made[0].closed
    assert [step for step, _ in made[0].lines] == list(range(len(made[0].lines)))


@pytest.mark.parametrize("name", trackers.EXTRA)
def test_missing_package_is_refused_with_the_command(tmp_path, monkeypatch, name):
    """A folder of that name in the working directory is not the package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"{name}, which is not installed; pip install 'brainscale-mri\[trackers\]'"):
        metrics.Writer(tmp_path, 0, Config(log=Log(trackers=("tensorboard", name))))
    monkeypatch.undo()
    (tmp_path / "a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers, "EXTRA", ("a_folder",))
    with pytest.raises(InputError, match="a_folder, which is not installed"):
        trackers.require(("a_folder",))
    trackers.require(("tensorboard",))


def pretrain_with(make: Callable[..., Kept], arguments: list[str]) -> None:
    trackers.TRACKERS["tensorboard"] = make
    cli.main(arguments)


def hang_for_ever() -> None:
    threading.Event().wait()


@pytest.mark.slow
def test_run_does_not_depend_on_its_trackers(tiny_store, tiny_config, tmp_path):
    """The same losses and exit code without a tracker, and with one that raises or hangs."""
    kinds: dict[str, tuple[Callable[..., Kept], list[str]]] = {
        "none": (Kept, ["log.trackers=[]"]),
        "raises": (partial(Failing, "log", refuse), []),
        "hangs": (partial(Failing, "start", hang_for_ever), []),
    }
    texts = {}
    for name, (make, more) in kinds.items():
        arguments = ["pretrain", str(tiny_config), f"data.store={tiny_store}", f"run.dir={tmp_path / name}", *more]
        run = partial(pretrain_with, make, arguments)
        texts[name] = finish(start_function(run, ranks=1, logs=tmp_path / "logs"), code=0)[0].text
    kept = {name: losses(tmp_path / name) for name in kinds}
    assert len(kept["none"]) == 40 and kept["none"] == kept["raises"] == kept["hangs"]
    said = {name: [text for text in texts[name].splitlines() if "the tracker" in text] for name in kinds}
    assert not said["none"] and len(said["raises"]) == len(said["hangs"]) == 1
    assert "failed (ConnectionError: no route to the host)" in said["raises"][0]
    assert "did not finish within 10 s" in said["hangs"][0]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    writer = metrics.Writer(tmp_path, 0, say=pytest.fail)
    write(writer, range(1, 6))
    writer.close()
    expected = [(step, pytest.approx(1.0 / step)) for step in range(1, 6)]
    assert scalars(tmp_path) == {"loss": expected, "skipped_steps": [(step, 0.0) for step in range(1, 6)]}
    writer = metrics.Writer(tmp_path, 3, say=pytest.fail)
    for step in range(4, 8):
        writer.write({**line(step), "loss": 2.0})
    writer.close()
    assert scalars(tmp_path)["loss"] == [*expected[:3], *((step, 2.0) for step in range(4, 8))]


def write_twice(run: Path, tracker: Any) -> None:
    """Steps 1 to 4, then, resumed at 2, steps 3 to 5."""
    config = Config(seed=5, log=Log(trackers=(tracker,)))
    said: list[str] = []
    for step, steps in ((0, range(1, 5)), (2, range(3, 6))):
        writer = metrics.Writer(run, step, config, said.append)
        write(writer, steps)
        writer.trackers.close(timeout_s=200)
    assert not said, said


def needs(package: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(package)
    missing = found is None or found.origin is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install -e '.[trackers]'")


@pytest.mark.slow
@needs("mlflow")
@needs("sqlalchemy")
def test_mlflow_continues_its_run_in_the_folder(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a run"
    run.mkdir()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    write_twice(run, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("brainscale")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (run / "mlflow_run_id").read_text()
    assert (found.info.run_name, found.info.status) == ("a run", "FINISHED")
    assert found.data.params["seed"] == "5" and found.data.params["log.every_steps"] == "10"
    history = [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "loss")]
    assert sorted(history) == sorted((step, 1.0 / step) for step in (1, 2, 3, 4, 3, 4, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["a run"]


@pytest.mark.slow
@needs("wandb")
def test_wandb_continues_its_run_in_the_folder(tmp_path):
    """Offline, and in a process of its own, because W&B changes `sys.exit` for good."""
    run = tmp_path / "a-run"
    run.mkdir()
    finish(start_function(partial(write_twice_offline, run), ranks=1, logs=tmp_path / "logs"))
    name = (run / "wandb_run_id").read_text()
    files = sorted((run / "wandb").glob(f"offline-run-*-{name}*/run-{name}.wandb"))
    rows = [row for file in files for row in history(file)]
    assert [(row["step"], row["loss"]) for row in rows] == [(step, 1.0 / step) for step in (1, 2, 3, 4, 3, 4, 5)]
    assert not (tmp_path / "wandb").exists()


def write_twice_offline(run: Path) -> None:
    os.environ["WANDB_MODE"] = "offline"
    write_twice(run, "wandb")


def history(file: Path) -> list[dict[str, Any]]:
    """Rows of a W&B file: 7 bytes, then records in blocks of 32 KiB (here one), each after 7 bytes with its length."""
    from wandb.proto import wandb_internal_pb2

    data, at, rows = file.read_bytes(), 7, []
    assert data[:4] == b":W&B" and len(data) < 2**15
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + size])
        if record.HasField("history"):
            rows.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            )
        at += 7 + size
    return rows
