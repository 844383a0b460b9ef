"""A rank that is killed, stopped or hung ends the others, which say whose fault it was and where they stood."""

import json
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from conftest import losses
from processes import Rank, finish, start_function, start_ranks

from brainscale import slurm_job


def started(store, config, run: Path, faults: str, *more: str) -> list[Rank]:
    common = ("pretrain", config, f"data.store={store}", f"run.dir={run}", "train.num_steps=100000", *more)
    return start_ranks(*common, ranks=2, faults=faults, logs=run.parent / "logs")


def assert_named(run: Path, survivor: Rank, victim: int, *words: str) -> None:
    """exit.json, the output and the stacks all say it in one sentence."""
    told = json.loads((run / "exit.json").read_text())
    stacks = (run / "stacks" / f"rank-{1 - victim:04d}.txt").read_text()
    assert told["code"] == 5 and told["again"], "a Slurm job begins again after that"
    for word in (f"rank {victim} (", *words):
        assert word in told["sentence"], told
        assert word in survivor.text
    assert "most recent call" in stacks and "train.py" in stacks


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_other_in_seconds(victim, tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    ranks = started(tiny_store, tiny_config, run, "")
    deadline = time.monotonic() + 60
    while max(losses(run), default=0) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks[victim].signal(signal.SIGKILL)
    killed = time.monotonic()
    assert ranks[1 - victim].wait(60) == 5, ranks[1 - victim].text
    assert time.monotonic() - killed < 10, "the promise is ten seconds"
    assert_named(run, ranks[1 - victim], victim, "is dead or stopped", f"pid {ranks[victim].pid}", "last in step")
    assert json.loads((run / "exit.json").read_text())["lost_nodes"] == [slurm_job.node()]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_ends_the_other_within_the_timeout(victim, tiny_store, tiny_config, tmp_path):
    """SIGSTOP, which is how a node looks that no longer answers: no connection breaks."""
    run, timeout_s = tmp_path / "run", 8
    fault = f"step.backward:stop@rank={victim}@hit=9"
    ranks = started(tiny_store, tiny_config, run, fault, f"health.timeout_s={timeout_s}")
    deadline = time.monotonic() + 60
    while "T (stopped)" not in Path(f"/proc/{ranks[victim].pid}/status").read_text():
        assert time.monotonic() < deadline, ranks[victim].text
        time.sleep(0.02)
    stopped = time.monotonic()
    assert ranks[1 - victim].wait(60) == 5, ranks[1 - victim].text
    assert time.monotonic() - stopped < timeout_s
    assert_named(run, ranks[1 - victim], victim, "is dead or stopped", "last in step")
    ranks[victim].signal(signal.SIGKILL)
    ranks[victim].wait()


def evaluate_slowly(arguments: list[str], evaluation_s: float) -> None:
    """Train, with a held-out evaluation that takes so long."""
    from brainscale import cli
    from brainscale.holdout import Holdout

    plain = Holdout.evaluate

    def evaluate(self, *given):
        time.sleep(evaluation_s)
        return plain(self, *given)

    Holdout.evaluate = evaluate
    cli.main(arguments)


@pytest.mark.slow
def test_ranks_wait_for_an_evaluation_longer_than_the_timeout_of_a_step(tiny_store, tiny_config, tmp_path):
    arguments = ["pretrain", str(tiny_config), f"data.store={tiny_store}", f"run.dir={tmp_path / 'run'}"]
    arguments += ["health.timeout_s=4", "log.holdout_every_steps=5", "train.num_steps=8"]
    finish(start_function(partial(evaluate_slowly, arguments, 6.0), ranks=2, logs=tmp_path / "logs"), code=0)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_by_all_and_shows_where(tiny_store, tiny_config, tmp_path):
    """It is alive and answers, but does not go on: its own stacks show the line."""
    run = tmp_path / "run"
    ranks = started(tiny_store, tiny_config, run, "step.data:hang@rank=1@hit=9", "health.timeout_s=6")
    assert [rank.wait(60) for rank in ranks] == [5, 5]
    assert "no progress in step 9 (data)" in json.loads((run / "exit.json").read_text())["sentence"]
    stacks = [(run / "stacks" / f"rank-000{rank}.txt").read_text() for rank in (0, 1)]
    assert "in fault_point" in stacks[1] and "in fault_point" not in stacks[0]
    assert "rank 0 of 2" in stacks[0] and "rank 1: no progress" in stacks[0]


def test_an_error_of_one_rank_is_told_by_the_other(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    ranks = started(tiny_store, tiny_config, run, "step.data:full@rank=1@hit=5")
    assert [rank.wait(60) for rank in ranks] == [5, 75]
    assert "rank 1" in ranks[0].text and "failed: OSError" in ranks[0].text
    assert "the disk of" in json.loads((run / "exit.json").read_text())["sentence"]


def join_late(timeout_s: float) -> None:
    """Rank 1 does not come to a collective; groups made before and after with the long timeout give up early."""
    import torch
    import torch.distributed as dist

    from brainscale import distributed

    world = distributed.find()
    distributed.start(world, 600.0)
    other = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
    distributed.set_timeouts(timeout_s)
    if world.is_first:
        for group in (None, other):
            begin = time.monotonic()
            with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
                dist.all_reduce(torch.zeros(1), group=group)
            assert time.monotonic() - begin < timeout_s + 2
        Path("done").touch()
    else:
        while not Path("done").exists():
            time.sleep(0.05)


def test_every_group_s_timeout_can_be_shortened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish(start_function(partial(_in, tmp_path, 2.0), ranks=2, logs=tmp_path), code=0)


def _in(folder: Path, timeout_s: float) -> None:
    import os

    os.chdir(folder)
    join_late(timeout_s)
