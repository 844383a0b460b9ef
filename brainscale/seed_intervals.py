"""Scores of one objective trained with several seeds: their mean, its 95 % interval, and the difference of two.

With few seeds the spread of trainings is known badly, and Student's t says so: a bootstrap of two or three seeds calls
14 to 34 % of equal objectives different where trainings vary (simulated), and one of a single seed over half.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from brainscale.intervals import Estimate
from brainscale.resampling import jackknife_variance, leave_one_out, weighted_scores
from brainscale.settings import InputError


def check_subjects(columns: dict[str, list[Estimate]]) -> None:
    """Raise InputError unless all were tested on the same subjects."""
    first = next(iter(columns.values()))[0]
    for name, column in columns.items():
        if any(not np.array_equal(found.subjects, first.subjects) for found in column):
            raise InputError(f"{name} was tested on other subjects; remove the evaluations and run the same again")


def summary(column: Sequence[Estimate], metric: str) -> dict[str, Any]:
    """Mean over seeds, with the 95 % interval of `interval_of`. column: held-out predictions of every seed."""
    each, left_out = scored(column, metric)
    low, high = interval_of(float(each.mean()), jackknife_variance(left_out, strata_of(column[0])), each, left_out)[:2]
    return {"value": float(each.mean()), "low": low, "high": high}


def difference(a: Sequence[Estimate], b: Sequence[Estimate], metric: str) -> dict[str, Any]:
    """a − b, paired by seed and test subject: mean over seeds, 95 % interval, two-sided p (none with one seed)."""
    (first, first_out), (second, second_out) = scored(a, metric), scored(b, metric)
    each, left_out = first - second, first_out - second_out
    value = float(each.mean())
    low, high, p = interval_of(value, jackknife_variance(left_out, strata_of(a[0])), each, left_out)
    return {"difference": value, "low": low, "high": high, "p": p}


def scored(column: Sequence[Estimate], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(seeds,) the score of every seed, and (subjects,) their mean with each test subject left out."""
    each, left_out = [], []
    for one in column:
        weights = np.concatenate([np.ones((1, len(one.y))), leave_one_out(len(one.y))])
        found = weighted_scores(metric, one.kind, one.y, one.predictions[0], weights)
        each.append(found[0])
        left_out.append(found[1:])
    return np.array(each), np.mean(left_out, axis=0)


def interval_of(
    value: float, of_subjects: float, each: np.ndarray, left_out: np.ndarray
) -> tuple[float, float, float | None]:
    """95 % bounds and two-sided p of a mean over seeds. Its variance is that of the test subjects (jackknife, the same
    ones for all seeds) plus that of the seeds' mean, s²/n; Student's t with the degrees of freedom of that sum
    (Satterthwaite 1946), which with few seeds that differ are few. One seed tells nothing of trainings: the interval is
    of subjects alone, and there is no p."""
    subjects, seeds = len(left_out), len(each)
    of_seeds = float(each.var(ddof=1)) / seeds if seeds > 1 else 0.0
    total = of_subjects + of_seeds
    if total == 0:
        return value, value, (1.0 if value == 0 else None) if seeds > 1 else None
    freedom = total**2 / (of_subjects**2 / (subjects - 1) + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0))
    reach = float(stats.t.ppf(0.975, freedom) * np.sqrt(total))
    p = float(2 * stats.t.sf(abs(value) / np.sqrt(total), freedom)) if seeds > 1 else None
    return value - reach, value + reach, p


def strata_of(found: Estimate) -> np.ndarray:
    """Classes, in which subjects are drawn; one stratum for a regression."""
    return np.zeros(len(found.y), int) if found.kind == "regression" else found.y
