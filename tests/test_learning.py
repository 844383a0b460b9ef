"""The whole path on synthetic brains, as a user walks it, and that the model learns more than interpolation."""

import json

import pytest
from conftest import ROOT, run_brainscale

pytestmark = pytest.mark.slow


def test_phantom_to_report_learns_more_than_interpolation(tmp_path):
    run_brainscale("phantom", tmp_path / "phantom", "--subjects", "20", "--spacing-mm", "4")
    plan = ROOT / "configs" / "prep" / "brain_2mm.toml"
    coarse = ("grid_voxels_xyz=[40,48,40]", "spacing_mm_xyz=[4.0,4.0,4.0]")
    run_brainscale("to-zarr", tmp_path / "phantom", tmp_path / "store", "--prep", plan, *coarse)
    assert "20 scans" in run_brainscale("doctor", tmp_path / "store", "--deep").stdout
    run = tmp_path / "run"
    run_brainscale(
        "pretrain", ROOT / "configs" / "mae_tiny_cpu.toml", f"data.store={tmp_path / 'store'}", f"run.dir={run}",
        "model.patch_voxels_zyx=[4,4,4]", "log.every_steps=50", timeout_s=900,
    )  # fmt: skip
    errors = json.loads((run / "reconstruction.json").read_text())["errors"]
    assert errors["own"] < 0.8 * errors["neighbours"]
    assert set(errors) == {"own", "swapped", "neighbours", "average"}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "neighbour" in page
