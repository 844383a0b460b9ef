"""The pictures and charts of a store's QC page: three small grey planes of a scan, and histograms in rows."""

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, PercentFormatter

from brainscale.figures import BLUE, GREEN, INK, ORANGE, PLANES, chart, letters

COLOURS = (BLUE, ORANGE, GREEN, "#a35fb0", "#8a94a3", "#b0993a")
"""One for each contrast, as long as there are no more contrasts than colours."""
PICTURE_PIXELS = 96
"""Height and width of a plane's picture, at most."""
GREY_LEVELS = 32
"""Greys of a picture: enough for the eye at this size, and half the bytes of 256."""
BINS = 48
WIDE_RATIO = 10
"""Positive values that span more than this are drawn on a logarithmic axis."""


# ------------------------------------------------------------------------------------------------- pictures


def three_planes(
    volume_zyx: np.ndarray,
    cells_zyx: np.ndarray,
    window: tuple[float, float],
    spacing_mm_xyz: Sequence[float],
    orientation: str,
    box_zyx: tuple[slice, slice, slice] = (slice(None),) * 3,
) -> list[dict[str, Any]]:
    """The planes through the foreground's centre of mass: name, PNG, size in mm, letters at left, right, top, bottom.

    volume_zyx: stored values; cells_zyx: share of foreground per cell; window: the stored values of black and white;
    orientation: where x, y, z of the volume point; box_zyx: the part of the volume to show. The planes stand upright
    whatever the orientation: front or crown at the top, the front of the sagittal plane at the right. x increases to
    the right, as it is stored.
    """
    shares = cells_zyx.astype(np.float64)
    at_zyx = []
    for axis, voxels in enumerate(volume_zyx.shape):
        share = shares.sum(axis=tuple({0, 1, 2} - {axis}))
        centre = float((np.arange(len(share)) + 0.5) @ share / share.sum()) / len(share) if share.any() else 0.5
        # Counted from the same end of the head however it is stored, so that the same plane is shown.
        turned = orientation[2 - axis] in "LPI"
        at_zyx.append(voxels - 1 - int((1 - centre) * voxels) if turned else int(centre * voxels))
    found = []
    for name, (across, up) in PLANES.items():
        cut = [box if 2 - axis in (across, up) else at for axis, (at, box) in enumerate(zip(at_zyx, box_zyx))]
        pixels = volume_zyx[tuple(cut)]
        # Row 0 is the top; x, the only axis that stays as it is stored, never runs up.
        pixels = pixels[::-1] if orientation[up] in "AS" else pixels
        pixels = pixels[:, ::-1] if orientation[across] == "P" else pixels
        rows, columns = pixels.shape
        found.append({
            "name": name, "uri": grey_png(shrink(pixels, PICTURE_PIXELS), *window),
            "size_mm": (columns * spacing_mm_xyz[across], rows * spacing_mm_xyz[up]),
            "letters": letters(name, orientation[0] + "AS"),
        })  # fmt: skip
    return found


def shrink(pixels: np.ndarray, most: int) -> np.ndarray:
    """float64 means of blocks of (rows, columns), so that neither axis has more than `most`; an incomplete last block
    is left out."""
    down, across = (-(-n // most) for n in pixels.shape)
    rows, columns = pixels.shape[0] // down, pixels.shape[1] // across
    blocks = pixels[: rows * down, : columns * across].reshape(rows, down, columns, across)
    return blocks.mean(axis=(1, 3), dtype=np.float64)


def grey_png(pixels: np.ndarray, low: float, high: float) -> str:
    """Pixels (rows, columns) as the data URI of an 8-bit grey PNG (ISO/IEC 15948), `low` black and `high` white, also
    where low > high; in GREY_LEVELS steps."""
    scaled = np.clip((pixels - low) / ((high - low) or 1.0), 0, 1)
    grey = np.rint(np.rint(scaled * (GREY_LEVELS - 1)) * (255 / (GREY_LEVELS - 1))).astype(np.uint8)
    lines = np.pad(grey, ((0, 0), (1, 0)))  # each line starts with its filter type, 0: none
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return "data:image/png;base64," + base64.b64encode(data).decode()


# ------------------------------------------------------------------------------------------------- charts


def histogram_rows(name: str, rows: dict[str, np.ndarray], groups: list[np.ndarray], unit: str) -> Markup:
    """One histogram above the other on a common axis, in each a curve for every group, in the order of COLOURS.

    rows: title → value of each scan; groups: the scans of each, as indices. A row's height is that of its own highest
    bar. The axis is logarithmic for what spans more than WIDE_RATIO; values that cannot stand on it are counted in
    the corner. Where an axis cannot be, the outermost bars hold what lies far out, so that one scan does not squeeze
    the others.
    """
    every = np.concatenate(list(rows.values()))
    positive = every[every > 0]
    log = len(positive) > 0 and positive.max() > WIDE_RATIO * positive.min() and np.median(every) > 0
    if log:
        edges = np.geomspace(positive.min() * 0.99, positive.max() * 1.01, BINS + 1)
    else:
        low, high = every.min(), every.max()
        if low <= 0:
            inner = np.percentile(every, (1, 99))
            low, high = max(low, 2 * inner[0] - inner[1]), min(high, 2 * inner[1] - inner[0])
        margin = max((high - low) / 50, abs(high) / 100, 1e-6)
        edges = np.linspace(low - margin, high + margin, BINS + 1)

    def draw(ax: Axes) -> None:
        for height, values in enumerate(reversed(rows.values())):
            counts = [np.histogram(np.clip(values[g], *edges[[0, -1]]) if not log else values[g], edges)[0]
                      for g in groups]  # fmt: skip
            highest = max(1, *(int(c.max()) for c in counts))
            for count, colour in zip(counts, COLOURS):
                top = height + 0.8 * count / highest
                ax.stairs(
                    top, edges, baseline=height, color=colour, alpha=0.85 if len(groups) == 1 else 0.35, fill=True
                )
                if len(groups) > 1:
                    ax.stairs(top, edges, baseline=height, color=colour, linewidth=1.1)
            ax.axhline(height, color=INK, linewidth=0.6)
        ax.set_yticks([height + 0.3 for height in range(len(rows))], list(reversed(rows)))
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(0, len(rows))
        ax.set_xlabel(unit)
        if log:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 200 * edges[0] else (1,)))
            ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(EngFormatter(sep="") if every.max() >= 1000 else "{x:.4g}")
        if log and (lost := int(np.sum(every <= 0))):
            ax.text(1, 1, f"{lost} values not above 0", transform=ax.transAxes, ha="right", va="top")

    return chart(draw, name, height=0.75 + 0.5 * len(rows))


def cropped_chart(cropped_fraction: np.ndarray) -> Markup:
    """How many scans lose how much of their foreground, with lines at 1 % and 5 %; counts on a logarithmic axis, since
    most scans lose nothing and the few others are what is looked for."""

    def draw(ax: Axes) -> None:
        edges = np.linspace(0, max(0.06, 1.02 * cropped_fraction.max()), BINS + 1)
        ax.hist(cropped_fraction, edges.tolist(), color=BLUE)
        for share, style in ((0.01, ":"), (0.05, "--")):
            ax.axvline(share, color=ORANGE, linewidth=1, linestyle=style)
        ax.set_yscale("log")
        ax.set_ylim(0.7, max(12, 2 * len(cropped_fraction)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_xlim(0, None)
        ax.set_xlabel("share of the foreground outside the grid")
        ax.set_ylabel("scans")

    return chart(draw, "cropped", height=2.2)
