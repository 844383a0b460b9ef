"""Objectives side by side: what is trained, at equal samples and FLOPs, and what the tables say."""

import json

import numpy as np
import pytest
from conftest import FULL, ROOT, run_brainscale

from brainscale import compare, comparison, report_comparison
from brainscale.intervals import Estimate
from brainscale.model_counts import model_flops, tokens_of
from brainscale.settings import InputError

FILES = sorted((ROOT / "configs/compare").glob("*.toml"))
BRAIN_2MM = (80, 96, 80)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Files name others from the checkout's root."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_shipped_holds_all_but_the_objective_alike(path):
    found = comparison.read(path)
    assert [arm.name for arm in found.arms] == ["mae", "mae_spectral", "jepa", "jepa_vcr"]
    configs = {arm.name: found.arm_config(arm, 0, found.num_steps) for arm in found.arms}
    assert [c.objective for c in configs.values()] == ["mae", "mae", "jepa", "jepa"]
    assert [c.spectral.weight > 0 for name, c in configs.items() if name.startswith("mae")] == [False, True]
    assert [c.regularizer.kind for name, c in configs.items() if name.startswith("jepa")] == ["none", "vcr"]
    assert len({c.model for c in configs.values()}) == 1
    assert path.read_text().count("\n# ") >= 1 and "Came out:" in path.read_text()


def test_flops_are_spent_alike_to_a_step():
    found = comparison.read(ROOT / "configs/compare/one_gpu_hour.toml")
    steps = compare.steps_of(found, BRAIN_2MM)
    assert set(steps["equal_samples"].values()) == {found.num_steps}
    configs = {arm.name: found.arm_config(arm, 0, found.num_steps) for arm in found.arms}
    each = {name: compare.training_flops(config, BRAIN_2MM) for name, config in configs.items()}
    budget = each["mae"] * found.num_steps
    for name, number in steps["equal_flops"].items():
        assert number * each[name] <= budget < (number + 1) * each[name]
    assert steps["equal_flops"]["jepa"] < steps["equal_flops"]["mae_spectral"] <= steps["equal_flops"]["mae"]


def test_the_spectral_term_costs_three_transforms():
    found = comparison.read(ROOT / "configs/compare/tiny_cpu.toml")
    plain, spectral = (found.arm_config(arm, 0, found.num_steps) for arm in found.arms[:2])
    n = np.prod(BRAIN_2MM)
    assert compare.training_flops(plain, BRAIN_2MM) == model_flops(plain, tokens_of(plain, BRAIN_2MM))
    extra = compare.training_flops(spectral, BRAIN_2MM) - compare.training_flops(plain, BRAIN_2MM)
    assert extra == pytest.approx(7.5 * n * np.log2(n))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ('"model.width=64"', "other settings of model"),
        ('"data.flip_fraction=0.5"', "other settings of data"),
        ('"train.global_batch_volumes=4", "train.micro_batch_volumes=4"', "a batch of 4 volumes"),
    ],
)
def test_arms_that_differ_in_more_than_the_objective_are_refused(tmp_path, change, sentence):
    text = (ROOT / "configs/compare/tiny_cpu.toml").read_text()
    path = tmp_path / "unfair.toml"
    path.write_text(text + f'\n[[arms]]\nname = "unfair"\nset = [{change}]\n')
    with pytest.raises(InputError, match=sentence):
        comparison.read(path)


def test_a_warm_up_that_does_not_fit_is_refused(tmp_path):
    text = (ROOT / "configs/compare/tiny_cpu.toml").read_text()
    path = tmp_path / "short.toml"
    path.write_text(text.replace("num_steps = 40\nseeds", "num_steps = 6\nseeds").replace("steps=40", "steps=6"))
    with pytest.raises(InputError, match="warm-up takes 5"):
        compare.steps_of(comparison.read(path), BRAIN_2MM)


def held_out(shift: float, seed: int, subjects: int = 400) -> Estimate:
    """Predictions whose AUROC is Φ(shift/√2), of the same subjects for every seed."""
    y = np.arange(subjects) % 2
    p = 1 / (1 + np.exp(-(np.random.default_rng(seed).normal(size=subjects) + shift * y)))
    names = np.array([f"s{k:03d}" for k in range(subjects)])
    return Estimate("binary", names, y, np.stack([1 - p, p], 1)[None], np.zeros((1, subjects), int))


def test_a_difference_holds_what_subjects_and_seeds_vary():
    same = {name: [held_out(1.0, seed) for seed in range(3)] for name in "ab"}
    drawn = compare.resampled(same, "auroc", 300)
    assert compare.difference(drawn["a"], drawn["b"]) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    better = {"a": [held_out(2.0, seed) for seed in range(3)], "b": [held_out(0.5, 10 + seed) for seed in range(3)]}
    drawn = compare.resampled(better, "auroc", 300)
    found = compare.difference(drawn["a"], drawn["b"])
    truth = 0.921 - 0.638
    assert found["low"] < truth < found["high"] and found["low"] > 0 and found["p"] == pytest.approx(2 / 301)
    # trainings that come out differently widen the interval
    wide = compare.resampled({"a": [held_out(shift, seed) for seed, shift in enumerate((0.2, 1, 2))]}, "auroc", 300)
    assert wide["a"][1].std() > 2 * drawn["a"][1].std()


def test_other_test_subjects_are_refused():
    other = held_out(1.0, 1)
    mixed = {"a": [held_out(1.0, 0)], "b": [Estimate("binary", other.subjects[::-1], *list(vars(other).values())[2:5])]}
    with pytest.raises(InputError, match="b was tested on other subjects"):
        compare.resampled(mixed, "auroc", 10)


@pytest.mark.slow
def test_the_small_form_runs_on_a_cpu_and_goes_on(tmp_path):
    """All of it by one command: phantoms, stores, trainings, scores, two tables and a page."""
    text = (ROOT / "configs/compare/tiny_cpu.toml").read_text()
    if not FULL:
        for old, new in (
            ("num_steps = 40\nseeds = [0, 1]", "num_steps = 12\nseeds = [0, 1]"),
            ("train.num_steps=40", "train.num_steps=12"),
            ("pretrain_subjects = 24", "pretrain_subjects = 12"),
            ("evaluate_subjects = 60", "evaluate_subjects = 40"),
        ):
            assert old in text
            text = text.replace(old, new)
    path, out = tmp_path / "small.toml", tmp_path / "out"
    path.write_text(text)
    done = run_brainscale("compare", path, "--out", out, timeout_s=1800)
    assert "On planted effects in synthetic brains." in done.stdout and str(out / "compare.html") in done.stdout
    result = json.loads((out / "compare.json").read_text())
    steps = result["steps"]["equal_flops"]
    assert steps["jepa"] < steps["mae"] == result["steps"]["equal_samples"]["jepa"]
    names = {row["arm"] for row in result["tables"]["equal_flops"]}
    assert names == {"mae", "mae_spectral", "jepa", "jepa_vcr", "random", "histogram+volume"}
    for rows in result["tables"].values():
        assert len(rows) == 6 * 6  # six tasks: five effects and age
        assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert all(len(pairs) == 6 * 6 for pairs in result["paired"].values())
    runs = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/exit.json")}
    assert len(runs) == 2 * len({(arm, n) for table in result["steps"].values() for arm, n in table.items()})
    weights = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*/weights.safetensors")}
    run_brainscale("compare", path, "--out", out, timeout_s=900)
    assert weights == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*/weights.safetensors")}
    again = json.loads((out / "compare.json").read_text())
    assert again == result
    assert report_comparison.write(out / "compare.json").is_file()
