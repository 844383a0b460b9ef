"""Scores: against scikit-learn on whole arrays, what chance is, scans as subjects, and test sets that have no score."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, r2_score, roc_auc_score

from brainscale.scores import METRICS, by_subject, chance, score
from brainscale.settings import InputError


def labels_and_noise(kind: str, n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and a prediction that leans towards them."""
    rng = np.random.default_rng(seed)
    if kind == "regression":
        y = rng.normal(50, 10, n)
        return y, y + rng.normal(0, 5, n)
    classes = 2 if kind == "binary" else 3
    y = np.arange(n) % classes
    p = rng.random((n, classes)) + 0.5 * (y[:, None] == np.arange(classes))
    return y, p / p.sum(axis=1, keepdims=True)


def test_binary_and_multiclass_scores_are_scikit_learns():
    y, p = labels_and_noise("binary")
    assert score("auroc", "binary", y, p) == pytest.approx(roc_auc_score(y, p[:, 1]))
    assert score("auprc", "binary", y, p) == pytest.approx(average_precision_score(y, p[:, 1]))
    y, p = labels_and_noise("multiclass")
    assert score("auroc", "multiclass", y, p) == pytest.approx(roc_auc_score(y, p, multi_class="ovr"))
    assert score("auprc", "multiclass", y, p) == pytest.approx(average_precision_score(y, p, average="macro"))
    assert score("balanced_accuracy", "multiclass", y, p) == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    y, p = labels_and_noise("regression")
    assert score("mae", "regression", y, p) == pytest.approx(np.abs(y - p).mean())
    assert score("r2", "regression", y, p) == pytest.approx(r2_score(y, p))


@pytest.mark.parametrize("kind", METRICS)
def test_a_prediction_without_information_scores_chance(kind):
    """Predictions drawn without the labels, of unbalanced classes, score what `chance` says (median for MAE)."""
    rng = np.random.default_rng(1)
    y = rng.choice(2 if kind == "binary" else 3, 4000, p=[0.7, 0.3] if kind == "binary" else [0.6, 0.3, 0.1])
    prediction = rng.random((4000, y.max() + 1))
    if kind == "regression":
        y = rng.normal(size=4000)
        prediction = np.full(4000, np.median(y))
    for metric in METRICS[kind]:
        assert score(metric, kind, y, prediction) == pytest.approx(chance(metric, kind, y), abs=0.03)


@pytest.mark.parametrize("metric", METRICS["binary"])
def test_a_test_set_of_one_class_is_refused(metric):
    y, p = labels_and_noise("binary")
    with pytest.raises(InputError, match="1 of 2 classes"):
        score(metric, "binary", np.zeros_like(y), p)
    with pytest.raises(InputError, match="2 of 3 classes"):
        score(metric, "multiclass", y, labels_and_noise("multiclass")[1])


def test_r2_of_one_subject_is_refused():
    with pytest.raises(InputError, match="at least 2"):
        score("r2", "regression", np.zeros(1), np.zeros(1))


def test_scans_become_subjects_in_any_order():
    y, p = labels_and_noise("binary", 6)
    subjects = np.array(["c", "a", "b", "c", "a", "c"])
    y = np.array([1, 0, 0, 1, 0, 1])
    names, label, mean = by_subject(subjects, y, p)
    assert names.tolist() == ["a", "b", "c"] and label.tolist() == [0, 0, 1]
    np.testing.assert_allclose(mean, [p[[1, 4]].mean(0), p[2], p[[0, 3, 5]].mean(0)])
    order = np.random.default_rng(0).permutation(6)
    again = by_subject(subjects[order], y[order], p[order])
    np.testing.assert_allclose(again[2], mean)
    age = np.array([60.0, 30.0, 40.0, 61.0, 32.0, 62.0])
    assert by_subject(subjects, age, p[:, 0])[1].tolist() == [31.0, 40.0, 61.0]


def test_a_subject_of_two_classes_is_refused():
    with pytest.raises(InputError, match="subject b has scans of several classes"):
        by_subject(np.array(["a", "b", "b"]), np.array([0, 0, 1]), np.zeros((3, 2)))
