"""The picture of `brainscale bench roofline`: parts of a step under the roofs of a GPU, and what a step consists of."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.lines
import numpy as np
from matplotlib.figure import Figure

from brainscale.bench.roofline import (
    ATTENTION,
    COMMUNICATION,
    GATHER,
    MATRICES,
    OPTIMIZER,
    SMALL,
    SPECTRAL,
    TEACHER,
    Preset,
)  # fmt: skip
from brainscale.bench.scaling_predict import PRESETS
from brainscale.hardware import Gpu

PAINT = {
    MATRICES: ("#0072B2", "o"), TEACHER: ("#56B4E9", "s"), ATTENTION: ("#E69F00", "^"), SMALL: ("#999999", "D"),
    SPECTRAL: ("#CC79A7", "v"), OPTIMIZER: ("#009E73", "P"), GATHER: ("#F0E442", "X"), COMMUNICATION: ("#D55E00", "s"),
}  # fmt: skip
"""Colours that those who see no red or no green tell apart (Okabe and Ito, jfly.uni-koeln.de/color), and shapes."""
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "brainscale", "font.size": 12, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 11,
}  # fmt: skip
PREDICTED = "predicted from formulas; nothing here was measured on a GPU"


def points(lines: Sequence[dict[str, Any]], found: list[Preset], gpu: Gpu) -> list[tuple[str, float, float]]:
    """Measured steps of these presets on this GPU, of lines of `bench step`: name, FLOP/byte by formula, TFLOP/s."""
    known = {(one.objective, one.size, str(one.patch)): one for one in found}
    measured = []
    for line in lines:
        place = re.match(r"ViT-([SBLH])/(\d+)", line["case"])
        if line["bench"] != "step" or line["skipped"] or not line.get("tflops") or place is None:
            continue
        one = known.get((line["variant"].split()[0].strip(","), *place.groups()))
        if one is not None and PRESETS.get(line["machine"]["gpu"] or "") == gpu.name:
            measured.append((f"{one.name}: {line['variant']}", one.intensity, float(line["tflops"])))
    return measured


def draw(found: list[Preset], gpu: Gpu, measured: list[tuple[str, float, float]], path: Path) -> None:
    """Write the picture as SVG, the same bytes for the same figures."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 11.2), layout="constrained")
        roofs, bars = figure.subplots(2, 1, height_ratios=(4.4, 6.8))
        _roofs(roofs, found, gpu, measured)
        _bars(bars, found, gpu)
        title = PREDICTED if not measured else "predicted from formulas, but for the stars, which were measured"
        figure.suptitle(f"Where a step's time goes on {gpu.name.upper()}\n({title})", fontsize=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _roofs(axes: Any, found: list[Preset], gpu: Gpu, measured: list[tuple[str, float, float]]) -> None:
    ridge, peak = 1e3 * gpu.bf16_tflops / gpu.memory_gb_per_s, gpu.bf16_tflops
    span = np.array([0.05, ridge, 4000])
    axes.loglog(span, np.minimum(peak, span * gpu.memory_gb_per_s / 1e3), color="black", linewidth=1.5)
    axes.text(0.06, 1.25 * peak, f"computing: {peak:,.0f} TFLOP/s in bf16", va="bottom", fontsize=11)
    axes.text(4, 5, f"memory: {gpu.memory_gb_per_s / 1e3:.1f} TB/s", fontsize=11)
    axes.text(1.2 * ridge, 0.3, f"{ridge:.0f} FLOP/byte", fontsize=11)
    axes.axvline(ridge, color="black", linewidth=0.8, linestyle=":")
    for part in (part for one in found for part in one.parts):
        colour, shape = PAINT[part.name]
        reached = min(peak, part.intensity * gpu.memory_gb_per_s / 1e3)
        axes.plot(part.intensity, reached, shape, color=colour, markersize=7, markeredgecolor="white", zorder=3)
    for _, intensity, tflops in measured:
        axes.plot(intensity, tflops, "*", color="black", markersize=12, zorder=4)
    axes.set(xlabel="FLOP per byte of the GPU's memory", ylabel="TFLOP/s at most", xlim=(0.05, 4000), ylim=(0.2, 3000))
    axes.set_title("parts of a step under the roofs, all presets", fontsize=12, loc="left")


def _bars(axes: Any, found: list[Preset], gpu: Gpu) -> None:
    for row, one in enumerate(found):
        seconds, left = one.seconds(gpu), 0.0
        for name, (colour, _) in PAINT.items():
            share = 100 * seconds.get(name, 0.0) / sum(seconds.values())
            axes.barh(row, share, left=left, color=colour, edgecolor="white", linewidth=0.6)
            left += share
    axes.set_yticks(range(len(found)), [one.name for one in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set(xlabel="% of the least time of a step, at the roofs", xlim=(0, 100))
    axes.set_title("all presets, 8 GPUs (/16: 160×192×160, /8: 128³)", fontsize=12, loc="left")
    handles = [
        matplotlib.lines.Line2D([], [], marker=shape, color=colour, linestyle="", markersize=9, label=name)
        for name, (colour, shape) in PAINT.items()
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=2, handletextpad=0.3)
