"""A score with its 95 % interval, of one held-out test set or of repeated cross-validation, and the paired difference
of two pipelines on the same splits.

**Held out.** The interval is for the score of this one fitted pipeline on the population. Its standard error is the
jackknife over subjects, stratified by class (for AUROC: DeLong et al. 1988), taken to a scale without bounds: logit,
log for MAE, log(1 - R²) for R², with Welch's degrees of freedom. It covered the truth in 91 to 97.5 % (200 repetitions
of the four held-out cases of tests/planted.py, 80 to 150 subjects). In 30 settings of 40 to 100 subjects (400
repetitions), with the degrees of freedom of all subjects, it did so in 90 to 99 %; bootstrap percentiles in 82 to 97 %,
BCa in 86 to 98 %, both worst for AUPRC.

**Cross-validated.** The interval is for the expected score of the procedure at that number of training subjects. A
subject's label also moves the fits that are tested on the others, so the spread of pooled predictions is too small:
with no effect each pair of subjects counts twice and the variance is double (hence 13 to 21 % of such intervals exclude
chance). How far fits hang on the draw of training subjects shows in the data: two repeats train on sets that share most
subjects, and where r, the correlation of their predictions, is lower than the part that differs explains, noise was
fitted. The jackknife variance of the mean over repeats is multiplied by 1 + s with

    s = (1 - r) / (2 (1 - q)), at most K/(K-1),    q = shared part of two training sets = (n - n/K) / (n - 1),

which is near 1 without an effect and small for a strong one. The bound, also used where there is one repeat, is the
correction n_test/n_train of Nadeau & Bengio 2003 for one K-fold run. R² depends on the draw more than its predictions
show: s counts three times. Balanced accuracy changes only where the most probable class does: three quarters. The form
was chosen by simulation (tests/planted.py prints the table): the corrected resampled t of Nadeau & Bengio, on 10 × 5
folds of 47 subjects, excluded chance in 9 % (logit scale) to 14 %, and the bound alone covered 99 to 100 % of 100
subjects with an effect. No fit is needed beyond those of the score; nested cross-validation (Bates et al. 2023) needs
thousands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from brainscale.resampling import jackknife_freedom, jackknife_variance, leave_one_out, weighted_scores
from brainscale.scores import METRICS, by_subject
from brainscale.settings import InputError

Pipeline = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]
"""(y, train, test, seed) → prediction of the scans `test`."""
COUNTS = {"r2": 3.0, "balanced_accuracy": 0.75}
"""How often s counts, by metric; once for the others."""
Progress = Callable[[int, int], None]
"""Called with (done, of how many)."""


class Split(Protocol):
    """What is needed of a split: indices of scans on its two sides."""

    @property
    def train(self) -> np.ndarray: ...
    @property
    def test(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval and how that was found."""

    value: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Difference:
    """The paired difference a - b, its 95 % interval, and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Estimate:
    """Predictions of every test subject in every repeat, and the intervals of the kind's metrics."""

    kind: str
    subjects: np.ndarray
    """(n,) test subjects, sorted."""
    y: np.ndarray
    """(n,) their labels."""
    predictions: np.ndarray
    """(repeats, n, classes) or (repeats, n): each subject's prediction by the fit that did not see it."""
    folds: np.ndarray
    """(repeats, n) the fold in which each subject was tested."""
    chosen: list[str] = field(default_factory=list)
    """The setting that each fit chose, where the pipeline says it."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Metric → interval."""


def estimate(
    pipeline: Pipeline,
    kind: str,
    y: np.ndarray,
    subjects: np.ndarray,
    splits: Sequence[Split],
    seed: int,
    progress: Progress | None = None,
) -> Estimate:
    """Fit and test on every split, and give each metric of the kind its interval. One split is a held-out test set;
    more are K folds, repeated or not, in order.

    y, subjects: (scans,). Fit number i gets the seed `seed + i`, the same for every pipeline. Raises InputError where
    the splits are not whole repeats of the same test subjects.
    """
    found = predict(pipeline, kind, y, subjects, splits, seed, progress)
    found.intervals.update({metric: interval(found, metric) for metric in METRICS[kind]})
    return found


def predict(
    pipeline: Pipeline,
    kind: str,
    y: np.ndarray,
    subjects: np.ndarray,
    splits: Sequence[Split],
    seed: int,
    progress: Progress | None = None,
) -> Estimate:
    """The predictions of `estimate`, without intervals."""
    repeats: list[dict[str, tuple[int, float, np.ndarray]]] = []
    chosen = []
    for number, split in enumerate(splits):
        prediction = np.asarray(pipeline(y, split.train, split.test, seed + number), dtype=np.float64)
        tested = list(zip(*by_subject(subjects[split.test], y[split.test], prediction)))
        if not repeats or any(name in repeats[-1] for name, _, _ in tested):
            repeats.append({})
            fold = 0
        repeats[-1].update({name: (fold, label, value) for name, label, value in tested})
        fold += 1
        chosen.append(getattr(pipeline, "chosen", ""))
        if progress:
            progress(number + 1, len(splits))
    names = sorted(repeats[0])
    if any(sorted(repeat) != names for repeat in repeats):
        raise InputError(
            f"{len(splits)} splits test not every subject once per repeat; "
            "give one split, or whole repeats of folds in order"
        )
    folds, labels, predictions = (np.array([[repeat[n][i] for n in names] for repeat in repeats]) for i in range(3))
    return Estimate(kind, np.array(names), labels[0], predictions, folds, chosen)


def score_of(found: Estimate, metric: str) -> float:
    """Mean over repeats of the metric; AUROC compares subjects of the same fold."""
    return float(repeat_scores(found, metric).mean())


def repeat_scores(found: Estimate, metric: str) -> np.ndarray:
    """(repeats,) the metric of each repeat."""
    return _scores(found, metric, np.ones((1, len(found.y))))[:, 0]


def variance_of_test(found: Estimate, metric: str) -> float:
    """The jackknife variance of the mean over repeats, as if the fits were given."""
    return jackknife_variance(left_out_scores(found, metric), strata_of(found))


def interval(found: Estimate, metric: str) -> Interval:
    """The 95 % interval of a metric; see the top of this file."""
    value = score_of(found, metric)
    share = refit_share(found, metric)
    variance = variance_of_test(found, metric) * (1 + share)
    repeats, folds = len(found.folds), int(found.folds.max()) + 1
    scale = {"mae": "log", "r2": "log(1-R²)"}.get(metric, "logit")
    method = f"jackknife over {len(found.y)} test subjects on the {scale} scale"
    if folds > 1:
        method += f", variance × {1 + share:.2f} for refitting ({repeats} × {folds} folds)"
    left_out = left_out_scores(found, metric)
    freedom = jackknife_freedom(left_out, strata_of(found))
    return Interval(value, *bounds(metric, value, variance, informative(found), freedom), method)


def bounds(
    metric: str, value: float, variance: float, subjects: int, freedom: float | None = None
) -> tuple[float, float]:
    """The 95 % bounds on the metric's scale without bounds, with Student's t of `freedom` (by default subjects - 1).

    Without any spread (every subject right) the variance would be nothing: it is then that of a share of which half a
    subject more is wrong.
    """
    reach = stats.t.ppf(0.975, subjects - 1 if freedom is None else freedom)
    if metric == "mae":
        factor = np.exp(reach * np.sqrt(variance) / value) if value > 0 else 1.0
        return float(value / factor), float(value * factor)
    if metric == "r2":
        factor = np.exp(reach * np.sqrt(variance) / (1 - value)) if value < 1 else 1.0
        return float(1 - (1 - value) * factor), float(1 - (1 - value) / factor)
    inside = (value * subjects + 0.5) / (subjects + 1) if variance == 0 or not 0 < value < 1 else value
    variance = variance or inside * (1 - inside) / subjects
    step = reach * np.sqrt(variance) / (inside * (1 - inside))
    low, high = expit(logit(inside) - step), expit(logit(inside) + step)
    return float(min(low, value)), float(max(high, value))


def refit_share(found: Estimate, metric: str) -> float:
    """s of the top of this file: what refitting adds to the variance, in units of it. 0 for a held-out test set."""
    repeats, n = found.folds.shape
    folds = int(found.folds.max()) + 1
    if folds == 1:
        return 0.0
    bound, apart = folds / (folds - 1), (n / folds - 1) / (n - 1)
    share = bound
    if repeats > 1 and apart > 0:
        columns = [stats.rankdata(column, axis=1) for column in np.moveaxis(np.atleast_3d(found.predictions), 2, 0)]
        if found.kind == "regression":
            columns = [np.abs(found.predictions - found.y) if metric == "mae" else found.predictions]
        shared = [_mean_correlation(_centred(column, strata_of(found))) for column in columns]
        share = min(bound, (1 - float(np.mean(shared))) / (2 * apart))
    return COUNTS.get(metric, 1.0) * share


def paired_difference(a: Estimate, b: Estimate, metric: str) -> Difference:
    """a - b of two pipelines tested on the same subjects and splits.

    The variance is the jackknife of the difference (for AUROC: DeLong et al. 1988), times 1 + the larger of the two
    shares that refitting adds, and at least what a perfect score is given in `bounds`; t-test with the degrees of
    freedom of that variance (Welch). Raises InputError on other subjects or folds.
    """
    if not (np.array_equal(a.subjects, b.subjects) and np.array_equal(a.folds, b.folds) and np.array_equal(a.y, b.y)):
        raise InputError("two scores of other subjects or splits; a paired test needs the same of both")
    value = score_of(a, metric) - score_of(b, metric)
    left_out = left_out_scores(a, metric) - left_out_scores(b, metric)
    spread = max(jackknife_variance(left_out, strata_of(a)), *(least_variance(one, metric) for one in (a, b)))
    error = float(np.sqrt(spread * (1 + max(refit_share(a, metric), refit_share(b, metric)))))
    if error == 0:  # the same predictions, or two constants
        return Difference(value, value, value, 1.0)
    freedom = jackknife_freedom(left_out, strata_of(a))
    reach = stats.t.ppf(0.975, freedom) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Difference(value, float(value - reach), float(value + reach), p)


def informative(found: Estimate) -> int:
    """Test subjects that a score hangs on: of classes, twice as many as the rarest has."""
    return len(found.y) if found.kind == "regression" else min(len(found.y), 2 * int(np.bincount(found.y).min()))


def least_variance(found: Estimate, metric: str) -> float:
    """Of a score that is perfect (or wholly wrong) and so does not vary: as in `bounds`. 0 for any other."""
    value, n = score_of(found, metric), informative(found)
    if found.kind == "regression" or 0 < value < 1:
        return 0.0
    inside = (value * n + 0.5) / (n + 1)
    return inside * (1 - inside) / n


def _scores(found: Estimate, metric: str, weights: np.ndarray) -> np.ndarray:
    """(repeats, B) the metric of each repeat under B weightings (B,n) of the subjects."""
    with np.errstate(divide="ignore", invalid="ignore"):
        each = [
            weighted_scores(metric, found.kind, found.y, prediction, weights, fold)
            for prediction, fold in zip(found.predictions, found.folds)
        ]
    if not np.isfinite(each).all():
        raise InputError(
            f"{metric} of {len(found.y)} test subjects in {int(found.folds.max()) + 1} folds cannot be computed; "
            "it needs two subjects of every class in a fold, or two different values: use fewer folds"
        )
    return np.array(each)


def left_out_scores(found: Estimate, metric: str) -> np.ndarray:
    """(n,) the mean over repeats with each subject left out of the test."""
    return _scores(found, metric, leave_one_out(len(found.y))).mean(axis=0)


def strata_of(found: Estimate) -> np.ndarray:
    """(n,) classes, in which subjects are drawn; one stratum for a regression."""
    return np.zeros(len(found.y), int) if found.kind == "regression" else found.y


def _centred(values: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """(repeats, n) less the mean of each stratum."""
    values = values.astype(float)
    for stratum in np.unique(strata):
        values[:, strata == stratum] -= values[:, strata == stratum].mean(axis=1, keepdims=True)
    return values


def _mean_correlation(values: np.ndarray) -> float:
    """Mean correlation of two different rows (repeats, n); rows without spread correlate with nothing."""
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.where(norm > 0, norm, 1)
    together = unit @ unit.T
    return float((together.sum() - np.trace(together)) / (len(values) * (len(values) - 1)))
