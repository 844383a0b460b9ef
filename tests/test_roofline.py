"""The parts of a step add up to what is counted elsewhere, the kept table and picture are those of the formulas."""

import pytest
from conftest import ROOT

from brainscale import plan_time
from brainscale.bench import roofline, roofline_picture
from brainscale.config import Config
from brainscale.model_counts import executed_flops, tokens_of
from brainscale.plan import DEFAULT_VOLUME
from brainscale.settings import InputError, load
from brainscale.zero import batch_split

H200 = roofline.gpu_of("h200")


@pytest.fixture(scope="module")
def presets():
    return roofline.presets(H200)


@pytest.mark.parametrize("name", ["mae_spectral_vit_b", "jepa_vcr_vit_s"])
def test_parts_add_up_to_the_flops_that_are_executed_and_to_the_plan_s_bytes(name):
    config = load(Config, ROOT / f"configs/{name}.toml", ("train.global_batch_volumes=512",))
    tokens, (micro, accumulation) = tokens_of(config, DEFAULT_VOLUME), batch_split(config, roofline.NODE_GPUS)
    parts = {part.name: part for part in roofline.parts(config, tokens)}
    large = (roofline.MATRICES, roofline.ATTENTION, roofline.TEACHER)
    flops = sum(parts[part].flops for part in large if part in parts)
    assert flops == pytest.approx(micro * accumulation * executed_flops(config, tokens, recomputed=0), rel=1e-9)
    moved = sum(parts[part].moved_bytes for part in (roofline.OPTIMIZER, roofline.SPECTRAL) if part in parts)
    assert moved == pytest.approx(plan_time.memory_bytes(config, tokens, roofline.NODE_GPUS, "triton"))


def test_a_part_takes_what_its_lower_roof_allows():
    assert roofline.Part("", 989e12, 1.0).roof_s(H200) == pytest.approx(1.0)
    assert roofline.Part("", 1.0, 4800e9).roof_s(H200) == pytest.approx(1.0)


def test_wider_models_are_bound_by_matrices_and_small_ones_wait_for_volumes(presets):
    by_name = {one.name: one for one in presets}
    assert len(by_name) == 16
    for objective in roofline.OBJECTIVES:
        for patch in (16, 8):
            shares = [roofline.grouped(by_name[f"{objective} ViT-{size}/{patch}"], H200) for size in "SBLH"]
            assert [one["matrices"] for one in shares] == sorted(one["matrices"] for one in shares)
            assert all(sum(one.values()) == pytest.approx(1) for one in shares)
    assert roofline.limit(by_name["MAE ViT-S/16"], H200, per_core=62) == "reading volumes"
    assert roofline.limit(by_name["MAE ViT-S/16"], H200, per_core=1e6) == "memory bandwidth"


def test_the_kept_table_and_picture_are_made_from_these_formulas(presets, tmp_path):
    """After a change of formulas: brainscale bench roofline --out docs/performance_roofline.svg --markdown
    docs/performance_limits.inc"""
    assert (ROOT / "docs/performance_limits.inc").read_text() == roofline.markdown(presets, H200)
    for name in ("a.svg", "b.svg"):
        roofline_picture.draw(presets, H200, [], tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and "<dc:date>" not in drawn
    assert (ROOT / "docs/performance_roofline.svg").read_text() == drawn
    for text in (drawn, roofline.markdown(presets, H200)):
        assert "nothing here was measured on a GPU" in text


def test_measured_steps_of_this_gpu_become_stars(presets, tmp_path):
    line = {
        "bench": "step", "case": "ViT-B/16, 160×192×160 int16, bf16, batch 32", "variant": "MAE + spectral, compiled",
        "skipped": None, "tflops": 350.0, "machine": {"gpu": "NVIDIA H200"},
    }  # fmt: skip
    other = {**line, "machine": {"gpu": "NVIDIA H100 PCIe"}}
    ((name, intensity, tflops),) = measured = roofline_picture.points([line, other], presets, H200)
    assert name == "MAE ViT-B/16: MAE + spectral, compiled" and tflops == 350.0 and 100 < intensity < 300
    roofline_picture.draw(presets, H200, measured, tmp_path / "a.svg")
    assert "which were measured" in (tmp_path / "a.svg").read_text()


def test_unknown_gpus_and_missing_lines_are_refused(tmp_path):
    with pytest.raises(InputError, match="v100 is not known, or has no bf16"):
        roofline.gpu_of("v100")
    (tmp_path / "lines").write_text("")
    with pytest.raises(InputError, match="no line of cold whole volumes"):
        roofline.read_per_core(tmp_path / "lines")
