"""What a run waits for: made-up runs of every kind to the letter, and real ones whose loader is slow."""

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal, run_brainscale
from processes import run_ranks

from brainscale.config import Config
from brainscale.report import read
from brainscale.run_doctor import Diagnosis, diagnose, text
from brainscale.settings import load

GPU: dict[str, Any] = {
    "world_size": 8, "machine": {"device": "NVIDIA H200", "cores": 64, "ranks": 8},
    "store": {"plan": {"codec": "zstd", "dtype": "int16"}},
}  # fmt: skip
CPU: dict[str, Any] = {"world_size": 1, "machine": {"device": "cpu (2 threads)", "cores": 2}, "store": {"plan": {}}}
COMPUTE = {"data": 0.0, "host_to_device": 0.0, "compute": 1.0, "communication": 0.0, "host": 0.0}


def config(*overrides: str) -> Config:
    return load(Config, None, ("train.num_steps=10000", *overrides))


def run(
    profile: dict[str, float] | None = None,
    *,
    step_s: float = 1.0,
    data_s: float = 0.01,
    checkpoint_s: float = 0.0,
    other_s: float = 0.0,
    largest: float | None = None,
    steps: int = 1000,
    since: int = 0,
    every: int = 100,
) -> dict[int, dict[str, Any]]:
    """Metrics of a process that began after step `since`; its first line is slow, and not to be counted."""
    lines: dict[int, dict[str, Any]] = {}
    time_s = 7.0
    for step in range(since + every, since + steps + 1, every):
        slow = 50 if step == since + every else 1
        time_s += slow * every * step_s + checkpoint_s + other_s
        lines[step] = {
            "loss": 1.0, "time_s": time_s, "process_steps": step - since, "step_s": slow * step_s, "data_s": data_s,
            "data_wait_fraction": data_s / step_s / slow, "data_wait_max_fraction": largest or data_s / step_s / slow,
            "checkpoint_s": checkpoint_s, "other_s": other_s, "skipped_steps": 0,
        }  # fmt: skip
    if profile is not None:
        lines[since + steps]["profile"] = {**COMPUTE, **profile}
    return lines


def said(lines: dict[int, dict[str, Any]], about: dict[str, Any] = GPU, *overrides: str, **ending: Any) -> str:
    return text("runs/a", diagnose(lines, config(*overrides), about, ending))


def of(folder: Path) -> Diagnosis:
    """The diagnosis of a real run."""
    found = read(folder)
    return diagnose(found.metrics, found.config, found.about, found.ending)


def test_a_run_that_waits_for_data():
    lines = run({"data": 0.5, "compute": 0.4, "host": 0.1}, data_s=0.5)
    assert said(lines, GPU, "data.workers=4", "train.compile=false") == (
        "runs/a: waits for data most, 50% of the time\n"
        "steps 501 to 1,000; what a step consists of was sampled at step 1,000\n"
        "\n"
        "  data                    50.0%  ████████████████████\n"
        "  copies to the GPU        0.0%\n"
        "  compute                 40.0%  ████████████████\n"
        "  communication            0.0%\n"
        "  launching               10.0%  ████\n"
        "  checkpoints              0.0%\n"
        "  evaluation and probes    0.0%\n"
        "\n"
        "data, 50% of the time: raise data.workers from 4 to 8 (64 cores for 8 rank(s) here); set data.loader = "
        '"dali"; convert with codec=lz4 (now zstd), which is read twice as fast; keep the store on a local disk; '
        "`brainscale bench loader` shows which stage is slow\n"
        "launching, 10% of the time: the GPU idles while Python is behind: set train.compile = true; raise "
        "train.micro_batch_volumes (now 32): more work per launch; log less often (log.every_steps is 10) and to fewer "
        'log.trackers; train.profile = "steps A-B" shows the phase in which it idles\n'
        "\n"
        "step 1,000 of 10,000; 2.5 hours left at this rate\n"
        "no end recorded: still running, or killed"
    )


def test_workers_are_raised_to_the_cores_there_are():
    lines = run(COMPUTE, data_s=0.5)
    assert "data.workers = 2 uses all cores already (2 for 1 rank(s) here); keep" in said(lines, CPU)
    unknown = {**CPU, "machine": {"device": "cpu (2 threads)"}}
    assert "raise data.workers (now 2), up to the cores that each rank has; keep" in said(lines, unknown)
    assert "dali" not in said(lines, CPU) and "dali" not in said(lines, GPU, 'data.loader="dali"')


def test_a_compute_bound_run():
    assert said(
        run({"compute": 0.97, "host": 0.03}),
        GPU,
        "train.num_steps=1000",
        "optim.warmup_steps=10",
        code=0,
        sentence="done",
    ) == (
        "runs/a: compute-bound, 96% of the time: nothing to gain from the loader\n"
        "steps 501 to 1,000; what a step consists of was sampled at step 1,000\n"
        "\n"
        "  data                     1.0%\n"
        "  copies to the GPU        0.0%\n"
        "  compute                 96.0%  ██████████████████████████████████████\n"
        "  communication            0.0%\n"
        "  launching                3.0%  █\n"
        "  checkpoints              0.0%\n"
        "  evaluation and probes    0.0%\n"
        "\n"
        "step 1,000 of 1,000\n"
        "the last process ended with exit code 0: done"
    )


def test_a_run_that_waits_for_checkpoints():
    found = said(run(COMPUTE, checkpoint_s=100.0), GPU, "checkpoint.every_steps=50", "checkpoint.background=false")
    assert found.startswith("runs/a: waits for checkpoints most, 50% of the time\n")
    assert (
        "\ncheckpoints, 50% of the time: raise checkpoint.every_steps (now 50); set checkpoint.background = true; "
        "write to a faster disk, since a save also waits for the one before\n"
    ) in found
    assert "; 5.0 hours left at this rate" in found


def test_a_run_that_waits_for_evaluation():
    found = said(run(COMPUTE, other_s=25.0), GPU, "log.holdout_every_steps=100")
    assert found.startswith("runs/a: waits for evaluation and probes most, 20% of the time\n")
    assert (
        "\nevaluation and probes, 20% of the time: raise log.holdout_every_steps (now 100), health.probe_every_steps "
        "(now 500) or log.profile_every_steps (now 1000; 0: never for the last two), or lower log.holdout_volumes (now "
        "16)\n"
    ) in found


def test_a_run_that_waits_for_communication():
    lines = run({"compute": 0.6, "communication": 0.4})
    found = said(lines, GPU, "zero.stage=3", "train.micro_batch_volumes=8")
    assert found.startswith("runs/a: waits for communication most, 40% of the time\n")
    assert (
        "\ncommunication, 40% of the time: lower zero.stage (now 3) if memory allows, since stages 2 and 3 send more; "
        "raise train.micro_batch_volumes (now 8): fewer accumulated passes, fewer exchanges; look at the links between "
        "ranks and machines (NCCL_DEBUG=INFO says which are used); more volumes per step (train.global_batch_volumes) "
        "send the same bytes less often, but change results\n"
    ) in found
    assert "lower zero.stage" not in said(lines) and "accumulated" not in said(lines) and "another rank" not in found


def test_communication_that_is_another_rank_s_waiting_for_data():
    found = said(run({"compute": 0.4, "communication": 0.6}, largest=0.6))
    assert found.startswith(
        "runs/a: waits for communication most, 59% of the time, in which another rank waits for data\n"
    )
    assert (
        "\nanother rank waits for data 60% of its steps, rank 0 1%, and the ranks wait for each other, which is "
        "communication: look at the cores and the disk of that rank's machine, and raise data.workers\ncommunication, "
    ) in found


def test_one_rank_has_no_links_to_look_at():
    found = said(run({"compute": 0.8, "communication": 0.2}), CPU)
    assert "\ncommunication, 20% of the time: one rank sends nothing to others" in found and "links" not in found


def test_a_run_that_waits_for_copies_and_launches():
    found = said(run({"compute": 0.5, "host_to_device": 0.3, "host": 0.2}), GPU, "train.compile=true")
    assert found.startswith("runs/a: waits for copies to the GPU most, 30% of the time\n")
    assert (
        "\ncopies to the GPU, 30% of the time: convert with a smaller dtype (now int16); look at the GPU's PCIe link "
        "(nvidia-smi -q -d PCIE); a larger micro-batch does not help\nlaunching, 20% of the time: "
    ) in found
    assert "set train.compile" not in found


def test_too_few_lines_say_how_many_steps_are_needed():
    wanted = (
        "runs/a: fewer than 2 logged intervals besides the first of this process: nothing to say yet; run at least 300 "
        "steps\n\nstep 1,200 of 10,000\nno end recorded: still running, or killed"
    )
    before = run(COMPUTE, data_s=0.9)
    assert said({**before, **run(steps=200, since=1000)}, GPU, "log.every_steps=100") == wanted
    assert "nothing to say yet" in said({}) and "nothing to say yet" not in said(run(steps=300))


def test_only_the_newest_process_counts_without_its_first_line():
    before = run({"data": 0.9, "compute": 0.1}, data_s=0.9)
    found = diagnose({**before, **run(COMPUTE, since=1000, steps=400)}, config(), GPU, {})
    assert found.seen == "steps 1,101 to 1,400; what a step consists of was sampled at step 1,400"
    assert found.shares["data"] == pytest.approx(0.01) and found.shares["compute"] == pytest.approx(0.99)
    assert "1% of" not in "".join(found.advice) and found.verdict.startswith("compute-bound")


def test_shares_sum_to_one():
    lines = run({"compute": 0.5, "host_to_device": 0.1, "communication": 0.3, "host": 0.1}, data_s=0.2,
                checkpoint_s=30.0, other_s=20.0)  # fmt: skip
    shares = diagnose(lines, config(), GPU, {}).shares
    assert sum(share or 0 for share in shares.values()) == pytest.approx(1)
    assert shares["data"] == pytest.approx(20 / 150) and shares["communication"] == pytest.approx(0.3 * 80 / 150)


def test_a_run_of_before_the_samples_is_diagnosed_as_far_as_it_goes():
    """Its other time is what time_s has beyond steps and checkpoints."""
    lines = run(data_s=0.3, other_s=50.0)
    for line in lines.values():
        for key in ("process_steps", "other_s", "data_wait_max_fraction"):
            del line[key]
    found = said(lines)
    assert found.startswith(
        "runs/a: waits for evaluation and probes most, 33% of the time\n"
        "steps 501 to 1,000; what a step consists of is not known: none was sampled since the last start "
        "(log.profile_every_steps is 1000)\n"
        "\n"
        "  data                    20.0%  ████████\n"
        "  copies to the GPU     not known\n"
        "  compute               not known\n"
    )
    assert "takes less than 5% each" not in found
    assert "data, checkpoints, evaluation and probes take less than 5% each; the rest is not known" in said(run())


def test_what_else_the_metrics_tell():
    lines = run(COMPUTE)
    lines[1000]["skipped_steps"] = 3
    lines[600]["warnings"] = {"gap": "the gap is small"}
    lines[900]["warnings"] = {"gap": "the gap is smaller"}
    found = said(lines, GPU, code=75, sentence="stopped by a signal")
    assert "\nthe last process ended with exit code 75: stopped by a signal\n" in found
    assert "\n3 step(s) were left out because they were not finite; nonfinite/ names the scans\n" in found
    assert found.endswith("\nwarning gap, 2 time(s), last at step 900: the gap is smaller")


def test_a_path_that_is_neither_and_deep_runs_are_refused(tmp_path, unbroken):
    for path in (tmp_path, tmp_path / "absent"):
        sentence = refusal(2, "doctor", path)
        assert str(path) in sentence and "neither a store nor a run" in sentence
    assert "checkpoint verify" in refusal(2, "doctor", unbroken, "--deep")


def test_the_command_and_the_page_say_the_same(unbroken):
    printed = run_brainscale("doctor", unbroken).stdout
    found = of(unbroken)
    assert printed == text(str(unbroken), found) + "\n" and found.shares["compute"] is not None
    page = (unbroken / "report.html").read_text()
    assert "Where the time goes" in page and found.seen in page
    assert all(f"<td>{what}</td>" in page for what, _ in found.rows)


@pytest.mark.slow
def test_a_run_with_a_slow_loader_waits_for_data(tiny_store, tiny_config, tmp_path):
    arguments = (f"data.store={tiny_store}", f"run.dir={tmp_path / 'run'}", "log.every_steps=5", "train.num_steps=25")
    quiet = ("checkpoint.every_steps=25", "log.holdout_every_steps=25")
    run_ranks("pretrain", tiny_config, *arguments, *quiet, faults="step.data:slow", logs=tmp_path / "logs")
    found = of(tmp_path / "run")
    assert found.verdict.startswith("waits for data most")
    assert found.advice[0].startswith("data, ")
    cores = len(os.sched_getaffinity(0))
    assert (
        f"({cores} cores for 1 rank(s) here)" in found.advice[0] or f"({cores} for 1 rank(s) here)" in found.advice[0]
    )
    assert sum(share or 0 for share in found.shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_run_with_one_slow_rank_is_told_so(tiny_store, tiny_config, tmp_path):
    arguments = (f"data.store={tiny_store}", f"run.dir={tmp_path / 'run'}", "log.every_steps=5", "train.num_steps=25")
    quiet = ("checkpoint.every_steps=25", "log.holdout_every_steps=25")
    faults = "step.data:slow@rank=1"
    run_ranks("pretrain", tiny_config, *arguments, *quiet, ranks=2, faults=faults, logs=tmp_path / "logs")
    found = of(tmp_path / "run")
    assert found.verdict.startswith("waits for communication most") and "another rank waits for data" in found.verdict
    assert found.advice[0].startswith("another rank waits for data")
