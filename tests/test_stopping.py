"""Asked to stop, all ranks save together and leave with 75, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, losses
from hypothesis import given
from hypothesis import strategies as st
from processes import run_ranks, start_ranks

from brainscale import checkpoint_files as files
from brainscale import slurm_job, stopping


def common(config, store, run):
    return ("pretrain", config, f"data.store={store}", f"run.dir={run}")


def newest_step(run):
    return files.step_of(files.directories(run / "checkpoints")[-1])


def test_a_signal_to_one_rank_of_two_stops_both_and_loses_nothing(tiny_store, tiny_config, tmp_path):
    """In the middle of a step; at most one more step is taken; the resumed run equals an unbroken one bit by bit."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    fault = "step.backward:term@rank=1@hit=10"
    ranks = run_ranks(*common(tiny_config, tiny_store, run), ranks=2, faults=fault, code=75, logs=tmp_path)
    assert "SIGTERM (rank 1): stopping" in ranks[1].text and "Traceback" not in ranks[0].text + ranks[1].text
    assert newest_step(run) == 11 and max(losses(run)) == 11
    assert files.damage(files.directory(run / "checkpoints", 11)) is None
    told = json.loads((run / "exit.json").read_text())
    assert told["code"] == 75 and "SIGTERM after step 11 of 40, which is saved" in told["sentence"]
    run_ranks(*common(tiny_config, tiny_store, run), ranks=2, logs=tmp_path)
    run_ranks(*common(tiny_config, tiny_store, whole), ranks=2, logs=tmp_path)
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_every_kind_of_signal_saves(number, tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    (rank,) = start_ranks(*common(tiny_config, tiny_store, run), "train.num_steps=100000", logs=tmp_path)
    until(lambda: losses(run), rank)
    rank.signal(number)
    assert rank.wait() == 75, rank.text
    assert newest_step(run) == max(losses(run))


def test_a_second_ctrl_c_leaves_at_once(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    arguments = (*common(tiny_config, tiny_store, run), "train.num_steps=100000")
    (rank,) = start_ranks(*arguments, faults="step.data:hang@hit=3", logs=tmp_path)
    until(lambda: max(losses(run), default=0) == 2, rank)
    rank.signal(signal.SIGINT)
    until(lambda: "Ctrl-C again" in rank.text, rank)
    rank.signal(signal.SIGINT)
    assert rank.wait(30) == 75
    assert not files.directories(run / "checkpoints")


def test_a_time_limit_saves(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    arguments = (*common(tiny_config, tiny_store, run), "train.num_steps=100000", "train.stop_after_min=0.05")
    ranks = run_ranks(*arguments, ranks=2, code=75, logs=tmp_path)
    assert "stopped by the time limit" in ranks[0].text
    assert newest_step(run) == max(losses(run))


@pytest.mark.slow
def test_the_end_of_a_slurm_job_is_met_in_time(tiny_store, tiny_config, tmp_path, monkeypatch):
    """The job ends in 65 seconds, of which 60 are kept for saving."""
    run = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 65))
    done = subprocess.run(
        [sys.executable, "-m", "brainscale", *map(str, common(tiny_config, tiny_store, run)), "train.num_steps=100000"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 75 and "the time limit" in done.stderr, done.stderr
    assert newest_step(run) == max(losses(run))


def test_a_slurm_job_goes_on_after_signals_and_at_its_end_alone():
    """Not when a person pressed Ctrl-C, set a limit of time, or the disk is full."""
    assert set(stopping.GOES_ON) == {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, stopping.JOB_ENDS}
    reasons = {*stopping.SIGNALS, stopping.TIME_IS_UP, stopping.JOB_ENDS, stopping.SAVE_FAILED}
    assert len(reasons) == 7 and max(reasons) == stopping.SAVE_FAILED, "the largest vote of any rank counts"


def test_room_is_left_before_the_end_of_a_job_for_what_a_step_and_a_save_take():
    """A minute, twice both, and an evaluation; a limit of one's own needs none, and the job's end comes first."""
    deadline = stopping.Deadline(0.0, time.time() + 100)
    assert [deadline.reached(*seconds) for seconds in ((0, 0, 0), (5, 5, 10), (5, 20, 0), (0, 0, 50))] == [
        0, 0, stopping.JOB_ENDS, stopping.JOB_ENDS,
    ]  # fmt: skip
    assert stopping.Deadline(1e-9, None).reached(0, 0, 0) == stopping.TIME_IS_UP
    assert stopping.Deadline(1e-9, time.time()).reached(0, 0, 0) == stopping.JOB_ENDS
    assert stopping.Deadline(0.0, None).reached(1e9, 1e9, 1e9) == 0


def test_a_job_whose_end_slurm_does_not_tell_says_so(monkeypatch):
    said = []
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert slurm_job.job_end_s(said.append) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert slurm_job.job_end_s(said.append) is None
    assert all("the end of this Slurm job is not known" in sentence for sentence in said) and len(said) == 2


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_slurm_s_time_left_is_read(days, hours, minutes, seconds):
    wanted = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert slurm_job.time_left_s(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == wanted
    if days == 0:
        assert slurm_job.time_left_s(f"{hours}:{minutes:02}:{seconds:02}") == wanted
    if days == hours == 0:
        assert slurm_job.time_left_s(f"{minutes}:{seconds:02}") == wanted


def test_slurm_s_other_words():
    assert slurm_job.time_left_s("UNLIMITED") is None
    with pytest.raises(ValueError, match="INVALID"):
        slurm_job.time_left_s("INVALID")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_children_outlive_the_signal_that_everybody_gets(number):
    """Slurm and torchrun send it to every process; a child that was forked, or started as another program, goes on."""
    code = """
import os, signal, subprocess, sys, time
from brainscale.stopping import Stop
stop = Stop()
started = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input(); print('alive', flush=True)"],
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
forked_out, forked_in = os.pipe()
go_out, go_in = os.pipe()
if os.fork() == 0:
    os.read(go_out, 1)
    os.write(forked_in, b"alive")
    os._exit(0)
assert started.stdout.readline() == "up\\n"
os.killpg(0, int(sys.argv[1]))
while not stop.number:
    time.sleep(0.01)
os.write(go_in, b"x")
print(stop.number, os.read(forked_out, 5).decode(), started.communicate("\\n")[0].strip())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(int(number))], capture_output=True, text=True, start_new_session=True,
        timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split() == [str(int(number)), "alive", "alive"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_a_torchrun_saves(number, tiny_store, tiny_config, tmp_path):
    """As Slurm sends it to a step: to torchrun, which is told to pass it on and to wait, and to the ranks too."""
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", "--shutdown-timeout", "300",
        "-m", "brainscale", *map(str, common(tiny_config, tiny_store, run)), "train.num_steps=100000",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not losses(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    for pid in (*map(int, children), process.pid):
        os.kill(pid, number)
    process.wait(120)
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    assert newest_step(run) == max(losses(run))


def test_who_is_told_to_stop_saves_before_anything_else_that_is_due(tiny_store, tiny_config, tmp_path):
    """An evaluation, which may take longer than there is time; the run goes on as one that was not stopped."""
    run, whole, arguments = tmp_path / "run", tmp_path / "whole", ("log.holdout_every_steps=7", "log.pictures=1")
    run_ranks(*common(tiny_config, tiny_store, run), *arguments, faults="step.data:term@hit=14", code=75, logs=tmp_path)
    assert newest_step(run) == 14
    saved = (files.directory(run / "checkpoints", 14) / files.MANIFEST).stat().st_mtime_ns
    (evaluated,) = (run / "holdout").glob("step-*14*.npz")
    assert saved < evaluated.stat().st_mtime_ns
    for folder in (run, whole):
        run_ranks(*common(tiny_config, tiny_store, folder), *arguments, logs=tmp_path)
    assert losses(run) == losses(whole)


def test_a_stop_between_two_lines_of_the_log_leaves_no_trace_in_them(tiny_store, tiny_config, tmp_path):
    """Each line is the mean of its ten steps, though the run stopped and saved in the middle of them."""
    arguments = ("train.num_steps=30", "log.every_steps=10", "checkpoint.every_steps=15")
    run, whole = tmp_path / "run", tmp_path / "whole"
    fault = "step.data:term@hit=13"
    run_ranks(*common(tiny_config, tiny_store, run), *arguments, faults=fault, code=75, logs=tmp_path)
    for folder in (run, whole):
        run_ranks(*common(tiny_config, tiny_store, folder), *arguments, logs=tmp_path)
    assert losses(run) == losses(whole) and list(losses(run)) == [10, 15, 20, 30]


def until(condition, rank, timeout_s=60):
    """Wait for something that a living process brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert rank.process.is_alive() and time.monotonic() < deadline, rank.text
        time.sleep(0.02)


def test_a_signal_that_comes_before_anything_is_imported_is_not_lost(tmp_path):
    """The first package that is imported finds it blocked, and sees it come."""
    (tmp_path / "cyclopts.py").write_text(
        "import os, signal\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print(signal.sigwait([signal.SIGUSR1]).name, flush=True)\n"
        "os._exit(0)\n"
    )
    command = [sys.executable, "-m", "brainscale", "pretrain", "config.toml"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "SIGUSR1\n"), done.stderr
