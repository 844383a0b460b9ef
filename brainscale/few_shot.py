"""How a score grows with the number of training subjects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from brainscale.intervals import (
    Interval,
    Pipeline,
    Progress,
    Split,
    bounds,
    informative,
    left_out_scores,
    predict,
    repeat_scores,
    strata_of,
    variance_of_test,
)
from brainscale.permutations import first_repeat
from brainscale.resampling import jackknife_freedom
from brainscale.scores import METRICS

SHOTS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Drawn:
    """A split of which only some training subjects are used."""

    train: np.ndarray
    test: np.ndarray


def few_shot_curve(
    pipeline: Pipeline,
    kind: str,
    y: np.ndarray,
    subjects: np.ndarray,
    splits: Sequence[Split],
    seed: int,
    shots: Sequence[int] = SHOTS,
    draws: int = 20,
    metric: str | None = None,
    progress: Progress | None = None,
) -> dict[int, Interval]:
    """Training subjects per class (regression: in all) → the score on the untouched test sides, with its 95 % interval.

    splits: one held-out test set, or the folds of one repeat; of repeats, the first is used. From each training side
    `draws` samples of subjects are drawn. A number that not every training side has is left out. The interval holds the
    spread over test subjects (of K folds times 1 + K/(K-1), the bound in intervals.py) and that of the mean over draws.
    """
    metric = metric or METRICS[kind][0]
    folds = first_repeat(subjects, splits)[0]
    refitting = len(folds) / (len(folds) - 1) if len(folds) > 1 else 0.0
    rng = np.random.default_rng(seed)
    fewest = min(len(names) for fold in folds for names in _per_stratum(kind, y, subjects, fold.train))
    possible = [k for k in shots if k <= fewest]
    curve = {}
    for at, k in enumerate(possible):
        drawn = [_draw(kind, y, subjects, fold, k, rng) for _ in range(draws) for fold in folds]
        found = predict(pipeline, kind, y, subjects, drawn, seed)
        scores = repeat_scores(found, metric)
        variance = variance_of_test(found, metric) * (1 + refitting) + scores.var(ddof=1) / draws
        freedom = jackknife_freedom(left_out_scores(found, metric), strata_of(found))
        low, high = bounds(metric, float(scores.mean()), variance, informative(found), freedom)
        curve[k] = Interval(float(scores.mean()), low, high, f"{draws} draws of {k} training subjects")
        if progress:
            progress(at + 1, len(possible))
    return curve


def _per_stratum(kind: str, y: np.ndarray, subjects: np.ndarray, train: np.ndarray) -> list[np.ndarray]:
    """The training subjects of each class; for regression all of them."""
    names, first = np.unique(subjects[train], return_index=True)
    label = y[train][first]
    return [names] if kind == "regression" else [names[label == c] for c in np.unique(y)]


def _draw(kind: str, y: np.ndarray, subjects: np.ndarray, split: Split, shots: int, rng: np.random.Generator) -> Drawn:
    """The split with `shots` training subjects of each class, and all their scans."""
    chosen = [rng.choice(names, shots, replace=False) for names in _per_stratum(kind, y, subjects, split.train)]
    return Drawn(split.train[np.isin(subjects[split.train], np.concatenate(chosen))], split.test)
