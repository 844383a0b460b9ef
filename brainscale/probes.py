"""Probes of frozen features: nearest neighbours and a linear model, with their one setting chosen inside.

A probe is a pipeline: called with labels and two lists of scans it trains on the first and predicts the second. The
setting (number of neighbours, inverse strength C of the penalty) is chosen in inner folds of the training subjects, by
the weighted squared error of the predicted probabilities (Brier score) or values; the test side is never looked at.

Every subject has the same weight in training, however many scans it has, and every class the same total weight: the
most probable class is then the choice for balanced accuracy. Probabilities are therefore those of a population in which
all classes are equally frequent.
"""

from dataclasses import dataclass, field

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from brainscale import linear_models
from brainscale.settings import InputError

NEIGHBOURS = (1, 3, 5, 10, 20, 50)
TEMPERATURE = 0.07
"""Of a neighbour's vote exp(cosine / temperature), as in Wu et al. 2018 (instance discrimination)."""
STRENGTHS = 10.0 ** np.arange(-3, 4)
"""C of ½‖w‖² + C Σ loss, on features divided by √D, so that the grid suits every D."""
INNER_FOLDS = 5


@dataclass
class FeatureProbe:
    """A kNN or linear probe of features (n,D) of a task's scans."""

    features: np.ndarray
    subjects: np.ndarray
    """(n,) the subject of each scan."""
    kind: str
    """binary, multiclass or regression."""
    name: str = "linear"
    """linear or knn."""
    chosen: str = field(default="", init=False)
    """The setting of the latest call, such as `C=0.1`."""

    def __call__(self, y: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
        """(m, classes) probabilities or (m,) values for the scans `test`. y: (n,) labels, looked at in `train` only.

        Raises InputError with fewer than two training subjects of a class: nothing could be chosen.
        """
        subject = np.unique(self.subjects[train], return_inverse=True)[1]
        classes = 0 if self.kind == "regression" else int(y.max()) + 1
        targets = (y[train, None] == np.arange(classes)) * 1.0 if classes else y[train, None].astype(float)
        folds = _inner_folds(subject, y[train], classes, seed)
        weight = _weights(np.stack([*folds, np.zeros(len(train), bool)]), subject, targets, classes)
        x = self.features[np.concatenate([train, test])].astype(np.float64)
        each = 1 / np.bincount(subject)[subject]
        x -= np.average(x[: len(train)], axis=0, weights=each)
        std = np.sqrt(np.average(x[: len(train)] ** 2, axis=0, weights=each))
        x /= np.where(std > 0, std, 1) * np.sqrt(x.shape[1])
        if self.name == "knn":
            inner, outer = _nearest(x[: len(train)], x[len(train) :], targets, weight, subject)
        else:
            inner, outer = _linear(x[: len(train)], x[len(train) :], targets, weight, classes)
        left_out = weight[-1] * (weight[:-1] == 0)
        error = ((inner - targets) ** 2).sum(axis=-1)
        best = int((left_out[:, None] * error).sum(axis=(0, 2)).argmin())
        self.chosen = f"k={NEIGHBOURS[best]}" if self.name == "knn" else f"C={STRENGTHS[best]:g}"
        return outer[best] if classes else outer[best, :, 0]


def _inner_folds(subject: np.ndarray, y: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """(n,) bool masks of the scans left out in turn: subjects never split, classes spread evenly.

    subject: (n,) index of each scan's subject. classes: 0 for regression.
    """
    first = np.unique(subject, return_index=True)[1]
    label = y[first]
    rarest = int(np.bincount(label, minlength=classes).min()) if classes else len(label)
    if rarest < 2:
        raise InputError(
            f"{rarest} training subjects of a class, at least 2 are needed to choose a probe's setting; "
            "use more subjects, or leave the rare class out"
        )
    folds = StratifiedKFold if classes else KFold
    splitter = folds(min(INNER_FOLDS, rarest), shuffle=True, random_state=seed % 2**32)
    return [np.isin(subject, out) for _, out in splitter.split(label, label)]


def _weights(left_out: np.ndarray, subject: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
    """(F,n) weights of the scans in each fit: equal per subject, equal in total per class, zero where left out; they
    sum to the number of subjects. left_out: (F,n) bool."""
    weight = (1 / np.bincount(subject))[subject] * ~left_out
    count = weight.sum(axis=1, keepdims=True)
    if classes:
        weight = weight / (weight @ targets @ targets.T)
    return weight * count / weight.sum(axis=1, keepdims=True)


def _linear(
    train: np.ndarray, test: np.ndarray, targets: np.ndarray, weight: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of the training scans by each inner fit (F-1,S,n,classes), and of the test scans by the fit to all
    (S,m,classes). Several classes are fitted one against the rest.

    With more features than scans the fit lies in the span of the scans, and is found there (n coordinates for D).
    """
    if train.shape[1] > len(train):
        basis = np.linalg.svd(train, full_matrices=False)[2].T
        train, test = train @ basis, test @ basis
    centre, spread = targets.mean(), targets.std() or 1.0
    if not classes:
        fits = [linear_models.ridge(train, (targets[:, 0] - centre) / spread, weight, STRENGTHS)]
    else:
        against_rest = targets.T[1:] if classes == 2 else targets.T
        fits = [linear_models.logistic(train, one > 0, weight, STRENGTHS) for one in against_rest]

    def apply(x: np.ndarray, rows: slice | int) -> np.ndarray:
        values = np.stack([fit[rows, :, :-1] @ x.T + fit[rows, :, -1:] for fit in fits], axis=-1)
        if not classes:
            return values * spread + centre
        p = 1 / (1 + np.exp(-np.clip(values, -500, 500)))
        return np.concatenate([1 - p, p], axis=-1) if classes == 2 else p / p.sum(axis=-1, keepdims=True)

    return apply(train, slice(-1)), apply(test, -1)


def _nearest(
    train: np.ndarray, test: np.ndarray, targets: np.ndarray, weight: np.ndarray, subject: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same by the k nearest training subjects, by cosine; a subject is as near as its nearest scan. Votes weigh
    exp(cosine / temperature) × the class's weight. Of fewer than k subjects all vote."""
    train, test = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, test))
    scans = np.bincount(subject)
    first = np.concatenate([[0], np.cumsum(scans)[:-1]])

    def votes(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        cosine = np.where(weight > 0, x @ train.T, -np.inf)
        nearest = np.lexsort((-cosine, np.broadcast_to(subject, cosine.shape)))[:, first]
        order = np.argsort(-np.take_along_axis(cosine, nearest, 1), kind="stable")
        nearest = np.take_along_axis(nearest, order, 1)
        cosine = np.take_along_axis(cosine, nearest, 1)
        vote = np.exp((cosine - cosine[:, :1]) / TEMPERATURE) * (weight * scans[subject])[nearest]
        cast, said = np.cumsum(vote[..., None] * targets[nearest], axis=1), np.cumsum(vote, axis=1)[..., None]
        at = [min(k, len(scans)) - 1 for k in NEIGHBOURS]
        return np.moveaxis(cast[:, at] / said[:, at], 1, 0)

    return np.stack([votes(train, row) for row in weight[:-1]]), votes(test, weight[-1])
