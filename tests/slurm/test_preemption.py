"""Preempted again and again, a job goes on by itself and ends with the losses of a run that nobody disturbed."""

import json
import os
import re
import signal
import sys

import pytest
from conftest import losses, run_brainscale
from slurm_cluster import read, slow_to_start, until

pytestmark = pytest.mark.slow
SLOW = "step.data:slow"
"""A tenth of a second more per step, so that there is something to disturb."""
STOPPED = re.compile(r"stopped by (.+) after step (\d+) of")
RESUMED = re.compile(r"resumed from \S+ at step (\d+)")


def stopped(text):
    """(why, step) of every life that was ended."""
    return [(why, int(step)) for why, step in STOPPED.findall(text)]


def test_five_preemptions_in_a_row_leave_no_trace(cluster, tiny_store, tiny_config, tmp_path):
    """An operator's requeue, a signal to the tasks, a partition that goes first, the end of the time, another signal;
    the third life reads through DALI in two processes. No step is taken twice: each life resumes where the one before
    ended."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'brainscale-mri[dali]'")
    config, run, plain = tmp_path / "config.toml", tmp_path / "run", tmp_path / "plain"
    text = tiny_config.read_text()
    config.write_text(text)
    arguments = (f"data.store={tiny_store}", "train.num_steps=600")
    job = cluster.sbatch(
        "pretrain_mae.sh", config, *arguments, f"run.dir={run}", BRAINSCALE_FAULTS=SLOW,
        options=("--nodes=2", "--time=60", "--signal=USR1@10"),
    )  # fmt: skip

    def life(number):
        cluster.trains(run, job, number, lambda: cluster.log(job))

    def waits():
        until(lambda: cluster.job(job)["JobState"] == "PENDING", f"job {job} to wait", lambda: cluster.log(job))

    life(0)
    cluster.run("scontrol", "requeue", job)
    waits()
    life(1)
    cluster.run("scancel", "--signal=USR1", job)
    waits()
    config.write_text(text.replace("workers = 1", 'workers = 2\nloader = "dali"'))
    life(2)
    urgent = cluster.run(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=srun true",
    )
    cluster.finish(urgent.strip())
    config.write_text(text)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    life(3)
    waits()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    life(4)
    cluster.run("scancel", "--signal=USR2", job)
    ended, log = cluster.finish(job), cluster.log(job)

    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "5", log
    ends = stopped(log)
    assert [why for why, _ in ends[:2]] == ["SIGTERM", "SIGUSR1"] and ends[4][0] == "SIGUSR2", ends
    assert ends[2][0] in ("SIGUSR1", "SIGTERM") and ends[3][0] in ("SIGUSR1", "the time limit of the Slurm job"), ends
    assert [step for _, step in ends] == [int(step) for step in RESUMED.findall(log)]
    assert "loader: DALI" in log and log.count("loader: torch") == 5
    assert "Traceback" not in log
    run_brainscale("pretrain", tiny_config, *arguments, f"run.dir={plain}", ranks=2)
    assert losses(run) == losses(plain) and max(losses(run)) == 600
    assert json.loads(read(run / "exit.json"))["code"] == 0


@pytest.mark.parametrize("number", ["USR1", "USR2", "TERM"])
def test_a_job_of_submitit_goes_on_as_well(cluster, tiny_store, tiny_config, tmp_path, number):
    """USR2 is what submitit asks Slurm to send; TERM is ignored by its own handler, and not by ours."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    arguments = (tiny_config, f"data.store={tiny_store}", "train.num_steps=60")
    options = ("--nodes=2", "--cpus-per-task=1", "--time-hours=1", "--signal-delay-s=10")
    submit = (sys.executable, "-m", "brainscale", "submit", *arguments, f"run.dir={run}", *options)
    job = cluster.run(*submit, BRAINSCALE_FAULTS=SLOW).split()[0]

    def log():
        return "".join(read(file) for file in (run / "slurm").glob("*.out"))

    for life in range(2):
        cluster.trains(run, job, life, log)
        cluster.run("scancel", f"--signal={number}", job)
        until(lambda: cluster.job(job)["JobState"] == "PENDING", "the job to wait", log)
    ended = cluster.finish(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "2", log()
    assert [why for why, _ in stopped(log())] == [f"SIG{number}"] * 2
    assert [step for _, step in stopped(log())] == [int(step) for step in RESUMED.findall(log())]
    run_brainscale("pretrain", *arguments, f"run.dir={plain}", ranks=2)
    assert losses(run) == losses(plain) and max(losses(run)) == 60


def test_a_job_that_is_cancelled_saves_and_stays_away(cluster, tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    arguments = (tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=600")
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=("--nodes=2",), BRAINSCALE_FAULTS=SLOW)
    cluster.trains(run, job, 0, lambda: cluster.log(job))
    cluster.run("scancel", job)
    ended = cluster.finish(job)
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0"
    until(lambda: (run / "exit.json").is_file(), "exit.json", lambda: cluster.log(job))
    record = json.loads(read(run / "exit.json"))
    assert record["code"] == 75 and "the same command continues" in record["sentence"], record
    assert "was cancelled or is ending" in cluster.log(job)


def test_a_job_that_may_not_be_queued_again_says_so(cluster, tiny_store, tiny_config, tmp_path):
    """It ends with 75, and the same line, submitted again, continues it."""
    run = tmp_path / "run"
    arguments = (tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=120")
    options = ("--nodes=2", "--no-requeue")
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=options, BRAINSCALE_FAULTS=SLOW)
    cluster.trains(run, job, 0, lambda: cluster.log(job))
    cluster.run("scancel", "--signal=TERM", job)
    ended = cluster.finish(job)
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "75:0", cluster.log(job)
    assert "was submitted with --no-requeue" in cluster.log(job)
    assert json.loads(read(run / "exit.json"))["code"] == 75
    again = cluster.sbatch("pretrain_mae.sh", *arguments, options=options)
    assert cluster.finish(again)["JobState"] == "COMPLETED" and max(losses(run)) == 120, cluster.log(again)


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_signal_before_python_looks_at_signals_is_no_end(cluster, tiny_store, tiny_config, tmp_path, number):
    run, python = tmp_path / "run", slow_to_start(tmp_path / "python")
    arguments = (tiny_config, f"data.store={tiny_store}", f"run.dir={run}")
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=("--nodes=1",), PYTHON=str(python))
    until((tmp_path / "python.begun").exists, "the task", lambda: cluster.log(job))
    cluster.run("scancel", f"--signal={number}", job)
    ended = cluster.finish(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", cluster.log(job)
    assert "a signal came before the run began" in cluster.log(job) and max(losses(run)) == 40


def test_a_slurm_that_does_not_answer_when_a_run_has_saved_is_asked_again(cluster, tiny_store, tiny_config, tmp_path):
    """Its controller is stopped, as while it is restarted: the job's script asks until it goes on."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    arguments = (tiny_config, f"data.store={tiny_store}", "train.num_steps=150")
    options = ("--nodes=1",)
    job = cluster.sbatch("pretrain_mae.sh", *arguments, f"run.dir={run}", options=options, BRAINSCALE_FAULTS=SLOW)
    cluster.trains(run, job, 0, lambda: cluster.log(job))
    controller = cluster.daemons["slurmctld"]
    controller.send_signal(signal.SIGSTOP)
    try:
        (task,) = cluster.tasks("pretrain", str(run))
        os.kill(task, signal.SIGUSR1)
        until(lambda: "asked again in" in cluster.log(job), "the script to ask", lambda: cluster.log(job), 200)
    finally:
        controller.send_signal(signal.SIGCONT)
    ended = cluster.finish(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", cluster.log(job)
    run_brainscale("pretrain", *arguments, f"run.dir={plain}")
    assert losses(run) == losses(plain)
