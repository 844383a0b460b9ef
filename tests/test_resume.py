"""Runs that were cut: killed, doubled, begun again; what comes out equals an unbroken run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

from conftest import ROOT, losses, refusal, run_brainscale

from brainscale import metrics


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
