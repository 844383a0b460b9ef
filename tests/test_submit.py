"""What `brainscale submit` would hand in, and runs here. On a real Slurm: tests/slurm/test_scripts.py."""

import json
import shlex
import subprocess

import pytest
from conftest import losses, refusal, run_brainscale
from hypothesis import given
from hypothesis import strategies as st

from brainscale.settings import InputError
from brainscale_slurm.submit import Job, Resources, script, split, sweep

WANTED = """#!/bin/bash

# Parameters
#SBATCH --account=brains
#SBATCH --comment='two words'
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=8
#SBATCH --job-name=mae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=runs/a/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=720
#SBATCH --wckey=submitit

# setup
trap : USR1 USR2 TERM  # the tasks save and leave; this shell waits for them
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output runs/a/slurm/%j_%t_log.out --kill-on-bad-exit=1 python -u -m submitit.core._submit runs/a/slurm


# teardown
python -m brainscale retry $? c.toml 'data.store=a b' run.dir=runs/a"""  # noqa: E501


def test_the_script_is_what_a_person_would_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resources = Resources(
        nodes=2, gpus_per_node=8, tasks_per_node=8, cpus_per_task=16, time_hours=12, partition="gpu", account="brains",
        sbatch=("comment=two words",), setup=("module load cuda",), python="python",
    )  # fmt: skip
    text = script(Job("mae", ["c.toml", "data.store=a b", "run.dir=runs/a"], tmp_path / "runs/a"), resources)
    assert text.replace(f"{tmp_path}/", "") == WANTED


def test_the_shell_finds_no_fault_in_it(tmp_path):
    text = script(Job("mae", ["c.toml", "a=b; rm -rf $HOME"], tmp_path), Resources())
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    assert shlex.split(text.splitlines()[-1])[-1] == "a=b; rm -rf $HOME"


def test_a_sweep_is_every_combination_in_a_folder_of_its_own(tiny_config):
    overrides = ("optim.lr=1e-3,2e-3", "seed=0,1", "data.store=s", "model.patch_voxels_zyx=[8,8,8]", "run.dir=runs/x")
    jobs = sweep(tiny_config, overrides, ["--allow-change=seed"])
    assert [job.name for job in jobs] == [
        "optim.lr=1e-3,seed=0", "optim.lr=1e-3,seed=1", "optim.lr=2e-3,seed=0", "optim.lr=2e-3,seed=1",
    ]  # fmt: skip
    assert len({job.run_dir for job in jobs}) == 4
    assert jobs[1].arguments == [
        str(tiny_config), "optim.lr=1e-3", "seed=1", "data.store=s", "model.patch_voxels_zyx=[8,8,8]",
        "run.dir=runs/x/optim.lr=1e-3,seed=1", "--allow-change=seed",
    ]  # fmt: skip


def test_without_a_sweep_the_run_folder_is_as_usual(tiny_config):
    (job,) = sweep(tiny_config, ("seed=3",))
    assert (job.name, str(job.run_dir)) == ("tiny", "runs/tiny")
    assert job.arguments == [str(tiny_config), "seed=3", "run.dir=runs/tiny"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("optim.lr=1e-3,-1",), "optim.lr"),
        (("run.dir=a,b",), "run.dir is swept over"),
        (("seed=0,0",), "two runs of the sweep would write runs/tiny/seed=0"),
        (("sed=0,1",), "did you mean 'seed'"),
        (("seed",), "key=value"),
    ],
)
def test_one_bad_combination_is_refused_before_anything_is_handed_in(tiny_config, overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        sweep(tiny_config, overrides)


@given(st.lists(st.sampled_from(["1", "[1,2]", '"a,b"', "{x=1,y=2}", "[[1,2],[3]]", "1e-4"]), min_size=1, max_size=5))
def test_commas_split_only_outside_of_brackets_and_quotes(parts):
    assert split(",".join(parts)) == parts


def test_the_job_s_pickle_becomes_the_command(tmp_path):
    """What submitit loads in a task replaces its process, with signals blocked until the command looks at them."""
    code = """
import signal, sys
from brainscale_slurm.submit import Command
Command(sys.argv[1:])()
"""
    done = subprocess.run([*shlex.split(Resources().python), "-c", code, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == __import__("brainscale").__version__


@pytest.mark.slow
def test_two_processes_here_train_as_two_under_torchrun_do(tiny_store, tiny_config, tmp_path):
    runs, plain, changes = tmp_path / "runs", tmp_path / "plain", ("train.num_steps=8", f"data.store={tiny_store}")
    options = ("--local", "--tasks-per-node", "2")
    told = run_brainscale("submit", tiny_config, *changes, f"run.dir={runs}", "seed=0,1", *options).stdout
    assert [line.split(" (exit ")[0] for line in told.splitlines()] == [f"{runs}/seed={seed}: done" for seed in (0, 1)]
    run_brainscale("pretrain", tiny_config, *changes, f"run.dir={plain}", ranks=2)
    assert losses(runs / "seed=0") == losses(plain)
    assert json.loads((runs / "seed=1" / "run.json").read_text())["launcher"] == "submitit"


@pytest.mark.slow
def test_a_run_here_that_fails_passes_its_code_on(tiny_config, tmp_path):
    options = ("data.store=nowhere", f"run.dir={tmp_path / 'run'}", "--local")
    done = run_brainscale("submit", tiny_config, *options, code=2)
    assert "nowhere is not a folder" in done.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--local", "--dry-run"), "give one of them"),
        (("--local", "--nodes", "2"), "--local is this machine alone"),
        (("--dry-run", "--sbatch", "=x"), "is not of the form key=value"),
    ],
)
def test_options_that_contradict_each_other(tiny_config, options, sentence):
    assert sentence in refusal(2, "submit", tiny_config, *options)
