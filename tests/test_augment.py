"""What is done to voxels: geometry in millimetres, intensities between the clip bounds, noise of a sample's own."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, stats

from brainscale.augment import NOISE_PLACES, Codes, Noise, altered, box_of, inverse_linear, log_field, placed, rounded
from brainscale.data_settings import Augment
from brainscale.sampling import SAME, Change, draw_change

ISOTROPIC = np.ones(3)
VOLUME_ZYX = (20, 28, 24)
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(-300, 3000, VOLUME_ZYX).astype(np.int16)
CODES = Codes(background=0.0, low=100.0, high=1100.0)


def crop(corner, size, change=SAME, spacing=ISOTROPIC, voxels=VOXELS, background=0.0):
    box = box_of(corner, size, voxels.shape, change, spacing)
    part = voxels[tuple(slice(c, c + s) for c, s in zip(box.corner_zyx, box.size_zyx))]
    return placed(part, box, size, change, background)


@given(st.tuples(*[st.integers(-8, 16)] * 3), st.tuples(*[st.sampled_from([8, 16, 24])] * 3))
def test_a_crop_is_a_slice_of_the_padded_volume(corner, size):
    corner = tuple(min(max(c, -s + 1), v - 1) for c, s, v in zip(corner, size, VOLUME_ZYX))
    padded = np.pad(VOXELS, 24, constant_values=-7)
    expected = padded[tuple(slice(c + 24, c + 24 + s) for c, s in zip(corner, size))]
    found = crop(corner, size, background=-7)
    assert found.dtype == np.int16 and np.array_equal(found, expected)


@given(st.integers(0, 10**6), st.floats(0.3, 4), st.tuples(*[st.integers(-4, 8)] * 3))
def test_the_box_that_is_read_holds_all_that_an_interpolation_needs(index, slice_mm, corner):
    """Interpolated from the box alone, and from the whole volume."""
    change = draw_change(Augment(affine_fraction=1, max_rotation_deg=40, max_scale=1.5), 0, index)
    size, spacing = (16, 12, 20), np.array([slice_mm, 1.0, 0.7])
    half = (np.array(size) - 1) / 2
    linear = inverse_linear(change, spacing)
    offset = np.array(corner) + half - linear @ half
    whole = ndimage.affine_transform(VOXELS, linear, offset, size, np.float64, 1, "grid-constant", -7)
    assert np.abs(crop(corner, size, change, spacing, background=-7) - whole).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("axis", "planes"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))])
def test_a_quarter_turn_moves_voxels_as_numpy_does(axis, planes):
    cube = RNG.integers(0, 1000, (16, 16, 16)).astype(np.int16)
    degrees = [0.0, 0.0, 0.0]
    degrees[axis] = 90.0
    turned = crop((0, 0, 0), cube.shape, Change(rotation_deg_zyx=tuple(degrees)), voxels=cube)
    ways = [np.rot90(cube, k, planes) for k in (1, 3)]
    assert any(np.abs(turned.astype(int) - way).max() <= 1 for way in ways)


def test_rotations_have_a_sense_and_an_order():
    """About z, +y goes to +x; then about y, +z goes to +x and what lay along +x to -z."""
    turned = np.linalg.inv(inverse_linear(Change(rotation_deg_zyx=(90.0, 0.0, 0.0)), ISOTROPIC))
    assert np.allclose(turned @ [0, 1, 0], [0, 0, 1]) and np.allclose(turned @ [0, 0, 1], [0, -1, 0])
    both = np.linalg.inv(inverse_linear(Change(rotation_deg_zyx=(90.0, 90.0, 0.0)), ISOTROPIC))
    assert np.allclose(both @ [0, 1, 0], [-1, 0, 0]) and np.allclose(both @ [1, 0, 0], [0, 0, 1])


def test_a_scaled_ball_has_the_scaled_radius_and_stays_a_ball_in_millimetres():
    spacing = np.array([2.0, 1.0, 0.5])
    shape = (24, 48, 96)
    mm = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)], indexing="ij"))
    ball = np.where((mm**2).sum(0) < 12**2, 1000, 0).astype(np.int16)
    change = Change(rotation_deg_zyx=(20.0, 35.0, -15.0), scale=1.3)
    moved = crop((0, 0, 0), shape, change, spacing, ball).astype(float)
    spread = [math.sqrt((moved * axis**2).sum() / moved.sum()) for axis in mm]
    assert np.allclose(spread, 12 * 1.3 / math.sqrt(5), rtol=0.02)  # of a solid ball: radius / √5


def test_what_lies_outside_is_the_rows_background():
    full = np.full((8, 8, 8), 500, np.int16)
    shrunk = crop((0, 0, 0), (8, 8, 8), Change(scale=0.5), voxels=full, background=-77)
    assert (shrunk[0] == -77).all() and (shrunk[3:5, 3:5, 3:5] == 500).all()


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32"])
@pytest.mark.parametrize("codes", [CODES, Codes(0.0, 220.0, 20.0)])  # also values that run backwards
def test_gamma_and_gain_are_a_curve_between_the_clip_bounds(dtype, codes):
    if dtype == "uint8":
        codes = Codes(0.0, codes.low / 5, codes.high / 5)
    volume = np.arange(0, 250).astype(dtype)[None, None]
    found = altered(volume, Change(gamma=0.8, gain=1.1), codes, ISOTROPIC, Noise(0, volume.shape))
    u = np.clip((volume.astype(float) - codes.low) / (codes.high - codes.low), 0, 1)
    expected = codes.low + (codes.high - codes.low) * np.clip(u**0.8 * 1.1, 0, 1)
    assert found.dtype == np.float32 and found[0, 0, 0] == 0  # the background stays
    assert np.abs(found - expected)[0, 0, 1:].max() <= 1e-3
    assert np.abs(rounded(found, volume.dtype) - expected)[0, 0, 1:].max() <= (0.501 if dtype != "float32" else 1e-3)


@given(st.integers(0, 10**6))
def test_a_bias_field_is_smooth_and_within_its_bounds(index):
    bias = draw_change(Augment(bias_fraction=1, max_bias=1.4), 0, index).bias
    field = log_field(bias)
    assert np.abs(field).max() == pytest.approx(bias[0], rel=1e-5) and bias[0] <= math.log(1.4)
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) <= 2 * bias[0]


def test_a_bias_field_multiplies():
    volume = np.full((16, 16, 16), 600, np.int16)
    change = draw_change(Augment(bias_fraction=1, max_bias=1.4), 0, 3)
    found = altered(volume, change, CODES, ISOTROPIC, Noise(0, volume.shape))
    factor = (found.astype(float) - 100) / 500
    at = (np.arange(16) + 0.5) / 2 - 0.5  # in knots, from the middle of the first
    knots = np.clip(np.stack(np.meshgrid(at, at, at, indexing="ij")), 0, 7)
    assert np.allclose(factor, np.exp(ndimage.map_coordinates(log_field(change.bias), knots, order=1)), atol=1e-5)
    assert 1 / 1.4 - 0.01 < factor.min() < factor.max() < 1.4 + 0.01 and factor.std() > 0.01


def test_a_blur_has_its_width_in_millimetres():
    spacing, volume = np.array([2.0, 1.0, 0.5]), np.full((17, 33, 65), 101.0, np.float32)
    volume[8, 16, 32] = 1100.0
    found = altered(volume, Change(blur_mm=1.0), CODES, spacing, Noise(0, volume.shape)) - 101.0
    for axis, step in enumerate(spacing):
        profile = found.sum(tuple({0, 1, 2} - {axis}))
        at = (np.arange(len(profile)) - (len(profile) - 1) / 2) * step
        width_mm = math.sqrt((profile * at**2).sum() / profile.sum())
        assert width_mm == pytest.approx(1.0, rel=0.1 if step > 1 else 0.03)  # voxels of 2 mm sample it coarsely


def test_noise_is_normal_white_and_a_samples_own():
    noise = Noise(5, (32, 32, 32))
    one, two = (noise.of(Change(noise_place=place), (32, 32, 32)).ravel() for place in (17, 90_001))
    assert stats.kstest(one, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03 and abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.03
    assert np.array_equal(one, Noise(5, (32, 32, 32)).of(Change(noise_place=17), (32, 32, 32)).ravel())
    assert not np.array_equal(one, Noise(6, (32, 32, 32)).of(Change(noise_place=17), (32, 32, 32)).ravel())
    assert noise.of(Change(noise_place=NOISE_PLACES), (32, 32, 32)).size == 32**3  # the last place there is


def test_noise_has_its_deviation_and_leaves_the_background():
    volume = np.full((32, 32, 32), 600, np.int16)
    volume[:16] = 0
    found = altered(volume, Change(noise_std=0.05), CODES, ISOTROPIC, Noise(0, volume.shape))
    assert (found[:16] == 0).all() and found[16:].std() == pytest.approx(50, rel=0.03)


@given(st.integers(0, 10**6))
def test_codes_stay_between_the_clip_bounds(index):
    every = {name: 1.0 for name in Augment.model_fields if name.endswith("_fraction")}
    change = draw_change(Augment(**every), 0, index)
    found = altered(VOXELS, change, CODES, ISOTROPIC, Noise(0, VOXELS.shape))
    inside = found[VOXELS != 0]
    assert inside.min() >= 100 and inside.max() <= 1100 and (found[VOXELS == 0] == 0).all()
