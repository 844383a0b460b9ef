"""The taken scans of a store as the QC page compares them: their geometry along the stored axes, and who is unusual."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from brainscale.store import Store

OUTLIER = 3.5
"""Robust standard deviations from the median from which a scan is unusual (Iglewicz and Hoaglin 1993)."""
MIN_PEERS = 8
"""A scan is compared with those of its contrast where there are as many, else with all."""
AXES = ("left–right", "front–back", "up–down")


class Scans:
    """The columns of the taken scans as arrays, in row order; geometry along the stored x, y and z."""

    def __init__(self, store: Store) -> None:
        self.rows = store.rows
        self.ids, self.sources = store.column("id"), store.column("source")
        self.contrasts, self.warnings = store.column("contrast"), store.column("warnings")
        self.duplicate_of = store.column("duplicate_of")
        self.cropped, self.foreground = store.column("cropped_fraction"), store.column("foreground_fraction")
        self.scale, self.offset = store.column("scale"), store.column("offset")
        self.background = store.column("background_code") * self.scale + self.offset
        self.mean, self.std = store.column("mean"), store.column("std")
        self.clip_low, self.clip_high = store.column("clip_low"), store.column("clip_high")
        stored = store.column("affine_stored").reshape(-1, 4, 4)
        to_stored = np.linalg.inv(stored) @ store.column("affine_source").reshape(-1, 4, 4)
        # Storing permutes, turns and scales axes: each stored axis has one source axis.
        order = np.abs(to_stored[:, :3, :3]).argmax(axis=2)
        shape = store.column("shape_source_xyz")
        self.shape_xyz = np.take_along_axis(shape, order, axis=1)
        self.spacing_xyz = np.take_along_axis(store.column("spacing_source_mm_xyz"), order, axis=1)
        self.stored_spacing_xyz = np.linalg.norm(stored[:, :3, :3], axis=1)
        corners = [(to_stored[:, :3, :3] @ at[..., None])[..., 0] + to_stored[:, :3, 3]
                   for at in (np.full(shape.shape, -0.5), shape - 0.5)]  # fmt: skip
        grid_xyz = np.array(store.volume_zyx[::-1])
        low, high = np.minimum(*corners), np.maximum(*corners)
        self.outside_low_mm = np.maximum(0, -0.5 - low) * self.stored_spacing_xyz
        self.outside_high_mm = np.maximum(0, high - grid_xyz + 0.5) * self.stored_spacing_xyz
        # What the pictures show of the grid: the scan and a rim of its padding.
        self.first_xyz = np.maximum(0, np.floor(low - grid_xyz / 16)).astype(int)
        self.stop_xyz = np.minimum(grid_xyz, np.ceil(high + grid_xyz / 16)).astype(int)


# ------------------------------------------------------------------------------------------------- outliers


class Feature(NamedTuple):
    """Something that makes a scan unusual."""

    values: np.ndarray
    """Of every scan, on the scale on which differences count."""
    least: float
    """The smallest standard deviation it is judged by: where nearly all scans agree, trifles are not unusual."""
    words: Callable[[float, float], str]
    """Says (value, the usual value)."""
    only_more: bool = False
    """Whether less than usual is nothing to look at."""


def features(scans: Scans) -> list[Feature]:
    """What is compared; ratios as log2, so that twice and half are equally far."""
    above = np.maximum(np.abs(scans.mean - scans.background), 1e-6 * scans.std)
    num_warnings = np.array([float(len(codes)) for codes in scans.warnings])
    found = [
        Feature(100 * scans.cropped, 0.3, lambda v, usual: f"cropped {v:.1f} % (usually {usual:.1f} %)", True),
        Feature(np.log2(np.maximum(scans.foreground, 1e-6)), 0.1,
                lambda v, usual: f"foreground {2 ** (v - usual):.2g}× the usual"),
        Feature(np.log2(scans.std / above), 0.1, lambda v, usual: f"contrast {2 ** (v - usual):.2g}× the usual"),
        Feature(num_warnings, 0.25, lambda v, usual: f"{v:g} warning{'s' * (v != 1)} (usually {usual:g})", True),
    ]  # fmt: skip
    for i, axis in enumerate(AXES):
        found.append(Feature(np.log2(scans.spacing_xyz[:, i]), 0.1, partial(_other, "mm", axis)))
        found.append(Feature(np.log2(scans.shape_xyz[:, i]), 0.1, partial(_other, "voxels", axis)))
    return found


def _other(unit: str, axis: str, value: float, usual: float) -> str:
    return f"{2**value:.3g} {unit} {axis} (usually {2**usual:.3g})"


def unusual(scans: Scans) -> tuple[np.ndarray, list[list[str]]]:
    """(score of every scan, its reasons, the strongest first). The score is the largest distance of a feature from its
    median, in robust standard deviations (1.4826 × median absolute deviation)."""
    contrasts = {name: np.flatnonzero(scans.contrasts == name) for name in dict.fromkeys(scans.contrasts)}
    everyone = np.arange(len(scans.rows))
    scores = np.zeros(len(everyone))
    reasons: list[list[tuple[float, str]]] = [[] for _ in everyone]
    for feature in features(scans):
        for members in contrasts.values():
            peers = feature.values[members if len(members) >= MIN_PEERS else everyone]
            usual = float(np.median(peers))
            spread = max(1.4826 * float(np.median(np.abs(peers - usual))), feature.least)
            distance = (feature.values[members] - usual) / spread
            distance = np.maximum(distance, 0) if feature.only_more else np.abs(distance)
            scores[members] = np.maximum(scores[members], distance)
            for at in np.flatnonzero(distance >= OUTLIER):
                value = float(feature.values[members[at]])
                reasons[members[at]].append((-float(distance[at]), feature.words(value, usual)))
    return scores, [[words for _, words in sorted(found)] for found in reasons]
