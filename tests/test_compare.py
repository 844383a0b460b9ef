"""Objectives side by side: what is trained, at equal samples and FLOPs, and what the tables say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FULL, ROOT, losses, run_brainscale

from brainscale import compare, comparison, report_comparison
from brainscale.config import Config
from brainscale.intervals import Estimate
from brainscale.model_counts import model_flops, tokens_of
from brainscale.scores import score
from brainscale.seed_intervals import check_subjects, difference, summary
from brainscale.settings import InputError, load
from brainscale.task_settings import load_tasks

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


def test_a_difference_is_paired_by_subject_and_seed():
    same = [held_out(1.0, seed) for seed in range(3)]
    assert difference(same, same, "auroc") == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    better, worse = ([held_out(shift, seed) for seed in range(3)] for shift in (2.0, 0.5))
    found = difference(better, worse, "auroc")
    truth = 0.921 - 0.638
    assert 0 < found["low"] < truth < found["high"] and found["p"] < 0.01
    mean = np.mean([score("auroc", "binary", one.y, one.predictions[0]) for one in better])
    assert summary(better, "auroc")["value"] == pytest.approx(mean)
    alone = summary(better[:1], "auroc")
    assert alone["low"] < alone["value"] < alone["high"] and difference(better[:1], worse[:1], "auroc")["p"] is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_objectives_are_seldom_called_different(seeds):
    """Whether trainings vary or not; d′ of each training is drawn around the same mean. A bootstrap of seeds said so in
    14 to 34 % of 150 studies with 2 or 3 seeds."""
    studies = 1000 if FULL else 200
    for spread in (0.0, 0.3):
        rng = np.random.default_rng(seeds)
        wrong = 0
        for study in range(studies):
            arms = [
                [held_out(1.0 + spread * rng.normal(), 1000 * study + 10 * arm + k, 100) for k in range(seeds)]
                for arm in range(2)
            ]
            wrong += difference(*arms, "auroc")["p"] < 0.05
        # 0.06 expected at most; four standard deviations of that many studies beyond it
        assert wrong / studies < 0.06 + 4 * np.sqrt(0.06 * 0.94 / studies), (spread, wrong / studies)


def test_a_perfect_arm_is_not_told_apart_for_nothing():
    """Of six subjects: no variance is seen, and the interval has a width all the same."""
    y, names = np.array([0, 0, 0, 1, 1, 1]), np.array(list("abcdef"))
    perfect, guess = (
        Estimate("binary", names, y, np.stack([1 - p, p], 1)[None], np.zeros((1, 6), int))
        for p in (0.2 + 0.6 * y, np.full(6, 0.5))
    )
    found = difference([perfect] * 3, [guess] * 3, "auroc")
    assert found["difference"] == 0.5 and found["low"] < 0.3 and found["p"] > 0.005
    assert difference([perfect] * 3, [perfect] * 3, "auroc")["p"] == 1


def test_other_test_subjects_are_refused():
    other = held_out(1.0, 1)
    mixed = {"a": [held_out(1.0, 0)], "b": [Estimate("binary", other.subjects[::-1], *list(vars(other).values())[2:5])]}
    with pytest.raises(InputError, match="b was tested on other subjects"):
        check_subjects(mixed)


def test_each_table_is_of_its_own_trainings():
    """Made-up predictions whose quality is the number of steps."""
    found = comparison.read(ROOT / "configs/compare/tiny_cpu.toml")
    tasks = compare.held_out(load_tasks(found.tasks)[:1], 0.5)
    steps = compare.steps_of(found, BRAIN_2MM)
    names = {(arm, number) for table in steps.values() for arm, number in table.items()}
    predictions = {
        seed: {
            ("atrophy", compare.run_name(arm, number, seed), "linear"): held_out(number / 20, seed)
            for arm, number in names
        }
        | {("atrophy", name, "linear"): held_out(0, seed) for name in ("random", "histogram+volume")}
        for seed in found.seeds
    }
    result = compare.tables(found, tasks, steps, predictions)
    value = {(table, row["arm"]): row["value"] for table, rows in result["tables"].items() for row in rows}
    assert value["equal_samples", "jepa"] == value["equal_samples", "mae"]
    assert value["equal_flops", "jepa"] < value["equal_samples", "jepa"]
    (pair,) = (p for p in result["paired"]["equal_flops"] if (p["a"], p["b"]) == ("mae", "jepa"))
    assert pair["difference"] == pytest.approx(value["equal_flops", "mae"] - value["equal_flops", "jepa"])


def test_data_that_were_made_otherwise_are_refused(tmp_path):
    found = comparison.read(ROOT / "configs/compare/tiny_cpu.toml")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "phantom.json").write_text(json.dumps({"pretrain_subjects": 3}))
    with pytest.raises(InputError, match=r"made for another \[phantom\]"):
        compare.prepare(found, tmp_path, lambda text: None)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_is_the_run_that_its_name_says(ranks, tiny_store, tiny_config, tmp_path):
    """By torchrun where there are several ranks; the same call leaves it alone, and a failure is one sentence."""
    arms = [{"name": "mae"}, {"name": "weak", "set": ["optim.lr=1e-4"]}]
    found = comparison.Comparison.model_validate(
        {"config": str(tiny_config), "arms": arms, "num_steps": 6, "tasks": "-", "pretrain_store": str(tiny_store),
         "evaluate_store": str(tiny_store), "ranks": ranks}
    )  # fmt: skip
    steps = {"equal_samples": {"mae": 6, "weak": 6}}
    todo = compare.trainings(found, str(tiny_store), steps, tmp_path)
    assert [one.folder.name for one in todo[:2]] == ["mae-6steps-seed0", "weak-6steps-seed0"]
    compare.train(todo[1], found)
    assert max(losses(todo[1].folder)) == 6 and world_size(todo[1].folder) == ranks
    assert load(Config, todo[1].folder / "config.toml").optim.lr == 1e-4
    before = losses(todo[1].folder)
    compare.train(todo[1], found)
    assert losses(todo[1].folder) == before
    code = 2 if ranks == 1 else 1  # torchrun hides a rank's own
    with pytest.raises(InputError, match=f"ended with code {code}"):
        compare.train(todo[0]._replace(config=found.arm_config(found.arms[0], 0, 6, "data.store=nowhere")), found)


def world_size(run: Path) -> int:
    """As the newest checkpoint of a run has it."""
    state = sorted(run.glob("checkpoints/step-*/state.json"))[-1]
    return json.loads(state.read_text())["world_size"]


def test_warm_ups_are_looked_at_before_data_are_made(tmp_path):
    text = (ROOT / "configs/compare/tiny_cpu.toml").read_text()
    path = tmp_path / "short.toml"
    path.write_text(text.replace("num_steps = 40\nseeds", "num_steps = 6\nseeds").replace("steps=40", "steps=6"))
    with pytest.raises(InputError, match="warm-up takes 5"):
        compare.run(comparison.read(path), tmp_path / "out", torch.device("cpu"), lambda text: None)
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.slow
def test_the_small_form_runs_on_a_cpu_and_goes_on(tmp_path):
    """All of it by one command: phantoms, stores, trainings, scores, two tables and a page."""
    text = (ROOT / "configs/compare/tiny_cpu.toml").read_text()
    if not FULL:
        for old, new in (
            ("num_steps = 40\nseeds = [0, 1]", "num_steps = 12\nseeds = [0, 1]"),
            ("train.num_steps=40", "train.num_steps=12"),
            ("optim.warmup_steps=5", "optim.warmup_steps=2"),
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
