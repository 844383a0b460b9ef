"""A node that is gone, a rank that is killed, a job that does not get on."""

import json
import re

import pytest
from conftest import losses
from slurm_cluster import NODES, lives, read, until

pytestmark = pytest.mark.slow


def test_a_dead_node_is_left_and_the_job_goes_on(cluster, tiny_store, tiny_config, tmp_path):
    """The daemon of the job's first node is killed; Slurm finds out and begins the job on the others."""
    run = tmp_path / "run"
    arguments = (tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=400")
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=("--nodes=2",), BRAINSCALE_FAULTS="step.data:slow")
    cluster.trains(run, job, 0, lambda: cluster.log(job))
    dead = NODES[0]
    assert cluster.job(job)["BatchHost"] == dead
    cluster.kill_node(dead)
    try:
        ended = cluster.finish(job)
        assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", cluster.log(job)
        assert [life["node"] for life in lives(run)] == [dead, NODES[1]]
        assert max(losses(run)) == 400
    finally:
        cluster.start_node(dead)


def test_a_rank_that_is_killed_is_tried_again_on_a_job_that_gets_on(cluster, tiny_store, tiny_config, tmp_path):
    """The second rank dies in its 30th step, and in that of every life; a state is saved every fourth. After the second
    time the job stays away from that node."""
    run = tmp_path / "run"
    arguments = (tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=70")
    fault = "step.backward:kill@rank=1@hit=30"
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=("--nodes=2",), BRAINSCALE_FAULTS=fault)
    ended, log = cluster.finish(job), cluster.log(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "2", log
    steps = [life["step"] for life in lives(run)]
    assert [life["lost_nodes"] for life in lives(run)] == [[], [NODES[1]], [NODES[1]]]
    assert f"it stays away from {NODES[1]}" in log and ended["ExcNodeList"] == NODES[1], log
    assert steps[0] == 0 and 20 <= steps[1] <= 28 and 44 <= steps[2] <= 56 and max(losses(run)) == 70, steps


def test_a_job_that_does_not_get_on_is_given_up_with_the_reason(cluster, tiny_store, tiny_config, tmp_path):
    """A rank dies before anything is saved: begun three times, by the limit of two restarts."""
    run = tmp_path / "run"
    arguments = (tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "health.max_restarts_without_progress=2")
    fault = "step.backward:kill@rank=1@hit=3"
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=("--nodes=2",), BRAINSCALE_FAULTS=fault)
    ended, log = cluster.finish(job), cluster.log(job)
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "2", log
    assert [life["step"] for life in lives(run)] == [0, 0, 0]
    record = json.loads(read(run / "exit.json"))
    assert record["code"] == 5, record
    reason = f"Slurm job {job} began 3 times in a row at step 0 and saved nothing further, so it is given up"
    assert reason in record["sentence"] and reason in log


def test_a_start_that_slurm_orders_in_vain_is_refused(cluster, tiny_store, tiny_config, tmp_path):
    """Killed before anything is saved and queued again by an operator, past the limit: the job ends itself."""
    run = tmp_path / "run"
    arguments = (tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "health.max_restarts_without_progress=0")
    fault = "step.backward:hang@rank=1@hit=1"
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=("--nodes=2",), BRAINSCALE_FAULTS=fault)
    until(lambda: lives(run), "the first life", lambda: cluster.log(job))
    cluster.run("scontrol", "requeue", job)
    ended, log = cluster.finish(job), cluster.log(job)
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "1", log
    assert "began 1 times in a row at step 0" in json.loads(read(run / "exit.json"))["sentence"], log


def test_settings_that_cannot_work_are_not_tried_again(cluster, tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    arguments = (tiny_config, f"data.store={tmp_path / 'nothing'}", f"run.dir={run}")
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=("--nodes=2",))
    ended, log = cluster.finish(job), cluster.log(job)
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0" and ended["ExitCode"] == "2:0", log
    assert re.findall("^error: (.*)$", log, re.MULTILINE) == [json.loads(read(run / "exit.json"))["sentence"]]
    assert "not queued again" in log
