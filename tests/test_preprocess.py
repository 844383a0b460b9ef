"""From scan to row: axes, placement, resampling, quantisation and statistics, on synthetic and on real heads."""

import itertools

import numpy as np
import pytest
from conftest import REAL_DATA, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from brainscale.geometry import voxel_to_mm
from brainscale.prep_plan import Plan
from brainscale.settings import load
from brainscale_data_prep import nifti, preprocess, resampling
from brainscale_data_prep.foreground import cell_shares, largest_component, otsu
from brainscale_data_prep.nifti import Refused, Scan

ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
NATIVE = {"spacing_mm_xyz": "native", "crop": "centre", "max_cropped_fraction": 0.0}


def real(folder):
    return pytest.mark.skipif(not (REAL_DATA / folder).is_dir(), reason="real data absent: set BRAINSCALE_TEST_DATA")


def scan_of(voxels, affine=None, slope=1.0, inter=0.0):
    return Scan(np.asfortranarray(voxels), slope, inter, np.eye(4) if affine is None else affine, b"", [], "", 0)


def head(shape, rng, low=0, high=1000):
    """An ellipsoid with texture and a bump that makes it asymmetric, on zero background."""
    grid = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in shape], indexing="ij")
    inside = sum(g**2 for g in grid) < 1
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    texture = (texture - texture.min()) / np.ptp(texture) + 0.3 * (grid[0] > 0.4)
    return np.where(inside, low + 1 + (high - low) * texture, low)


def turned(voxels, affine, order, signs):
    """The same image stored with other axes."""
    flip = np.eye(4)
    for axis, sign in enumerate(signs):
        if sign < 0:
            flip[axis, axis], flip[axis, 3] = -1, voxels.shape[axis] - 1
    permute = np.eye(4)[[*order, 3]].T
    flipped = voxels[tuple(slice(None, None, s) for s in signs)]
    return flipped.transpose(order), affine @ flip @ permute


def stored_values(prepared):
    return prepared.volume_zyx * prepared.record["scale"] + prepared.record["offset"]


def stored_affine(prepared):
    return np.array(prepared.record["affine_stored"]).reshape(4, 4)


# --------------------------------------------------------------------------------------------- axes and world


@given(
    st.sampled_from(ORIENTATIONS),
    st.tuples(*[st.floats(0.5, 3)] * 3),
    st.tuples(*[st.floats(-0.5, 0.5)] * 3),
    st.tuples(*[st.floats(-200, 200)] * 3),
)
@settings(max_examples=100, deadline=None)
def test_world_coordinates_survive_all_orientations(orientation, spacing, tilt, origin):
    """Turned, tilted and shifted scans keep every voxel's place in the world; 48 storage orders give one array."""
    a, b, c = tilt
    rotation = np.linalg.qr(np.array([[1, -a, b], [a, 1, -c], [-b, c, 1]]))[0]
    rotation *= np.sign(np.diag(rotation))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation * spacing, origin
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    plain, plain_affine = preprocess.canonical(voxels, affine)
    view, view_affine = preprocess.canonical(*turned(voxels, affine, *orientation))
    np.testing.assert_array_equal(view, plain)
    np.testing.assert_allclose(view_affine, plain_affine, atol=1e-9)
    assert (np.diag(view_affine)[:3] > 0).all()
    index = np.argwhere(np.ones(voxels.shape, bool))
    world = {int(voxels[tuple(ijk)]): voxel_to_mm(affine, ijk) for ijk in index}
    for ijk in index:
        np.testing.assert_allclose(voxel_to_mm(view_affine, ijk), world[int(view[tuple(ijk)])], atol=1e-3)


def test_resampled_rows_keep_the_world_too():
    """A landmark found in the stored grid lies where it lay in the scan, for every orientation."""
    shape, place = (40, 44, 36), np.array([14.0, 25.0, 20.0])
    affine = np.array([[1.6, 0.1, 0, -30], [-0.1, 1.6, 0.05, -20], [0, -0.05, 1.7, 10], [0, 0, 0, 1.0]])
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - place, axis=-1)
    voxels = 1000 * np.exp(-(distance**2) / 18)
    plan = Plan(grid_voxels_xyz=(72, 80, 68), foreground="otsu", max_cropped_fraction=1.0)
    for orientation in ORIENTATIONS[::5]:
        prepared = preprocess.prepare(scan_of(*turned(voxels, affine, *orientation)), plan, (72, 80, 68))
        values = stored_values(prepared)
        centre_xyz = np.array(ndimage.center_of_mass(np.where(values > 50, values, 0)))[::-1]
        np.testing.assert_allclose(
            voxel_to_mm(stored_affine(prepared), centre_xyz), voxel_to_mm(affine, place), atol=0.02
        )


@real("orientations")
def test_the_twelve_orientations_become_one_array():
    plan = load(Plan, ROOT / "configs/prep/identity.toml")
    one_mm = load(Plan, ROOT / "configs/prep/brain_1mm.toml")
    scans = [nifti.read(path) for path in sorted((REAL_DATA / "orientations").glob("*.nii.gz"))]
    assert len(scans) == 12
    shape = [-(-int(n) // 4) * 4 for n in preprocess.canonical(scans[0].voxels, scans[0].affine)[0].shape]
    exact = [preprocess.prepare(scan, plan, tuple(shape)) for scan in scans]
    resampled = [preprocess.prepare(scan, one_mm, (160, 192, 160)) for scan in scans[::4]]
    for other in exact[1:]:
        np.testing.assert_array_equal(other.volume_zyx, exact[0].volume_zyx)
        np.testing.assert_allclose(stored_affine(other), stored_affine(exact[0]), atol=1e-3)
    for other in resampled[1:]:
        difference = other.volume_zyx.astype(int) - resampled[0].volume_zyx
        assert np.abs(difference).max() <= 1


# --------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, ">i2", ">u2"])
def test_integers_are_stored_exactly(dtype):
    info = np.iinfo(dtype)
    rng = np.random.default_rng(1)
    voxels = head((21, 26, 23), rng, max(info.min, -5000), info.max * 0.7).clip(info.min, info.max).astype(dtype)
    prepared = preprocess.prepare(scan_of(voxels, slope=0.25, inter=-7), Plan(**NATIVE), (24, 28, 24))
    assert prepared.volume_zyx.dtype == np.int16 and prepared.volume_zyx.flags.c_contiguous
    x, y, z = (-int(first) for first in prepared.record["crop_voxels_xyz"])
    cut = stored_values(prepared)[z : z + 23, y : y + 26, x : x + 21]
    np.testing.assert_array_equal(cut, voxels.T.astype(float) * 0.25 - 7)
    padding = np.delete(prepared.volume_zyx, range(y, y + 26), axis=1)
    assert (padding == prepared.record["background_code"]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, ">i4", np.uint64])
@pytest.mark.parametrize(("low", "high"), [(0, 60000), (-9000, 30000)])
def test_wide_integers_are_stored_exactly_where_sixteen_bits_hold_them(dtype, low, high):
    low = max(low, np.iinfo(dtype).min)
    voxels = head((21, 26, 23), np.random.default_rng(1), low, high).astype(dtype)
    prepared = preprocess.prepare(scan_of(voxels), Plan(**NATIVE), (24, 28, 24))
    x, y, z = (-int(first) for first in prepared.record["crop_voxels_xyz"])
    assert prepared.volume_zyx.dtype == np.int16 and prepared.record["scale"] == 1
    np.testing.assert_array_equal(stored_values(prepared)[z : z + 23, y : y + 26, x : x + 21], voxels.T.astype(float))


@given(st.floats(1e-3, 1e6), st.floats(-1e4, 1e4), st.sampled_from([np.float32, np.float64, np.int32]))
@settings(max_examples=25, deadline=None)
def test_other_types_are_within_half_a_quantum(factor, shift, dtype):
    factor = max(factor, 1) if dtype == np.int32 else factor
    voxels = (head((20, 24, 20), np.random.default_rng(2)) * factor + shift).astype(dtype)
    scan = scan_of(voxels)
    prepared = preprocess.prepare(scan, Plan(**NATIVE), (20, 24, 20))
    numbers = prepared.record
    kept = dtype == np.int32 and numbers["scale"] == 1
    assert kept or numbers["scale"] == pytest.approx(numbers["std"] / 512) or "quantum_widened" in numbers["warnings"]
    slack = 1e-6 * float(np.ptp(voxels)) + 1e-15 * float(np.abs(voxels).max())
    assert np.abs(stored_values(prepared) - voxels.T).max() <= 0.5 * numbers["scale"] * 1.001 + slack
    exact = preprocess.prepare(scan, Plan(**NATIVE, dtype="float32"), (20, 24, 20))
    np.testing.assert_array_equal(exact.volume_zyx, voxels.T.astype(np.float32))


def test_uint8_and_a_widened_quantum_keep_their_promise():
    voxels = head((20, 24, 20), np.random.default_rng(3)).astype(np.float32)
    coarse = preprocess.prepare(scan_of(voxels), Plan(**NATIVE, dtype="uint8"), (20, 24, 20))
    assert coarse.volume_zyx.dtype == np.uint8
    assert np.abs(stored_values(coarse) - voxels.T).max() <= 0.501 * np.ptp(voxels) / 255
    voxels[10, 12, 10] = 1e6
    spike = preprocess.prepare(scan_of(voxels), Plan(**NATIVE), (20, 24, 20))
    assert spike.record["warnings"] == ["quantum_widened"]
    assert stored_values(spike)[10, 12, 10] == pytest.approx(1e6, rel=1e-4)


def test_statistics_are_those_of_the_clipped_foreground():
    voxels = head((30, 34, 32), np.random.default_rng(4), low=0).astype(np.int16)
    numbers = preprocess.prepare(scan_of(voxels, slope=2.0, inter=5), Plan(**NATIVE), (32, 36, 32)).record
    values = voxels[voxels > 0] * 2.0 + 5
    low, high = np.percentile(values, (0.5, 99.5))
    clipped = values.clip(low, high)
    assert (numbers["clip_low"], numbers["clip_high"]) == pytest.approx((low, high), rel=1e-5)
    assert (numbers["mean"], numbers["std"]) == pytest.approx((clipped.mean(), clipped.std()), rel=1e-5)
    assert numbers["foreground_threshold"] == 5
    assert numbers["foreground_fraction"] == pytest.approx(values.size / (32 * 36 * 32))


def test_what_is_not_finite_becomes_background_and_is_counted():
    voxels = head((40, 48, 40), np.random.default_rng(5)).astype(np.float32)
    bad = voxels.copy()
    bad[0], bad[20, 24, 20] = np.nan, np.inf
    prepared = preprocess.prepare(scan_of(bad), Plan(**NATIVE), (40, 48, 40))
    assert prepared.record["warnings"] == [f"non_finite:{48 * 40 + 1}"]
    codes = prepared.volume_zyx
    assert codes[20, 24, 20] == prepared.record["background_code"] == codes[0, 0, 0]
    voxels[voxels == 0] = np.nan
    everywhere = preprocess.prepare(scan_of(voxels), Plan(**NATIVE), (40, 48, 40))
    assert everywhere.record["foreground_fraction"] == pytest.approx(np.isfinite(voxels).mean(), abs=1e-4)


@pytest.mark.parametrize(
    "voxels", [np.zeros((8, 8, 8)), np.full((8, 8, 8), np.nan), np.eye(8)[None] * np.full((8, 1, 1), 1.5)]
)
def test_volumes_without_contrast_are_refused(voxels):
    with pytest.raises(Refused) as refused:
        preprocess.prepare(scan_of(voxels.astype(np.float32)), Plan(**NATIVE), (8, 8, 8))
    assert refused.value.code == "constant"


# --------------------------------------------------------------------------------------------- resampling


def resampled(raw, *arguments):
    return resampling.resample(raw, tuple(slice(0, size) for size in raw.shape), *arguments)


def test_resampling_agrees_with_scipy_on_smooth_volumes():
    rng = np.random.default_rng(6)
    raw = ndimage.gaussian_filter(rng.normal(size=(30, 34, 32)), 3).astype(np.float32)
    raw /= raw.std()
    first, step, grid = np.array([2.3, 3.1, 4.7]), np.array([0.71, 0.83, 0.9]), (30, 28, 24)
    ours = resampled(raw, np.float32(0), 1.0, first, step, grid)
    at = [first[a] + step[a] * np.arange(grid[a]) for a in (2, 1, 0)]
    reference = ndimage.map_coordinates(raw.astype(np.float64), np.meshgrid(*at, indexing="ij"), order=3)
    assert np.abs(ours - reference).max() < 0.02


def test_downsampling_keeps_slow_waves_and_does_not_alias_fast_ones():
    x = np.arange(96)
    grid = (30, 30, 30)
    first, step = np.full(3, 4.0), np.full(3, 3.0)

    def wave(cycles_per_voxel):
        raw = np.cos(2 * np.pi * cycles_per_voxel * x)[None, None, :] * np.ones((96, 96, 1))
        return raw, resampled(raw.astype(np.float32), 0, 1.0, first, step, grid)

    raw, slow = wave(1 / 32)
    assert np.abs(slow - raw[4, 4, 4:94:3]).max() < 0.1
    _, fast = wave(0.3)  # 0.9 cycles per new voxel: picked voxels would show it as a slow wave of full height
    assert np.abs(fast).max() < 0.1


@pytest.mark.parametrize("spacing", [2.0, 1.0])
def test_padding_is_never_foreground(spacing):
    """With foreground "none" everything scanned counts, and nothing else: statistics are those of the scan."""
    rng = np.random.default_rng(3)
    voxels = rng.integers(200, 400, (10, 12, 14)).astype(np.int16)
    plan = Plan(
        grid_voxels_xyz=(24, 24, 32),
        spacing_mm_xyz=(2, 2, 2),
        foreground="none",
        clip_percentiles=(0, 100),
        crop="centre",
    )
    scan = scan_of(voxels, np.diag([spacing, spacing, spacing, 1]))
    record = preprocess.prepare(scan, plan, plan.grid_voxels_xyz).record
    rim = 1e-9 if spacing == 2.0 else 0.1  # a widened kernel mixes the background into the scan's own rim
    assert record["mean"] == pytest.approx(voxels.mean(), rel=rim)
    scanned = voxels.size * (spacing / 2) ** 3
    assert record["foreground_fraction"] == pytest.approx(scanned / (24 * 24 * 32), rel=1e-9)


def test_the_background_outside_the_field_of_view_is_kept():
    raw = np.full((12, 12, 12), 700, np.int16)
    out = resampled(raw, 700, 1.0, np.array([-6.0, -6, -6]), np.full(3, 0.8), (30, 30, 30))
    assert (out == 0).all()
    raw[6, 6, 6] = 900
    out = resampled(raw, 700, 0.5, np.array([-6.0, -6, -6]), np.full(3, 0.5), (40, 40, 40))
    assert out.max() == out[24, 24, 24] == pytest.approx(100, abs=1e-3)


@given(st.tuples(*[st.integers(-9, 30)] * 3), st.tuples(*[st.integers(1, 30)] * 3))
@settings(max_examples=50, deadline=None)
def test_cutting_equals_resampling_with_unit_steps(first, grid):
    raw = np.random.default_rng(7).integers(0, 100, (13, 17, 19)).astype(np.int16)
    start = np.array(first, float)
    source, target = resampling.window(tuple(slice(0, size) for size in raw.shape), start, grid)
    cut = np.full(grid[::-1], 3, raw.dtype)
    cut[target] = raw[source]
    np.testing.assert_allclose(resampled(raw, 3, 1.0, start, np.ones(3), grid), cut - 3.0, atol=1e-4)


def test_nearly_equal_spacing_takes_the_voxels_as_they_are():
    voxels = head((30, 34, 32), np.random.default_rng(8)).astype(np.int16)
    affine = np.diag([1.0005, 0.9995, 1.0, 1])
    prepared = preprocess.prepare(scan_of(voxels, affine), Plan(), (40, 40, 40))
    assert prepared.record["scale"] == 1.0
    np.testing.assert_array_equal(np.sort(prepared.volume_zyx[prepared.volume_zyx > 0]), np.sort(voxels[voxels > 0]))
    np.testing.assert_allclose(np.diag(stored_affine(prepared))[:3], [1.0005, 0.9995, 1.0])


# --------------------------------------------------------------------------------------------- placing


def test_a_tall_head_keeps_its_top_and_a_low_one_is_centred():
    rng = np.random.default_rng(9)
    voxels = np.zeros((60, 64, 90), np.int16)
    voxels[10:50, 12:52, 5:80] = head((40, 40, 75), rng) + 1
    plan = Plan(grid_voxels_xyz=(48, 48, 48), top_margin_mm=4, max_cropped_fraction=1.0)
    tall = preprocess.prepare(scan_of(voxels), plan, (48, 48, 48))
    first = tall.record["crop_voxels_xyz"]
    assert first[2] + 48 == 80 + 4
    assert (first[0] + 23.5, first[1] + 23.5) == pytest.approx((29.5, 31.5), abs=1)
    total = (voxels > 0).sum()
    lost = (voxels[:, :, : int(first[2])] > 0).sum()
    assert tall.record["cropped_fraction"] == pytest.approx(lost / total, abs=0.01)
    assert tall.record["warnings"] == ["cropped"]
    low = preprocess.prepare(scan_of(voxels), plan, (48, 48, 88))
    assert low.record["crop_voxels_xyz"][2] + 43.5 == pytest.approx(42, abs=1.5)
    assert low.record["cropped_fraction"] == 0
    with pytest.raises(Refused) as refused:
        preprocess.prepare(scan_of(voxels), Plan(), (48, 48, 48))
    assert refused.value.code == "does_not_fit"


def test_air_with_noise_is_no_foreground():
    """Half of the air is exactly zero: the rest still must not pass for a stripped brain."""
    rng = np.random.default_rng(10)
    clean = np.pad(head((40, 48, 44), rng), 10)
    noisy = np.where(clean > 0, clean + 200, rng.integers(-6, 7, clean.shape).clip(0)).astype(np.int16)
    for voxels, threshold in ((clean.astype(np.int16), 0.0), (noisy, None)):
        numbers = preprocess.prepare(scan_of(voxels), Plan(**NATIVE), (60, 68, 64)).record
        assert numbers["foreground_fraction"] == pytest.approx((clean > 0).sum() / (60 * 68 * 64), rel=0.03)
        assert threshold is None or numbers["foreground_threshold"] == threshold


def test_foreground_parts():
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 5000), np.random.default_rng(1).normal(20, 1, 3000)])
    assert 4 < otsu(values) < 16
    mask = np.zeros((9, 9, 9), bool)
    mask[:2, :2, :2] = mask[4:8, 4:8, 4:8] = True
    assert largest_component(mask).sum() == 64
    shares = cell_shares(mask[:8, :8, :8], 4)
    assert shares[0, 0, 0] == round(255 * 8 / 64) and shares[1, 1, 1] == 255 and shares.sum() == 255 + 32


# --------------------------------------------------------------------------------------------- real heads


@real("ds002748_2mm")
def test_all_stripped_brains_are_taken_whole_at_2mm():
    plan = load(Plan, ROOT / "configs/prep/brain_2mm.toml")
    paths = sorted((REAL_DATA / "ds002748_2mm").rglob("*_T1w.nii.gz"))
    prepared = [preprocess.prepare(nifti.read(path), plan, (80, 96, 80)) for path in paths]
    assert len(prepared) == 47
    assert sum(p.record["cropped_fraction"] <= 0.01 for p in prepared) == 47
    assert all(0.2 < p.record["foreground_fraction"] < 0.4 and not p.record["warnings"] for p in prepared)


@pytest.mark.parametrize("folder", [pytest.param(f, marks=real(f)) for f in ("ds000011", "ds002748_native")])
def test_the_top_of_every_real_head_is_inside(folder):
    """Every part of the head over the grid's upper end would be lost; the highest tissue is found here by itself."""
    plan = load(Plan, ROOT / "configs/prep/brain_1mm.toml")
    paths = sorted((REAL_DATA / folder).rglob("*_T1w.nii.gz"))
    assert paths
    for path in paths:
        scan = nifti.read(path)
        record = preprocess.prepare(scan, plan, (160, 192, 160)).record
        view, affine = preprocess.canonical(scan.voxels, scan.affine)
        smooth = ndimage.uniform_filter(view[::2, ::2].astype(np.float32), (5, 5, 1))
        tissue = smooth > record["foreground_threshold"]
        per_slice = tissue.reshape(-1, tissue.shape[2]).sum(axis=0)
        top_voxel = np.flatnonzero(per_slice > 0.01 * per_slice.max())[-1]
        last = record["crop_voxels_xyz"][2] + 159 / np.linalg.norm(affine[:3, 2])
        assert top_voxel <= last
        assert record["cropped_fraction"] < 0.13
