"""Runs that were cut: killed, doubled, begun again; what comes out equals an unbroken run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, losses, refusal, run_brainscale
from processes import run_ranks

from brainscale import faults, metrics
from brainscale.settings import InputError


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_equal_an_unbroken_run(unbroken, tiny_store, tiny_config, tmp_path):
    """Killed twice, each time as soon as the log has passed a checkpoint; the loss sequence is the same bit for bit."""
    run = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "brainscale",
        "pretrain",
        tiny_config,
        f"data.store={tiny_store}",
        f"run.dir={run}",
    ]
    for past in (6, 13):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 120
        while max(losses(run), default=0) < past and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it must die, not finish"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')
    done = run_brainscale("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}")
    assert "resumed from" in done.stdout
    assert losses(run) == losses(unbroken)


@pytest.mark.slow
def test_what_an_attempt_without_a_checkpoint_left_is_made_again(unbroken, tiny_store, tiny_config, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "restarted")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / ".tmp-step-00000004-1").mkdir()
    arguments = ("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=6")
    run_brainscale(*arguments)
    assert list(metrics.read(run / "metrics.jsonl")) == list(range(1, 7))
    assert [p.name for p in (run / "holdout").iterdir()] == ["step-00000006.npz"]
    assert json.loads((run / "reconstruction.json").read_text())["step"] == 6
    assert not list((run / "checkpoints").glob(".tmp*"))


def test_two_runs_in_one_folder_are_refused(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "shared"
    run.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import filelock, sys; l = filelock.FileLock({str(run / '.lock')!r}); l.acquire(); "
         "print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    text = refusal(2, "pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}")
    assert "written by another process" in text
    holder.communicate("")


def test_another_model_and_a_folder_that_cannot_be_are_refused_in_one_sentence(
    unbroken, tiny_store, tiny_config, tmp_path
):
    run = shutil.copytree(unbroken, tmp_path / "run")
    store = f"data.store={tiny_store}"
    more = ("train.num_steps=50", "model.width=36", "--allow-change", "model.width")
    assert "holds another model" in refusal(2, "pretrain", tiny_config, store, f"run.dir={run}", *more)
    below_a_file = run_ranks("pretrain", tiny_config, store, "run.dir=README.md/run", ranks=2, code=2, logs=tmp_path)
    text = "".join(rank.text for rank in below_a_file)
    assert text.count("README.md/run cannot be used") == 1 and "Traceback" not in text


@pytest.mark.parametrize(
    "text", ["a:kill@hit=x", "a:kill@hit=0", "a:kill@rank=", ":kill", "a", "a:explode", "a:kill@x=1"]
)
def test_a_list_of_faults_that_means_nothing_is_refused(text):
    with pytest.raises(InputError, match="is not NAME:ACTION"):
        faults.parse(text)


def test_faults_are_read(monkeypatch):
    """Only at their point, on their rank, at their passing; an unarmed process looks at an empty list."""
    assert faults.parse("") == [] and faults.parse(" ; ") == []
    monkeypatch.setattr(faults, "ARMED", faults.parse("save.*:full@hit=2; load.found:full@rank=7"))
    for name in ("load.found", "save.begin", "prune.before"):
        faults.fault_point(name)
    with pytest.raises(OSError, match="No space left"):
        faults.fault_point("save.end")
    faults.fault_point("save.end")
