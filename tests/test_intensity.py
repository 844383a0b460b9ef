"""The quick ways through a volume against the plain ones: percentiles, counted levels, blocks of resampling, cells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainscale.prep_plan import Plan
from brainscale_data_prep.foreground import cell_shares
from brainscale_data_prep.intensity import above, level_statistics, percentiles, statistics
from brainscale_data_prep.nifti import Refused, Scan
from brainscale_data_prep.preprocess import prepare
from brainscale_data_prep.resampling import extent, resample, window


def plain_statistics(values, plan):
    low, high = np.percentile(values.astype(np.float64), plan.clip_percentiles)
    clipped = np.clip(values.astype(np.float64), low, high)
    return {"mean": clipped.mean(), "std": clipped.std(), "clip_low": low, "clip_high": high}


@given(
    st.lists(st.integers(-300, 300), min_size=1, max_size=60),
    st.tuples(st.floats(0, 100), st.floats(0, 100)).map(sorted).filter(lambda pair: pair[0] < pair[1]),
    st.sampled_from([1.0, 0.5, -0.25]),
)
@settings(max_examples=300, deadline=None)
def test_values_and_counted_levels_have_the_plain_statistics(codes, bounds, slope):
    plan = Plan(clip_percentiles=tuple(bounds))
    values = np.array(codes, np.float32) * np.float32(slope)
    np.testing.assert_allclose(
        percentiles(values.copy(), *bounds), np.percentile(values.astype(np.float64), bounds), rtol=1e-9, atol=1e-9
    )
    levels = np.arange(min(codes), max(codes) + 1, dtype=np.float32) * np.float32(slope)
    counts = np.bincount(np.array(codes) - min(codes))
    plain = plain_statistics(values, plan)
    if plain["std"] < 1e-5:
        return
    for found in (statistics(values.copy(), plan), level_statistics(levels, counts, plan)):
        for name, number in plain.items():
            assert found[name] == pytest.approx(number, abs=1e-6 * float(np.abs(values).max()))  # float32 values


def test_one_intensity_or_none_is_refused():
    for values in (np.zeros(0, np.float32), np.full(5, 3, np.float32)):
        with pytest.raises(Refused):
            statistics(values, Plan())
    for counts in (np.zeros(3), np.array([0, 7, 0])):
        with pytest.raises(Refused):
            level_statistics(np.arange(3.0), counts, Plan())


def dense_weights(first, step, num_out, num_in):
    """The resampling matrix of one axis, by the kernel's definition (Keys 1981, a = −1/2, stretched by the step)."""
    width = max(1.0, step)
    at = (first + step * np.arange(num_out))[:, None]
    taps = np.arange(-300, 300)
    x = np.abs(at - taps) / width
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    total = weights.sum(axis=1, keepdims=True)
    return (weights / np.where(total == 0, 1, total))[:, 300 : 300 + num_in]


@given(
    st.tuples(*[st.integers(1, 40)] * 3),
    st.tuples(*[st.integers(1, 70)] * 3),
    st.tuples(*[st.floats(-12, 12) | st.integers(-12, 12).map(float)] * 3),
    st.tuples(*[st.floats(0.3, 3.0) | st.just(1.0)] * 3),
    st.sampled_from([np.int16, np.float32, np.float64]),
)
@settings(max_examples=60, deadline=None)
def test_resampling_in_blocks_equals_the_whole_matrices(shape_zyx, grid_xyz, first, step, dtype):
    """Grids that reach over the scan, lie beside it, or cut it, with fewer and more rows than a block."""
    first = np.clip(first, -np.array(shape_zyx[::-1]), None)
    raw = np.random.default_rng(0).integers(-500, 500, shape_zyx).astype(dtype)
    wz, wy, wx = (dense_weights(first[a], step[a], grid_xyz[a], shape_zyx[2 - a]) for a in (2, 1, 0))
    plain = np.einsum("az,by,cx,zyx->abc", wz, wy, wx, (raw - 7.0) * 2, optimize=True)
    box = tuple(slice(0, size) for size in shape_zyx)
    found = resample(raw, box, dtype(7), 2.0, np.array(first), np.array(step), grid_xyz)
    np.testing.assert_allclose(found, plain, atol=2e-3)
    raw[:, :, : shape_zyx[2] // 2] = 7
    raw[shape_zyx[0] // 2 :] = 7
    box = extent(raw != 7)
    plain = np.einsum("az,by,cx,zyx->abc", wz, wy, wx, (raw - 7.0) * 2, optimize=True)
    found = resample(raw, box, dtype(7), 2.0, np.array(first), np.array(step), grid_xyz)
    np.testing.assert_allclose(found, plain, atol=2e-3)


def test_resampling_leaves_the_scan_as_it_was():
    raw = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32)
    before = raw.copy()
    resample(raw, extent(raw != 0), np.float32(0), 1.0, np.zeros(3), np.full(3, 1.1), (10, 9, 8))
    np.testing.assert_array_equal(raw, before)
    assert not np.shares_memory(above(raw, np.float32(0), 1.0), raw)


@pytest.mark.parametrize("cell", [1, 2, 4, 6, 8])
def test_cells_hold_the_share_of_foreground(cell):
    inside = np.random.default_rng(cell).random((48, 48, 24)) < 0.3
    inside[:8] = True
    z, y, x = (n // cell for n in inside.shape)
    share = inside.reshape(z, cell, y, cell, x, cell).mean((1, 3, 5))
    np.testing.assert_array_equal(cell_shares(inside, cell), np.rint(share * 255).astype(np.uint8))


def test_integers_declared_as_floats_are_no_intensities():
    """int32 read as float32 are values of about 1e-43: a quantum of them would be 0."""
    tiny = np.arange(1, 1000, dtype=np.int32).view(np.float32)
    with pytest.raises(Refused, match="float32 can tell apart"):
        statistics(tiny, Plan())


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(-12, 12)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
@settings(max_examples=100, deadline=None)
def test_a_window_is_what_scan_and_grid_share(shape_zyx, first, grid_xyz):
    box = tuple(slice(size // 3, size) for size in shape_zyx)
    source, target = window(box, np.array(first), grid_xyz)
    found, plain = np.zeros(grid_xyz[::-1]), np.zeros(grid_xyz[::-1])
    voxels = np.arange(1.0, np.prod(shape_zyx) + 1).reshape(shape_zyx)
    found[target] = voxels[source]
    for at in np.ndindex(grid_xyz[::-1]):
        place = tuple(i + f for i, f in zip(at, first[::-1]))
        if all(part.start <= i < part.stop for i, part in zip(place, box)):
            plain[at] = voxels[place]
    np.testing.assert_array_equal(found, plain)


@given(st.tuples(*[st.integers(1, 6)] * 3), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_extent_holds_all_that_differs_and_no_more(shape, seed, turned):
    mask = np.random.default_rng(seed).random(shape) < 0.1
    mask = mask.T if turned else mask
    held = extent(mask)
    assert np.count_nonzero(mask[held]) == np.count_nonzero(mask)
    for axis in range(3):
        if mask.any():
            lines = np.moveaxis(mask[held], axis, 0)
            assert lines[0].any() and lines[-1].any()


@pytest.mark.parametrize("background", [65535, 40000])
def test_a_bright_constant_background_is_stored_too(background):
    """Unsigned 16 bits, inverted: what needs the shift by 32768 lies outside the box that is looked at."""
    voxels = np.full((30, 30, 30), background, np.uint16)
    voxels[8:20, 9:21, 10:22] = np.random.default_rng(0).integers(100, 900, (12, 12, 12))
    scan = Scan(np.asfortranarray(voxels), -1.0, 65535.0, np.eye(4), b"", [], "", 0)
    plan = Plan(grid_voxels_xyz=(32, 32, 32), spacing_mm_xyz="native")
    prepared = prepare(scan, plan, (32, 32, 32))
    values = prepared.volume_zyx * prepared.record["scale"] + prepared.record["offset"]
    np.testing.assert_array_equal(np.unique(values), np.unique(65535.0 - voxels))
    assert values[0, 0, 0] == 65535 - background
    assert prepared.record["background_code"] * prepared.record["scale"] + prepared.record["offset"] == values[0, 0, 0]


@pytest.mark.parametrize("dtype", ["int16", "uint8"])
def test_an_outlier_that_would_drown_the_anatomy_is_refused(dtype):
    voxels = np.zeros((30, 30, 30), np.float32)
    voxels[8:20, 9:21, 10:22] = np.random.default_rng(0).normal(500, 100, (12, 12, 12))
    plan = Plan(grid_voxels_xyz=(32, 32, 32), spacing_mm_xyz="native", dtype=dtype)
    for spike, taken in ((3e3, True), (3e7, False)):
        voxels[15, 15, 15] = spike
        scan = Scan(np.asfortranarray(voxels), 1.0, 0.0, np.eye(4), b"", [], "", 0)
        if taken:
            assert prepare(scan, plan, (32, 32, 32)).record["scale"] < 100 / 4
        else:
            with pytest.raises(Refused, match="dtype=float32") as refused:
                prepare(scan, plan, (32, 32, 32))
            assert refused.value.code == "too_coarse"
            exact = prepare(scan, plan.model_copy(update={"dtype": "float32"}), (32, 32, 32))
            assert exact.volume_zyx.max() == np.float32(3e7)


def test_what_is_darker_than_a_constant_background_is_refused():
    voxels = np.full((30, 30, 30), 1000, np.int16)
    voxels[8:20, 9:21, 10:22] = np.random.default_rng(0).integers(0, 900, (12, 12, 12))
    scan = Scan(np.asfortranarray(voxels), 1.0, 0.0, np.eye(4), b"", [], "", 0)
    plan = Plan(grid_voxels_xyz=(32, 32, 32), spacing_mm_xyz="native")
    with pytest.raises(Refused, match="brighter than its background"):
        prepare(scan, plan, (32, 32, 32))


def a_head(rng):
    """A bright ellipsoid in dark air with noise: no constant background."""
    grid = np.meshgrid(*[np.linspace(-1.3, 1.3, n) for n in (40, 44, 40)], indexing="ij")
    return np.where(sum(g**2 for g in grid) < 1, rng.normal(1000, 80, (40, 44, 40)), rng.normal(60, 20, (40, 44, 40)))


def test_air_brighter_than_the_head_is_warned_of():
    voxels, plan = a_head(np.random.default_rng(0)), Plan(grid_voxels_xyz=(40, 44, 40), spacing_mm_xyz="native")
    for values, warned in ((voxels, []), (2000 - voxels, ["bright_background"])):
        scan = Scan(np.asfortranarray(values.astype(np.int16)), 1.0, 0.0, np.eye(4), b"", [], "", 0)
        assert prepare(scan, plan, (40, 44, 40)).record["warnings"] == warned


@pytest.mark.parametrize(
    ("factor", "dtype", "warned"),
    [(1, "int16", False), (100, "int16", True), (1, "uint8", True), (9, "float32", False)],
)
def test_whole_numbers_that_are_rounded_carry_a_warning(factor, dtype, warned):
    voxels = (a_head(np.random.default_rng(0)) * factor).astype(np.int32)
    plan = Plan(grid_voxels_xyz=(40, 44, 40), spacing_mm_xyz="native", dtype=dtype)
    scan = Scan(np.asfortranarray(voxels), 1.0, 0.0, np.eye(4), b"", [], "", 0)
    record = prepare(scan, plan, (40, 44, 40)).record
    assert ("rounded_integers" in record["warnings"]) == warned
