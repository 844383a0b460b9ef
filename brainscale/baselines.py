"""What a score is worth beside simple measures: size of the foreground and histogram of its intensities.

A representation that does not beat these has shown nothing about anatomy. Both are read from the store, so they come
from the same voxels that an encoder sees: what the grid cut off is missing here too. The foreground is the brain where
scans are skull-stripped or come with masks, else the head; a store that mixes them (column `foreground_method`) has
sizes that do not compare. Of skull-stripped scans that were resampled, voxels that are brain in part count as brain, so
they are larger by a rim of less than a voxel than those that were not.

Histograms are of z-scores. Mean, deviation and quantum in original units are left out on purpose: they tell scanner and
acquisition, which is what the site score is for.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brainscale.store import Store
from brainscale.stores import Stores

BINS = np.linspace(-4, 4, 33)
"""Edges of the histogram, in foreground standard deviations; what lies outside is counted in the first and last bin."""
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
VOLUME_NAMES = ("foreground_ml", "extent_x_mm", "extent_y_mm", "extent_z_mm")
HISTOGRAM_NAMES = (*(f"z_{low:+.2f}" for low in BINS[:-1]), *(f"z_quantile_{share:.2f}" for share in QUANTILES))
NAMES = (*HISTOGRAM_NAMES, *VOLUME_NAMES)
"""Columns of `histogram_and_volume`."""

Rows = Sequence[int] | NDArray[np.int64]


def histogram_and_volume(store: Store | Stores, rows: Rows) -> NDArray[np.float32]:
    """(n, len(NAMES)) features of rows: those of `histogram`, then those of `volume`. Raises as they do."""
    return np.concatenate([histogram(store, rows), volume(store, rows)], axis=1)


def volume(store: Store | Stores, rows: Rows) -> NDArray[np.float32]:
    """(n, 4): the foreground's volume in ml and its extents along the stored x, y and z in mm.

    Volume: the share of stored voxels that is foreground, as it was counted in conversion, times the volume of the
    stored grid by its affine. Extent: 2√5 standard deviations of the foreground's position along the axis, taken as
    evenly spread within its cells: the length of an ellipsoid, which single bright voxels hardly change. No voxel is
    read. Raises IndexError for a row that the store lacks.
    """
    at = _places(store, rows)
    affines = store.column("affine_stored").reshape(-1, 4, 4)[at, :3, :3]
    voxel_ml = np.abs(np.linalg.det(affines)) / 1000
    ml = store.column("foreground_fraction")[at] * np.prod(store.volume_zyx) * voxel_ml
    spacing_mm_xyz = np.linalg.norm(affines, axis=1)
    cell = store.plan.foreground_cell_voxels
    features = np.zeros((len(at), len(VOLUME_NAMES)), np.float32)
    for i, row in enumerate(rows):
        cells = store.foreground([int(row)])[0].astype(np.float64)
        profiles = (cells.sum((0, 1)), cells.sum((0, 2)), cells.sum((1, 2)))  # along x, y, z
        features[i] = ml[i], *(cell * spacing_mm_xyz[i] * [_extent(profile) for profile in profiles])
    return features


def histogram(store: Store | Stores, rows: Rows) -> NDArray[np.float32]:
    """(n, 39): shares of foreground voxels in the 32 bins of `BINS`, which sum to 1, and 7 quantiles of their z-scores.

    z-scores are those of the plan's `normalize = "zscore"`, clipped as for training, whatever the plan says. A voxel
    counts as foreground above the scan's threshold in a cell that holds foreground; where a mask said what is
    foreground, which the store keeps per cell, each voxel counts with the share of its cell. A quantile is the lowest
    z-score up to which at least that share lies. Raises IndexError for a row that the store lacks, StoreDamage for
    damaged data.
    """
    at = _places(store, rows)
    names = ("scale", "offset", "mean", "std", "clip_low", "clip_high", "foreground_threshold")
    columns = np.stack([store.column(name)[at].astype(np.float64) for name in names], axis=1)
    masked = store.column("foreground_method")[at] == "mask"
    cell = store.plan.foreground_cell_voxels
    features = np.zeros((len(at), len(HISTOGRAM_NAMES)), np.float32)
    for i, row in enumerate(rows):
        scale, offset, mean, std, low, high, threshold = columns[i]
        values = store.volumes([int(row)])[0] * scale + offset
        share = store.foreground([int(row)])[0]
        for axis in range(3):
            share = share.repeat(cell, axis)
        inside = (values > threshold) & (share > 0)
        # Few different values, since stores hold quanta: counted once each, whatever the number of voxels.
        z, which = np.unique((values[inside].clip(low, high) - mean) / std, return_inverse=True)
        weight = np.bincount(which, share[inside] if masked[i] else None, minlength=len(z))
        total = weight.sum()
        assert total > 0, f"row {int(row)} was taken without foreground"
        bins = (np.digitize(z, BINS) - 1).clip(0, len(BINS) - 2)
        shares = np.bincount(bins, weight, len(BINS) - 1) / total
        reached = np.cumsum(weight) / total
        places = np.searchsorted(reached, np.array(QUANTILES) - 1e-12)
        features[i] = *shares, *z[places.clip(max=len(z) - 1)]
    return features


def _places(store: Store | Stores, rows: Rows) -> NDArray[np.int64]:
    """Where rows stand in the store's columns."""
    wanted = np.asarray(rows, np.int64)
    at = np.searchsorted(store.rows, wanted).clip(max=len(store.rows) - 1)
    if (missing := wanted[store.rows[at] != wanted]).size:
        raise IndexError(f"row {missing[0]} is not a row of the store")
    return at


def _extent(profile: NDArray[np.float64]) -> float:
    """Length in cells of a mass that lies evenly in each cell."""
    place = np.arange(len(profile))
    mean = np.average(place, weights=profile)
    return float(2 * np.sqrt(5 * (np.average((place - mean) ** 2, weights=profile) + 1 / 12)))
