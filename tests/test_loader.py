"""Batches hold the voxels that the draws name, whatever the ranks, the accumulation and the cursor."""

import itertools

import numpy as np
import pytest
import torch
from conftest import write_tiny_store
from hypothesis import given, settings
from hypothesis import strategies as st

from brainscale.config import Config
from brainscale.geometry import patchify
from brainscale.loader import Loader, read_batch
from brainscale.prep_plan import Plan
from brainscale.reader import Reader
from brainscale.samplers import make_order
from brainscale.sampling import SAME, Change, Draw
from brainscale.settings import InputError, load
from brainscale.store import open_store
from brainscale.store_files import StoreDamage
from brainscale.stores import open_stores

SETTINGS = ("model.patch_voxels_zyx=[8,8,8]", "train.global_batch_volumes=4", "train.micro_batch_volumes=4")


def stream(store_path, steps, ranks, micro, cursor=0, *overrides):
    """(row, volume sum) of every sample of `steps` optimizer steps, in global order."""
    config = load(Config, None, (*SETTINGS, *overrides))
    store = open_stores([store_path])
    reader = Reader(store, config.model.patch_voxels_zyx, config.data.crop_voxels_zyx)
    order = make_order(store, store.rows, config)
    seen = {}
    for rank in range(ranks):
        batches = Loader(reader, order, config, rank, ranks, micro).batches(cursor)
        for _ in range(steps * 4 // (micro * ranks)):
            batch, after = next(batches)
            for i, row, volume in zip(batch.sample_index, batch.row, batch.volumes):
                seen[int(i)] = (int(row), int(volume.long().sum()))
        batches.close()
        assert after == cursor + steps * 4
    return [seen[i] for i in sorted(seen)]


def test_the_order_is_the_same_for_any_ranks_and_accumulation(tiny_store):
    one = stream(tiny_store, 5, 1, 4)
    assert sorted(row for row, _ in one[:10]) == sorted(row for row, _ in one[10:]) == list(range(10))
    for ranks, micro in ((1, 2), (2, 2), (2, 1), (4, 1)):
        assert stream(tiny_store, 5, ranks, micro) == one


def test_a_cursor_gives_the_tail(tiny_store):
    crop = ("data.crop_voxels_zyx=[8,16,8]", "data.flip_fraction=0.5")
    assert stream(tiny_store, 2, 2, 2, 12, *crop) == stream(tiny_store, 5, 1, 4, 0, *crop)[12:]


def test_voxels_statistics_and_foreground(tiny_store):
    store = open_store(tiny_store)
    reader = Reader(store, (8, 8, 8), (8, 16, 8))
    batch = read_batch(reader, [Draw(0, 3, (4, 8, 8), False), Draw(1, 3, (4, 8, 8), True)])
    whole = store.volumes([3])[0]
    part = torch.from_numpy(whole[4:12, 8:24, 8:16])
    assert torch.equal(batch.volumes[0, 0], part)
    assert torch.equal(batch.volumes[1, 0], part.flip(2))
    mean, std = store.column("mean")[3], store.column("std")[3]
    values = batch.volumes[0].double() * float(batch.scale[0]) + float(batch.offset[0])
    torch.testing.assert_close(values, (batch.volumes[0].double() - mean) / std, atol=1e-5, rtol=1e-5)
    assert float(batch.low[0]) == pytest.approx((store.column("clip_low")[3] - mean) / std, rel=1e-6)
    shares = patchify((batch.volumes > 0).float(), (8, 8, 8)).mean(-1)
    torch.testing.assert_close(batch.foreground, shares, atol=0.003, rtol=0)


@pytest.mark.parametrize("crop", [(16, 24, 16), (24, 16, 16)])
def test_foreground_moves_with_the_voxels(tiny_store, crop):
    """Voxels above 200 are the blob's, at its edge about half. Shares are interpolated from cells of 4³ voxels, so they
    agree roughly."""
    store = open_stores([tiny_store])
    reader = Reader(store, (8, 8, 8), crop)
    change = Change(rotation_deg_zyx=(25.0, -10.0, 15.0), scale=0.7)
    corner = tuple((v - c) // 2 // 4 * 4 for v, c in zip(store.volume_zyx, crop))
    for at, flip, moved in ((corner, False, change), (corner, True, change), ((0, 4, 0), True, SAME)):
        batch = read_batch(reader, [Draw(0, 3, at, flip, moved)])
        shares = patchify((batch.volumes > 200).float(), (8, 8, 8)).mean(-1)
        apart = (batch.foreground - shares).abs()
        assert apart.max() < 0.1 and apart.mean() < 0.03
        assert np.corrcoef(batch.foreground[0], shares[0])[0, 1] > 0.98


def test_spacing_and_centre_are_in_memory_order(tiny_store, tmp_path):
    """1 × 1.5 × 3 mm along x, y, z."""

    def change(record):
        record["affine_stored"] = np.diag([1.0, 1.5, 3.0, 1.0]).reshape(-1).tolist()

    plan = Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4, spacing_mm_xyz="native")
    native = Reader(open_stores([write_tiny_store(tmp_path / "native", plan=plan, change=change)]), (8, 8, 8), None)
    assert native.spacing_mm_zyx(3).tolist() == [3.0, 1.5, 1.0]
    assert Reader(open_stores([tiny_store]), (8, 8, 8), (8, 8, 24)).centre() == (4, 8, -4)


def test_what_does_not_fit_is_refused(tiny_store):
    store = open_store(tiny_store)
    with pytest.raises(InputError, match="no multiple of the patch"):
        Reader(store, (8, 16, 8), None)
    with pytest.raises(InputError, match="foreground cell"):
        Reader(store, (2, 2, 2), None)


def test_damage_reaches_the_caller(tiny_store, tmp_path):
    """A shard that disappears under a running loader is an error that names a file, not a zero volume."""
    import shutil

    copy = shutil.copytree(tiny_store, tmp_path / "store")
    config = load(Config, None, SETTINGS)
    store = open_stores([copy])
    reader = Reader(store, (8, 8, 8), None)
    for shard in (copy / "volumes" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(StoreDamage, match=r"sample \d \(row \d, sub-.*volumes/c/"):
        next(Loader(reader, make_order(store, store.rows, config), config, 0, 1, 4).batches(0))


def test_rows_are_sorted_positions(tiny_store):
    store = open_store(tiny_store)
    assert np.array_equal(store.rows, np.arange(10))


@given(st.integers(1, 10), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 12))
@settings(deadline=None, max_examples=30)
def test_every_scan_once_per_epoch_whatever_reads_it(tiny_store, scans, ranks, micro, workers, cut):
    """Two epochs of so many scans through real loaders, stopped after `cut` steps and continued by one rank."""
    store = open_stores([tiny_store])
    config = load(Config, None, (*SETTINGS, f"data.workers={workers}"))
    reader, order = Reader(store, (8, 8, 8), None), make_order(store, store.rows[:scans], config)
    taken = {}
    for rank in range(ranks):
        batches = Loader(reader, order, config, rank, ranks, micro).batches(0)
        for batch, _ in itertools.islice(batches, cut):
            taken |= dict(zip(batch.sample_index.tolist(), batch.row.tolist()))
        batches.close()
    cursor = cut * ranks * micro
    assert sorted(taken) == list(range(cursor))
    batches = Loader(reader, order, config, 0, 1, micro).batches(cursor)
    while cursor < 2 * scans:
        batch, cursor = next(batches)
        taken |= dict(zip(batch.sample_index.tolist(), batch.row.tolist()))
    batches.close()
    for epoch in range(2):
        assert sorted(taken[epoch * scans + at] for at in range(scans)) == list(range(scans))
