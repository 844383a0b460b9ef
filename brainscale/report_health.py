"""What the pages say of a run's monitors (`health.py` says what they measure): warnings, latest numbers, curves."""

import math
from functools import partial
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes

from brainscale.config import Config
from brainscale.figures import ABOVE, BLUE, INK, ORANGE, Metrics, Series, chart, draw_series, series, thin

MAX_MARKERS = 40
"""A curve of no more points shows them."""


class Warned(NamedTuple):
    """A warning that a run gave: its last sentence, the steps between which it was given and how often. holds: it was
    given at the latest probe; None for what no probe finds (spikes of the gradient)."""

    code: str
    sentence: str
    first: int
    last: int
    times: int
    holds: bool | None


class Reference(NamedTuple):
    """A horizontal line of a chart."""

    label: str
    value: float
    style: str = "--"


def probes(metrics: Metrics) -> Metrics:
    """The lines that the monitors wrote."""
    return {step: line for step, line in metrics.items() if "std_median" in line}


def warned(metrics: Metrics) -> list[Warned]:
    """The warnings of a run by code, those that hold at the latest probe first, then in order of appearance."""
    latest = list(probes(metrics).values())[-1:]
    holding = set(latest[0].get("collapse", ())) if latest else set()
    judged = {code for line in metrics.values() for code in line.get("collapse", ())}
    found: dict[str, Warned] = {}
    for step, line in metrics.items():
        for code, sentence in line.get("warnings", {}).items():
            before = found.get(code)
            holds = code in holding if code in judged else None
            first, times = (before.first, before.times + 1) if before else (step, 1)
            found[code] = Warned(code, sentence, first, step, times, holds)
    return sorted(found.values(), key=lambda warning: not warning.holds)


def monitors(metrics: Metrics, config: Config) -> dict[str, Any]:
    """What a page says of the monitors. first, latest: their numbers with random weights (step 0) and now, None for
    what is not known; probes: how many there were after step 0; collapsed: whether one found signs of it; gap_judged:
    whether the run is judged by the gap yet."""
    found = probes(metrics)
    steps, warnings = list(found), warned(metrics)
    return {
        "step": steps[-1] if steps else None,
        "probes": sum(step > 0 for step in steps),
        "first": known(found.get(0, {})),
        "latest": known(found[steps[-1]] if steps else {}),
        "warned": warnings,
        "collapsed": any(w.holds is not None and w.code != "gap" for w in warnings),
        "gap_judged": bool(steps) and steps[-1] >= max(1, config.health.gap_after_steps),
    }


def known(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the monitors with None for every number that it lacks or that is not finite."""
    keys = ("effective_rank", "std_low", "std_median", "std_high", "lidar", "gap", "error_over_average",
            "teacher_cosine", "mask_distance_tokens", "probe_volumes", "probe_tokens")  # fmt: skip
    values = {key: line.get(key) for key in keys}
    return {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}


# ------------------------------------------------------------------------------------------------- charts


def health_charts(metrics: Metrics, config: Config) -> dict[str, Markup]:
    """Title → chart, of every monitor that gave a number."""
    settings, found = config.health, probes(metrics)
    ranks = []
    if start := known(found.get(0, {}))["effective_rank"]:
        ranks = [Reference("random weights", start)]
        ranks += [warning_below(settings.min_rank_fraction * start)] if config.objective == "jepa" else []
    gaps, spreads = [warning_below(settings.min_gap)], [warning_below(settings.min_std)]
    charts = {}
    for title, key, references, log in (
        ("effective rank", "effective_rank", ranks, False),
        ("gap: own subject against another", "gap", gaps, False),
        ("standard deviation of embeddings", "std_median", spreads, False),
        ("error over that of the average", "error_over_average", [Reference("average of other volumes", 1.0)], True),
        ("cosine of student and teacher", "teacher_cosine", [], False),
        ("LiDAR", "lidar", [], False),
    ):
        curve = series(found, key)
        if len(curve[0]):
            between = (series(found, "std_low"), series(found, "std_high")) if key == "std_median" else None
            charts[title] = chart(
                partial(draw_monitor, curve=curve, references=references, log=log, between=between), key
            )
    return charts


def online_charts(metrics: Metrics) -> dict[str, Markup]:
    """Title → chart, of the probes on labelled scans during training, where the run has them."""
    charts = {}
    for title, key, level in (
        ("AUROC of the probe", "probe_auroc", 0.5),
        ("AUPRC of the probe", "probe_auprc", None),
        ("balanced accuracy of the probe", "probe_balanced_accuracy", None),
        ("mean absolute error of the probe", "probe_mae", None),
        ("R² of the probe", "probe_r2", 0.0),
    ):
        curve = series(metrics, key)
        if len(curve[0]):
            lines = [] if level is None else [Reference("chance", level)]
            charts[title] = chart(partial(draw_monitor, curve=curve, references=lines, log=False), key)
    return charts


def warning_below(value: float) -> Reference:
    """Where a monitor begins to warn."""
    return Reference(f"warning below {value:.3g}", value, ":")


def draw_monitor(
    ax: Axes, curve: Series, references: list[Reference], log: bool, between: tuple[Series, Series] | None = None
) -> None:
    """A curve with horizontal lines of reference, and a filled band `between` two others at the same steps."""
    draw_series(ax, curve, log=log, noisy=False)
    if len(curve[0]) <= MAX_MARKERS:
        ax.plot(*curve, "o", color=BLUE, markersize=3)
    handles = []
    if between is not None and len(between[0][0]) == len(between[1][0]):
        (x, low), (_, high) = (thin(*edge, False) for edge in between)
        ax.plot([], [], color=BLUE, label="median")
        handles = [ax.lines[-1], ax.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0, label="5 to 95 %")]
    for label, value, style in references:
        colour = ORANGE if style == ":" else INK
        handles.append(ax.axhline(value, color=colour, linewidth=1, linestyle=style, label=label))
    if handles:
        ax.legend(handles=handles, **ABOVE)
