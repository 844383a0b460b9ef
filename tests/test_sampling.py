"""Samples and masks are pure functions of (seed, index): once per epoch, any world size, exact and uniform masks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brainscale.config import Config, Mask
from brainscale.data_settings import Augment
from brainscale.masking import draw_masks, masked_count
from brainscale.sampling import SAME, Change, draw, draw_change, held_out, words
from brainscale.settings import InputError


def test_streams_are_fixed_for_ever():
    """A checkpoint made with another numpy must find the same order."""
    assert words(7, 0, 3, 2).tolist() == [13918315942059181947, 18007048821034219458]


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**12))
def test_crops_lie_inside_on_cells(seed, index):
    d = draw(seed, index, 3, (80, 96, 88), (40, 96, 32), 4, 0.5, Augment())
    for corner, crop, volume in zip(d.corner_zyx, (40, 96, 32), (80, 96, 88)):
        assert corner % 4 == 0 and 0 <= corner <= volume - crop
    assert d == draw(seed, index, 3, (80, 96, 88), (40, 96, 32), 4, 0.5, Augment())


def test_every_corner_and_both_sides_are_drawn():
    draws = [draw(0, i, 0, (16, 8, 8), (8, 8, 8), 4, 0.25, Augment()) for i in range(2000)]
    assert {d.corner_zyx[0] for d in draws} == {0, 4, 8}
    assert 0.2 < np.mean([d.flip for d in draws]) < 0.3


def test_a_crop_longer_than_the_volume_is_padded_on_both_sides():
    d = draw(0, 5, 0, (16, 24, 16), (32, 8, 20), 4, 0.0, Augment())
    assert d.corner_zyx[0] == -8 and d.corner_zyx[2] == -4 and 0 <= d.corner_zyx[1] <= 16


FRACTIONS = {name: 1.0 for name in Augment.model_fields if name.endswith("_fraction")}


def test_nothing_is_changed_by_default():
    assert draw(0, 1, 0, (8, 8, 8), (8, 8, 8), 4, 0.0, Augment()).change is SAME
    assert not SAME.moves and not SAME.alters


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**12))
def test_changes_stay_within_their_settings(seed, index):
    augment = Augment(**FRACTIONS)
    change = draw_change(augment, seed, index)
    assert max(map(abs, change.rotation_deg_zyx)) <= 10 and 1 / 1.1 <= change.scale <= 1.1
    assert 1 / 1.5 <= change.gamma <= 1.5 and 1 / 1.2 <= change.gain <= 1.2
    assert 0 <= change.noise_std <= 0.05 and 0 <= change.blur_mm <= 1 and 0 <= change.bias[0] <= np.log(1.4)
    assert change.moves and change.alters and change == draw_change(augment, seed, index)


def test_changes_are_fixed_for_ever():
    """A run must go on with the changes that it began with."""
    change = draw_change(Augment(**FRACTIONS), 7, 3)
    assert change.rotation_deg_zyx == pytest.approx((-7.188727096723499, 1.604653539835792, 7.396632514873891))
    assert (change.scale, change.gamma) == pytest.approx((1.0949823683435331, 1.085565374926779))
    assert (change.gain, change.blur_mm) == pytest.approx((1.0484689913351448, 0.9138192908560749))
    assert change.bias[:2] == pytest.approx((0.21616009449861145, 0.15953328791658206)) and len(change.bias) == 20
    assert change.noise_std == pytest.approx(0.0018282044068658318) and change.noise_place == 639476


@pytest.mark.parametrize("kind", sorted(FRACTIONS))
def test_switching_one_change_on_leaves_the_others_as_they_are(kind):
    everything, one = Augment(**FRACTIONS), Augment(**{kind: 1.0})
    for index in range(20):
        alone, among = draw_change(one, 3, index), draw_change(everything, 3, index)
        changed = {name for name in Change.__dataclass_fields__ if getattr(alone, name) != getattr(SAME, name)}
        assert changed and all(getattr(alone, name) == getattr(among, name) for name in changed)


def test_changes_have_their_shares():
    augment = Augment(affine_fraction=0.25, noise_fraction=0.5)
    changes = [draw_change(augment, 0, index) for index in range(2000)]
    assert abs(np.mean([c.moves for c in changes]) - 0.25) < 0.04
    assert abs(np.mean([c.noise_std > 0 for c in changes]) - 0.5) < 0.045
    assert abs(np.mean([c.scale for c in changes if c.moves]) - 1) < 0.01


@given(st.lists(st.sampled_from([f"sub-{i:02d}" for i in range(30)]), min_size=10), st.integers(0, 100))
def test_subjects_are_never_on_both_sides(subjects, seed):
    subjects = np.array([*subjects, "sub-98", "sub-99"])
    held = held_out(subjects, 0.2, seed)
    assert not set(subjects[held]) & set(subjects[~held])
    assert len(set(subjects[held])) == max(1, round(0.2 * len(set(subjects))))


def test_one_subject_cannot_be_split():
    with pytest.raises(InputError, match="nobody would be left"):
        held_out(np.array(["a", "a"]), 0.1, 0)
    assert not held_out(np.array(["a", "a"]), 0.0, 0).any()


def masks_of(index, tokens, seed, fraction=0.75):
    config = Config(seed=seed, mask=Mask(fraction=fraction))
    return draw_masks(config, index, torch.ones(len(index), tokens), (tokens, 1, 1))


@given(st.floats(0.05, 0.95), st.integers(20, 400), st.integers(0, 2**31), st.integers(0, 2**62))
def test_mask_counts_are_exact_and_disjoint(fraction, tokens, seed, index):
    masks = masks_of(np.array([index, index + 1]), tokens, seed, fraction)
    assert masks.masked.shape == (2, round(fraction * tokens))
    for visible, masked in zip(masks.visible.tolist(), masks.masked.tolist()):
        assert sorted(visible + masked) == list(range(tokens))


def test_every_cell_is_equally_likely():
    """Counts over 4,000 masks stay within 5 standard deviations of the binomial for each of 60 cells."""
    masked = masks_of(np.arange(4000), 60, seed=3).masked
    counts = np.bincount(masked.numpy().reshape(-1), minlength=60)
    assert np.abs(counts - 3000).max() < 5 * np.sqrt(4000 * 0.75 * 0.25)


def test_masks_depend_on_seed_and_index_alone():
    one, two = (masks_of(np.array([5, 9]), 100, seed=1), masks_of(np.array([9]), 100, seed=1))
    assert one.masked[1].tolist() == two.masked[0].tolist()
    assert one.masked[0].tolist() != one.masked[1].tolist()
    assert masks_of(np.array([9]), 100, seed=2).masked[0].tolist() != two.masked[0].tolist()


@pytest.mark.parametrize(("fraction", "tokens"), [(0.01, 10), (0.99, 10)])
def test_masks_that_hide_nothing_or_all_are_refused(fraction, tokens):
    with pytest.raises(InputError, match="at least one must be hidden"):
        masked_count(fraction, tokens)
