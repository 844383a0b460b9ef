"""The pictures and charts of a run's page: slices as PNG, curves as SVG whose text takes the page's colour."""

import base64
import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from brainscale.config import Config

MAX_POINTS = 1000
"""Points of a drawn curve, at most."""
DIFFERENCE_STD = 1.5
"""Colours of the difference pictures saturate here, in z-score units."""

INK, BLUE, ORANGE, GREEN = "#010203", "#3d7fc1", "#d9822b", "#2f9e77"
"""Colours that read on white and on black; INK becomes the colour of the page's text."""
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "brainscale", "font.size": 10, "axes.linewidth": 0.6, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.15, "grid.color": INK,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "axes.formatter.useoffset": False, "axes.axisbelow": True,
}  # fmt: skip
ABOVE: dict[str, Any] = {
    "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "handlelength": 1.2, "columnspacing": 1, "borderpad": 0,
}  # fmt: skip
GREY = LinearSegmentedColormap.from_list("grey", ["#000000", "#ffffff"]).with_extremes(bad="#55677d")
SIGNED = LinearSegmentedColormap.from_list("signed", ["#9fd0ff", "#2b6cb0", "#000000", "#c05621", "#ffd09f"])
PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
"""Plane → (axis of its columns, axis of its rows, in x, y, z)."""
OPPOSITE = dict(zip("RLAPSI", "LRPAIS"))
"""Where an axis comes from that points there: right or left, anterior or posterior, superior or inferior."""

ERRORS = {
    "own": "model, own tokens",
    "swapped": "model, another's tokens",
    "neighbours": "visible neighbours' mean",
    "average": "average training brain",
}

LOSSES = {
    "mae": {"loss": "loss", "voxel part": "pixel_loss", "spectral part": "spectral_loss"},
    "jepa": {
        "loss with the regularizer": "loss", "prediction": "prediction_loss", "variance part": "variance_loss",
        "covariance part": "covariance_loss", "SIGReg part": "sigreg_loss",
    },
}  # fmt: skip
"""Objective → title and key of its loss and the parts of it."""

Metrics = dict[int, dict[str, Any]]
Series = tuple[np.ndarray, np.ndarray]
NONE: Series = (np.array([]), np.array([]))


class Evaluation(NamedTuple):
    """One file of RUN/holdout; `holdout.py` says what the arrays are."""

    step: int
    arrays: dict[str, np.ndarray]


def series(metrics: Metrics, key: str) -> Series:
    """(steps, values) of the lines that have this key; null (mfu where the peak is not known) counts as absent."""
    found = {step: line[key] for step, line in metrics.items() if line.get(key) is not None}
    return np.array(list(found), dtype=float), np.array(list(found.values()), dtype=float)


# ------------------------------------------------------------------------------------------------- pictures


def letters(plane: str, orientation: str) -> str:
    """What lies at the left, right, top and bottom of a plane whose columns run to the right and rows to the top, for
    volumes whose x, y and z point to `orientation`: "LRAP" for the axial plane of RAS."""
    across, up = (orientation[axis] for axis in PLANES[plane])
    return OPPOSITE[across] + across + up + OPPOSITE[up]


def pictures(evaluations: list[Evaluation], spacing_mm_xyz: Any, orientation: str = "RAS") -> list[dict[str, Any]]:
    """Of every volume pictured at the latest evaluation: its slices in three planes, and its mosaic over time."""
    if not evaluations:
        return []
    latest = evaluations[-1]
    spacing = (1.0, 1.0, 1.0) if spacing_mm_xyz == "native" else spacing_mm_xyz
    volumes = []
    for i, row in enumerate(latest.arrays["rows"]):
        inputs = np.concatenate([latest.arrays[f"{plane}_{i}"][0].ravel() for plane in PLANES]).astype(np.float32)
        low, high = np.percentile(inputs, (0, 99.5))
        window = (low, max(high, low + 1e-3))
        planes, widest_mm = [], 0.0
        for plane, (across, down) in PLANES.items():
            true, masked, predicted, mosaic = latest.arrays[f"{plane}_{i}"].astype(np.float32)
            rows, columns = true.shape
            size_mm = (columns * spacing[across], rows * spacing[down])
            cells = {name: png(s, *window, GREY) for name, s in
                     (("input", true), ("masked", masked), ("predicted", predicted), ("mosaic", mosaic))}  # fmt: skip
            cells["difference"] = png(mosaic - true, -DIFFERENCE_STD, DIFFERENCE_STD, SIGNED)
            widest_mm = max(widest_mm, size_mm[0])
            planes.append({"name": plane, "letters": letters(plane, orientation), "size_mm": size_mm, "cells": cells})
        over_time = {f"step {e.step}": png(e.arrays[f"axial_{j}"][3].astype(np.float32), *window, GREY)
                     for e in evaluations for j, other in enumerate(e.arrays["rows"]) if other == row}  # fmt: skip
        volumes.append({
            "row": int(row), "id": str(latest.arrays["ids"][i]), "step": latest.step, "window": window,
            "planes": planes, "over_time": over_time, "widest_mm": widest_mm,
        })  # fmt: skip
    return volumes


def frequencies(counts_zyx: np.ndarray) -> dict[str, str]:
    """Plane → picture of how often each cell of the grid was hidden, summed along the third axis: grey is the mean,
    black a quarter less, white a quarter more."""
    found = {}
    for axis, plane in enumerate(PLANES):
        seen = counts_zyx.sum(axis)[::-1].astype(float)
        found[plane] = png(seen, 0.75 * seen.mean(), 1.25 * seen.mean() + 1e-9, GREY)
    return found


def png(pixels: np.ndarray, low: float, high: float, colours: Colormap) -> str:
    """Pixels (rows, columns) as a data URI; NaN takes the colour map's own tone for what is missing."""
    buffer = io.BytesIO()
    unsigned: dict[str, Any] = {"Software": None}
    imsave(buffer, np.ma.masked_invalid(pixels), vmin=low, vmax=high, cmap=colours, metadata=unsigned)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ------------------------------------------------------------------------------------------------- charts


def chart(draw: Callable[[Axes], Any], name: str, height: float = 2.7, width: float = 4.6) -> Markup:
    """An inline SVG of the axes that `draw` fills; the narrower (inches), the larger its text. Nothing of the
    user's text may be drawn: it is not escaped."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for reference in ('id="', "url(#", 'href="#'):
        svg = svg.replace(reference, f"{reference}{name}-")
    return Markup(svg)


def thin(x: np.ndarray, y: np.ndarray, envelope: bool) -> Series:
    """At most MAX_POINTS points: the lowest and highest of every block, so that no spike is lost, or its mean."""
    if len(x) <= MAX_POINTS:
        return x, y
    starts = np.linspace(0, len(x), MAX_POINTS // 2 + 1).astype(int)[:-1]
    if envelope:
        extremes = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
        return np.repeat(x[starts], 2), np.stack(extremes, axis=1).ravel()
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twenty-fifth of the curve, shorter at its ends."""
    half = len(values) // 50
    total = np.concatenate([[0.0], np.cumsum(values - values[0])])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return values[0] + (total[high] - total[low]) / (high - low)


def draw_series(ax: Axes, train: Series, held: Series = NONE, log: bool = True, noisy: bool = True) -> None:
    """Training values faint under their running mean, held-out values as points; log y where values span a factor of
    5. Values that are not finite are left out and counted in the chart's corner."""
    finite = np.isfinite(train[1])
    x, y = train[0][finite], train[1][finite]
    if len(x) and noisy:
        ax.plot(*thin(x, y, True), color=BLUE, alpha=0.35, linewidth=0.6)
    if len(x):
        ax.plot(*thin(x, smooth(y) if noisy else y, False), color=BLUE, linewidth=1.6, label="training")
    if len(held[0]):
        marker = "o" if len(held[0]) <= 40 else None
        ax.plot(*thin(*held, False), color=ORANGE, linewidth=1.2, marker=marker, markersize=3, label="held-out")
    both = np.concatenate([y, held[1]])
    if log and len(both) and both.min() > 0 and both.max() > 5 * both.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    if len(x) and len(held[0]):
        ax.legend(**ABOVE)
    if not finite.all():
        ax.text(0.01, 0.02, f"{np.sum(~finite)} values not finite", transform=ax.transAxes)
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.set_xlabel("step")


def loss_charts(metrics: Metrics, objective: str) -> dict[str, Markup]:
    """Title → chart, of the losses of this objective that were recorded and are not zero throughout.

    A JEPA's held-out loss is its prediction's alone, so it stands beside that part; and without a regularizer the loss
    is that part.
    """
    parts = LOSSES[objective]
    if objective == "jepa" and not any(len(series(metrics, key)[0]) for key in list(parts.values())[2:]):
        parts = {"prediction": "prediction_loss"}
    charts = {}
    for title, key in parts.items():
        train, held = series(metrics, key), series(metrics, f"holdout_{key}")
        if objective == "jepa" and key == "loss":
            held = NONE
        if np.any(train[1]) or np.any(held[1]):
            charts[title] = chart(partial(draw_series, train=train, held=held), key)
    held = series(metrics, "holdout_loss")
    if len(held[0]) > 1:
        charts["held-out loss alone"] = chart(partial(draw_series, train=NONE, held=held), "held")
    return charts


def speed_charts(metrics: Metrics) -> dict[str, Markup]:
    """Title → chart, of what a step costs and how it goes."""
    charts = {}
    for title, key, unit, log, noisy in (
        ("million voxels per second", "voxels_per_s", 1e6, True, True),
        ("seconds per step", "step_s", 1, True, True),
        ("share of time waiting for data", "data_wait_fraction", 1, False, True),
        ("model FLOPs utilisation", "mfu", 1, False, True),
        ("gradient norm before clipping", "grad_norm", 1, True, True),
        ("learning rate", "lr", 1, False, False),
    ):
        steps, values = series(metrics, key)
        if len(steps):
            draw = partial(draw_series, train=(steps, values / unit), log=log, noisy=noisy)
            charts[title] = chart(draw, key)
    return charts


def spectrum_charts(evaluations: list[Evaluation], config: Config) -> dict[str, Markup]:
    """Title → chart, of the radial power spectra at the latest evaluation and of the error's share at all shown."""
    if not evaluations:
        return {}
    # The corner of the band is at √3 × 0.5 cycles per voxel; the cut-off is a share of it.
    cutoff = config.spectral.cutoff_fraction * np.sqrt(3) / 2 if config.spectral.weight else 0.0

    def frame(ax: Axes) -> None:
        ax.set_yscale("log")
        ax.set_xlabel("cycles per voxel")
        ax.set_xlim(0, 0.5)
        if 0 < cutoff < 0.5:
            ax.axvline(cutoff, color=INK, linewidth=0.8, linestyle=":")
        ax.legend(**ABOVE)

    def power(ax: Axes) -> None:
        arrays = evaluations[-1].arrays
        for values, name, colour in zip(arrays["power"], ("input", "mosaic", "error"), (BLUE, GREEN, ORANGE)):
            ax.plot(arrays["cycles_per_voxel"], values, color=colour, linewidth=1.4, label=name)
        frame(ax)

    def share(ax: Axes) -> None:
        for age, e in zip(range(len(evaluations))[::-1], evaluations):
            target, _, error = e.arrays["power"]
            ratio = np.divide(error, target, out=np.full_like(error, np.nan), where=target > 0)
            ax.plot(e.arrays["cycles_per_voxel"], ratio, color=ORANGE, alpha=max(0.2, 1 - 0.18 * age),
                    linewidth=1.6 if age == 0 else 0.9, label=f"step {e.step}")  # fmt: skip
        ax.axhline(1, color=INK, linewidth=0.6)
        frame(ax)

    return {"power per frequency": chart(power, "power"), "error's power / input's power": chart(share, "share")}


def bars(ax: Axes, means: dict[str, float], spread: dict[str, float]) -> None:
    """Horizontal bars of the errors with their spread over volumes, the model's own in another colour."""
    names = list(means)[::-1]
    values = [means[name] for name in names]
    colours = [BLUE if name == "own" else "#8a94a3" for name in names]
    ax.barh([ERRORS[n] for n in names], values, xerr=[spread[n] for n in names], color=colours, height=0.6,
            error_kw={"elinewidth": 0.9, "ecolor": INK, "capsize": 2})  # fmt: skip
    ax.set_xlabel("mean squared error")
    ax.set_xlim(0, None)
    ax.grid(axis="y", visible=False)
