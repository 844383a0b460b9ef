"""What is asked of Slurm and made of its answers, which are those of Slurm 22.05; the real one is in tests/slurm."""

import os
import signal
import stat
import time

import pytest

from brainscale import cli_slurm, restarts, run_folder, slurm_job
from brainscale.slurm_job import NotRequeued

RUNNING = {"JobState": "RUNNING", "Restarts": "1", "Requeue": "1", "BatchFlag": "1", "Partition": "batch"}
NODES = {"NumNodes": "2", "ExcNodeList": "(null)"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands, which print what a test has given for the words they are called with, and note them."""

    def answers(given):
        for number, (words, (code, text)) in enumerate(given.items()):
            (tmp_path / f"{number}.words").write_text(words)
            (tmp_path / f"{number}.text").write_text(text)
            (tmp_path / f"{number}.code").write_text(str(code))
        for name in ("scontrol", "squeue", "sinfo"):
            path = tmp_path / name
            path.write_text(
                f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n'
                f"for file in {tmp_path}/*.words; do\n"
                f'  case "{name} $*" in "$(cat $file)"*)\n'
                "    cat ${file%.words}.text; exit $(cat ${file%.words}.code);; esac\n"
                "done\nexit 9\n"
            )
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    answers.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return answers


def shown(**changes):
    return {
        "scontrol show": (0, "JobId=7 JobName=a " + " ".join(f"{k}={v}" for k, v in {**RUNNING, **changes}.items()))
    }


def test_a_job_that_runs_is_queued_again(slurm):
    slurm({**shown(), "scontrol requeue 7": (0, "")})
    assert slurm_job.requeue() == "job 7 is queued again"
    assert slurm.calls() == ["scontrol show job --oneliner 7", "scontrol requeue 7"]


def test_a_job_that_slurm_has_queued_again_is_left_alone(slurm):
    slurm(shown(JobState="COMPLETING", Restarts="2"))
    assert slurm_job.requeue() == "Slurm has queued job 7 again"
    assert slurm.calls() == ["scontrol show job --oneliner 7"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"JobState": "COMPLETING"}, "was cancelled or is ending"),
        ({"JobState": "CANCELLED"}, "was cancelled or is ending"),
        ({"Requeue": "0"}, "--no-requeue"),
        ({"BatchFlag": "0"}, "was not submitted by sbatch"),
    ],
)
def test_what_is_not_queued_again(slurm, changes, why):
    slurm({**shown(**changes), "scontrol requeue 7": (0, "")})
    with pytest.raises(NotRequeued, match=why):
        slurm_job.requeue()
    assert slurm.calls() == ["scontrol show job --oneliner 7"]


def test_slurm_that_refuses_or_is_not_there_is_a_reason(slurm, monkeypatch):
    slurm(shown())
    with pytest.raises(NotRequeued, match="Slurm could not be asked to"):
        slurm_job.requeue()
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NotRequeued, match="Slurm could not be asked to"):
        slurm_job.requeue()
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(NotRequeued, match="not a Slurm job"):
        slurm_job.requeue()


@pytest.mark.parametrize(
    ("up", "known", "wanted"),
    [
        ("n1 idle\nn2 alloc\nn3 mix\n", "(null)", "n2"),
        ("n1 idle\nn2 alloc\nn3 mix\nn4 idle\n", "n1", "n1,n2"),
        ("n1 idle\nn2 alloc\nn3 drain\n", "(null)", None),
        ("n1 idle\nn2 alloc\nn3 mix\n", "n1", None),
    ],
)
def test_nodes_are_avoided_where_enough_others_are_up(slurm, up, known, wanted):
    job = shown(**{**NODES, "ExcNodeList": known})
    slurm({"scontrol show hostnames": (0, "n1\n"), **job, "sinfo": (0, up), "scontrol update": (0, "")})
    assert slurm_job.exclude(["n2"]) == (wanted is not None)
    updates = [call for call in slurm.calls() if "update" in call]
    assert updates == ([f"scontrol update JobId=7 ExcNodeList={wanted}"] if wanted else [])


def test_the_end_of_a_job_is_what_slurm_says_now(slurm, monkeypatch):
    """An administrator may have moved it since the job began."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", "12345")
    slurm({"squeue --noheader --jobs 7": (0, "1-00:00:10\n")})
    assert slurm_job.end_s() == pytest.approx(time.time() + 86410, abs=5)
    slurm({"squeue --noheader --jobs 7": (0, "UNLIMITED\n")})
    assert slurm_job.end_s() is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert slurm_job.end_s() == 12345.0


def test_a_node_has_slurm_s_name(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-17")
    assert slurm_job.node() == "gpu-17"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert slurm_job.node() == os.uname().nodename


@pytest.fixture
def lost(tiny_config, tmp_path):
    """Asks what is done about a life that ended with 137 since a rank was lost; its exit code."""
    run = tmp_path / "run"
    run.mkdir()

    def retry(code=137):
        (run / restarts.STARTS).write_text('{"job": "7", "restart": 1, "step": 0, "lost_nodes": []}\n')
        run_folder.write_record(run, 5, "rank 1 is dead", again=True)
        with pytest.raises(SystemExit) as left:
            cli_slurm.retry(code, tiny_config, f"run.dir={run}")
            raise SystemExit(0)
        return left.value.code

    handler = signal.getsignal(signal.SIGTERM)
    yield retry
    signal.signal(signal.SIGTERM, handler)


def test_a_lost_rank_has_its_job_queued_again(slurm, lost, capsys):
    slurm({**shown(), "scontrol requeue 7": (0, "")})
    assert lost() == 0
    assert "job 7 is queued again, since rank 1 is dead" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "Slurm ends the script, which has more to do"


def test_a_slurm_that_does_not_answer_is_asked_again_and_again(slurm, lost, capsys, monkeypatch):
    monkeypatch.setattr(cli_slurm, "PAUSE_S", 0.0)
    slurm({})
    assert lost() == 137
    assert len(slurm.calls()) == cli_slurm.TIMES_ASKED
    assert capsys.readouterr().err.count("asked again in 0 s") == cli_slurm.TIMES_ASKED - 1


def test_a_job_that_was_cancelled_ends_with_the_code_of_its_tasks(slurm, lost):
    slurm(shown(JobState="CANCELLED"))
    assert lost() == 137
    assert len(slurm.calls()) == 1
