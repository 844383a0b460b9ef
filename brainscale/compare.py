"""Objectives side by side: the same scans, encoder and seeds, at equal samples and at equal training FLOPs.

Every arm is trained as `brainscale pretrain` would, with every seed, and scored on held-out subjects. What is compared
are means over seeds; their intervals hold both the luck of a training and that of the test set (seed_intervals.py), and
differences are paired by seed and subject. A finished training or evaluation is not done again.
"""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from brainscale import evaluate, scores
from brainscale.comparison import Comparison
from brainscale.config import Config
from brainscale.evaluation_settings import EvaluationSettings
from brainscale.geometry import Zyx
from brainscale.intervals import Estimate
from brainscale.model_counts import model_flops, tokens_of
from brainscale.plan import volume_of
from brainscale.prep_plan import Plan
from brainscale.provenance import write_text
from brainscale.seed_intervals import check_subjects, difference, summary
from brainscale.settings import InputError, load
from brainscale.store import open_store
from brainscale.task_settings import SplitSettings, Task, load_tasks

TABLES = {"equal_samples": "equal samples seen", "equal_flops": "equal training FLOPs"}


class Training(NamedTuple):
    """One pretraining of the comparison."""

    arm: str
    seed: int
    num_steps: int
    config: Config
    folder: Path


def training_flops(config: Config, volume_zyx: Zyx) -> float:
    """FLOPs of one sample: those of the model, and of the spectral term three real transforms of the volume (two
    forward, one back for the gradient) of 2.5·n·log2 n each, in the share of steps that compute it. Variance and
    covariance of pooled vectors are a matter of volumes, not of tokens, and left out."""
    flops = float(model_flops(config, tokens_of(config, volume_zyx)))
    if config.spectral.weight:
        n = math.prod(volume_zyx)
        flops += 3 * 2.5 * n * math.log2(n) / config.spectral.every_steps
    return flops


def steps_of(comparison: Comparison, volume_zyx: Zyx) -> dict[str, dict[str, int]]:
    """Table → arm → optimizer steps. Raises InputError when an arm's warm-up does not fit into its share of FLOPs."""
    configs = {arm.name: comparison.arm_config(arm, 0, comparison.num_steps) for arm in comparison.arms}
    flops = {name: training_flops(config, volume_zyx) for name, config in configs.items()}
    budget = next(iter(flops.values())) * comparison.num_steps
    equal = {name: max(1, int(budget / each)) for name, each in flops.items()}
    for name, config in configs.items():
        if equal[name] <= config.optim.warmup_steps:
            raise InputError(
                f'arm "{name}" has {equal[name]} steps at equal FLOPs, and its warm-up takes '
                f"{config.optim.warmup_steps}; raise num_steps or lower optim.warmup_steps"
            )
    return {"equal_samples": dict.fromkeys(configs, comparison.num_steps), "equal_flops": equal}


def trainings(comparison: Comparison, store: str, steps: dict[str, dict[str, int]], out: Path) -> list[Training]:
    """Every training that the tables need, once each."""
    found = []
    for seed in comparison.seeds:
        for arm in comparison.arms:
            for num_steps in sorted({table[arm.name] for table in steps.values()}):
                folder = out / "runs" / run_name(arm.name, num_steps, seed)
                config = comparison.arm_config(arm, seed, num_steps, f"data.store={store}", f"run.dir={folder}")
                found.append(Training(arm.name, seed, num_steps, config, folder))
    return found


def run_name(arm: str, num_steps: int, seed: int) -> str:
    """Folder of a training."""
    return f"{arm}-{num_steps}steps-seed{seed}"


def train(training: Training, comparison: Comparison) -> None:
    """Run, continue or leave alone one training, in processes of its own. Raises InputError when it fails."""
    arm = next(arm for arm in comparison.arms if arm.name == training.arm)
    config = training.config
    settings = (*comparison.arm_set(arm), f"seed={training.seed}", f"train.num_steps={training.num_steps}",
                f"data.store={config.data.store}", f"run.dir={training.folder}")  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(comparison.ranks), "-m"]
    command = [sys.executable, *(launch if comparison.ranks > 1 else ["-m"]), "brainscale", "pretrain"]
    done = subprocess.run([*command, comparison.config, *settings], check=False)
    if done.returncode:
        raise InputError(
            f"the training of {training.folder} ended with code {done.returncode}; see what it said above, and "
            f"{training.folder}/exit.json, then run the same command again"
        )


def prepare(comparison: Comparison, out: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """Paths of the stores to pretrain and to evaluate on; made here when the comparison asks for phantoms."""
    made = comparison.phantom
    if made is None:
        return comparison.pretrain_store, comparison.evaluate_store
    asked = {**made.model_dump(mode="json"), "plan": load(Plan, made.prep).hash()}
    marker = out / "data" / "phantom.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != asked:
        raise InputError(f"{marker.parent} was made for another [phantom] or prep; give another --out, or remove it")
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps(asked))
    stores = []
    for name, subjects, seed in (
        ("pretrain", made.pretrain_subjects, 2 * made.seed),
        ("evaluate", made.evaluate_subjects, 2 * made.seed + 1),
    ):
        cohort, store = out / "data" / f"{name}-bids", out / "data" / name
        if not (cohort / "dataset_description.json").is_file():
            say(f"{subjects} synthetic subjects to {name} on")
            words = ("phantom", str(cohort), "--subjects", str(subjects), "--seed", str(seed))
            command(*words, "--spacing-mm", str(made.spacing_mm))
        if not (store / "COMPLETE.json").is_file():
            command("to-zarr", str(cohort), str(store), "--prep", made.prep)
        stores.append(str(store))
    return stores[0], stores[1]


def command(*words: str) -> None:
    """A command of brainscale in a process of its own. Raises InputError when it fails."""
    done = subprocess.run([sys.executable, "-m", "brainscale", *words], check=False)
    if done.returncode:
        raise InputError(f"brainscale {words[0]} ended with code {done.returncode}; see what it said above")


def run(comparison: Comparison, out: Path, device: torch.device, say: Callable[[str], None]) -> Path:
    """Make data, train, evaluate, compare; returns OUT/compare.json. The same call continues what was interrupted."""
    out.mkdir(parents=True, exist_ok=True)
    tasks = held_out(load_tasks(comparison.tasks), comparison.test_fraction)
    if comparison.phantom is not None and (grid := load(Plan, comparison.phantom.prep).grid_voxels_xyz) != "largest":
        steps_of(comparison, (grid[2], grid[1], grid[0]))  # before hours of making data
    pretrain_store, evaluate_store = prepare(comparison, out, say)
    first = comparison.arm_config(comparison.arms[0], 0, comparison.num_steps, f"data.store={pretrain_store}")
    volume_zyx = volume_of(first).shape_zyx
    steps = steps_of(comparison, volume_zyx)
    todo = trainings(comparison, pretrain_store, steps, out)
    for number, training in enumerate(todo, 1):
        say(f"training {number} of {len(todo)}: {training.folder.name}")
        train(training, comparison)
    found = {}
    for seed in comparison.seeds:
        runs = [training.folder for training in todo if training.seed == seed]
        settings = EvaluationSettings(
            probes=(comparison.probe,), cnn=False, random_seed=seed, layers=comparison.layers,
            pooling=comparison.pooling, permutations=0, few_shot=(),
        )  # fmt: skip
        say(f"evaluation of {len(runs)} runs of seed {seed}")
        folder = out / f"evaluation-seed{seed}"
        evaluate.run(runs, open_store(evaluate_store), tasks, folder, settings, device, say)
        found[seed] = evaluate.read_predictions(folder / evaluate.PREDICTIONS)
    flops = {
        arm.name: training_flops(comparison.arm_config(arm, 0, comparison.num_steps), volume_zyx)
        for arm in comparison.arms
    }
    result = {
        "schema": 1,
        "arms": [arm.name for arm in comparison.arms],
        "seeds": list(comparison.seeds),
        "probe": comparison.probe,
        "flops_per_sample": flops,
        "steps": steps,
        "batch_volumes": first.train.global_batch_volumes,
        "planted": comparison.phantom is not None,
        **tables(comparison, tasks, steps, found),
    }
    path = out / "compare.json"
    write_text(path, json.dumps(result, indent=1))
    return path


def held_out(tasks: Sequence[Task], test_fraction: float) -> list[Task]:
    """The tasks with one held-out side, which stays the same for all arms and seeds."""
    splits = [
        SplitSettings(kind="holdout", test_fraction=test_fraction, site_disjoint=task.split.site_disjoint)
        for task in tasks
    ]
    return [task.model_copy(update={"split": split}) for task, split in zip(tasks, splits)]


def tables(
    comparison: Comparison, tasks: Sequence[Task], steps: dict[str, dict[str, int]], found: dict[int, Any]
) -> dict[str, Any]:
    """The rows of both tables, and the paired differences of every two arms. found: seed → predictions of held-out
    subjects by (task, contestant, probe)."""
    rows: dict[str, list[dict[str, Any]]] = {table: [] for table in TABLES}
    paired: dict[str, list[dict[str, Any]]] = {table: [] for table in TABLES}
    for table in TABLES:
        for task in tasks:
            metric = scores.METRICS[task.kind][0]
            columns: dict[str, list[Estimate]] = {}
            for arm, num_steps in steps[table].items():
                columns[arm] = [
                    found[seed][task.name, run_name(arm, num_steps, seed), comparison.probe]
                    for seed in comparison.seeds
                ]
            for baseline in ("random", "histogram+volume"):
                columns[baseline] = [found[seed][task.name, baseline, comparison.probe] for seed in comparison.seeds]
            check_subjects(columns)
            for name, column in columns.items():
                rows[table].append(
                    {"task": task.name, "arm": name, "metric": metric, **summary(column, metric),
                     "seeds": len(comparison.seeds), "test_subjects": len(column[0].subjects)}
                )  # fmt: skip
            for a, b in itertools.combinations(steps[table], 2):
                paired[table].append({"task": task.name, "a": a, "b": b, **difference(columns[a], columns[b], metric)})
    return {"tables": rows, "paired": paired}


def text(path: Path) -> str:
    """Both tables of a compare.json, and the paired differences, as Markdown."""
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    if result["planted"]:
        lines.append("On planted effects in synthetic brains.")
    for table, title in TABLES.items():
        lines += ["", f"{title}, {result['probe']} probe, mean of {len(result['seeds'])} seed(s) [95 %]", ""]
        rows = result["tables"][table]
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        lines += ["| objective | steps | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
        for arm in dict.fromkeys(row["arm"] for row in rows):
            cells = [f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in rows if r["arm"] == arm]
            lines.append(f"| {arm} | {result['steps'][table].get(arm, '')} | " + " | ".join(cells) + " |")
        lines += ["", "| a − b | " + " | ".join(tasks) + " |", "|---|" + "---|" * len(tasks)]
        pairs = result["paired"][table]
        for a, b in dict.fromkeys((pair["a"], pair["b"]) for pair in pairs):
            cells = [
                f"{p['difference']:+.3f} [{p['low']:+.3f}, {p['high']:+.3f}]"
                + ("" if p["p"] is None else f", p {p['p']:.3f}")
                for p in pairs
                if (p["a"], p["b"]) == (a, b)
            ]
            lines.append(f"| {a} − {b} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()
