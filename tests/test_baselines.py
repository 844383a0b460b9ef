"""Volumes and histograms against plain numpy, and against what is known of the volumes."""

import numpy as np
import pytest
from conftest import TINY_GRID_ZYX, write_tiny_store

from brainscale import baselines
from brainscale.prep_plan import Plan
from brainscale.store import Store
from brainscale_data_prep.convert import convert
from brainscale_data_prep.nifti import write


def column(features, name, names=baselines.VOLUME_NAMES):
    return features[:, names.index(name)].astype(float)


@pytest.fixture(scope="module")
def tiny(tiny_store):
    return Store(tiny_store)


def write_ball(path, radius_mm, spacing_mm, shape_xyz=(48, 48, 48), semi=(1.0, 1.2, 0.9)):
    """A NIfTI of an ellipsoid of textured brain in air of 0; returns its volume in ml."""
    rng = np.random.default_rng(7)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape_xyz, spacing_mm)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    a, b, c = (radius_mm * s for s in semi)
    inside = (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1
    voxels = np.where(inside, 600 + 200 * np.cos(x / radius_mm * 3) + rng.normal(0, 20, inside.shape), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, voxels.astype(np.float32), np.diag([*spacing_mm, 1.0]))
    return 4 / 3 * np.pi * a * b * c / 1000


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    """Two brains, the second 10 % larger in every direction, and the first with other voxels; resampled to 2 mm."""
    root = tmp_path_factory.mktemp("balls")
    ml = [
        write_ball(root / "in/a.nii", 30.0, (2.0, 2.0, 2.0)),
        write_ball(root / "in/b.nii", 33.0, (2.0, 2.0, 2.0)),
        write_ball(root / "in/c.nii", 30.0, (1.6, 2.0, 2.5), (60, 48, 40)),
    ]
    for name, grid, spacing in (("fixed", (48, 48, 48), (2.0, 2.0, 2.0)), ("native", (60, 48, 48), "native")):
        convert(root / "in", root / name, Plan(grid_voxels_xyz=grid, spacing_mm_xyz=spacing), workers=1)
    return ml, Store(root / "fixed"), Store(root / "native")


@pytest.mark.parametrize(("which", "rim"), [(1, 0.1), (2, 0.02)])
def test_a_brain_10_percent_larger_has_1_331_times_the_volume(balls, which, rim):
    """rim: what the third brain gains where it is resampled, since part of a brain's voxel counts as brain."""
    ml, store = balls[0], balls[which]
    features = baselines.volume(store, store.rows)
    volumes = column(features, "foreground_ml")
    assert volumes[:2] == pytest.approx(ml[:2], rel=0.02)
    assert volumes[1] / volumes[0] == pytest.approx(1.331, rel=0.01)
    assert volumes[2] / volumes[0] == pytest.approx(1, rel=rim)  # the same brain on other voxels
    extents = features[:, 1:]
    assert extents[1] / extents[0] == pytest.approx(1.1, rel=0.02)
    assert extents[2] / extents[0] == pytest.approx(1, rel=0.06)
    assert extents[0, 1] > extents[0, 0] > extents[0, 2]  # y is longest, z shortest


def test_an_extent_is_the_length_of_an_ellipsoid():
    edges = np.linspace(-1.1, 1.1, 23).clip(-1, 1)
    profile = np.diff(edges - edges**3 / 3)  # of a ball 20 cells long
    assert baselines._extent(profile) == pytest.approx(20, rel=0.01)
    assert baselines._extent(np.array([0.0, 1.0, 0.0])) == pytest.approx(np.sqrt(5 / 3))
    profile[[0, -1]] += 1e-4 * profile.sum()  # a few bright voxels beside it
    assert baselines._extent(profile) == pytest.approx(20, rel=0.01)


def test_the_volume_is_that_of_the_stored_affine(tmp_path):
    turn = np.diag([3.0, 1.0, 0.5, 1.0])
    turn[0, 1] = 0.4  # sheared: the volume is the determinant, not the product of spacings

    def change(record):
        record["affine_stored"] = turn.reshape(-1).tolist()

    store = Store(write_tiny_store(tmp_path / "store", plan=None, change=change))
    inside = store.volumes(store.rows) > 0
    expected = inside.sum((1, 2, 3)) * 1.5 / 1000
    assert column(baselines.volume(store, store.rows), "foreground_ml") == pytest.approx(expected, rel=1e-6)


def test_the_histogram_is_that_of_numpy(tiny):
    features = baselines.histogram(tiny, tiny.rows)
    mean, std, low, high = (tiny.column(name) for name in ("mean", "std", "clip_low", "clip_high"))
    for at, volume in enumerate(tiny.volumes(tiny.rows).astype(float)):
        z = (np.clip(volume[volume > 0], low[at], high[at]) - mean[at]) / std[at]
        counts, _ = np.histogram(z, np.linspace(-4, 4, 33))
        assert features[at, :32] == pytest.approx(counts / len(z), abs=1e-6)
        quantiles = np.quantile(z, baselines.QUANTILES, method="inverted_cdf")
        assert features[at, 32:] == pytest.approx(quantiles, abs=1e-5)
    assert features[:, :32].sum(1) == pytest.approx(1)


@pytest.mark.parametrize("normalize", ["zscore", "unit_range", "none"])
def test_intensity_units_do_not_matter(tmp_path, tiny, normalize):
    def change(record):
        for name in ("mean", "clip_low", "clip_high"):
            record[name] = 7 * record[name] + 3
        record["std"] *= 7
        record["foreground_threshold"] = 3.0
        record.update(scale=7.0, offset=3.0)

    plan = Plan(grid_voxels_xyz=TINY_GRID_ZYX[::-1], shard_volumes=4, normalize=normalize)
    other = Store(write_tiny_store(tmp_path / "store", plan=plan, change=change))
    assert baselines.histogram(other, other.rows) == pytest.approx(baselines.histogram(tiny, tiny.rows), abs=1e-4)


def test_what_lies_outside_the_bins_is_counted_in_the_outermost(tmp_path):
    def change(record):
        record.update(std=record["std"] / 50)

    store = Store(write_tiny_store(tmp_path / "store", change=change))
    features = baselines.histogram(store, store.rows)
    assert (features[:, 0] > 0.3).all() and (features[:, 31] > 0.3).all()
    assert features[:, :32].sum(1) == pytest.approx(1)


def test_with_a_mask_voxels_count_with_the_share_of_their_cell(tmp_path):
    def change(record):
        record.update(foreground_method="mask", foreground_threshold=float(np.finfo(np.float32).min))

    store = Store(write_tiny_store(tmp_path / "store", change=change))
    features = baselines.histogram(store, [3])
    mean, std, low, high = (store.column(name)[3] for name in ("mean", "std", "clip_low", "clip_high"))
    z = (np.clip(store.volumes([3])[0].astype(float), low, high) - mean) / std
    share = np.kron(store.foreground([3])[0], np.ones((4, 4, 4)))
    counts, _ = np.histogram(z, np.linspace(-4, 4, 33), weights=share)
    assert features[0, :32] == pytest.approx(counts / share.sum(), abs=1e-6)


def test_rows_come_in_the_order_asked_for_and_names_fit(tiny):
    both = baselines.histogram_and_volume(tiny, [7, 2])
    assert both.dtype == np.float32 and both.shape == (2, len(baselines.NAMES)) and np.isfinite(both).all()
    assert (both[0] != both[1]).any()
    assert (both[::-1] == baselines.histogram_and_volume(tiny, np.array([2, 7]))).all()
    assert (both[:, -4:] == baselines.volume(tiny, [7, 2])).all()


def test_a_row_that_is_not_there_is_refused(tiny):
    for wrong in (10, -1):
        with pytest.raises(IndexError, match=f"row {wrong} "):
            baselines.volume(tiny, [0, wrong])
