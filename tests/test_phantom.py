"""The synthetic cohort: reproducible, in the right place, and different between subjects exactly where it says so."""

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from bids2table import index_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from brainscale.geometry import spacing_mm, voxel_to_mm
from brainscale.settings import InputError
from brainscale_data_prep import anatomy, effects, nifti, phantom, scanners
from brainscale_data_prep.anatomy import Subject, Template

SITES = tuple(scanners.SITES)
RAS_2MM, RAS_2MM_SHAPE = np.diag([2.0, 2, 2, 1]), (96, 116, 96)
RAS_2MM[:3, 3] = -95, -131, -91


@pytest.fixture(scope="module")
def template() -> Template:
    return phantom.load_template(2, head=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("phantom") / "bids"
    phantom.make(dest, 4, seed=5, spacing_mm=4.0, contrasts=("T1w", "FLAIR"), workers=1)
    return dest


def noise_free(template: Template, subject: Subject, contrast: str = "T1w") -> np.ndarray:
    """The subject on a fixed RAS grid of 2 mm, symmetric about x = 0."""
    return scanners.sample(anatomy.paint(template, subject, contrast), template, subject, RAS_2MM, RAS_2MM_SHAPE)


def template_mm(subject: Subject, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Template mm (x,y,z,3) of every voxel of a grid."""
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return anatomy.world_to_template(subject, voxel_to_mm(affine, voxels))


def around(
    volume: np.ndarray, affine: np.ndarray, subject: Subject, place_mm: tuple[float, ...], mm: float
) -> np.ndarray:
    """Values of the voxels whose tissue lies within `mm` of a place in the template."""
    voxels = np.indices(volume.shape).reshape(3, -1).T
    voxels = voxels[np.linalg.norm(voxel_to_mm(affine, voxels) - place_mm, axis=1) < 30]
    tissue_mm = anatomy.world_to_template(subject, voxel_to_mm(affine, voxels))
    return volume[tuple(voxels[np.linalg.norm(tissue_mm - place_mm, axis=1) < mm].T)]


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------- files


def test_same_arguments_give_the_same_bytes_for_any_number_of_threads(dataset: Path, tmp_path: Path) -> None:
    phantom.make(tmp_path / "again", 4, seed=5, spacing_mm=4.0, contrasts=("T1w", "FLAIR"), workers=2)
    assert files(tmp_path / "again") == files(dataset)


def test_a_subject_depends_on_seed_and_number_alone(dataset: Path, tmp_path: Path) -> None:
    phantom.make(tmp_path / "small", 2, seed=5, spacing_mm=4.0, contrasts=("FLAIR",))
    phantom.make(tmp_path / "other", 1, seed=6, spacing_mm=4.0, contrasts=("T1w",))
    large, small, other = files(dataset), files(tmp_path / "small"), files(tmp_path / "other")
    scans = {name for name in small if name.endswith(".nii.gz")}
    assert scans == {f"sub-00{n}/anat/sub-00{n}_FLAIR.nii.gz" for n in (1, 2)}
    assert all(small[name] == large[name] for name in scans)
    assert large["participants.tsv"].startswith(small["participants.tsv"])
    assert other["sub-001/anat/sub-001_T1w.nii.gz"] != large["sub-001/anat/sub-001_T1w.nii.gz"]


def test_the_dataset_is_bids(dataset: Path) -> None:
    description = json.loads((dataset / "dataset_description.json").read_text())
    assert {"Name", "BIDSVersion", "GeneratedBy"} <= set(description) and description["DatasetType"] == "raw"
    assert (dataset / "README").read_text().strip()
    table = index_dataset(dataset).to_pydict()
    assert sorted(zip(table["sub"], table["suffix"])) == [(f"00{n}", c) for n in range(1, 5) for c in ("FLAIR", "T1w")]
    with (dataset / "participants.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert set(rows[0]) == set(json.loads((dataset / "participants.json").read_text()))
    assert [row["participant_id"] for row in rows] == [f"sub-00{n}" for n in range(1, 5)]
    assert [name for name in rows[0] if name.startswith("label_")] == [
        "label_atrophy", "label_lesions", "label_sharpness", "label_mass", "label_distributed",
    ]  # fmt: skip


def test_written_brains_lie_where_the_template_lies(dataset: Path, template: Template) -> None:
    centre_mm = voxel_to_mm(template.affine, template.brain_xyz.T).mean(axis=0)
    for path in dataset.rglob("*.nii.gz"):
        scan = nifti.read(path)
        assert scan.voxels.dtype == np.int16 and not scan.warnings
        np.testing.assert_allclose(spacing_mm(scan.affine), 4.0, rtol=1e-5)
        brain = np.argwhere(scan.voxels > 0)
        assert np.abs(voxel_to_mm(scan.affine, brain).mean(axis=0) - centre_mm).max() < 7
        assert 1.0e6 < len(brain) * 64 < 2.3e6  # mm³; the template's brain has 1.88e6
        assert (brain.min(axis=0) > 0).all() and (brain.max(axis=0) < np.array(scan.voxels.shape) - 1).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"subjects": 0},
        {"seed": -1},
        {"spacing_mm": 0.0},
        {"contrasts": ("T1w", "T1w")},
        {"contrasts": ("t1",)},
        {"contrasts": ()},
    ],
)
def test_bad_arguments_are_named_and_write_nothing(arguments: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        phantom.make(tmp_path / "bids", **{"subjects": 1, "seed": 0} | arguments)
    assert not (tmp_path / "bids").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="not an empty folder"):
        phantom.make(tmp_path, 1, seed=0)
    with pytest.raises(InputError, match="not an empty folder"):
        phantom.make(tmp_path / "mine.txt", 1, seed=0)
    assert files(tmp_path) == {"mine.txt": b"kept"}


# --------------------------------------------------------------------------------------------- grids


def test_grids_differ(template: Template) -> None:
    subject, seen, oblique, spacings = anatomy.draw_subject(1, 1, SITES), set(), 0, set()
    for number in range(80):
        affine, _ = scanners.draw_grid(np.random.default_rng(number), template, subject, None)
        directions = affine[:3, :3] / spacing_mm(affine)
        np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-12)
        seen.add(tuple(np.rint(directions).ravel()))
        oblique += not np.allclose(directions, np.rint(directions))
        spacings.add(tuple(spacing_mm(affine).round(6)))
    assert len(seen) == len(scanners.ORIENTATIONS) and {np.linalg.det(np.reshape(d, (3, 3))) for d in seen} == {
        -1.0,
        1.0,
    }
    assert spacings == set(scanners.SPACINGS_MM)
    assert 10 < oblique < 40


def test_scans_hold_what_their_affine_says(template: Template) -> None:
    """A painted ramp of template mm, read through any grid, must equal the warp at that voxel's world position."""
    ramps = np.meshgrid(*(mm.astype(np.float32) for mm in template.axes_mm()), indexing="ij")
    low, high = np.array(phantom.BRAIN_BOX_MM)
    for number in range(12):
        subject = anatomy.draw_subject(1, number + 1, SITES)
        affine, shape = scanners.draw_grid(np.random.default_rng(number), template, subject, 4.0)
        expected, axis = template_mm(subject, affine, shape), number % 3
        got = scanners.sample(ramps[axis], template, subject, affine, shape)
        inner = ((expected > low + 10) & (expected < high - 10)).all(axis=-1)
        assert inner.sum() > 10_000
        np.testing.assert_allclose(got[inner], expected[..., axis][inner], atol=0.02)


def test_thick_slices_blur_across_the_slices_alone(template: Template) -> None:
    subject = anatomy.draw_subject(8, 1, SITES)
    affine, shape = np.eye(4), (60, 60, 16)
    affine[:3, :3] = np.array([[0, 0, 8], [-2, 0, 0], [0, 2, 0]])  # PSR, sagittal slices of 8 mm
    affine[:3, 3] = -60, 40, -50
    widths_mm = []
    for axis, across in enumerate((2, 0, 1)):
        edge = (np.indices(template.shape_xyz)[axis] > template.shape_xyz[axis] / 2).astype(np.float32)
        values = scanners.sample(edge, template, subject, affine, shape)
        partial = (values > 0.1) & (values < 0.9)
        widths_mm.append(partial.sum() / partial.any(axis=across).sum() * spacing_mm(affine)[across])
    assert 6 < widths_mm[0] < 11 and max(widths_mm[1:]) < 5


def test_resampled_coordinates_follow_the_warp_between_knots(template: Template) -> None:
    subject = anatomy.draw_subject(2, 1, SITES)
    ramp = np.broadcast_to(template.axes_mm()[1].astype(np.float32)[:, None], template.shape_xyz)
    affine, shape = np.eye(4), (80, 90, 70)
    affine[:3, 3] = -40, -60, -20
    error = np.abs(
        scanners.sample(ramp, template, subject, affine, shape) - template_mm(subject, affine, shape)[..., 1]
    )
    assert error.max() < 0.3 and error.mean() < 0.03


# --------------------------------------------------------------------------------------------- anatomy


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    number=st.integers(1, 10_000),
    age=st.sampled_from([20, 85]),
    mass=st.sampled_from([-3.0, 0.7, 5.0]),
)
def test_warps_are_invertible(seed: int, number: int, age: int, mass: float) -> None:
    subject = replace(anatomy.draw_subject(seed, number, SITES), age=age).at("mass", mass)
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = -100, -130, -150
    mapped = template_mm(subject, affine, (50, 60, 66))
    jacobian = np.stack([np.diff(mapped, axis=a)[:49, :59, :65] / 4 for a in range(3)], axis=-1)
    assert np.linalg.det(jacobian).min() > 0


def test_subjects_differ(template: Template) -> None:
    brains = [noise_free(template, anatomy.draw_subject(3, number, SITES)) for number in range(1, 4)]
    for one, other in pairwise(brains):
        assert np.abs(one - other).mean() > 0.1 * one.mean()


def test_asymmetry_is_as_documented(template: Template) -> None:
    """With everything individual left out, right and left differ at the poles and in brightness, as written down."""
    drawn = anatomy.draw_subject(3, 1, SITES)
    common = replace(
        drawn.at("mass", -9.0).at("lesions", -9.0),
        region_severities=np.zeros(12),
        to_template=np.eye(4),
        displacement_mm=0 * drawn.displacement_mm,
        folding=0 * drawn.folding,
    )
    brain = noise_free(template, common)
    y_mm = RAS_2MM[1, 3] + 2 * np.arange(RAS_2MM_SHAPE[1])
    left, right = brain[:48][::-1], brain[48:]
    middle = np.abs(y_mm + 15) < 20
    assert 1.03 < right[:, middle].sum() / left[:, middle].sum() < 1.07
    front, back = y_mm > 62, y_mm < -96
    assert (right[:, front] > 0.2).sum() > 1.3 * (left[:, front] > 0.2).sum() > 0
    assert (left[:, back] > 0.2).sum() > 1.3 * (right[:, back] > 0.2).sum() > 0


def ventricle_mm3(brain: np.ndarray) -> float:
    """Dark voxels of a T1w brain on the 2 mm grid, around the lateral ventricles."""
    x, y, z = (RAS_2MM[k, 3] + 2 * np.arange(n) for k, n in enumerate(RAS_2MM_SHAPE))
    box = np.ix_(np.abs(x) < 24, (y > -45) & (y < 38), (z > 2) & (z < 34))
    return 8.0 * (brain[box] < 0.45).sum()


@pytest.mark.slow
def test_ventricles_grow_and_hippocampi_shrink_with_atrophy_and_age(template: Template) -> None:
    hippocampus_mm, _ = effects.HIPPOCAMPUS_MM
    for number in (1, 2):
        drawn = anatomy.draw_subject(9, number, SITES)
        volumes, hippocampi = [], []
        for age, severity in ((30, -1.0), (30, 1.0), (80, -1.0), (80, 1.0)):
            subject = replace(drawn, age=age).at("atrophy", severity)
            brain = noise_free(template, subject)
            volumes.append(ventricle_mm3(brain))
            hippocampi.append(around(brain, RAS_2MM, subject, hippocampus_mm, 9).mean())
        for before, after in ((0, 1), (0, 2), (1, 3), (2, 3)):
            assert volumes[after] > 1.05 * volumes[before]
            assert hippocampi[after] < hippocampi[before] - 0.01


@pytest.mark.slow
def test_head_surrounds_the_brain_and_has_a_neck(template: Template) -> None:
    whole = phantom.load_template(2, head=True)
    assert whole.brain_xyz.shape == template.brain_xyz.shape
    subject = anatomy.draw_subject(4, 1, SITES)
    stored, affine, slope = scanners.scan(whole, subject, "T1w", 4, 4.0)
    place = template_mm(subject, affine, stored.shape)
    x, y, z = np.moveaxis(place, -1, 0)
    white_matter = scanners.SITES[subject.site].gain / slope
    bright = stored > 0.25 * white_matter
    neck = (z < -78) & (z > -98) & (np.hypot(x, y + 22) < 45)
    assert bright[neck].mean() > 0.7
    over_the_vertex = (np.abs(x) < 20) & (np.abs(y + 20) < 20) & (z > 85) & (z < 97)
    assert bright[over_the_vertex].mean() > 0.25
    air = (z > 110) | (y < -145)
    assert 0 < stored[air].mean() < 0.1 * white_matter
