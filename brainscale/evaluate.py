"""Scores of frozen encoders on tasks, with intervals, beside the baselines that a score must be held against.

    OUT/scores.json           everything that the page shows (`score_file.py`)
    OUT/predictions.parquet   what was predicted for every tested subject of every split
    OUT/features/NAME.parquet features of every scan
    OUT/parts/                finished pieces: the same command goes on with them, whatever ended it

Every contestant and every rung of the ladder (kNN, linear, attentive probe, fine-tuning) meets the same splits of
subjects; settings are chosen inside the training side; predictions are averaged over a subject's scans before anything
is counted. The statistics are in intervals.py.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from brainscale import contamination, contestants, provenance
from brainscale.contestants import CNN, Contestant
from brainscale.evaluation_settings import EvaluationSettings
from brainscale.intervals import Estimate, estimate
from brainscale.parts import Parts
from brainscale.pipelines import Pipelines
from brainscale.pretrained import Pretrained
from brainscale.settings import InputError
from brainscale.split_files import Split
from brainscale.splits import make_splits
from brainscale.store import Store
from brainscale.task_scores import TaskWork
from brainscale.task_settings import Task
from brainscale.tasks import Labelled, labelled, named_subjects

SCORES, PREDICTIONS = "scores.json", "predictions.parquet"
PREDICTION_COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("task", "encoder", "probe")),
        *((name, pa.int64()) for name in ("repeat", "fold")),
        ("subject", pa.string()),
        ("y", pa.float64()),
        ("prediction", pa.list_(pa.float64())),
    ]
)


def run(
    sources: Sequence[Path],
    store: Store,
    tasks: Sequence[Task],
    out: Path,
    settings: EvaluationSettings,
    device: torch.device,
    say: Callable[[str], None],
) -> Path:
    """Score runs and exports on tasks of a store; returns OUT/scores.json. Raises InputError for tasks, splits and
    encoders that cannot be scored before anything is computed."""
    cases = [labelled(task, store) for task in tasks]
    dealt = [make_splits(case, settings.seed) for case in cases]
    for case, splits in zip(cases, dealt):
        refuse_unscorable(case, splits)
    opened = contestants.open_all(sources, settings.part, settings.layers, store)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", timeout=0):
            return score(sources, opened, store, cases, dealt, out, settings, device, say)
    except filelock.Timeout:
        raise InputError(f"another evaluation is at work in {out}; wait for it, or give another --out") from None


def score(
    sources: Sequence[Path],
    opened: dict[str, Pretrained],
    store: Store,
    cases: Sequence[Labelled],
    dealt: Sequence[list[Split]],
    out: Path,
    settings: EvaluationSettings,
    device: torch.device,
    say: Callable[[str], None],
) -> Path:
    """`run` behind its checks, alone in OUT."""
    rows = np.unique(np.concatenate([case.rows for case in cases]))
    parts, scratch = Parts(out / "parts"), out / "scratch"
    entrants = contestants.gather(opened, sources, store, rows, settings, parts.folder, device, say)
    write_features(entrants, store, rows, out / "features", settings)
    records: list[dict[str, Any]] = []
    predicted: dict[tuple[str, str, str], Estimate] = {}
    for case, splits in zip(cases, dealt):
        pipelines = Pipelines(case, store, rows, scratch, device)
        work = TaskWork(case, splits, store, entrants, parts, settings, pipelines, say)
        records.append(work.score())
        predicted |= {(case.task.name, *key): found for key, found in work.estimates.items()}
    seen = {name: pretrained_on(path, store, say, name) for name, path in zip(opened, sources)}
    result = {
        "schema": 1,
        "store": store.path.name,
        "plan_hash": store.plan_hash,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": settings.seed,
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "settings": settings.model_dump(mode="json"),
        "encoders": [{**described(entrant), "pretrained_on": seen.get(entrant.name)} for entrant in entrants]
        + ([CNN_RECORD] if settings.cnn else []),
        "tasks": records,
        "maps": {e.name: embedding_map(e, rows, cases, store) for e in entrants if e.pretrained is not None},
    }
    write_predictions(predicted, out / PREDICTIONS)
    provenance.write_text(out / SCORES, json.dumps(result, indent=1))
    return out / SCORES


def refuse_unscorable(case: Labelled, splits: Sequence[Split]) -> None:
    """Raise InputError where scores of a task could not be computed whatever was predicted: found out by a guess."""
    if not case.classes and np.ptp(case.y) == 0:
        raise InputError(
            f'task "{case.task.name}": every {case.task.column} is {case.y[0]:g}; there is nothing to tell'
        )

    def guess(y: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
        return np.full((len(test), len(case.classes)), 1 / len(case.classes)) if case.classes else np.zeros(len(test))

    try:
        estimate(guess, case.task.kind, case.y, case.groups, splits, 0)
    except InputError as error:
        raise InputError(f'task "{case.task.name}": {error}') from None


def pretrained_on(path: Path, store: Store, say: Callable[[str], None], name: str) -> int | None:
    """How many subjects of the store a run was pretrained on, without their labels; None where that is not known (an
    export, or a training store that is not there)."""
    if not (path / "config.toml").is_file():
        return None
    try:
        found = contamination.compare(
            contamination.read_source(path, "pretraining"), contamination.read_source(store.path)
        )
    except (InputError, FileNotFoundError) as error:
        say(f"{name}: whether scored subjects were pretrained on is not known ({error})")
        return None
    seen = len({subject for subject, hit in zip(found.test.subjects.tolist(), found.seen.tolist()) if hit})
    say(f"{name}: {seen} subjects of the store were pretrained on, without labels")
    return seen


CNN_RECORD = {"name": CNN, "kind": "baseline", "source": "trained from scratch"}


def described(entrant: Contestant) -> dict[str, Any]:
    """A contestant's record in scores.json."""
    about = {name: entrant.about.get(name) for name in ("objective", "part", "step", "samples", "flops")}
    return {
        "name": entrant.name, "kind": entrant.kind, "source": entrant.source, **about,
        "dimensions": int(entrant.features.shape[1]),
        "weights": entrant.pretrained.fingerprint() if entrant.pretrained is not None else None,
    }  # fmt: skip


def embedding_map(entrant: Contestant, rows: np.ndarray, cases: Sequence[Labelled], store: Store) -> dict[str, Any]:
    """The first two principal components of standardised features, a point per scan, with the labels of every task."""
    x = entrant.features.astype(np.float64)
    std = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(std > 0, std, 1)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    points = u[:, :2] * s[:2]
    share = (s**2 / max((s**2).sum(), 1e-300))[:2]
    labels: dict[str, list[Any]] = {}
    sites: list[str | None] = [None] * len(rows)
    for case in cases:
        column: list[Any] = [None] * len(rows)
        for at, label, site in zip(np.searchsorted(rows, case.rows).tolist(), case.y.tolist(), case.sites.tolist()):
            column[at] = case.classes[label] if case.classes else label
            sites[at] = site or sites[at]
        labels[case.task.name] = column
    subjects = named_subjects(store)[np.searchsorted(store.rows, rows)]
    return {
        "explained": share.tolist(), "x": points[:, 0].tolist(), "y": points[:, 1].tolist(),
        "subject": subjects.tolist(), "site": sites, "labels": labels,
    }  # fmt: skip


def write_features(
    entrants: Sequence[Contestant], store: Store, rows: np.ndarray, folder: Path, settings: EvaluationSettings
) -> None:
    """OUT/features/NAME.parquet of every contestant; the same columns as `brainscale embed` writes for encoders."""
    folder.mkdir(exist_ok=True)
    at = np.searchsorted(store.rows, rows)
    for entrant in entrants:
        flat = pa.array(entrant.features.ravel(), pa.float32())
        table = pa.table(
            {
                "row": pa.array(rows, pa.int64()),
                "id": pa.array(store.column("id")[at].tolist(), pa.string()),
                "subject": pa.array(named_subjects(store)[at].tolist(), pa.string()),
                "features": pa.FixedSizeListArray.from_arrays(flat, entrant.features.shape[1]),
            }
        ).replace_schema_metadata(
            {"brainscale": json.dumps({**described(entrant), "layers": settings.layers, "pooling": settings.pooling})}
        )
        pq.write_table(table, folder / f"{entrant.name.replace('/', '_')}.parquet")


def write_predictions(predicted: dict[tuple[str, str, str], Estimate], path: Path) -> None:
    """One line per repeat and tested subject; y: class index or value, prediction: class probabilities or a value.

    predicted: by (task, encoder, probe).
    """
    lines: dict[str, list[Any]] = {name: [] for name in PREDICTION_COLUMNS.names}
    for (task, encoder, probe), found in predicted.items():
        for repeat, (prediction, folds) in enumerate(zip(found.predictions, found.folds), 1):
            count = len(folds)
            for name, value in (("task", task), ("encoder", encoder), ("probe", probe), ("repeat", repeat)):
                lines[name] += [value] * count
            lines["fold"] += (folds + 1).tolist()
            lines["subject"] += found.subjects.tolist()
            lines["y"] += found.y.astype(float).tolist()
            lines["prediction"] += prediction.reshape(count, -1).tolist()
    pq.write_table(pa.table(lines, schema=PREDICTION_COLUMNS), path)


def read_predictions(path: Path) -> dict[tuple[str, str, str], Estimate]:
    """predictions.parquet by (task, encoder, probe), as it was written."""
    found = {}
    table = pq.read_table(path, schema=PREDICTION_COLUMNS).to_pylist()
    for key, several in groupby(table, key=itemgetter("task", "encoder", "probe")):
        lines = list(several)
        repeats = max(line["repeat"] for line in lines)
        arrays = {name: np.array([line[name] for line in lines]) for name in ("subject", "y", "fold", "prediction")}
        shaped = {name: array.reshape(repeats, -1, *array.shape[1:]) for name, array in arrays.items()}
        regression = arrays["prediction"].shape[1] == 1
        y = shaped["y"][0]
        found[key] = Estimate(
            "regression" if regression else "binary" if arrays["prediction"].shape[1] == 2 else "multiclass",
            shaped["subject"][0], y if regression else y.astype(np.int64),
            shaped["prediction"][..., 0] if regression else shaped["prediction"], shaped["fold"] - 1,
        )  # fmt: skip
    return found
