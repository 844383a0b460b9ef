"""Is there any effect at all: labels permuted between subjects, the whole pipeline run again each time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from brainscale.intervals import Pipeline, Progress, Split, predict, score_of
from brainscale.scores import METRICS, SMALLER_IS_BETTER


@dataclass(frozen=True)
class Permutation:
    """The p-value of no effect, and what it is made of."""

    p: float
    as_good: int
    """Permuted scores at least as good as the true one."""
    value: float
    """The score with the true labels."""
    null: np.ndarray
    """(permutations,) the scores with permuted labels."""


def permutation_test(
    pipeline: Pipeline,
    kind: str,
    y: np.ndarray,
    subjects: np.ndarray,
    splits: Sequence[Split],
    seed: int,
    permutations: int = 200,
    metric: str | None = None,
    progress: Progress | None = None,
    begin: int = 0,
) -> Permutation:
    """p = (1 + #{permuted score at least as good}) / (1 + permutations), which is never 0 (Phipson & Smyth 2010).

    All scans of a subject move together, and choosing settings is part of every refit (Ojala & Garriga 2010). Labels
    are permuted within each test fold (for one held-out test set: within either side), so the splits stay as stratified
    as they were drawn. Of repeated folds the first repeat is used, for the true labels too.

    y, subjects: (scans,). metric: the kind's main one by default. begin: number of the first permutation, each of which
    depends on (seed, its number) alone, so that many can be done in pieces.
    """
    metric = metric or METRICS[kind][0]
    splits, side = first_repeat(subjects, splits)
    value = score_of(predict(pipeline, kind, y, subjects, splits, seed), metric)
    null = np.empty(permutations)
    for number in range(permutations):
        shuffled = permuted(y, subjects, side, np.random.default_rng([seed, begin + number]))
        null[number] = score_of(predict(pipeline, kind, shuffled, subjects, splits, seed), metric)
        if progress:
            progress(number + 1, permutations)
    as_good = int((null <= value + 1e-12 if metric in SMALLER_IS_BETTER else null >= value - 1e-12).sum())
    return Permutation((1 + as_good) / (1 + permutations), as_good, value, null)


def permuted(y: np.ndarray, subjects: np.ndarray, side: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(scans,) labels exchanged between subjects of the same side. A class moves whole; of values that differ between a
    subject's scans (age), the subject's mean moves and the scan's distance from it stays. side: (scans,) int."""
    _, first, at = np.unique(subjects, return_index=True, return_inverse=True)
    real = np.issubdtype(y.dtype, np.floating)
    label = np.bincount(at, weights=y) / np.bincount(at) if real else y[first]
    moved = label.copy()
    for one in np.unique(side):
        members = np.flatnonzero(side[first] == one)
        moved[members] = label[rng.permutation(members)]
    return y - label[at] + moved[at] if real else moved[at]


def first_repeat(subjects: np.ndarray, splits: Sequence[Split]) -> tuple[list[Split], np.ndarray]:
    """The splits up to the first subject that is tested again, and (scans,) in which of them each scan is tested (-1:
    in none)."""
    side = np.full(len(subjects), -1)
    chosen: list[Split] = []
    for split in splits:
        if (side[split.test] >= 0).any():
            break
        side[split.test] = len(chosen)
        chosen.append(split)
    return chosen, side
