"""The charts of an evaluation: where a forest plot's marks lie, few-shot curves, maps of embeddings.

Names are the user's and may be anything, so no chart holds one: the page writes them beside it.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from brainscale.figures import BLUE, GREEN, INK, MAX_POINTS, ORANGE, chart
from brainscale.score_file import Encoder, Map, Shots

QUIET = "#8a94a3"
"""Colour of baselines, and of what is not known."""
COLOURS = (BLUE, ORANGE, GREEN, "#a35fb0", "#b0993a", "#c2527a")
DASHES = {"solid": "-", "dashed": "--", "dotted": ":", "double": "-."}
"""How CSS and matplotlib call a line's style."""
CLASSES = len(COLOURS)
"""Categories that a map gives a colour of their own; rarer ones are grey together."""
GRADIENT = ("#3b2a7a", "#2f8f8a", "#e0b62f")
"""Colours of a number from its least to its most."""


class Style(NamedTuple):
    """How an encoder is drawn; dashes as CSS calls them."""

    colour: str
    dashes: str


class Mark(NamedTuple):
    """A row of a forest plot, in percent of its width: value, ends of its interval (None: not known)."""

    at: float | None
    low: float | None
    high: float | None


class Scale(NamedTuple):
    """The horizontal axis of a forest plot: its ticks, of which the first and last are its ends."""

    ticks: tuple[float, ...]

    def percent(self, value: float | None) -> float | None:
        """Where a value lies."""
        low, high = self.ticks[0], self.ticks[-1]
        return None if value is None else round(100 * (value - low) / (high - low), 2)

    def mark(self, value: float | None, low: float | None, high: float | None) -> Mark:
        """Where a value and its interval lie."""
        return Mark(self.percent(value), self.percent(low), self.percent(high))


def styles(encoders: Sequence[Encoder]) -> dict[str, Style]:
    """Name → style: a colour for every encoder, grey and a style of line for every baseline; they repeat beyond."""
    found, seen = {}, {True: 0, False: 0}
    for encoder in encoders:
        is_baseline = encoder.kind == "baseline"
        number = seen[is_baseline]
        dashes = tuple(DASHES)
        if is_baseline:
            found[encoder.name] = Style(QUIET, dashes[number % len(dashes)])
        else:
            found[encoder.name] = Style(COLOURS[number % CLASSES], dashes[number // CLASSES % len(dashes)])
        seen[is_baseline] += 1
    return found


def scale(values: Sequence[float | None], lines: Sequence[float | None] = (), most: float | None = None) -> Scale:
    """Round ticks from below the least of all values to above the highest, the lines (chance, zero) among them.

    most: no tick is needed beyond, unless a value is there.
    """
    known = [value for value in (*values, *lines) if value is not None] or [0.0, 1.0]
    low, high = min(known), max(known)
    pad = max(0.03 * (high - low), 0.01)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low - pad, high + pad)
    kept = [round(float(tick), 10) for tick in ticks]
    while most is not None and high <= most and len(kept) > 2 and kept[-2] >= most:
        kept.pop()
    return Scale(tuple(kept))


# ------------------------------------------------------------------------------------------------- charts


def few_shot(
    points: Sequence[Shots], drawn_as: dict[str, Style], chance: float | None, labels: tuple[str, str], name: str
) -> Markup:
    """Curves of a metric over the labelled subjects per class, an encoder each, with their intervals as bands.

    labels: of the axes.
    """
    return chart(partial(_few_shot, points=points, drawn_as=drawn_as, chance=chance, labels=labels), name)


def _few_shot(
    ax: Axes, points: Sequence[Shots], drawn_as: dict[str, Style], chance: float | None, labels: tuple[str, str]
) -> None:
    for encoder, (colour, dashes) in drawn_as.items():
        curve = sorted((p for p in points if p.encoder == encoder and p.value is not None), key=_shots)
        whole = [p for p in curve if p.low is not None and p.high is not None]
        low, high = ([end for p in whole if (end := getattr(p, side)) is not None] for side in ("low", "high"))
        ax.fill_between([_shots(p) for p in whole], low, high, color=colour, alpha=0.13, linewidth=0)
        ax.plot([_shots(p) for p in curve], [p.value or 0.0 for p in curve], color=colour, linestyle=DASHES[dashes],
                linewidth=1.5, marker="o", markersize=3)  # fmt: skip
    if chance is not None:
        ax.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
    shots = sorted({_shots(p) for p in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(shots, [f"{n:,}" for n in shots])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])


def _shots(point: Shots) -> int:
    return point.shots_per_class


def panel(found: Map, values: Sequence[str | float | None], name: str) -> dict[str, Any]:
    """A map coloured by `values`: its chart, and the legend as (colour, text, points), or the range of a number."""
    numbers = [value for value in values if isinstance(value, float | int)]
    if numbers and len(numbers) == sum(value is not None for value in values) and len(set(numbers)) > CLASSES:
        low, high = min(numbers), max(numbers)
        parts = [None if value is None else (value - low) / (high - low) for value in map(_number, values)]
        colours = [QUIET if part is None else _between(part) for part in parts]
        unknown = len(values) - len(numbers)
        legend = [(QUIET, "not known", unknown)] if unknown else []
        return {"chart": _scatter(found, colours, name), "legend": legend, "range": (low, high)}
    counts = Counter(_text(value) for value in values if value is not None)
    common = [text for text, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    colour_of = dict(zip(sorted(common[:CLASSES]), COLOURS))
    colours = [QUIET if value is None else colour_of.get(_text(value), QUIET) for value in values]
    legend = [(colour, text, counts[text]) for text, colour in colour_of.items()]
    if rare := len(common[CLASSES:]):
        legend.append((QUIET, f"{rare:,} others", sum(counts[text] for text in common[CLASSES:])))
    if unknown := len(values) - counts.total():
        legend.append((QUIET, "not known", unknown))
    return {"chart": _scatter(found, colours, name), "legend": legend, "range": None}


def _number(value: str | float | None) -> float | None:
    return value if isinstance(value, float | int) else None


def _text(value: str | float | None) -> str:
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def _between(part: float) -> str:
    """The colour at a part, 0 to 1, of GRADIENT."""
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in GRADIENT], dtype=float)
    found = [round(float(np.interp(part, np.linspace(0, 1, len(stops)), channel))) for channel in stops.T]
    return "#" + "".join(f"{level:02x}" for level in found)


def _scatter(found: Map, colours: Sequence[str], name: str) -> Markup:
    def draw(ax: Axes) -> None:
        many = len(found.x) > MAX_POINTS
        order = sorted(range(len(colours)), key=lambda at: colours[at] != QUIET)  # grey lies below
        ax.scatter([found.x[at] for at in order], [found.y[at] for at in order], s=5 if many else 14,
                   c=[colours[at] for at in order], alpha=0.8, linewidths=0, rasterized=many)  # fmt: skip
        parts = [f" ({100 * part:.0f} % of variance)" for part in found.explained]
        ax.set_xlabel("component 1" + (parts[0] if parts else ""))
        ax.set_ylabel("component 2" + (parts[1] if len(parts) > 1 else ""))
        ax.set_xticks([])
        ax.set_yticks([])

    return chart(draw, name, height=2.9, width=3.2)
