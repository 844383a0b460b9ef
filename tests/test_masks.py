"""Given brain masks, stored orientation, normalisation: where the grid lies, what is foreground, what is trained on."""

import numpy as np
import pytest
from conftest import REAL_DATA, ROOT, write_tiny_store
from test_preprocess import NATIVE, head, real, scan_of, stored_affine, stored_values, turned

from brainscale.geometry import voxel_to_mm
from brainscale.prep_plan import Plan
from brainscale.reader import normalisation
from brainscale.settings import load
from brainscale.store import Store
from brainscale_data_prep import nifti, preprocess
from brainscale_data_prep.nifti import Refused


def share_inside(mask, affine, prepared):
    """Share of a mask's voxels whose centres lie in the stored grid."""
    at = voxel_to_mm(np.linalg.inv(stored_affine(prepared)) @ affine, np.argwhere(mask))
    size = np.array(prepared.volume_zyx.shape[::-1])
    return float(np.mean(((at > -0.5) & (at < size - 0.5)).all(axis=1)))


@pytest.fixture(scope="module")
def brain_in_head():
    """A head with a bright ball off its centre, and the ball's mask: (voxels, mask, affine)."""
    voxels = head((60, 64, 56), np.random.default_rng(0)).astype(np.int16)
    ball = np.sum([(g - c) ** 2 for g, c in zip(np.indices(voxels.shape), (20, 30, 34))], axis=0) < 14**2
    return voxels, ball, np.diag([2.0, 2.0, 2.0, 1.0])


@pytest.mark.parametrize("spacing", ["native", (1.5, 1.5, 1.5)])
def test_a_mask_places_the_grid_and_is_the_foreground(brain_in_head, spacing):
    voxels, ball, affine = brain_in_head
    plan = Plan(grid_voxels_xyz=(44, 44, 44), spacing_mm_xyz=spacing, max_cropped_fraction=1.0)
    prepared = preprocess.prepare(scan_of(voxels, affine), plan, (44, 44, 44), scan_of(ball.astype(np.uint8), affine))
    assert prepared.record["foreground_method"] == "mask" and prepared.record["cropped_fraction"] == 0
    assert share_inside(ball, affine, prepared) == 1
    centre = voxel_to_mm(stored_affine(prepared), np.array([21.5, 21.5, 21.5]))
    np.testing.assert_allclose(centre, voxel_to_mm(affine, np.array([20.0, 30, 34])), atol=2.1)
    voxel_mm3 = 8.0 if spacing == "native" else np.prod(spacing)
    volume_mm = prepared.record["foreground_fraction"] * 44**3 * voxel_mm3
    assert volume_mm == pytest.approx(ball.sum() * 8, rel=0.02)
    values = voxels[ball].astype(float)
    low, high = np.percentile(values, (0.5, 99.5))
    assert prepared.record["mean"] == pytest.approx(np.clip(values, low, high).mean(), rel=0.02)
    without = preprocess.prepare(scan_of(voxels, affine), plan, (44, 44, 44))
    assert without.record["foreground_method"] == "nonzero" and without.record["cropped_fraction"] > 0.05


def test_a_mask_on_other_axes_and_another_grid_means_the_same(brain_in_head):
    voxels, ball, affine = brain_in_head
    plan = Plan(grid_voxels_xyz=(44, 44, 44), spacing_mm_xyz="native")
    same = preprocess.prepare(scan_of(voxels, affine), plan, (44, 44, 44), scan_of(ball.astype(np.uint8), affine))
    other = scan_of(*turned(ball.astype(np.uint8), affine, (2, 0, 1), (-1, 1, -1)))
    again = preprocess.prepare(scan_of(voxels, affine), plan, (44, 44, 44), other)
    np.testing.assert_array_equal(again.foreground_cells_zyx, same.foreground_cells_zyx)
    assert again.record == same.record
    a, c, s = 4.0, np.cos(0.3), np.sin(0.3)
    tilted = np.array([[a * c, -a * s, 0, 3], [a * s, a * c, 0, -9], [0, 0, a, 0.0], [0, 0, 0, 1]])
    at = voxel_to_mm(np.linalg.inv(affine) @ tilted, np.moveaxis(np.indices((40, 44, 30)), 0, -1).reshape(-1, 3))
    coarse = (np.sum((at - (20, 30, 34)) ** 2, axis=1) < 14**2).reshape(40, 44, 30)
    rough = preprocess.prepare(scan_of(voxels, affine), plan, (44, 44, 44), scan_of(coarse.astype(np.int16), tilted))
    assert rough.record["foreground_fraction"] == pytest.approx(same.record["foreground_fraction"], rel=0.05)
    apart = rough.foreground_cells_zyx.astype(int) - same.foreground_cells_zyx
    assert np.abs(apart).mean() < 0.1 * same.foreground_cells_zyx.mean()


def test_masks_that_cannot_serve_are_refused_or_not_asked(brain_in_head):
    voxels, ball, affine = brain_in_head
    scan, empty = scan_of(voxels, affine), scan_of(np.zeros_like(ball, np.uint8), affine)
    plan = Plan(grid_voxels_xyz=(60, 64, 56), spacing_mm_xyz="native")
    with pytest.raises(Refused, match="covers nothing") as refused:
        preprocess.prepare(scan, plan, (60, 64, 56), empty)
    assert refused.value.code == "bad_mask"
    with pytest.raises(Refused, match="comes with none") as refused:
        preprocess.prepare(scan, plan.model_copy(update={"foreground": "mask"}), (60, 64, 56))
    assert refused.value.code == "no_mask"
    nothing = np.where(ball, 1, np.nan).astype(np.float32)
    given = [preprocess.prepare(scan, plan, (60, 64, 56), scan_of(m, affine)) for m in (nothing, ball.astype(np.uint8))]
    assert given[0].record == given[1].record  # NaN outside means outside
    otsu = plan.model_copy(update={"foreground": "otsu"})
    assert preprocess.prepare(scan, otsu, (60, 64, 56), empty).record["foreground_method"] == "otsu"


@pytest.mark.parametrize("orientation", ["LAS", "LPI", "RPS"])
def test_the_plan_says_where_the_stored_axes_point(orientation):
    voxels = head((30, 34, 28), np.random.default_rng(1)).astype(np.int16)
    affine = np.array([[2, 0.1, 0, -30], [-0.1, 2, 0, 5], [0, 0, 2.1, 1], [0, 0, 0, 1.0]])
    plain = preprocess.prepare(scan_of(voxels, affine), Plan(**NATIVE), (32, 36, 28))
    plan = Plan(**NATIVE, orientation=orientation)
    prepared = preprocess.prepare(scan_of(*turned(voxels, affine, (1, 2, 0), (1, -1, 1))), plan, (32, 36, 28))
    signs = np.sign(np.diag(stored_affine(prepared))[:3])
    assert signs.tolist() == [1 if letter in "RAS" else -1 for letter in orientation]
    place = {int(v): voxel_to_mm(affine, ijk) for ijk, v in np.ndenumerate(voxels) if v > 900}
    values = np.rint(stored_values(prepared)).astype(int).T
    found = [(voxels == value).sum() == 1 for value in place]
    assert sum(found) > 20
    for value in [v for v, single in zip(place, found) if single]:
        np.testing.assert_allclose(
            voxel_to_mm(stored_affine(prepared), np.argwhere(values == value)[0]), place[value], atol=1e-6
        )
    assert sorted(plain.volume_zyx.ravel()) == sorted(prepared.volume_zyx.ravel())


def test_a_tall_head_keeps_its_top_where_z_points_down():
    voxels = np.zeros((24, 24, 90), np.int16)
    voxels[6:18, 6:18, 5:85] = np.random.default_rng(0).integers(50, 99, (12, 12, 80))
    plan = Plan(grid_voxels_xyz=(24, 24, 48), spacing_mm_xyz="native", orientation="RAI", max_cropped_fraction=1.0)
    prepared = preprocess.prepare(scan_of(voxels), plan, (24, 24, 48))
    top = voxel_to_mm(stored_affine(prepared), np.array([0, 0, 0]))[2]
    assert 84 <= top <= 90 and prepared.record["cropped_fraction"] > 0.3


@pytest.mark.parametrize("normalize", ["zscore", "unit_range", "none"])
def test_training_reads_what_the_plan_normalises_to(tmp_path, normalize):
    plan = Plan(grid_voxels_xyz=(16, 24, 16), shard_volumes=4, normalize=normalize)
    store = Store(write_tiny_store(tmp_path / "store", plan=plan))
    scale, offset, lower, upper = (column[0] for column in normalisation(store))
    volume = store.volumes([0])[0].astype(np.float64)
    inside = volume > 0
    values = np.clip(volume * scale + offset, lower, upper)[inside]
    if normalize == "zscore":
        assert values.mean() == pytest.approx(0, abs=1e-3) and values.std() == pytest.approx(1, rel=1e-3)
    else:
        assert lower <= values.min() and values.max() <= upper
        assert values.max() == pytest.approx(1 if normalize == "unit_range" else volume.max())
        assert (normalize == "unit_range") == (values.min() == pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("folder", [pytest.param(f, marks=real(f)) for f in ("ds000011", "ds002748_native")])
def test_given_masks_of_real_heads_stay_inside_the_grid(folder):
    """A mask as a skull-stripping tool would give it: here the largest bright part above the lowest third."""
    plan = load(Plan, ROOT / "configs/prep/brain_1mm.toml")
    for path in sorted((REAL_DATA / folder).rglob("*_T1w.nii.gz")):
        scan = nifti.read(path)
        record = preprocess.prepare(scan, plan, (160, 192, 160)).record
        axis = int(np.argmax(np.abs(scan.affine[2, :3])))
        height = voxel_to_mm(scan.affine, np.eye(3)[axis] * np.arange(scan.voxels.shape[axis])[:, None])[:, 2]
        high = np.moveaxis(scan.voxels * scan.slope + scan.inter > record["foreground_threshold"], axis, 0).copy()
        high[height < height.max() - 130] = False
        mask = np.moveaxis(high, 0, axis)
        given = preprocess.prepare(scan, plan, (160, 192, 160), scan_of(mask.astype(np.uint8), scan.affine))
        assert given.record["foreground_method"] == "mask"
        assert share_inside(mask, scan.affine, given) >= 0.99
