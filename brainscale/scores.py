"""How good a prediction is, always per subject: the metrics, what chance comes to, and predictions of scans as those of
subjects.

A prediction is (m, classes) class probabilities or, for regression, (m,) values. Labels are class indices 0..classes-1
or values. scikit-learn computes the metrics.
"""

from collections.abc import Iterator

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)

from brainscale.settings import InputError

METRICS = {
    "binary": ("auroc", "auprc", "balanced_accuracy"),
    "multiclass": ("auroc", "auprc", "balanced_accuracy"),
    "regression": ("mae", "r2"),
}
"""Metrics of each kind of task, the main one first. AUROC and AUPRC of several classes are the mean over classes, each
against the rest."""
SMALLER_IS_BETTER = ("mae",)


def score(metric: str, kind: str, y: np.ndarray, prediction: np.ndarray) -> float:
    """The metric of one prediction. y: (m,); prediction: (m, classes) probabilities or (m,) values.

    A subject's class is its most probable one in `balanced_accuracy`; AUPRC is the average precision.

    Raises InputError where the test set has not every class, or fewer than two subjects for R²: no number would mean
    anything there, and a NaN would spoil every mean it gets into.
    """
    if kind == "regression":
        if metric == "r2" and len(y) < 2:
            raise InputError(f"R² of {len(y)} test subject: it needs at least 2; use fewer folds")
        return float(mean_absolute_error(y, prediction) if metric == "mae" else r2_score(y, prediction))
    classes = prediction.shape[1]
    if len(present := np.unique(y)) < classes:
        raise InputError(
            f"{metric} of a test set with subjects of {len(present)} of {classes} classes: every class must be on "
            "every test side; use fewer folds, or leave the rare class out"
        )
    if metric == "balanced_accuracy":
        return float(balanced_accuracy_score(y, prediction.argmax(axis=1)))
    measure = roc_auc_score if metric == "auroc" else average_precision_score
    return float(np.mean([measure(truth, probability) for truth, probability in against_rest(y, prediction)]))


def against_rest(y: np.ndarray, prediction: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(m,) bool truth and (m,) probability of each class against the rest; of two classes, of the second only."""
    for index in range(1 if prediction.shape[1] == 2 else 0, prediction.shape[1]):
        yield y == index, prediction[:, index]


def chance(metric: str, kind: str, y: np.ndarray) -> float:
    """What a prediction without information scores on these subjects. y: (m,).

    AUROC 0.5; AUPRC the prevalence of the second class (of several classes: the mean prevalence, 1/classes); balanced
    accuracy 1/classes; R² 0; MAE that of always saying the median.
    """
    if kind == "regression":
        return 0.0 if metric == "r2" else float(np.abs(y - np.median(y)).mean())
    classes = int(y.max()) + 1
    if metric == "auroc":
        return 0.5
    return float((y == 1).mean()) if metric == "auprc" and classes == 2 else 1 / classes


def by_subject(
    subjects: np.ndarray, y: np.ndarray, prediction: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scans → subjects, in sorted order: (names, labels, mean predictions).

    A value to predict that differs between a subject's scans (age) becomes its mean. A class that differs is refused
    with an InputError: one subject would count on both sides.
    """
    names, at, scans = np.unique(subjects, return_inverse=True, return_counts=True)
    total = np.zeros((len(names), *prediction.shape[1:]))
    np.add.at(total, at, prediction)
    prediction = total / scans.reshape(-1, *[1] * (prediction.ndim - 1))
    if np.issubdtype(y.dtype, np.floating):
        return names, np.bincount(at, weights=y) / scans, prediction
    label = np.zeros(len(names), y.dtype)
    label[at] = y
    if (mixed := label[at] != y).any():
        raise InputError(
            f"subject {subjects[mixed][0]} has scans of several classes, a subject needs one; keep one session of it, "
            "or define the class per subject"
        )
    return names, label, prediction
