"""The page that sets several runs side by side: one self-contained file, drawn from their run folders and nothing else.

Losses are listed and not drawn over one another: those of two objectives are of different things. The words are in
report_compare.html.
"""

import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from safetensors import SafetensorError, safe_open

from brainscale.config import Config
from brainscale.figures import INK, Metrics, Series, chart, series, smooth, thin
from brainscale.pages import put, render
from brainscale.qc_figures import COLOURS
from brainscale.report import WORDS, Run, numbers, read, read_json
from brainscale.report_health import MAX_MARKERS, known, monitors, probes
from brainscale.settings import InputError

DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}
"""How CSS and matplotlib call a line's style. Runs beyond the number of colours take the next style."""
STYLES = [(colour, dashes) for dashes in DASHES for colour in COLOURS]
"""Colour and style of the first run, the second, and so on."""


def write(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the comparison of two or more runs to `out` and return it; names link to the runs' own pages where these
    exist, relative to `out`.

    The same folders give the same bytes. Raises InputError when a folder is no run folder, is given twice or cannot be
    read, when there are more runs than lines can be told apart, and when `out` cannot be this page.
    """
    places = [os.path.realpath(folder) for folder in run_dirs]
    twice = [folder for folder, place in zip(run_dirs, places) if places.count(place) > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice; give every run once")
    if len(run_dirs) > len(STYLES):
        raise InputError(f"{len(run_dirs)} runs are too many to tell apart; give at most {len(STYLES)}")
    if out.suffix != ".html" or out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out {out} cannot be the page; give FILE.html in a folder that exists")
    if os.path.realpath(out) in {os.path.join(place, "report.html") for place in places}:
        raise InputError(f"--out {out} is the page of one of the runs; give another file")
    runs = [read(folder) for folder in run_dirs]
    page = render(
        "report_compare.html",
        **WORDS,
        rows=[
            row(run, name, style, os.path.relpath(place, os.path.realpath(out.parent)))
            for run, name, style, place in zip(runs, distinct(places), STYLES, places)
        ],
        charts_by_title=charts([run.metrics for run in runs]),
        same_objective=len({run.config.objective for run in runs}) == 1,
        same_data=same_data([newest(folder / "checkpoints") for folder in run_dirs]),
        same_shape=len({shape(run.config) for run in runs}) == 1,
    )
    return put(page, out)


def distinct(places: Sequence[str]) -> list[str]:
    """A name for every folder: its own, with as many of the folders above it as tell it from the others."""
    parts = [Path(place).parts[1:] for place in places]
    names = []
    for mine in parts:
        length = next(
            (k for k in range(1, len(mine)) if sum(other[-k:] == mine[-k:] for other in parts) == 1), len(mine)
        )
        names.append("/".join(mine[-length:]))
    return names


def row(run: Run, name: str, style: tuple[str, str], place: str) -> dict[str, Any]:
    """What the table says of a run. place: its folder, relative to the page."""
    found = monitors(run.metrics, run.config)
    return {
        "name": name, "colour": style[0], "dashes": style[1], "run": run, "config": run.config,
        "numbers": numbers(run.metrics, run.config), "monitors": found,
        "standing": [w.code for w in found["warned"] if w.holds],
        "past": [w.code for w in found["warned"] if not w.holds],
        "parameters": encoder_parameters(newest(run.folder / "checkpoints")),
        "link": quote(os.fsencode(f"{place}/report.html")) if (run.folder / "report.html").is_file() else None,
    }  # fmt: skip


def shape(config: Config) -> tuple[Any, ...]:
    """What decides how many tokens an encoder sees and how long they are."""
    return config.model.width, config.model.patch_voxels_zyx, config.data.crop_voxels_zyx


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint of a run, as `checkpoint_files.py` puts it there."""
    found = sorted(checkpoints.glob("step-" + "[0-9]" * 8 + "/weights.safetensors"))
    return found[-1].parent if found else None


def encoder_parameters(checkpoint: Path | None) -> int | None:
    """Parameters of the encoder, which is what is kept of a run; None where no checkpoint can be read."""
    if checkpoint is None:
        return None
    try:
        with safe_open(checkpoint / "weights.safetensors", "numpy") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys() if key.startswith("encoder.")]
    except (OSError, SafetensorError):
        return None
    return sum(math.prod(shape) for shape in shapes) or None


def same_data(checkpoints: Sequence[Path | None]) -> bool | None:
    """Whether the training scans of all runs are the same, by the hashes in their checkpoints; None where one has no
    checkpoint."""
    if None in checkpoints:
        return None
    return len({read_json(path / "state.json").get("data_hash") for path in checkpoints if path}) == 1


# ------------------------------------------------------------------------------------------------- charts


def charts(runs: Sequence[Metrics]) -> dict[str, Markup]:
    """Title → chart, of what can be set side by side. A run's number is its place in `runs`."""
    found = [probes(metrics) for metrics in runs]
    starts = {at: known(lines.get(0, {}))["effective_rank"] for at, lines in enumerate(found)}
    drawn = {}
    for title, key in (
        ("effective rank (faint: random weights)", "effective_rank"),
        ("gap: own subject against another", "gap"),
        ("error over that of the average of other volumes", "error_over_average"),
        ("median standard deviation of embeddings", "std_median"),
        ("million voxels per second", "voxels_per_s"),
    ):
        lines = runs if key == "voxels_per_s" else found
        curves = {at: finite(*series(metrics, key)) for at, metrics in enumerate(lines)}
        curves = {at: curve for at, curve in curves.items() if len(curve[0])}
        if key == "voxels_per_s":
            curves = {at: (x, smooth(y) / 1e6) for at, (x, y) in curves.items()}
        faint = {at: height for at, height in starts.items() if key == "effective_rank" and height is not None}
        level = 1.0 if key == "error_over_average" else None
        if curves:
            drawn[title] = chart(partial(overlaid, curves=curves, faint=faint, level=level), key)
    return drawn


def finite(x: np.ndarray, y: np.ndarray) -> Series:
    """The points whose value is finite."""
    return x[np.isfinite(y)], y[np.isfinite(y)]


def overlaid(ax: Axes, curves: dict[int, Series], faint: dict[int, float], level: float | None) -> None:
    """Curves by the number of their run, in its style; faint: heights of a run's own horizontal line; level: of one
    for all."""
    for at, (x, y) in curves.items():
        colour, dashes = STYLES[at]
        marker = "o" if len(x) <= MAX_MARKERS else None
        ax.plot(*thin(x, y, False), color=colour, linestyle=DASHES[dashes], linewidth=1.5, marker=marker, markersize=3)
    for at, height in faint.items():
        ax.axhline(height, color=STYLES[at][0], alpha=0.7, linewidth=0.9, linestyle=(0, (1, 3)))
    if level is not None:
        ax.axhline(level, color=INK, linewidth=0.8)
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.set_xlabel("step")
