"""What a test set can resolve, from its size alone, before any model is looked at."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from brainscale.scores import METRICS, chance

CORRELATION = 0.5
"""Assumed between two models' scores on the same subjects."""
TYPICAL_AUROC = 0.80
SIGNIFICANT = stats.norm.ppf(0.975)
POWERED = stats.norm.ppf(0.80)


@dataclass(frozen=True)
class Power:
    """The main metric's 95 % half-width, and the smallest differences found with 80 % power at two-sided 0.05."""

    metric: str
    half_width: float
    smallest_difference: float
    """Between two models on the same subjects."""
    smallest_above_chance: float | None
    """Above chance; None for MAE."""
    sentence: str


def auroc_error(auroc: float, positive: int, negative: int) -> float:
    """Standard error of an AUROC (Hanley & McNeil 1982, with Q1 = A/(2-A) and Q2 = 2A²/(1+A))."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + (positive - 1) * (q1 - auroc**2) + (negative - 1) * (q2 - auroc**2)
    return float(np.sqrt(variance / (positive * negative)))


def power(kind: str, y: np.ndarray, correlation: float = CORRELATION, auroc: float = TYPICAL_AUROC) -> Power:
    """y: (n,) labels of the test subjects (of cross-validation: of all). correlation: between two models' scores.

    AUROC: Hanley & McNeil; of several classes the mean of each class's error against the rest, as if these went
    together. MAE: of normal errors, whose absolute values have a deviation of 0.756 of their mean, at the MAE of always
    saying the median. The difference between two models has the error √(2 (1 - correlation)) times that of one. What
    refitting adds in cross-validation comes on top: up to √2.
    """
    metric, n = METRICS[kind][0], len(y)
    paired = (SIGNIFICANT + POWERED) * np.sqrt(2 * (1 - correlation))
    stated = f"({100 * 0.8:.0f} % power, correlation {correlation:g})"
    if kind == "regression":
        typical = chance("mae", kind, y)
        error = typical * np.sqrt(np.pi / 2 - 1) / np.sqrt(n)
        half, difference = float(SIGNIFICANT * error), float(paired * error)
        sentence = (
            f"{n} test subjects: ±{half:.2g} at an MAE of {typical:.3g} (that of always saying the median); "
            f"a paired difference below {difference:.2g} cannot be told from none {stated}"
        )
        return Power(metric, half, difference, None, sentence)
    counts = np.bincount(y)
    sides = [(int(c), int(n - c)) for c in counts[1 if len(counts) == 2 else 0 :]]

    def error_at(value: float) -> float:
        return float(np.mean([auroc_error(value, *side) for side in sides]))

    half, difference = float(SIGNIFICANT * error_at(auroc)), float(paired * error_at(auroc))
    grid = np.linspace(0.5, 1, 501)
    found = [a for a in grid if a - 0.5 >= SIGNIFICANT * error_at(0.5) + POWERED * error_at(a)]
    above = float(found[0] - 0.5) if found else 0.5
    sentence = (
        f"{n} test subjects ({'/'.join(map(str, counts))}): ±{half:.2f} at AUROC {auroc:.2f}; "
        f"a paired difference below {difference:.2f} cannot be told from none {stated}"
    )
    return Power(metric, half, difference, above, sentence)
