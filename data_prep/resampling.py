"""From one grid to another along its axes: cutting, padding, separable resampling. Arrays are z,y,x; no files.

The grid's first voxel lies at `first` and its voxels are `step` apart, both x,y,z in canonical source voxels.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from brainscale_data_prep.intensity import above

BLOCK_ROWS = 32
"""Few enough that a block's taps are not much more than a row's, many enough for a fast matrix product."""


Box = tuple[slice, ...]
"""A part of a volume, z,y,x."""


def window(box: Box, first: np.ndarray, grid_xyz: tuple[int, int, int]) -> tuple[Box, Box]:
    """The part of a scan's `box` that a grid of the same spacing covers (`first`: whole numbers), and where it lies in
    the grid."""
    source, target = [], []
    for start, size, part in zip(first[::-1].astype(int), grid_xyz[::-1], box):
        low = min(max(start, part.start), part.stop)
        high = max(low, min(start + size, part.stop))
        source.append(slice(low, high))
        target.append(slice(low - start, high - start) if high > low else slice(0, 0))
    return tuple(source), tuple(target)


def extent(mask: np.ndarray) -> Box:
    """The smallest box that holds every True of a (z,y,x) mask."""
    rows = np.logical_or.reduce(mask, axis=0)
    planes = np.fromiter((plane.any() for plane in mask), bool, len(mask))
    held = (np.flatnonzero(line) for line in (planes, rows.any(axis=1), rows.any(axis=0)))
    return tuple(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 0) for at in held)


def cubic_weights(at: np.ndarray, step: float, num_in: int) -> tuple[slice, np.ndarray]:
    """The source range that matters and float32 weights (len(at), range) of 1-D resampling at rising positions `at`.

    Kernel: cubic convolution with a = −1/2 (Keys 1981), stretched by the step when that is above 1, so that what the
    coarser grid cannot hold is filtered out. Each row sums to 1 with the taps outside the source counted, whose value
    is 0.
    """
    width = max(1.0, step)
    taps = np.arange(int(np.floor(at[0] - 2 * width)), int(np.ceil(at[-1] + 2 * width)) + 1)
    x = np.abs(at[:, None] - taps) / width
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights /= weights.sum(axis=1, keepdims=True)
    in_source = (taps >= 0) & (taps < num_in)
    start = int(taps[in_source][0]) if in_source.any() else 0
    return slice(start, start + int(in_source.sum())), weights[:, in_source].astype(np.float32)


def resample(
    raw: np.ndarray,
    box: Box,
    background: Any,
    slope: float,
    first: np.ndarray,
    step: np.ndarray,
    grid_xyz: tuple[int, int, int],
) -> np.ndarray:
    """float32 (Z,Y,X) value − background on the grid, from (z,y,x) voxels that are background outside `box`.

    What lies outside the scan is background too, of value 0. One axis after another, each in blocks of rows that share
    most of their taps: a matrix product per block, or a copy where steps are 1 from a whole voxel on.
    """
    near = []
    for axis, part in zip((2, 1, 0), box):
        at = first[axis] + step[axis] * np.arange(grid_xyz[axis])
        taps, _ = cubic_weights(at[[0, -1]], step[axis], raw.shape[2 - axis])
        near.append(slice(max(taps.start, part.start), max(taps.start, part.start, min(taps.stop, part.stop))))
    volume = raw[tuple(near)]
    if volume.dtype != np.float32 or background != 0 or slope != 1:
        volume = above(volume, background, slope)
    first = first - [part.start for part in reversed(near)]
    x, y, z = grid_xyz
    along_x = np.zeros((*volume.shape[:2], x), np.float32)
    for rows, taps, weights in _blocks(first[0], step[0], x, volume.shape[2]):
        if weights is None:
            along_x[:, :, rows] = volume[:, :, taps]
        else:
            np.matmul(volume[:, :, taps], weights.T, out=along_x[:, :, rows])
    along_y = np.zeros((len(volume), y, x), np.float32)
    for rows, taps, weights in _blocks(first[1], step[1], y, volume.shape[1]):
        if weights is None:
            along_y[:, rows] = along_x[:, taps]
        else:
            np.matmul(weights, along_x[:, taps], out=along_y[:, rows])
    out = np.zeros((z, y * x), np.float32)
    for rows, taps, weights in _blocks(first[2], step[2], z, volume.shape[0]):
        if weights is None:
            out[rows] = along_y[taps].reshape(-1, y * x)
        else:
            np.matmul(weights, along_y[taps].reshape(-1, y * x), out=out[rows])
    return out.reshape(z, y, x)


def _blocks(first: float, step: float, num_out: int, num_in: int) -> Iterator[tuple[slice, slice, np.ndarray | None]]:
    """(rows, taps, weights) of each block along one axis, but those that no tap reaches; no weights: a plain copy."""
    if step == 1 and first == int(first):
        low, high = max(0, int(-first)), min(num_out, num_in - int(first))
        if high > low:
            yield slice(low, high), slice(low + int(first), high + int(first)), None
        return
    for start in range(0, num_out, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, num_out))
        taps, weights = cubic_weights(first + step * np.arange(rows.start, rows.stop), step, num_in)
        if weights.size:
            yield rows, taps, weights
