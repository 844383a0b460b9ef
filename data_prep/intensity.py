"""Intensities of a scan: above its background, their statistics, and how they are stored. Arrays are z,y,x; no files.

Values are float32 "above background" in original units, or integer levels that stay as they are. Both give the same
numbers: integers are counted per level, which is exact and needs no float copy of the volume.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainscale.prep_plan import Plan
from brainscale_data_prep.nifti import Refused, Scan

SMALLEST_STD = 1e-30
"""Far above the smallest float32, so that a quantum of it is not 0 (integers declared as floats are that small)."""
FEWEST_QUANTA = 4.0
"""Quanta in the foreground's standard deviation; with fewer of them the anatomy would be lost."""


def above(raw: np.ndarray, background: Any, slope: float) -> np.ndarray:
    """float32 value − background in original units, C order; wide types are subtracted before they are rounded."""
    out = np.empty(raw.shape, np.float32)
    wide = raw.dtype.itemsize > 2 and raw.dtype != np.float32
    np.subtract(raw, background, out=out, dtype=np.float64 if wide else np.float32, casting="unsafe")
    if slope != 1:
        out *= np.float32(slope)
    return out


# --------------------------------------------------------------------------------------------- statistics


def statistics(values: np.ndarray, plan: Plan) -> dict[str, float]:
    """Clip bounds (percentiles, linear between neighbours), and mean and deviation after clipping, of the foreground.

    `values` (n,) is put into another order. Raises Refused (`constant`).
    """
    if values.size == 0:
        raise Refused("constant", "no foreground is left on the grid; choose a larger grid, or leave it out")
    low, high = percentiles(values, *plan.clip_percentiles)
    np.clip(values, low, high, out=values)
    mean = float(values.sum(dtype=np.float64) / values.size)
    centred = np.subtract(values, mean, dtype=np.float64)
    return _numbers(low, high, mean, float(np.sqrt(centred @ centred / values.size)))


def percentiles(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Two rising percentiles of values (n,), linear between neighbours; the values are put into another order.

    As np.percentile, which selects five times over all of them where this selects twice, and then among the rest.
    """
    rank, lower = _select(values, low, values.size, 0)
    return lower, _select(values[rank:], high, values.size, rank)[1]


def _select(values: np.ndarray, percentile: float, total: int, before: int) -> tuple[int, float]:
    """Rank below a percentile of `total` values, of which the `before` smallest are left out here, and its value."""
    position = percentile / 100 * (total - 1)
    rank = int(position)
    values.partition(rank - before)
    lower, rest = float(values[rank - before]), values[rank - before + 1 :]
    upper = float(rest.min()) if rest.size else lower
    return rank, lower + (upper - lower) * (position - rank)


def count_levels(
    raw: np.ndarray, within: np.ndarray | None, background: Any, slope: float, threshold: float, plan: Plan
) -> tuple[dict[str, float], np.ndarray]:
    """`statistics` of integer voxels, and which of them are foreground: those above the threshold, and `within` a mask.

    Values rise or fall with the voxels, as the slope's sign says, so the threshold is a comparison of integers.
    """
    if raw.size == 0:
        raise Refused("constant", "no foreground is left on the grid; choose a larger grid, or leave it out")
    voxels, counts = counted(raw)
    levels = above(voxels, background, slope)
    is_above = levels > threshold
    if not is_above.any():
        inside = np.zeros(raw.shape, bool)
    else:
        inside = raw >= voxels[is_above][0] if slope > 0 else raw <= voxels[is_above][-1]
    levels, counts = levels[is_above], counts[is_above]
    if within is not None:
        inside &= within
        voxels, counts = counted(raw[inside])
        levels = above(voxels, background, slope)
    return level_statistics(levels, counts, plan), inside


def counted(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of integer voxels (16 bits or fewer), rising, and how often each occurs.

    Arrow counts them in one pass, three times as fast as np.bincount, which widens all of them to 64 bits first.
    """
    modes = pc.mode(pa.array(voxels.reshape(-1)), n=1 << 16)
    values, counts = (modes.field(i).to_numpy() for i in (0, 1))
    order = np.argsort(values)
    return values[order], counts[order]


def level_statistics(levels: np.ndarray, counts: np.ndarray, plan: Plan) -> dict[str, float]:
    """`statistics` of the values `levels` (rising or falling), each of which occurs `counts` times."""
    held = counts > 0
    levels, counts = levels[held].astype(np.float64), counts[held].astype(np.float64)
    if levels.size == 0:
        raise Refused("constant", "no foreground is left on the grid; choose a larger grid, or leave it out")
    order = np.argsort(levels)
    levels, counts = levels[order], counts[order]
    low, high = level_percentiles(levels, counts, *plan.clip_percentiles)
    clipped, total = np.clip(levels, low, high), counts.sum()
    mean = float(counts @ clipped / total)
    return _numbers(low, high, mean, float(np.sqrt(counts @ (clipped - mean) ** 2 / total)))


def level_percentiles(levels: np.ndarray, counts: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """`percentiles` of the values `levels` (rising), each of which occurs `counts` times."""
    ends = np.cumsum(counts)

    def at(percentile: float) -> float:
        position = percentile / 100 * float(ends[-1] - 1)
        rank = np.floor(position)
        places = np.minimum(np.searchsorted(ends, (rank, rank + 1), side="right"), levels.size - 1)
        lower, upper = levels[places].tolist()
        return lower + (upper - lower) * (position - rank)

    return at(low), at(high)


def _numbers(low: float, high: float, mean: float, std: float) -> dict[str, float]:
    if not std > SMALLEST_STD:
        raise Refused("constant", "its foreground has one intensity, or none that float32 can tell apart; leave it out")
    return {"mean": mean, "std": std, "clip_low": low, "clip_high": high}


# --------------------------------------------------------------------------------------------- storage


def stays_integer(raw: np.ndarray, background: Any, plan: Plan) -> bool:
    """Whether voxels and their background fit the storage type as they are."""
    if raw.dtype.kind not in "iu" or raw.dtype.itemsize > 2 or plan.dtype == "float32":
        return False
    return plan.dtype == "int16" or bool(raw.min(initial=background) >= 0 and raw.max(initial=background) <= 255)


def keep_integers(raw: np.ndarray, background: Any, scan: Scan, plan: Plan) -> tuple[np.ndarray, float, float, float]:
    """Stored = voxel, or voxel − 32768 where 16 unsigned bits are used: (volume, scale, offset, background code)."""
    shift = 32768 if raw.dtype == np.uint16 and raw.max(initial=background) > 32767 else 0
    stored = (raw ^ np.uint16(shift)).view(np.int16) if shift else raw.astype(plan.dtype, copy=False)
    return stored, scan.slope, scan.inter + shift * scan.slope, int(background) - shift


def quantise(
    grid: np.ndarray, base: float, std: float, plan: Plan, warnings: list[str]
) -> tuple[np.ndarray, float, float, float]:
    """Round value − background to quanta: (volume, scale, offset, background code). `grid` is overwritten.

    Raises Refused (`too_coarse`).
    """
    low, high = float(grid.min(initial=0.0)), float(grid.max(initial=0.0))
    narrowest = (high - low) / 255 if plan.dtype == "uint8" else max(-low, high) / 32767
    if narrowest * FEWEST_QUANTA > std:
        raise Refused(
            "too_coarse",
            f"its values reach from {low + base:.4g} to {high + base:.4g}, so that one step of {plan.dtype} would be "
            f"{narrowest / std:.2g} standard deviations of the foreground; mend its outliers, or store dtype=float32",
        )
    if plan.dtype == "uint8":
        grid -= np.float32(low)
        grid /= np.float32(narrowest)
        return np.rint(grid, out=grid).astype(np.uint8), narrowest, base + low, round(-low / narrowest)
    quantum = std / plan.quanta_per_std
    if narrowest > quantum:
        quantum = narrowest
        warnings.append("quantum_widened")
    stored = np.empty(grid.shape, np.int16)
    for plane, out in zip(grid, stored):  # one after another, so that each stays in the processor's cache
        plane /= np.float32(quantum)
        np.copyto(out, np.rint(plane, out=plane), casting="unsafe")
    return stored, quantum, base, 0
