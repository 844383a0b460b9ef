"""Synthetic features with a known effect: what intervals and tests are tried on, and how often they were right.

`python tests/planted.py [REPETITIONS] [covered|tests]` prints the table of every combination.
"""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from scipy import stats
from sklearn.model_selection import KFold, StratifiedKFold

from brainscale.intervals import Estimate, estimate, paired_difference
from brainscale.permutations import permutation_test
from brainscale.probes import FeatureProbe
from brainscale.scores import METRICS, by_subject, chance, score

POPULATION = 600
"""Subjects outside the study that each fit is measured on; ten times as many where there is one fit per study."""


@dataclass(frozen=True)
class Case:
    """Gaussian features of `subjects` subjects. Each class has an axis of its own, along which the effect lies; a value
    to predict lies along the first."""

    name: str
    kind: str
    subjects: int
    dimensions: int
    effect: float
    """Shift of a class in standard deviations; for regression the correlation of the first feature."""
    positive: float = 0.5
    scans: int = 1
    """Of each subject; they share the subject's features, with as much noise again."""
    probe: str = "linear"
    folds: int = 5
    """1: half of the subjects are held out, once."""
    repeats: int = 4

    def draw(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Features, labels and subjects of all scans, the study's first, and the number of the study's scans."""
        rng = np.random.default_rng(seed)
        outside = POPULATION * (10 if self.folds == 1 else 1)
        total = self.subjects + outside
        x = rng.normal(size=(total, self.dimensions))
        if self.kind == "regression":
            y = rng.normal(size=total)
            x[:, 0] = self.effect * y + np.sqrt(1 - self.effect**2) * x[:, 0]
        else:
            shares = [1 - self.positive, self.positive] if self.kind == "binary" else [1 / 3] * 3
            here = np.repeat(np.arange(len(shares)), np.round(np.array(shares) * self.subjects).astype(int))
            y = np.concatenate([here, rng.choice(len(shares), outside, p=shares)])
            x[np.arange(total), y] += self.effect
        names = np.repeat(np.arange(total), self.scans)
        x = x[names] + (rng.normal(size=(len(names), self.dimensions)) if self.scans > 1 else 0)
        return x, y[names], names, self.subjects * self.scans

    def splits(self, y: np.ndarray, names: np.ndarray, seed: int) -> list[SimpleNamespace]:
        """Of the study's scans. y, names: (scans,)."""
        subjects, first = np.unique(names, return_index=True)
        splitter = KFold if self.kind == "regression" else StratifiedKFold
        splits = []
        for repeat in range(1 if self.folds == 1 else self.repeats):
            folds = splitter(max(self.folds, 2), shuffle=True, random_state=1000 * seed + repeat)
            for train, test in folds.split(subjects, y[first]):
                train, test = (np.flatnonzero(np.isin(names, subjects[side])) for side in (train, test))
                splits.append(SimpleNamespace(train=train, test=test))
        return splits[:1] if self.folds == 1 else splits


@dataclass
class Measured:
    """A pipeline that also notes what each of its fits scores on the population."""

    pipeline: FeatureProbe
    kind: str
    population: np.ndarray
    true: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, y: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
        both = self.pipeline(y, train, np.concatenate([test, self.population]), seed)
        _, label, prediction = by_subject(
            self.pipeline.subjects[self.population], y[self.population], both[len(test) :]
        )
        self.true.append({metric: score(metric, self.kind, label, prediction) for metric in METRICS[self.kind]})
        return both[: len(test)]


def studied(case: Case, seed: int) -> tuple[Estimate, dict[str, float]]:
    """One study of a case, and what its fits score on the population, on average."""
    x, y, names, scans = case.draw(seed)
    pipeline = Measured(FeatureProbe(x, names, case.kind, case.probe), case.kind, np.arange(scans, len(y)))
    found = estimate(pipeline, case.kind, y, names, case.splits(y[:scans], names[:scans], seed), seed)
    return found, {metric: float(np.mean([one[metric] for one in pipeline.true])) for metric in METRICS[case.kind]}


def coverage(case: Case, repetitions: int) -> dict[str, tuple[float, float, float]]:
    """Metric → (truth, share of intervals that hold it, share that excludes chance).

    The truth of a held-out test set is that study's own fit on the population, that of cross-validation the mean over
    all studies.
    """
    studies = [studied(case, seed) for seed in range(repetitions)]
    table = {}
    for metric in METRICS[case.kind]:
        mean = float(np.mean([true[metric] for _, true in studies]))
        held, excluded = [], []
        for found, true in studies:
            one = found.intervals[metric]
            held.append(one.low <= (true[metric] if case.folds == 1 else mean) <= one.high)
            excluded.append(not one.low <= chance(metric, case.kind, found.y) <= one.high)
        table[metric] = (mean, float(np.mean(held)), float(np.mean(excluded)))
    return table


def paired_p_values(case: Case, repetitions: int) -> np.ndarray:
    """p-values of two encoders that are equally good: other features of the same subjects, as much effect."""
    values = []
    for seed in range(repetitions):
        x, y, names, scans = case.draw(seed)
        rng = np.random.default_rng(seed + 10**6)
        other = rng.normal(size=x.shape)
        if case.kind == "regression":
            other[:, 0] = case.effect * y + np.sqrt(1 - case.effect**2) * other[:, 0]
        else:
            other[np.arange(len(y)), y] += case.effect
        splits = case.splits(y[:scans], names[:scans], seed)
        both = [
            estimate(FeatureProbe(z, names, case.kind, case.probe), case.kind, y, names, splits, 0) for z in (x, other)
        ]
        values.append(paired_difference(*both, METRICS[case.kind][0]).p)
    return np.array(values)


def permutation_p_values(case: Case, repetitions: int, permutations: int) -> np.ndarray:
    """p-values of the permutation test."""
    values = []
    for seed in range(repetitions):
        x, y, names, scans = case.draw(seed)
        y, names = y[:scans], names[:scans]
        probe = FeatureProbe(x[:scans], names, case.kind, case.probe)
        splits = case.splits(y, names, seed)
        values.append(permutation_test(probe, case.kind, y, names, splits, seed, permutations).p)
    return np.array(values)


def plausible(share: float, low: float, high: float, repetitions: int) -> bool:
    """Is a share of so many repetitions one that a true rate within [low, high] gives, with 99 % at either end? At 200
    repetitions the bounds themselves are asked for."""
    if repetitions >= 200:
        return low <= share <= high
    count = round(share * repetitions)
    return bool(stats.binom.cdf(count, repetitions, low) > 0.01 and stats.binom.sf(count - 1, repetitions, high) > 0.01)


COVERED = [
    Case("47 subjects, no effect", "binary", 47, 16, 0.0, 13 / 47),
    Case("47 subjects", "binary", 47, 16, 1.3, 13 / 47, repeats=10),
    Case("60 subjects of 2 scans", "binary", 60, 16, 1.2, scans=2),
    Case("100 subjects, no effect", "binary", 100, 64, 0.0, 0.4),
    Case("100 subjects", "binary", 100, 64, 1.3, 0.4),
    Case("100 subjects, strong effect", "binary", 100, 16, 2.0),
    Case("60 subjects, kNN", "binary", 60, 16, 1.5, probe="knn"),
    Case("60 subjects, kNN, no effect", "binary", 60, 16, 0.0, probe="knn"),
    Case("75 subjects, no effect", "multiclass", 75, 16, 0.0),
    Case("75 subjects", "multiclass", 75, 16, 1.5),
    Case("50 subjects, no effect", "regression", 50, 16, 0.0, repeats=10),
    Case("60 subjects", "regression", 60, 16, 0.6, repeats=10),
    Case("100 subjects", "regression", 100, 64, 0.8, repeats=10),
    Case("80 subjects, half held out, no effect", "binary", 80, 16, 0.0, folds=1),
    Case("80 subjects, half held out", "binary", 80, 16, 1.5, folds=1),
    Case("150 subjects, half held out", "multiclass", 150, 16, 1.5, folds=1),
    Case("100 subjects, half held out", "regression", 100, 16, 0.6, folds=1),
]
PERMUTED = [
    Case("47 subjects", "binary", 47, 16, 0.0, 13 / 47),
    Case("40 subjects of 2 scans, kNN", "binary", 40, 16, 0.0, scans=2, probe="knn"),
    Case("60 subjects, half held out", "binary", 60, 16, 0.0, folds=1),
    Case("60 subjects", "regression", 60, 16, 0.0),
]
PAIRED = [
    Case("60 subjects, no effect", "binary", 60, 16, 0.0),
    Case("60 subjects", "binary", 60, 16, 1.5),
    Case("80 subjects, half held out", "binary", 80, 16, 1.5, folds=1),
    Case("60 subjects", "regression", 60, 16, 0.6),
]

if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    part = sys.argv[2] if len(sys.argv) > 2 else "all"
    for case in COVERED if part in ("all", "covered") else []:
        for metric, (true, held, excluded) in coverage(case, count).items():
            line = (
                f"{case.kind:<11}{case.dimensions:>3} {case.name:<40}{metric:<18} truth {true:6.3f}  covered {held:.3f}"
            )
            print(line + ("" if case.effect else f"  excludes chance {excluded:.3f}"), flush=True)
    for case in PAIRED if part in ("all", "tests") else []:
        print(
            f"{case.kind:<11}{case.name:<40}paired       p < .05: {(paired_p_values(case, count) < 0.05).mean():.3f}",
            flush=True,
        )
    for case in PERMUTED if part in ("all", "tests") else []:
        share = (permutation_p_values(case, count, 99) <= 0.05).mean()
        print(f"{case.kind:<11}{case.name:<40}permutation  p ≤ .05: {share:.3f}", flush=True)
