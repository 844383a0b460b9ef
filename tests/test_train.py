"""Runs as a user makes them: what they leave, other numbers of ranks, every refusal one sentence."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import FULL, losses, refusal, run_brainscale, write_tiny_store

from brainscale import metrics, run_folder
from brainscale.config import Config
from brainscale.prep_plan import Plan
from brainscale.samplers import make_order
from brainscale.settings import load
from brainscale.stores import open_stores


def test_a_run_leaves_everything(unbroken):
    lines = metrics.read(unbroken / "metrics.jsonl")
    assert list(lines) == list(range(1, 41))
    wanted = {
        "loss", "pixel_loss", "spectral_loss", "lr", "grad_norm", "samples", "time_s", "step_s", "data_s",
        "data_wait_fraction", "data_wait_max_fraction", "checkpoint_s", "other_s", "process_steps",
        "voxels_per_s", "mfu", "mask_fraction", "skipped_steps",
    }  # fmt: skip
    assert all(wanted <= set(line) for line in lines.values())
    assert "holdout_loss" in lines[20] and "holdout_loss" in lines[40]
    assert lines[40]["samples"] == 160 and lines[40]["mask_fraction"] == pytest.approx(0.75, abs=0.05)
    assert losses(unbroken)[40] < losses(unbroken)[1]
    assert json.loads((unbroken / "exit.json").read_text())["code"] == 0
    errors = json.loads((unbroken / "reconstruction.json").read_text())["errors"]
    assert set(errors) == {"own", "swapped", "neighbours", "average"}
    assert (unbroken / "report.html").stat().st_size > 10_000
    assert sorted(p.name for p in (unbroken / "checkpoints").iterdir()) == ["latest", "step-00000036", "step-00000040"]
    assert (unbroken / "checkpoints" / "latest").read_text() == "step-00000040"


@pytest.mark.slow
def test_the_same_command_leaves_a_finished_run_alone(unbroken, tiny_store, tiny_config):
    before = (unbroken / "metrics.jsonl").read_bytes()
    done = run_brainscale("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={unbroken}")
    assert "already done" in done.stdout
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_unsaved(tiny_store, tiny_config, tmp_path):
    """The steps that diverge are left out and logged, nothing is saved from them on, and the exit code is 5."""
    run = tmp_path / "diverged"
    arguments = (f"data.store={tiny_store}", f"run.dir={run}", "optim.lr=1e30", "log.every_steps=100")
    text = run_brainscale("pretrain", tiny_config, *arguments, code=5).stderr
    assert "Traceback" not in text
    assert "3 steps in a row were not finite" in text
    assert json.loads((run / "exit.json").read_text())["code"] == 5
    stopped = max(metrics.read(run / "metrics.jsonl"))
    assert all(int(p.name[5:]) <= stopped - 3 for p in (run / "checkpoints").glob("step-*"))
    assert (run / "report.html").exists()


@pytest.mark.slow
def test_damage_that_one_rank_meets_is_named(tiny_config, tmp_path):
    """A bit flipped in a volume that only rank 1 reads: its file is named in the output and in exit.json."""
    broken = write_tiny_store(tmp_path / "store", plan=Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=1))
    config = load(Config, tiny_config)
    store = open_stores([broken])
    row = make_order(store, run_folder.split_rows(store, config)[0], config).row(2)
    shard = broken / "volumes" / "c" / str(row) / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    for at in range(0, len(data) - 100, 50):
        data[at] ^= 255
    shard.write_bytes(data)
    done = run_brainscale(
        "pretrain", tiny_config, f"data.store={broken}", f"run.dir={tmp_path / 'run'}", ranks=2, code=None
    )
    assert done.returncode != 0
    assert f"volumes/c/{row}/" in done.stderr
    assert f"volumes/c/{row}/" in json.loads((tmp_path / "run" / "exit.json").read_text())["sentence"]


def test_bad_input_is_one_sentence_and_exit_code_2(unbroken, tiny_store, tiny_config, tmp_path):
    run = f"run.dir={tmp_path / 'refused'}"
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(2, "to-zarr", tmp_path / "empty", tmp_path / "new")
    assert "did you mean 'num_steps'" in refusal(2, "pretrain", tiny_config, "train.num_step=3")
    assert "no store given" in refusal(2, "pretrain", tiny_config, run)
    assert "greater than 0" in refusal(2, "pretrain", tiny_config, run, "model.patch_voxels_zyx=[0,8,8]")
    assert "cannot be used" in refusal(2, "pretrain", tiny_config, f"data.store={tiny_store}", "run.dir=README.md")
    assert "no multiple of the patch" in refusal(
        2, "pretrain", tiny_config, f"data.store={tiny_store}", run, "model.patch_voxels_zyx=[8,16,8]"
    )

    unfinished = shutil.copytree(tiny_store, tmp_path / "unfinished")
    (unfinished / "COMPLETE.json").unlink()
    assert "COMPLETE.json" in refusal(2, "pretrain", tiny_config, f"data.store={unfinished}", run)

    shard = "volumes/c/1/0/0/0"
    for name, spoil in (("missing", Path.unlink), ("short", lambda p: os.truncate(p, 0))):
        broken = shutil.copytree(tiny_store, tmp_path / name)
        spoil(broken / shard)
        assert shard in refusal(2, "pretrain", tiny_config, f"data.store={broken}", run)

    other = write_tiny_store(tmp_path / "other", plan=Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4, codec="zstd"))
    resumed = shutil.copytree(unbroken, tmp_path / "resumed")
    again = ("train.num_steps=50", f"run.dir={resumed}")
    assert "plan" in refusal(2, "pretrain", tiny_config, f"data.store={other}", *again)
    text = refusal(2, "pretrain", tiny_config, f"data.store={tiny_store}", *again, "optim.lr=1e-3")
    assert "optim.lr: 0.003 → 0.001" in text
    assert json.loads((resumed / "exit.json").read_text())["code"] == 2


@pytest.mark.slow
def test_runs_under_torchrun_end_with_exit_0_again_and_again(tiny_store, tiny_config, tmp_path):
    """Thirty in a row (eight in CI): gloo's threads end an interpreter's shutdown by an abort in one of fifteen, if it
    is let to shut down."""
    for number in range(30 if FULL else 8):
        common = ("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={tmp_path / str(number)}")
        run_brainscale(*common, "train.num_steps=4", ranks=2)
