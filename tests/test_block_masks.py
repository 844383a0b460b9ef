"""JEPA's block masks: exact counts, no special cell, independent scale and aspect, blocks that are blocks.

Three defects of published code each have a test: an exclusive upper bound that never reaches the last row, one random
number used for scale and aspect, and lists cut to a common length in raster order (which empties one end of the head).
"""

import numpy as np
import pytest
import torch
from conftest import FULL
from hypothesis import given, settings
from hypothesis import strategies as st

from brainscale.config import MAX_BLOCKS, Config, Mask
from brainscale.masking import (
    Coverage,
    block_order,
    draw_blocks,
    draw_masks,
    head_by_stratum,
    masked_count,
    uniform,
)
from brainscale.sampling import MASK, words

GRID = (5, 6, 4)
DRAWS = 20_000


def blocks_of(index, grid=GRID, **mask):
    config, everywhere = Config(objective="jepa", mask=Mask(**mask)), torch.ones(len(index), int(np.prod(grid)))
    return draw_masks(config, index, everywhere, grid)


@pytest.fixture(scope="module")
def many():
    """Hidden cells of many draws, (DRAWS, N) bool."""
    hidden = np.zeros((DRAWS, int(np.prod(GRID))), bool)
    for first in range(0, DRAWS, 1000):
        masks = blocks_of(np.arange(first, first + 1000))
        np.put_along_axis(hidden[first : first + 1000], masks.masked.numpy(), True, axis=1)
    return hidden


def test_every_cell_is_equally_likely_to_be_a_target(many):
    """Also the last row of every axis, and by the same margin: each count is binomial."""
    assert (many.sum(1) == round(0.75 * many.shape[1])).all()
    deviation = np.sqrt(DRAWS * 0.75 * 0.25)
    counts = many.sum(0)
    assert np.abs(counts - 0.75 * DRAWS).max() < 4.5 * deviation
    for axis in range(3):
        for half in np.array_split(np.moveaxis(counts.reshape(GRID), axis, 0), 2):  # no end of the head is favoured
            assert half.mean() == pytest.approx(0.75 * DRAWS, abs=4.5 * deviation)


def test_the_context_is_as_flat_as_the_targets_at_each_scale():
    for low, high in Mask().block_fractions:
        counts = np.bincount(
            blocks_of(np.arange(4000), block_fractions=((low, high),)).visible.numpy().reshape(-1), minlength=120
        )
        assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(4000 * 0.75 * 0.25)


def test_scale_and_aspect_and_place_are_independent():
    random = np.random.default_rng(0).random((DRAWS // 10, 1 + 7 * 10))
    blocks = draw_blocks(Mask(block_fractions=((0.05, 0.5),)), random, (40, 40, 40))
    fraction, stretch = blocks.fraction.ravel(), blocks.stretch.reshape(-1, 3)
    columns = [fraction, stretch[:, 0], stretch[:, 1], stretch[:, 2], *blocks.corner.reshape(-1, 3).T]
    correlation = np.corrcoef(columns)
    for other in (*range(1, 7),):
        assert abs(correlation[0, other]) < 4.5 / np.sqrt(DRAWS), other
    assert abs(correlation[1:4, 4:]).max() < 4.5 / np.sqrt(DRAWS)
    np.testing.assert_allclose(stretch.prod(1), 1)
    ratio = stretch[:, 0] / stretch[:, 1]
    assert 0.5 <= ratio.min() < 0.55 and 1.8 < ratio.max() <= 2.0
    assert fraction.min() == pytest.approx(0.05, abs=0.001) and fraction.max() == pytest.approx(0.5, abs=0.001)
    corners = np.bincount(blocks.corner[..., 0].ravel(), minlength=40)
    assert np.abs(corners - DRAWS / 40).max() < 4.5 * np.sqrt(DRAWS / 40)
    achieved = blocks.edge.prod(-1).ravel() / 40**3
    assert np.corrcoef(achieved, fraction)[0, 1] > 0.97


@settings(max_examples=200 if FULL else 40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 7)] * 3), st.floats(0.1, 0.9), st.integers(0, 2**31), st.integers(0, 2**62),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_counts_are_exact_and_context_and_targets_disjoint(grid, fraction, seed, index, aware, shared):
    tokens = int(np.prod(grid))
    if not 0 < round(fraction * tokens) < tokens:
        return
    mask = Mask(fraction=fraction, foreground_aware=aware and not shared, shared=shared)
    config = Config(objective="jepa", mask=mask, seed=seed)
    foreground = torch.from_numpy(np.random.default_rng(seed).random((3, tokens)) < 0.4).float()
    masks = draw_masks(config, np.array([index, index + 1, index + 9]), foreground, grid)
    assert masks.masked.shape == (3, masked_count(fraction, tokens))
    for visible, masked in zip(masks.visible.tolist(), masks.masked.tolist()):
        assert sorted(visible + masked) == list(range(tokens))
        assert visible == sorted(visible) and masked == sorted(masked)
    for hidden, inside in zip(masks.masked, foreground > 0):
        if mask.foreground_aware:
            assert abs(int(inside[hidden].sum()) - fraction * int(inside.sum())) <= 1


def test_blocks_are_whole_but_for_the_last():
    """All but the last block of a sample are hidden whole, the last layer by layer from one of its six faces."""
    mask, count = Mask(block_fractions=((0.1, 0.3),)), 90
    order, used, _ = block_order(mask, 0, np.arange(200), GRID, count)
    whole = partial = 0
    for row, number, index in zip(order, used, range(200)):
        hidden = np.isin(np.arange(120), row[:count]).reshape(GRID)
        blocks = [cells(drawn(mask, index), k) for k in range(number)]
        assert all(hidden[block].all() for block in blocks[:-1])
        whole += len(blocks) - 1
        if not hidden[blocks[-1]].all():
            partial += 1
            inside = hidden[blocks[-1]]
            seen = [sorted({*at.tolist()}) for at in np.nonzero(~inside)]
            earlier = np.zeros(GRID, bool)
            for block in blocks[:-1]:
                earlier[block] = True
            own = np.nonzero(inside & ~earlier[blocks[-1]])
            faces = [(at.max(initial=0), low[0]) for at, low in zip(own, seen)]
            faces += [(-at.min(initial=99), -low[-1]) for at, low in zip(own, seen)]
            assert any(deepest <= shallowest for deepest, shallowest in faces)
    assert whole > 200 and partial > 100


def drawn(mask, index):
    """The blocks of a sample, as `block_order` draws them."""
    raw = words(0, MASK, index, 1 + 8 * MAX_BLOCKS + 120)[None]
    return draw_blocks(mask, uniform(raw[:, : 1 + 7 * MAX_BLOCKS]), GRID)


def cells(blocks, k):
    """What block k of the first sample covers, on the torus."""
    corner, edge = blocks.corner[0, k], blocks.edge[0, k]
    return np.ix_(*[(corner[axis] + np.arange(edge[axis])) % GRID[axis] for axis in range(3)])


def test_scales_differ_between_samples_and_take_their_number_of_blocks():
    masks = blocks_of(np.arange(900), grid=(10, 12, 10))
    assert masks.blocks.min() <= 3 and masks.blocks.max() >= 12
    large = masks.block_fraction > 0.5
    assert 0.2 < large.mean() < 0.45 and masks.blocks[large].mean() < 4


def test_blocks_hide_neighbours_together():
    """What single tokens do not: most neighbours of a hidden cell are hidden too."""
    shares = {}
    for kind in ("blocks", "random"):
        hidden = np.zeros((300, 1200), bool)
        np.put_along_axis(
            hidden, blocks_of(np.arange(300), (10, 12, 10), kind=kind, fraction=0.5).masked.numpy(), True, 1
        )
        grid = hidden.reshape(300, 10, 12, 10)
        shares[kind] = float(grid[:, 1:][grid[:, :-1]].mean())
    assert shares["random"] < 0.55 and shares["blocks"] > 0.8


def test_a_shared_mask_is_one_for_the_whole_step():
    masks = blocks_of(np.arange(4), shared=True)
    assert (masks.masked == masks.masked[0]).all()
    config = Config(objective="jepa", mask=Mask(shared=True))
    ones = torch.ones(2, 120)
    assert config.train.global_batch_volumes == 256
    first, last, after = (
        draw_masks(config, np.array([i, i + 1]), ones, GRID).masked[0].tolist() for i in (0, 254, 256)
    )
    assert first == last != after


def test_foreground_is_hidden_by_its_share():
    inside = np.zeros((1, 120), bool)
    inside[0, 30:70] = True
    order = np.random.default_rng(0).permutation(120)[None]
    head = head_by_stratum(order, inside, 0.75, 90)[0]
    assert sorted(head) == list(range(120)) and inside[0, head[:90]].sum() == 30
    kept = [i for i in order[0] if inside[0, i]][:30]
    assert set(kept) == set(head[:90][inside[0, head[:90]]]), "the first ones of the order"
    everything = head_by_stratum(order, np.ones((1, 120), bool), 0.75, 90)[0]
    assert set(everything[:90]) == set(order[0, :90])


def test_coverage_reports_what_was_hidden(tmp_path):
    coverage = Coverage(120)
    foreground = torch.zeros(50, 120)
    foreground[:, :60] = 1.0
    masks = blocks_of(np.arange(50))
    coverage.add(masks, foreground)
    line = coverage.read()
    assert line["mask_fraction"] == 0.75 and line["mask_blocks"] == masks.blocks.mean()
    coverage.save(tmp_path / "masks.npz", GRID)
    with np.load(tmp_path / "masks.npz") as saved:
        assert saved["counts"].shape == GRID and saved["counts"].sum() == 50 * 90 and saved["draws"] == 50
    hidden = (masks.masked < 60).float().sum(1).mean() / 60
    assert line["mask_foreground_fraction"] == pytest.approx(float(hidden), rel=1e-5)
    for first in range(50, 3000, 50):
        coverage.add(blocks_of(np.arange(first, first + 50)), foreground)
    assert 0.7 < coverage.read()["mask_cell_spread"] < 1.4
    lopsided = Coverage(120)
    for first in range(0, 3000, 50):
        masks = blocks_of(np.arange(first, first + 50))
        lopsided.add(type(masks)(masks.visible, masks.masked.clamp(max=100)), foreground)
    assert lopsided.read()["mask_cell_spread"] > 5
