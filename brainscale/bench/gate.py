"""`brainscale bench compare`: whether anything became slower than a threshold, beyond doubt.

What is judged is the time of a variant over that of the reference that ran in turn with it (the inverse of a line's
`ratio`), never seconds: a slower machine slows both. A file may hold a line several times, once for every run that was
appended to it; more runs, or more rounds in one, make the answer sharper.

Of one run: the 20 % trimmed mean of the logarithms of its pairs, with Yuen's standard error, from the winsorised ones
(Yuen, Biometrika 61, 1974, 165-170), so that a round in which something else ran counts little. Older lines are without
pairs; there the spread of seconds serves, which is wider.

Between runs, ratios differ by more than their rounds show, by how memory happens to be laid out and the like (Mytkowicz
et al., Producing wrong data without doing anything obviously wrong, ASPLOS 2009). This variance is a random effect, as
in Kalibera and Jones (Rigorous benchmarking in reasonable time, ISMM 2013): estimated over all lines of a benchmark
that a file holds several times, as what the variance of runs exceeds that within them, and never taken to be less than
RUN_TO_RUN squared. Degrees of freedom are Welch's and Satterthwaite's.

Of all lines together: each has an interval of 1 - 0.05 / (number of lines judged) by Student's t (Bonferroni's; Dunn,
JASA 56, 1961, 52-64), so that with 95 % all of them hold at once, however they depend on each other. An interval beyond
the threshold is "slower" or "faster", one within it to both sides "same", any other "cannot tell", with the rounds that
would do. Since all of the threshold would have to be noise, identical runs are called slower far more seldom than that.

What was counted does not vary, and is compared exactly.
"""

import bisect
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from brainscale.bench.schema import Line, Measured, only

ALPHA, TRIM = 0.05, 0.2
RUN_TO_RUN = 0.01
"""Least standard deviation of a ratio from run to run, as a share of it."""
MAX_RUNS, MIN_ROUNDS = 1000, 5
FEW = f"too few rounds are kept, {MIN_ROUNDS} are the least; run it without --quick, or append runs"
OURS = "brainscale"
"""How the names of our variants begin. In a case that has such, all others are peers."""
PEERS = ("MONAI",)
"""How the names of peers begin in cases where ours are called otherwise."""
Key = tuple[str, str, str]


class Run(NamedTuple):
    """Of one run: log time against the reference, the variance of that within the run, and its degrees of freedom."""

    mean: float
    variance: float
    freedom: float
    rounds: int


class Drift(NamedTuple):
    """Variance from run to run, and its degrees of freedom."""

    variance: float
    freedom: float


class Judgement(NamedTuple):
    """What is said of a line. before, after: `ratio` of the newest line of each file (of what is counted, the count);
    change, low, high: of the time against the reference (or of the count), as shares, 0.1 for 10 % more; None where
    there is none. failed: it is a regression. turned: ours is the reference; figures are of ours to this variant."""

    key: Key
    before: float
    after: float
    verdict: str
    why: str = ""
    change: float | None = None
    low: float | None = None
    high: float | None = None
    failed: bool = False
    turned: bool = False


def judge(before: Sequence[Line], after: Sequence[Line], threshold: float) -> list[Judgement]:
    """Judgements of all lines that both sides have, but the references. threshold: a share, 0.1 for 10 %. Pure."""
    old, new = by_key(before), by_key(after)
    found: dict[Key, Judgement] = {}
    runs: dict[Key, list[list[Run]]] = {}
    for key in (key for key in old if key in new):
        one, other = old[key][-1], new[key][-1]
        if one.variant == one.ratio_to or other.variant == other.ratio_to:
            continue
        sign = direction(one, {name for bench, case, name in old if (bench, case) == key[:2]})
        if reason := why_not(one, other, sign):
            found[key] = Judgement(key, one.ratio, other.ratio, "not judged", reason)
        elif is_exact(one):
            found[key] = exactly(key, one.median, other.median, threshold)
        else:
            was, now = (line.ratio if sign < 0 else 1 / line.ratio for line in (one, other))
            found[key] = Judgement(key, was, now, "cannot tell", FEW, turned=sign > 0)
            sides = [runs_of(key, lines, sign) for lines in (old, new)]
            if all(sum(run.rounds for run in side) >= MIN_ROUNDS for side in sides):
                runs[key] = sides
    for key, (a, b) in runs.items():
        beside = [side for other, sides in runs.items() if other[0] == key[0] for side in sides]
        found[key] = by_interval(found[key], a, b, drift(beside), threshold, ALPHA / len(runs))
    return list(found.values())


def by_key(lines: Sequence[Line]) -> dict[Key, list[Measured]]:
    """Measured lines by benchmark, case and variant: one for every run."""
    found: dict[Key, list[Measured]] = {}
    for line in only(lines, Measured):
        found.setdefault((line.bench, line.case, line.variant), []).append(line)
    return found


def direction(line: Measured, variants: set[str]) -> int:
    """-1 where a line's ratio is of ours to something else, 1 where it is of a peer to ours, 0 where it is of two
    peers. variants: all of the case. Pure."""
    ours = {name for name in variants if name.startswith(OURS)}
    if not ours:
        return 0 if line.variant.startswith(PEERS) else -1
    return -1 if line.variant in ours else 1 if line.ratio_to in ours else 0


def why_not(one: Measured, other: Measured, sign: int) -> str:
    """Why two lines are not judged; "" when they are."""
    if one.ratio_to != other.ratio_to:
        return f"the reference was {one.ratio_to}, and is {other.ratio_to}"
    if sign == 0 or (sign == 1 and is_exact(one)):
        return "a peer's"
    kind = next((line.kind for line in (one, other) if line.kind in ("simulated", "derived")), None)
    return f"{kind} from other lines" if kind else ""


def is_exact(line: Measured) -> bool:
    """Whether a figure does not vary."""
    return line.kind in ("counted", "compiled") or (line.kind is None and line.unit != "s")


def exactly(key: Key, before: float, after: float, threshold: float) -> Judgement:
    """The judgement of a count. Pure."""
    change = after / before - 1 if before else math.inf if after else 0.0
    verdict = "more" if change > 0 else "fewer" if change < 0 else "same"
    return Judgement(key, before, after, verdict, "", change, failed=change > threshold)


def usable(pairs: list[float]) -> bool:
    """Whether pairs say how they vary: several, and none of a difference that noise has turned negative."""
    return len(pairs) > 1 and min(pairs) > 0


def runs_of(key: Key, lines: dict[Key, list[Measured]], sign: int) -> list[Run]:
    """All runs of a line that say how they vary; of older lines, which are without pairs, by the spread of seconds."""
    own = lines[key]
    references = lines.get((*key[:2], own[-1].ratio_to), [])
    if any(line.pairs is not None for line in own) or len(own) != len(references):
        return [run_of(line.pairs, sign) for line in own if line.pairs and usable(line.pairs)]
    both = ((line, reference) for line, reference in zip(own, references) if min(line.p20, reference.p20) > 0)
    return [run_by_spread(line, reference, sign) for line, reference in both if line.n > 1]


def run_by_spread(line: Measured, reference: Measured, sign: int) -> Run:
    """From the percentiles of both, as if normal and independent, which pairs seldom are: no narrower than they would
    say. The variance of a median is π / 2 of a mean's. Pure."""
    deviations = ((math.log(one.p80) - math.log(one.p20)) / (2 * stats.norm.ppf(0.8)) for one in (line, reference))
    variance = math.pi / 2 * sum(deviation**2 for deviation in deviations) / line.n
    return Run(sign * math.log(line.ratio), float(variance), line.n - 1, line.n)


def run_of(pairs: list[float], sign: int) -> Run:
    """Trimmed mean of the logarithms of the pairs times `sign`, and Yuen's variance of it. Pure."""
    logs = sign * np.log(np.sort(pairs))
    cut = int(TRIM * len(logs))
    kept = np.sort(logs)[cut : len(logs) - cut]
    winsorised = np.clip(logs, kept[0], kept[-1])
    variance = float(((winsorised - winsorised.mean()) ** 2).sum()) / (len(kept) * (len(kept) - 1))
    return Run(float(kept.mean()), variance, len(kept) - 1, len(logs))


def drift(sides: Sequence[Sequence[Run]]) -> Drift:
    """Variance from run to run, from the sides that have several: the mean square between their runs, less what is
    within them. Pure."""
    freedom = sum(len(side) - 1 for side in sides)
    if not freedom:
        return Drift(RUN_TO_RUN**2, math.inf)
    several = [side for side in sides if len(side) > 1]
    excess = sum(
        (len(side) - 1)
        * (statistics.variance(run.mean for run in side) - statistics.fmean(run.variance for run in side))
        for side in several
    )
    if excess / freedom <= RUN_TO_RUN**2:
        return Drift(RUN_TO_RUN**2, math.inf)
    return Drift(excess / freedom, freedom)


def half_width(parts: Sequence[tuple[float, float]], alpha: float) -> float:
    """Of an interval in logarithms, whose variance is the sum of parts with their degrees of freedom. Pure."""
    variance, uncertain = sum(part for part, _ in parts), sum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / uncertain if uncertain else math.inf
    return float(stats.t.ppf(1 - alpha / 2, freedom)) * math.sqrt(variance)


def by_interval(
    line: Judgement, before: list[Run], after: list[Run], between: Drift, threshold: float, alpha: float
) -> Judgement:
    """The line with its change, interval and verdict. Pure."""
    change = statistics.fmean(run.mean for run in after) - statistics.fmean(run.mean for run in before)
    sides = before, after
    parts = [(run.variance / len(side) ** 2, run.freedom) for side in sides for run in side]
    parts.append((between.variance * sum(1 / len(side) for side in sides), between.freedom))
    half, limit = half_width(parts, alpha), math.log1p(threshold)
    low, high = change - half, change + half
    if low > limit:
        verdict, why = "slower", ""
    elif high < -limit:
        verdict, why = "faster", ""
    elif -limit <= low and high <= limit:
        verdict, why = "same", ""
    else:
        wanted = max(limit / 10, min(limit / 2, abs(abs(change) - limit)))
        verdict, why = "cannot tell", runs_needed(before, after, between, wanted, alpha)
    change, low, high = (math.expm1(min(value, 100.0)) for value in (change, low, high))  # a float has an end
    return line._replace(verdict=verdict, why=why, change=change, low=low, high=high, failed=verdict == "slower")


def runs_needed(before: list[Run], after: list[Run], between: Drift, wanted: float, alpha: float) -> str:
    """How many rounds, in runs like those of the lines, make an interval as narrow as `wanted` (logarithms). Pure."""
    rounds = max(run.rounds for run in (*before, *after))
    sides = [
        (statistics.fmean(run.variance for run in side), statistics.fmean(run.freedom for run in side))
        for side in (before, after)
    ]

    def enough(count: int) -> bool:
        parts = [(variance / count, freedom * count) for variance, freedom in sides]
        return half_width([*parts, (2 * between.variance / count, between.freedom)], alpha) <= wanted

    count = bisect.bisect_left(range(MAX_RUNS), True, lo=max(len(before), len(after)) + 1, key=enough)
    if count == MAX_RUNS:
        return f"more than {MAX_RUNS * rounds} rounds would be needed"
    return f"{count * rounds} rounds would: {count} such runs in either file"
