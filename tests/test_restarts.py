"""Whether a Slurm job begins again: counted from what stands in the run folder. The real thing is in tests/slurm."""

import json

import pytest
import torch

from brainscale import restarts, run_folder
from brainscale.distributed import World

ALONE = World(0, 1, 0, torch.device("cpu"), "single")


@pytest.fixture
def life(tmp_path, monkeypatch):
    """Begins a life of job 7 with the newest checkpoint at a step."""

    def begin(restart, step, most=2):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True, exist_ok=True)
        return restarts.begin(tmp_path, most, ALONE)

    return begin


def test_outside_of_slurm_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run_folder.write_record(tmp_path, 5, "as before")
    assert restarts.begin(tmp_path, 0, ALONE) == ""
    assert not (tmp_path / "exit.json").exists() and restarts.read(tmp_path) == []


def test_starts_that_save_nothing_are_counted_and_told(life, tmp_path):
    assert life(0, 10) == life(1, 10) == life(2, 10) == ""
    run_folder.write_record(tmp_path, 5, "rank 1 is dead")
    told = life(3, 10)
    assert "job 7 began 3 times in a row at step 10" in told and told.endswith("the last time: rank 1 is dead")
    assert [start["restart"] for start in restarts.read(tmp_path)] == [0, 1, 2, 3]


def test_a_save_begins_the_count_anew(life):
    assert life(0, 10) == life(1, 10) == life(2, 10) == life(3, 20) == life(4, 20) == life(5, 20) == ""
    assert life(6, 20) != ""


def test_another_job_begins_the_count_anew(life, monkeypatch, tmp_path):
    life(0, 10), life(1, 10), life(2, 10)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert restarts.begin(tmp_path, 2, ALONE) == ""


@pytest.mark.parametrize(
    ("code", "again", "saved", "wanted"),
    [
        (5, True, False, True),  # a lost rank
        (5, False, True, False),  # collapse
        (1, False, True, True),  # an error after a save
        (1, False, False, False),  # an error before
        (2, False, True, False),  # settings, damage
        (75, False, True, False),  # a full disk
    ],
)
def test_what_is_tried_again(life, tmp_path, code, again, saved, wanted):
    life(0, 10)
    if saved:
        (tmp_path / "checkpoints" / "step-00000011").mkdir()
    run_folder.write_record(tmp_path, code, "what happened", again=again)
    verdict = restarts.verdict(tmp_path, code, 2)
    assert verdict.again == wanted and verdict.nodes == []
    assert json.loads((tmp_path / "exit.json").read_text())["sentence"] == "what happened"


def test_who_is_killed_without_a_word_is_tried_again_and_leaves_a_record(life, tmp_path):
    life(0, 10)
    assert restarts.verdict(tmp_path, 137, 2).again
    record = json.loads((tmp_path / "exit.json").read_text())
    assert record["code"] == 137 and record["sentence"] == "its processes were killed (srun ended with 137)"


def test_who_fails_past_the_limit_is_given_up_with_the_reason(life, tmp_path):
    for restart in range(3):
        life(restart, 10)
    assert not restarts.verdict(tmp_path, 137, 2).again
    record = json.loads((tmp_path / "exit.json").read_text())
    assert record["code"] == 5 and "began 3 times in a row at step 10" in record["sentence"]


def test_a_job_that_never_reached_its_run_folder_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert restarts.verdict(tmp_path, 1, 2) == (False, "the run did not begin", [])


def test_a_life_that_does_not_begin_after_one_that_did_is_tried_again_and_counted(life, tmp_path, monkeypatch):
    """Where a node came without its GPU, say."""
    life(0, 10)
    run_folder.write_record(tmp_path, 0, "stopped, saved and queued again")
    for restart in (1, 2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        again, sentence, _ = restarts.verdict(tmp_path, 2, 2)
        assert again == (restart < 2) and "it did not begin again (srun ended with 2)" in sentence
    assert [start["restart"] for start in restarts.read(tmp_path)] == [0, 1, 2]
    assert restarts.read(tmp_path)[1]["before"] == "stopped, saved and queued again"


def test_a_node_that_loses_ranks_twice_is_named(life, tmp_path):
    def lost(*nodes):
        run_folder.write_record(tmp_path, 5, "lost", again=True, lost_nodes=nodes)
        return restarts.verdict(tmp_path, 5, 9).nodes

    life(0, 10)
    assert lost("n1", "n2") == []
    life(1, 20)
    assert lost("n2") == ["n2"]


def test_a_signal_before_the_run_began_is_tried_again_a_few_times(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restart, code, wanted in ((0, 138, True), (2, 140, True), (2, 143, True), (3, 138, False), (0, 137, False)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert restarts.verdict(tmp_path / "run", code, 2).again == wanted, (restart, code)


def test_a_folder_that_another_job_trains_in_is_left_alone(life, tmp_path, monkeypatch):
    """Job 7 waited to begin again, and job 8 took its place: each is judged by its own lives."""
    life(0, 10)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    restarts.begin(tmp_path, 2, ALONE)
    run_folder.write_record(tmp_path, 5, "collapse")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with run_folder.locked(tmp_path, ALONE):
        assert restarts.verdict(tmp_path, 2, 2) == (False, f"another process holds {tmp_path}", [])
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert not restarts.verdict(tmp_path, 5, 2).again


def test_a_stop_that_slurm_did_not_answer_to_is_asked_for_again(life, tmp_path):
    """By the job's script, which says nothing of one that was answered."""
    life(0, 10)
    run_folder.write_record(tmp_path, 75, "stopped by SIGUSR1", again=True)
    assert restarts.verdict(tmp_path, 75, 2) == (True, "stopped by SIGUSR1", [])
    run_folder.write_record(tmp_path, 75, "stopped by SIGUSR1")
    assert restarts.verdict(tmp_path, 75, 2) == (False, "", [])


def test_what_happened_to_another_job_is_not_held_against_this_one(life, tmp_path, monkeypatch):
    life(0, 10)
    run_folder.write_record(tmp_path, 5, "rank 1 is dead", again=True, lost_nodes=["n2"])
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert restarts.begin(tmp_path, 2, ALONE) == ""
    assert not (tmp_path / "exit.json").exists()
    assert restarts.read(tmp_path)[-1]["before"] == ""
    run_folder.write_record(tmp_path, 5, "rank 1 is dead", again=True, lost_nodes=["n2"])
    assert restarts.verdict(tmp_path, 5, 9).nodes == []
