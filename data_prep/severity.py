"""How ill each synthetic subject is: labels, and the severity behind each label, which makes its effect size known.

A label says from which of two normal distributions of unit variance a severity comes; the severity decides how large
the effect is, in healthy subjects as in ill ones. So no test can tell the labels apart better than the severity itself:
its AUROC, the oracle's, is Φ(d / √2) for means d apart (Green and Swets 1966, Signal Detection Theory and
Psychophysics). No arrays of voxels here.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import mannwhitneyu, norm

from brainscale.settings import InputError

TASKS = ("atrophy", "lesions", "sharpness", "mass", "distributed")
"""Each is a column label_NAME of participants.tsv and a column severity_NAME of truth.tsv."""
ORACLE_AUROC = 0.85
SEPARATION = float(np.sqrt(2) * norm.ppf(ORACLE_AUROC))
"""d: mean severity of label 1 minus that of label 0, in standard deviations within a label."""
NUM_REGIONS = 12
"""Parts of the distributed severity. Each has d / √12: alone it tells the labels apart at an AUROC of 0.62."""
BLOCK = 8


class Oracle(NamedTuple):
    """AUROC of the severity in one cohort, and its interval at 95 %; NaN where a label has one value alone."""

    auroc: float
    low: float
    high: float


def stream(seed: int, purpose: int, number: int, part: int) -> np.random.Generator:
    """A random stream per key. Keys have one length, since numpy pads shorter ones with zeros to equal streams."""
    return np.random.default_rng([seed, purpose, number, part])


def draw_labels(seed: int, number: int, tasks: Sequence[str]) -> dict[str, int]:
    """0 or 1 per task (at most 7) of subject `number` (from 1) of cohort `seed`; the cohort's size does not enter.

    In every eight subjects each label is 1 four times, and each pair of labels has each combination twice: the columns
    are parities of the row's three bits, an orthogonal array of strength 2 (Rao 1947, J. R. Stat. Soc. Suppl. 9:128).
    Which parities, their signs and the rows' order are drawn anew for every eight.
    """
    block, place = divmod(number - 1, BLOCK)
    rng = stream(seed, 0, block, 0)
    row = int(rng.permutation(BLOCK)[place])
    parities, flips = rng.permutation(np.arange(1, BLOCK)), rng.integers(2, size=BLOCK - 1)
    bits = [(int(parity) & row).bit_count() % 2 for parity in parities]
    return {task: bit ^ int(flip) for task, bit, flip in zip(tasks, bits, flips, strict=False)}


def draw_severities(seed: int, number: int, labels: Mapping[str, int]) -> tuple[dict[str, float], np.ndarray]:
    """Severity per task, normal around ±d/2 with variance 1, and the (12,) independent parts of the distributed one.

    The parts' sum over √12 is the distributed severity, and the best there is to tell from all of them.
    """
    severities = {}
    for task, label in labels.items():
        noise = stream(seed, 3, number, TASKS.index(task)).standard_normal()
        severities[task] = float(noise + SEPARATION * (label - 0.5))
    parts = stream(seed, 4, number, 0).standard_normal(NUM_REGIONS)
    parts += SEPARATION * (labels.get("distributed", 0) - 0.5) / np.sqrt(NUM_REGIONS)
    if "distributed" in labels:
        severities["distributed"] = distributed(parts)
    return severities, parts


def distributed(parts: np.ndarray) -> float:
    """Severity of a subject whose regions have severities `parts` (12,)."""
    return float(parts.sum() / np.sqrt(NUM_REGIONS))


def moved(parts: np.ndarray, severity: float) -> np.ndarray:
    """(12,) parts shifted alike, so that their distributed severity is `severity`."""
    return parts + (severity - distributed(parts)) / np.sqrt(NUM_REGIONS)


def rising(severity: float | np.ndarray, middle: float, slope: float) -> float | np.ndarray:
    """From a severity to a size between 0 and 1 with log odds `middle` + `slope` × severity: no severity is cut off."""
    size = expit(middle + slope * severity)
    return float(size) if np.ndim(size) == 0 else size


# ------------------------------------------------------------------------------------------------- confounds


def parse_confound(text: str) -> tuple[str, float]:
    """("label_mass", 0.8) from "label_mass=0.8". Raises InputError."""
    label, _, share = text.partition("=")
    try:
        strength = float(share)
    except ValueError:
        strength = -1.0
    known = [f"label_{task}" for task in TASKS]
    if label not in known or not 0 <= strength <= 1:
        raise InputError(f"confound = {text!r}: give LABEL=STRENGTH with a strength from 0 to 1 and a label of {known}")
    return label, strength


def confounded_site(
    seed: int, number: int, labels: Mapping[str, int], confound: tuple[str, float], site: str, sites: Sequence[str]
) -> str:
    """The site once it follows a label: with the confound's strength as probability, subjects with label 1 are scanned
    at the last site and those with label 0 at one of the others; else at `site`, which was drawn without looking."""
    label, strength = confound
    rng = stream(seed, 5, number, 0)
    if rng.random() >= strength:
        return site
    return sites[-1] if labels[label.removeprefix("label_")] else sites[int(rng.integers(len(sites) - 1))]


# ------------------------------------------------------------------------------------------------- the oracle


def oracle(labels: Sequence[int], severities: Sequence[float]) -> Oracle:
    """AUROC of severities (n,) for labels (n,), with Newcombe's interval (2006, Stat. Med. 25:559, method 5).

    The interval holds the values θ that are within 1.96 standard errors of the estimate, the error being that of
    Hanley and McNeil (1982, Radiology 143:29) at θ; it neither leaves [0, 1] nor shrinks to nothing at 1.
    """
    label, severity = np.asarray(labels), np.asarray(severities, float)
    ill, healthy = severity[label == 1], severity[label == 0]
    if not ill.size or not healthy.size:
        return Oracle(np.nan, np.nan, np.nan)
    auroc = float(mannwhitneyu(ill, healthy).statistic / (ill.size * healthy.size))
    others, z = (ill.size + healthy.size) / 2 - 1, float(norm.ppf(0.975))

    def beyond(theta: float) -> float:
        spread = 1 + others * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (theta - auroc) ** 2 - z**2 * theta * (1 - theta) * spread / (ill.size * healthy.size)

    inner = min(max(auroc, 1e-9), 1 - 1e-9)  # at 0 and 1 themselves the error is 0
    low = 0.0 if auroc == 0 else float(brentq(beyond, 0, inner))
    high = 1.0 if auroc == 1 else float(brentq(beyond, inner, 1))
    return Oracle(auroc, low, high)
