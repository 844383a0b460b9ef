"""The scripts of slurm/ and `brainscale submit` on a real Slurm of three nodes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, losses, run_brainscale, write_tiny_store
from slurm_cluster import NODES, slow_to_start, until

pytestmark = pytest.mark.slow
SCRIPTS = ("pretrain_mae.sh", "pretrain_jepa.sh", "to_zarr.sh", "evaluate.sh")
JEPA = ("objective=jepa", "jepa.predictor_width=12", "jepa.predictor_depth=1", "jepa.predictor_heads=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def common(store, run):
    return (f"data.store={store}", f"run.dir={run}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_slurm_takes_the_script_as_it_is(cluster, name):
    """sbatch --test-only prints what would be started to standard error."""
    done = subprocess.run(
        ["sbatch", "--test-only", *(["--array=0-2"] if name == "to_zarr.sh" else []), f"slurm/{name}", "a", "b"],
        env=cluster.environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


def test_the_shell_finds_no_fault():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", *sorted((ROOT / "slurm").glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("script", "changes"), [("pretrain_mae.sh", ()), ("pretrain_jepa.sh", JEPA)])
def test_two_nodes_train_to_the_end(cluster, tiny_store, tiny_config, tmp_path, script, changes):
    """As two ranks under torchrun do, which is said to be the same."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    job = cluster.sbatch(script, tiny_config, *common(tiny_store, run), *changes, options=TWO_NODES)
    assert cluster.finish(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert "2 rank(s)" in cluster.log(job)
    run_brainscale("pretrain", tiny_config, *common(tiny_store, plain), *changes, ranks=2)
    assert losses(run) == losses(plain) and max(losses(run)) == 40


def test_a_sweep_by_submitit_trains_each_of_its_runs(cluster, tiny_store, tiny_config, tmp_path):
    options = ("--nodes=2", "--cpus-per-task=1", "--time-hours=1", "--sbatch=comment=test")
    submit = (sys.executable, "-m", "brainscale", "submit", tiny_config, *common(tiny_store, tmp_path / "runs"))
    printed = cluster.run(*submit, "seed=0,1", "train.num_steps=8", *options)
    jobs = re.findall(r"^(\d+)  (\S+)", printed, re.MULTILINE)
    assert [Path(run).name for _, run in jobs] == ["seed=0", "seed=1"], printed
    for job, run in jobs:
        ended = cluster.finish(job)
        log = "".join(file.read_text() for file in (Path(run) / "slurm").glob("*.out"))
        assert ended["JobState"] == "COMPLETED" and "2 rank(s)" in log, log
        assert ended["Comment"] == "test" and ended["Requeue"] == "1"
        assert max(losses(Path(run))) == 8
        assert (Path(run) / "slurm").stat().st_mode & 0o077 == 0
    assert losses(Path(jobs[0][1])) != losses(Path(jobs[1][1]))


def test_an_array_of_three_builds_one_store(cluster, tmp_path):
    """The same bytes as one process makes."""
    source, plain, built = tmp_path / "bids", tmp_path / "plain", tmp_path / "built"
    run_brainscale("phantom", source, "--subjects", "7", "--seed", "0", "--spacing-mm", "4")
    plan = ("shard_volumes=2", "spacing_mm_xyz=[4,4,4]", "grid_voxels_xyz=[48,56,48]")
    subprocess.run([sys.executable, "data_prep/to_zarr.py", source, plain, *plan], cwd=ROOT, check=True)
    job = cluster.sbatch("to_zarr.sh", source, built, *plan, options=("--array=0-2",))
    for task in range(3):
        assert cluster.finish(f"{job}_{task}")["JobState"] == "COMPLETED", cluster.logs()
    assert contents(built) == contents(plain)


def test_a_conversion_whose_time_ends_is_queued_again_and_goes_on(cluster, tmp_path):
    """The signal that Slurm sends to the script before the end; 16 scans are made much finer, which takes a while."""
    source, plain, built = tmp_path / "bids", tmp_path / "plain", tmp_path / "built"
    run_brainscale("phantom", source, "--subjects", "16", "--seed", "0", "--spacing-mm", "4")
    plan = ("shard_volumes=1", "spacing_mm_xyz=[1,1,1]", "grid_voxels_xyz=[192,224,192]")
    subprocess.run([sys.executable, "data_prep/to_zarr.py", source, plain, *plan], cwd=ROOT, check=True)
    job = cluster.sbatch("to_zarr.sh", source, built, *plan)
    until(lambda: list((built / "journal").glob("*")), "a shard", lambda: cluster.log(job))
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    ended, log = cluster.finish(job), cluster.log(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", log
    assert f"job {job} is queued again" in log
    assert contents(built) == contents(plain)


def test_a_conversion_that_is_signalled_before_it_looks_is_queued_again(cluster, tmp_path):
    source, built, python = tmp_path / "bids", tmp_path / "built", slow_to_start(tmp_path / "python")
    run_brainscale("phantom", source, "--subjects", "2", "--seed", "0", "--spacing-mm", "4")
    plan = ("spacing_mm_xyz=[4,4,4]", "grid_voxels_xyz=[48,56,48]")
    job = cluster.sbatch("to_zarr.sh", source, built, *plan, PYTHON=str(python))
    until((tmp_path / "python.begun").exists, "the task", lambda: cluster.log(job))
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    ended = cluster.finish(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", cluster.log(job)
    assert (built / "COMPLETE.json").is_file()


def test_a_conversion_that_may_not_be_queued_again_says_so(cluster, tmp_path):
    source, built, python = tmp_path / "bids", tmp_path / "built", slow_to_start(tmp_path / "python")
    job = cluster.sbatch("to_zarr.sh", source, built, options=("--no-requeue",), PYTHON=str(python))
    until((tmp_path / "python.begun").exists, "the task", lambda: cluster.log(job))
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    assert cluster.finish(job)["ExitCode"] == "75:0"
    assert "not queued again: job" in cluster.log(job) and "Traceback" not in cluster.log(job)


def contents(store):
    """Bytes by name of what a store is, but for the journal and when it was made."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name not in ("COMPLETE.json",)
    }


@pytest.fixture(scope="module")
def evaluation(unbroken, tmp_path_factory):
    """(arguments of an evaluation of half a minute, folder of its scores when nothing disturbs it)."""
    home = tmp_path_factory.mktemp("evaluation")
    labels = lambda record: record.update(participant={"ill": str(record["row"] // 2 % 2)})  # noqa: E731
    store = write_tiny_store(home / "store", 40, change=labels)
    tasks = home / "tasks.toml"
    tasks.write_text('[[tasks]]\nname = "ill"\nkind = "binary"\ncolumn = "ill"\nsplit = {folds = 4, repeats = 2}\n')
    few = ("--probes=linear", "--no-cnn", "--permutations=200", "--few-shot=")
    arguments = (unbroken, "--store", store, "--tasks", tasks, *few)
    run_brainscale("evaluate", *arguments, "--out", home / "plain")
    return arguments, home / "plain"


def scores(out):
    """What scores.json says, but for when."""
    return {**json.loads((out / "scores.json").read_text()), "created_utc": ""}


def test_an_evaluation_as_a_job_is_that_of_the_same_line_without_slurm(cluster, evaluation, tmp_path):
    arguments, plain = evaluation
    job = cluster.sbatch("evaluate.sh", *arguments, "--out", tmp_path)
    assert cluster.finish(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert scores(tmp_path) == scores(plain) and (tmp_path / "scores.html").is_file()


def test_an_evaluation_whose_time_ends_is_queued_again_and_goes_on(cluster, evaluation, tmp_path):
    """After the first piece. What is left of pieces that were being written is not taken for one."""
    arguments, plain = evaluation
    parts = tmp_path / "parts"
    parts.mkdir()
    for piece in (plain / "parts").iterdir():
        for name in (f"{piece.name}.0123.partial", f"{piece.stem}.partial"):
            (parts / name).write_bytes(piece.read_bytes()[:20])
    job = cluster.sbatch("evaluate.sh", *arguments, "--out", tmp_path)
    until(lambda: list(parts.glob("*.json")), "a piece", lambda: cluster.log(job))
    kept = {piece: piece.stat().st_mtime_ns for piece in parts.glob("*.[jn]*")}
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    ended, log = cluster.finish(job), cluster.log(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", log
    assert f"job {job} is queued again" in log and "Traceback" not in log
    assert {piece: piece.stat().st_mtime_ns for piece in kept} == kept
    assert {p.name for p in (plain / "parts").iterdir()} <= {p.name for p in parts.iterdir()}
    assert scores(tmp_path) == scores(plain)


def test_an_evaluation_that_may_not_be_queued_again_says_so(cluster, evaluation, tmp_path):
    """The same line finishes it."""
    arguments, plain = evaluation
    job = cluster.sbatch("evaluate.sh", *arguments, "--out", tmp_path, options=("--no-requeue",))
    until(lambda: list((tmp_path / "parts").glob("*.json")), "a piece", lambda: cluster.log(job))
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    assert cluster.finish(job)["ExitCode"] == "75:0", cluster.log(job)
    assert "not queued again: job" in cluster.log(job) and "Traceback" not in cluster.log(job)
    assert not (tmp_path / "scores.json").exists()
    job = cluster.sbatch("evaluate.sh", *arguments, "--out", tmp_path)
    assert cluster.finish(job)["JobState"] == "COMPLETED" and scores(tmp_path) == scores(plain), cluster.log(job)


def test_each_of_four_tasks_on_two_nodes_sees_a_gpu_of_its_own(cluster):
    """Two (false) GPUs a node; the numbers of CUDA_VISIBLE_DEVICES are counted on the node."""
    names = ("SLURMD_NODENAME", "SLURM_LOCALID", "CUDA_VISIBLE_DEVICES")
    code = f"import os; print(*(os.environ[name] for name in {names}))"
    ask = ("srun", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    told = cluster.run(*ask, "--gpus-per-task=1", sys.executable, "-c", code)
    seen = sorted(line.split() for line in told.splitlines())
    assert seen == [[node, local, local] for node in NODES[:2] for local in ("0", "1")], told


def test_four_tasks_on_two_nodes_train(cluster, tiny_store, tiny_config, tmp_path):
    run, options = tmp_path / "run", ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1")
    arguments = (tiny_config, *common(tiny_store, run), "train.num_steps=8")
    job = cluster.sbatch("pretrain_mae.sh", *arguments, options=options)
    assert cluster.finish(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert "4 rank(s) × 1 volume(s)" in cluster.log(job) and max(losses(run)) == 8


def test_a_task_without_srun_in_a_job_of_several_says_so(cluster, tiny_store, tiny_config, tmp_path):
    line = f"{sys.executable} -m brainscale pretrain {tiny_config} data.store={tiny_store} run.dir={tmp_path / 'run'}"
    out = tmp_path / "out"
    job = cluster.run("sbatch", "--parsable", "--ntasks=2", f"--output={out}", f"--wrap={line}").strip()
    assert cluster.finish(job)["ExitCode"] == "2:0"
    assert "2 tasks, but this process was not started by srun" in out.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_without_its_python_says_what_to_do(cluster, name):
    job = cluster.sbatch(name, "a", "b", PYTHON="/nowhere/python")
    assert cluster.finish(job)["ExitCode"] == "2:0"
    assert cluster.log(job).startswith("error: /nowhere/python is not found in ")


def test_without_arguments_the_demo_s_store_is_trained_on():
    for name in SCRIPTS[:2]:
        text = (ROOT / "slurm" / name).read_text()
        config = re.search(r"set -- (\S+) data.store=runs/demo/store", text)
        assert config is not None and (ROOT / config[1]).is_file()
    assert "DEMO := runs/demo" in (ROOT / "Makefile").read_text()
