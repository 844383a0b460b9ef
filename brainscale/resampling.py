"""Scores of many weighted copies of a test set at once, and the jackknife of subjects that is made of them.

A subject left out has weight 0. Hundreds of copies are scored by a few matrix products; a test holds every metric to
scikit-learn's with `sample_weight`.
"""

import numpy as np

from brainscale.scores import against_rest


def weighted_scores(
    metric: str,
    kind: str,
    y: np.ndarray,
    prediction: np.ndarray,
    weights: np.ndarray,
    fold: np.ndarray | None = None,
) -> np.ndarray:
    """(B,) the metric under each of B weightings. y: (m,); prediction as in `scores`; weights: (B,m), with weight in
    every class.

    fold: (m,), or none. AUROC then compares subjects of the same fold only, since the predictions of two fits have no
    common scale (pooled over folds, AUROC without an effect lies below 0.5: Forman & Scholz 2010).
    """
    if kind == "regression":
        error = np.abs(prediction - y) if metric == "mae" else (prediction - y) ** 2
        total = weights.sum(axis=1)
        mean_error = weights @ error / total
        if metric == "mae":
            return mean_error
        return 1 - mean_error / (weights @ y**2 / total - (weights @ y / total) ** 2)
    if metric == "balanced_accuracy":
        hit = prediction.argmax(axis=1) == y
        rates = [weights[:, y == c] @ hit[y == c] / weights[:, y == c].sum(axis=1) for c in np.unique(y)]
        return np.mean(rates, axis=0)
    fold = np.zeros(len(y), int) if fold is None else fold
    measure = _auroc if metric == "auroc" else _average_precision
    return np.mean([measure(*one, weights, fold) for one in against_rest(y, prediction)], axis=0)


def _auroc(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The weighted share of pairs in the right order, ties half."""
    above = probability[truth][:, None] - probability[~truth]
    together = (fold[truth][:, None] == fold[~truth]).astype(float)
    right = together * ((above > 0) + 0.5 * (above == 0))
    ill, well = weights[:, truth], weights[:, ~truth]
    return ((ill @ right) * well).sum(axis=1) / ((ill @ together) * well).sum(axis=1)


def _average_precision(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Precision averaged over the positive subjects, each at its own threshold; equal probabilities share one."""
    order = np.argsort(-probability, kind="stable")
    ranked = probability[order]
    last = np.searchsorted(-ranked, -ranked, side="right") - 1
    weight, found = weights[:, order], weights[:, order] * truth[order]
    called = np.cumsum(weight, axis=1)[:, last]
    precision = np.cumsum(found, axis=1)[:, last] / np.where(called > 0, called, 1)
    return (found * precision).sum(axis=1) / found.sum(axis=1)


def leave_one_out(subjects: int) -> np.ndarray:
    """(subjects, subjects) weights of the jackknife: row i leaves subject i out."""
    return 1 - np.eye(subjects)


def jackknife_variance(left_out: np.ndarray, strata: np.ndarray) -> float:
    """Variance of a score from its values with each subject left out, by stratum (Efron & Tibshirani 1993, §11.5; for
    AUROC it is that of DeLong et al. 1988 to order 1/m). left_out: (m,); strata: (m,)."""
    parts = [left_out[strata == stratum] for stratum in np.unique(strata)]
    return float(sum((len(part) - 1) / len(part) * ((part - part.mean()) ** 2).sum() for part in parts))


def jackknife_freedom(left_out: np.ndarray, strata: np.ndarray) -> float:
    """Degrees of freedom of that variance: of strata with few subjects that vary much, few (Welch 1947, Satterthwaite
    1946). All of them where nothing varies."""
    sizes, each = [], []
    for stratum in np.unique(strata):
        members = strata == stratum
        sizes.append(int(members.sum()))
        each.append(jackknife_variance(left_out[members], strata[members]))
    total = sum(each)
    if total == 0:
        return float(min(sizes) - 1)
    return total**2 / sum(variance**2 / (size - 1) for variance, size in zip(each, sizes))
