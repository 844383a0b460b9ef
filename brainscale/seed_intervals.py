"""Scores of one objective trained with several seeds: their mean, its 95 % interval, and the difference of two.

With few seeds the spread of trainings is known badly, and Student's t says so: a bootstrap of two or three seeds calls
14 to 34 % of equal objectives different where trainings vary (simulated), and one of a single seed over half.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from brainscale.intervals import Estimate, bounds, informative, least_variance, left_out_scores, score_of, strata_of
from brainscale.resampling import jackknife_freedom, jackknife_variance
from brainscale.settings import InputError


def check_subjects(columns: dict[str, list[Estimate]]) -> None:
    """Raise InputError unless all were tested on the same subjects."""
    first = next(iter(columns.values()))[0]
    for name, column in columns.items():
        if any(not np.array_equal(found.subjects, first.subjects) for found in column):
            raise InputError(f"{name} was tested on other subjects; remove the evaluations and run the same again")


def summary(column: Sequence[Estimate], metric: str) -> dict[str, Any]:
    """Mean over seeds with its 95 % interval, on the metric's scale without bounds. column: held-out predictions of
    every seed."""
    each, left_out = scored(column, metric)
    value, (variance, freedom) = float(each.mean()), spread(each, left_out, column[0])
    low, high = bounds(metric, value, variance, informative(column[0]), freedom)
    return {"value": value, "low": low, "high": high}


def difference(a: Sequence[Estimate], b: Sequence[Estimate], metric: str) -> dict[str, Any]:
    """a − b, paired by seed and test subject: mean over seeds, 95 % interval, two-sided p (none with one seed). An arm
    that is perfect with every seed has the least variance of such a score all the same."""
    (first, first_out), (second, second_out) = scored(a, metric), scored(b, metric)
    each = first - second
    value, (variance, freedom) = float(each.mean()), spread(each, first_out - second_out, a[0])
    variance = max(variance, *(min(least_variance(one, metric) for one in column) for column in (a, b)))
    if variance == 0:  # the same predictions, or constants
        return {"difference": value, "low": value, "high": value, "p": 1.0 if len(each) > 1 else None}
    reach = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    p = float(2 * stats.t.sf(abs(value) / np.sqrt(variance), freedom)) if len(each) > 1 else None
    return {"difference": value, "low": value - reach, "high": value + reach, "p": p}


def scored(column: Sequence[Estimate], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(seeds,) the score of every seed, and (subjects,) their mean with each test subject left out."""
    each = np.array([score_of(one, metric) for one in column])
    return each, np.mean([left_out_scores(one, metric) for one in column], axis=0)


def spread(each: np.ndarray, left_out: np.ndarray, found: Estimate) -> tuple[float, float]:
    """Variance of a mean over seeds, and its degrees of freedom.

    The variance is that of the test subjects (jackknife, the same ones for all seeds) plus that of the seeds' mean,
    s²/n; degrees of freedom are those of the sum (Satterthwaite 1946), which with few seeds that differ are few. One
    seed tells nothing of trainings: then it is of subjects alone.

    each: (seeds,); left_out: (subjects,).
    """
    strata = strata_of(found)
    of_subjects, freedom = jackknife_variance(left_out, strata), jackknife_freedom(left_out, strata)
    of_seeds = float(each.var(ddof=1)) / len(each) if len(each) > 1 else 0.0
    total = of_subjects + of_seeds
    if of_seeds == 0:
        return total, freedom
    return total, total**2 / (of_subjects**2 / freedom + of_seeds**2 / (len(each) - 1))
