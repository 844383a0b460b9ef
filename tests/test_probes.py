"""Probes: the fits against scikit-learn, choices inside the training side, weights per subject, and what they find."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from brainscale import linear_models
from brainscale.probes import STRENGTHS, FeatureProbe
from brainscale.scores import score
from brainscale.settings import InputError

KINDS = ("binary", "multiclass", "regression")


def planted(kind: str, n: int, dimensions: int = 16, shift: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Features (n,D) in which the first three hold the label, and labels (n,)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, dimensions))
    if kind == "regression":
        return x, 40 + 10 * (x[:, 0] + 0.5 * rng.normal(size=n))
    y = np.arange(n) % (2 if kind == "binary" else 3)
    x[np.arange(n), y] += shift
    return x, y


@pytest.mark.parametrize("dimensions", [5, 40])
def test_logistic_regression_is_scikit_learns(dimensions):
    x, y = planted("binary", 40, dimensions)
    weight = np.stack([np.ones(40), np.random.default_rng(0).random(40), np.arange(40) < 30])
    ours = linear_models.logistic(x, y > 0, weight, STRENGTHS)
    for w, fits in zip(weight, ours):
        for strength, fit in zip(STRENGTHS, fits):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = LogisticRegression(C=strength, tol=1e-10, solver="newton-cholesky").fit(x, y, sample_weight=w)
            np.testing.assert_allclose(fit[:-1], theirs.coef_[0], rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(fit[-1], theirs.intercept_[0], rtol=2e-3, atol=2e-3)


def test_ridge_regression_is_scikit_learns():
    x, y = planted("regression", 40, 10)
    weight = np.stack([np.ones(40), np.random.default_rng(0).random(40)])
    for w, fits in zip(weight, linear_models.ridge(x, y, weight, STRENGTHS)):
        for strength, fit in zip(STRENGTHS, fits):
            theirs = Ridge(alpha=1 / strength).fit(x, y, sample_weight=w)
            np.testing.assert_allclose(fit, [*theirs.coef_, theirs.intercept_], rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "knn"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planted_is_found(kind, name):
    x, y = planted(kind, 360)
    probe = FeatureProbe(x, np.arange(360), kind, name)
    prediction = probe(y, np.arange(120), np.arange(120, 360), 0)
    if kind == "regression":
        assert score("r2", kind, y[120:], prediction) > (0.6 if name == "linear" else 0.15)
    else:
        np.testing.assert_allclose(prediction.sum(axis=1), 1)
        assert score("auroc", kind, y[120:], prediction) > (0.85 if name == "linear" else 0.7)
    assert probe.chosen.startswith("C=" if name == "linear" else "k=")


@pytest.mark.parametrize("name", ["linear", "knn"])
@pytest.mark.parametrize("kind", KINDS)
def test_test_labels_are_not_looked_at_and_the_seed_decides(kind, name):
    x, y = planted(kind, 90, 30, 0.5)
    probe = FeatureProbe(x.astype(np.float32), np.arange(90), kind, name)
    train, test = np.arange(60), np.arange(60, 90)
    first = probe(y, train, test, 3)
    changed = y.copy()
    changed[60:] = y[60:][::-1]
    np.testing.assert_array_equal(first, probe(changed, train, test, 3))
    np.testing.assert_allclose(first[:7], probe(y, train, test[:7], 3), rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "knn"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_subject_counts_once_however_many_scans_it_has(kind, name):
    """Every third subject's scan five times over changes nothing."""
    x, y = planted(kind, 90, 12, 1.0)
    once = FeatureProbe(x, np.arange(90), kind, name)(y, np.arange(60), np.arange(60, 90), 0)
    rows = np.concatenate([np.repeat(np.arange(60), np.where(np.arange(60) % 3, 1, 5)), np.arange(60, 90)])
    repeated = FeatureProbe(x[rows], rows, kind, name)
    many = repeated(y[rows], np.arange(len(rows) - 30), np.arange(len(rows) - 30, len(rows)), 0)
    np.testing.assert_allclose(many, once, atol=0.02 * np.ptp(once))


def test_more_features_than_scans_is_the_same_fit():
    """Columns of zeros change nothing but the √D in front, so twice the same features is found in the scans' span."""
    x, y = planted("binary", 60, 30)
    narrow = FeatureProbe(x, np.arange(60), "binary")(y, np.arange(40), np.arange(40, 60), 0)
    twice = FeatureProbe(np.tile(x, 2), np.arange(60), "binary")(y, np.arange(40), np.arange(40, 60), 0)
    np.testing.assert_allclose(twice, narrow, atol=1e-4)


def test_the_neighbours_are_of_other_subjects_when_their_number_is_chosen():
    """Twins of one subject with a label of their own tell nothing about others: k = 1 must not win by them."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(60, 8)), 2, axis=0) + 0.01 * rng.normal(size=(120, 8))
    y = np.repeat(rng.permutation(60) % 2, 2)
    probe = FeatureProbe(x, np.arange(120) // 2, "binary", "knn")
    probe(y, np.arange(100), np.arange(100, 120), 0)
    assert probe.chosen != "k=1"


def test_a_strong_penalty_is_chosen_for_noise_and_a_weak_one_for_a_clear_effect():
    rng = np.random.default_rng(0)
    x, y = planted("binary", 200, 4, 4.0)
    probe = FeatureProbe(x, np.arange(200), "binary")
    probe(y, np.arange(150), np.arange(150, 200), 0)
    clear = float(probe.chosen[2:])
    probe = FeatureProbe(rng.normal(size=(200, 64)), np.arange(200), "binary")
    probe(y, np.arange(150), np.arange(150, 200), 0)
    assert float(probe.chosen[2:]) <= 0.1 < clear


def test_a_class_with_one_training_subject_is_refused():
    x, y = planted("binary", 20)
    train = np.array([0, 2, 4, 6, 1])
    with pytest.raises(InputError, match="1 training subjects of a class"):
        FeatureProbe(x, np.arange(20), "binary")(y, train, np.arange(10, 20), 0)


@pytest.mark.parametrize("seed", [48, 104, 344])
def test_steps_that_overshoot_are_halved(seed):
    """Features with outliers, weights over orders of magnitude: full Newton steps diverge, the fit must not."""
    rng = np.random.default_rng(seed)
    n, dimensions = rng.integers(4, 30), rng.integers(1, 4)
    x = rng.standard_t(1, size=(n, dimensions))
    y = np.arange(n) < rng.integers(1, n)
    weight = np.exp(rng.normal(size=(1, n)) * rng.uniform(0, 3))
    for strength, fit in zip((1.0, 1e3, 1e6), linear_models.logistic(x, y, weight, np.array([1.0, 1e3, 1e6]))[0]):
        miss = weight[0] * (1 / (1 + np.exp(-np.clip(x @ fit[:-1] + fit[-1], -500, 500))) - y)
        gradient = np.append(strength * miss @ x + fit[:-1], strength * miss.sum())
        assert np.abs(gradient).max() <= 1e-6 * strength * weight.sum()


@pytest.mark.parametrize("name", ["linear", "knn"])
def test_a_rare_class_is_not_overlooked(name):
    """One subject in ten is of the second class: the most probable class finds most of both."""
    rng = np.random.default_rng(0)
    y = (np.arange(600) % 10 == 0).astype(int)
    x = rng.normal(size=(600, 4)) + 0.8 * y[:, None]
    prediction = FeatureProbe(x, np.arange(600), "binary", name)(y, np.arange(200), np.arange(200, 600), 0)
    assert score("balanced_accuracy", "binary", y[200:], prediction) > 0.68
    assert (prediction.argmax(axis=1) == 1)[y[200:] == 1].mean() > 0.6
