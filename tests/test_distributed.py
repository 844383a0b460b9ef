"""Who is who: a launcher's variables make a world, half of them a sentence."""

import os
import sys

import pytest

from brainscale import distributed, slurm_job
from brainscale.settings import InputError

SLURM = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "4",
}  # fmt: skip
LOCAL = {
    "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_JOB_ID": "99",
}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "2345"}


@pytest.fixture
def environment(monkeypatch):
    """Sets a launcher's variables, and nothing else of one."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SUBMITIT_")) or name in distributed.TORCHRUN:
            monkeypatch.delenv(name)
    monkeypatch.setattr(slurm_job, "nodes", lambda compact: {"n[1-2]": ["n1", "n2"]}[compact])
    before = dict(os.environ)

    def given(variables):
        os.environ.update(variables)
        return distributed.find()

    yield given
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("variables", "world", "address"),
    [
        (SLURM, (3, 4, 1, "slurm"), "n1"),
        (LOCAL, (1, 2, 1, "submitit"), "127.0.0.1"),
        (TORCHRUN, (5, 8, 1, "torchrun"), "n1"),
        ({**SLURM, **TORCHRUN}, (5, 8, 1, "torchrun"), "n1"),
        ({**SLURM, **LOCAL}, (1, 2, 1, "submitit"), "127.0.0.1"),
        ({}, (0, 1, 0, "single"), "127.0.0.1"),
    ],
)
def test_each_launcher_is_understood(environment, variables, world, address):
    found = environment(variables)
    assert (found.rank, found.size, found.local_rank, found.launcher) == world
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [str(n) for n in world[:3]]
    assert os.environ["MASTER_ADDR"] == address
    if variables:
        assert 1024 <= int(os.environ["MASTER_PORT"]) < 32768


@pytest.mark.parametrize(
    ("variables", "missing"),
    [(SLURM, name) for name in SLURM if name != "SLURM_NTASKS"]
    + [(LOCAL, name) for name in LOCAL if name != "SUBMITIT_EXECUTOR"]
    + [(TORCHRUN, name) for name in TORCHRUN],
)
def test_half_an_environment_is_an_error(environment, variables, missing):
    with pytest.raises(InputError, match=f"this looks like a process of .* but {missing} is not set"):
        environment({name: value for name, value in variables.items() if name != missing})


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "has 1 nodes and 4 tasks, but this process was not started"),
        ({"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}, "has 2 nodes and as many tasks, but this process was not started"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8 and WORLD_SIZE 8"),
        ({**TORCHRUN, "RANK": "one"}, "RANK is 'one'"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT is 0"),
    ],
)
def test_an_environment_that_does_not_fit_together_is_an_error(environment, variables, sentence):
    with pytest.raises(InputError, match=sentence):
        environment(variables)


def test_jobs_and_steps_beside_each_other_meet_at_different_ports(environment):
    ports = set()
    for job in ("100", "101", "102"):
        for step in ("0", "1", "2"):
            for name in distributed.TORCHRUN:
                os.environ.pop(name, None)
            environment({**SLURM, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
            ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 9


@pytest.mark.parametrize("variables", [SLURM, LOCAL])
def test_a_port_that_a_person_gives_is_taken(environment, variables):
    environment({**variables, "MASTER_PORT": "31999"})
    assert os.environ["MASTER_PORT"] == "31999"


def test_slurm_that_cannot_say_its_nodes_is_a_sentence(environment, monkeypatch):
    monkeypatch.setattr(slurm_job, "nodes", lambda compact: slurm_job._ask(sys.executable, "-c", "exit(1)"))
    with pytest.raises(InputError, match=r"Slurm does not say which nodes n\[1-2\] are"):
        environment(SLURM)
