"""How the page of an evaluation writes numbers, and what it says of them.

The words follow from the numbers: what an interval or a test leaves open is "not told apart".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from brainscale.score_file import Metric, Number, Paired, Score, TaskScores, Valued

METRICS: dict[str, tuple[str, bool]] = {
    "auroc": ("AUROC", True),
    "auprc": ("AUPRC", True),
    "balanced_accuracy": ("balanced accuracy", True),
    "mae": ("mean absolute error", False),
    "r2": ("R²", True),
}
"""How a metric is written, and whether more is better."""
MOST = {"auroc": 1.0, "r2": 1.0}
"""The best that a metric can be."""
PROBES = {"linear": "linear", "knn": "kNN", "attentive": "attentive", "finetune": "fine-tuned", "cnn": "trained CNN"}
"""How a probe is written. Of an encoder's probes the sentences take the first of these, whatever its score."""
LEVEL = 0.05
"""A p-value from here on leaves it open whether there is a difference."""


class Verdict(NamedTuple):
    """A sentence with its class on the page: good, bad or past (left open)."""

    kind: str
    sentence: str


def figure(value: Number) -> str:
    """A number of the page, n/a where it is not known."""
    return "n/a" if value is None else f"{value:z,.3f}".replace("-", "−")


def signed(value: Number) -> str:
    """A difference."""
    return figure(value) if value is None or figure(value) == "0.000" or value < 0 else f"+{figure(value)}"


def interval(low: Number, high: Number, written: Callable[[Number], str] = figure) -> str:
    """The ends of an interval."""
    return "no interval" if low is None or high is None else f"[{written(low)}, {written(high)}]"


def p_value(p: Number) -> str:
    """A p-value; one that rounds to zero is below 0.001."""
    return "n/a" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float) -> str:
    """A p-value in a sentence, not to be torn apart."""
    return f"p = {p_value(p)}".replace("= <", "<").replace(" ", "\u00a0")


def probe_name(probe: str) -> str:
    """A probe as it is written."""
    return PROBES.get(probe, probe)


def place(probe: str) -> tuple[int, str]:
    """By what probes are ordered."""
    return [*PROBES, probe].index(probe), probe


def chance(metric: str, task: TaskScores) -> float | None:
    """What a metric is without any knowledge; None where that depends on the data (AUPRC, mean absolute error)."""
    if metric == "balanced_accuracy":
        return 1 / len(task.classes) if task.classes else None
    return {"auroc": 0.5, "r2": 0.0}.get(metric)


# ------------------------------------------------------------------------------------------------- verdicts


def against(value: Valued, level: float) -> str:
    """Whether a score is told apart from chance: both its interval and its permutation test must say so."""
    if value.value is None or value.low is None or value.high is None:
        return "without an interval, so nothing follows from it"
    if value.low <= level <= value.high:
        return "not told apart from chance"
    p = getattr(value, "p_permutation", None)
    if p is not None and p >= LEVEL:
        return f"not told apart from chance (its interval excludes it, the permutation test does not: {p_equals(p)})"
    return "above chance" if value.low > level else "below chance"


def difference(pair: Paired) -> Verdict:
    """Whether two encoders are told apart on the same subjects: both the interval and the test must say so."""
    name, more_is_better = METRICS[pair.metric]
    test = "" if pair.p is None else f", {p_equals(pair.p)}"
    words = f"difference in {name} {signed(pair.difference)} {interval(pair.low, pair.high, signed)}{test}"
    if pair.difference is None or pair.low is None or pair.high is None:
        return Verdict("past", f"{pair.a} and {pair.b}: {words}, so nothing follows from it.")
    if pair.low <= 0 <= pair.high or (pair.p is not None and pair.p >= LEVEL):
        return Verdict("past", f"{pair.a} is not told apart from {pair.b}: {words}.")
    better = (pair.difference > 0) == more_is_better
    kind, word = ("good", "better") if better else ("bad", "worse")
    return Verdict(kind, f"{pair.a} is {word} than {pair.b}: {words}.")


def headline(task: TaskScores, encoder: str, metric: str) -> Score | None:
    """The score of an encoder that sentences are about: its first probe in the order of PROBES."""
    found = {s.probe: s for s in task.scores if s.encoder == encoder and s.metric == metric and s.value is not None}
    return found[min(found, key=place)] if found else None


def verdicts(task: TaskScores, encoders: Sequence[str], baselines: set[str]) -> list[Verdict]:
    """What can be said of every encoder that is no baseline: against chance, paired, and against the best baseline."""
    judged: Metric = "r2" if task.kind == "regression" else "auroc"
    level, main = chance(judged, task) or 0.0, "mae" if judged == "r2" else judged
    found, scored = [], [score for name in encoders if (score := headline(task, name, judged))]
    mine = [score for score in scored if score.encoder not in baselines]
    for score in mine:
        word = against(score, level)
        kind = {"above chance": "good", "below chance": "bad"}.get(word, "past")
        found.append(Verdict(kind, f"{named(score)}: {in_numbers(score)}, {word}."))
        pairs = [pair for pair in task.paired if pair.a == score.encoder and pair.metric == main]
        found += [difference(pair) for pair in pairs if pair.probe == score.probe]
    others = [score for score in scored if score.encoder in baselines]
    if mine and others:
        best = max(others, key=lambda score: (score.value or 0.0, score.encoder))
        below = [score.encoder for score in mine if (score.value or 0.0) <= (best.value or 0.0)]
        reached = f"The best baseline, {named(best)}, reaches {in_numbers(best)}"
        kind, rest = ("bad", f", no less than {', '.join(below)}") if below else ("past", ", less than every encoder")
        found.append(Verdict(kind, f"{reached}{rest}."))
    return found


def named(score: Score) -> str:
    """Whose score."""
    return f"{score.encoder} ({probe_name(score.probe)})"


def in_numbers(score: Score) -> str:
    """What it is."""
    return f"{METRICS[score.metric][0]} {figure(score.value)} {interval(score.low, score.high)}"
