"""Effects planted into scans: only their region changes, headers stay, the truth is written, the source is safe."""

import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import FULL, refusal, run_brainscale
from scipy.ndimage import binary_dilation

from brainscale.geometry import spacing_mm
from brainscale.settings import InputError
from brainscale_data_prep import discover, effects, nifti, phantom, planting, tables
from brainscale_data_prep.nifti_copy import copy_with_voxels
from brainscale_data_prep.planted_dataset import plant


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def plain(path: Path) -> bytes:
    stored = path.read_bytes()
    return gzip.decompress(stored) if stored[:2] == b"\x1f\x8b" else stored


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two synthetic brains in their own orientations, as a source of scans."""
    dest = tmp_path_factory.mktemp("planting") / "bids"
    phantom.make(dest, 2, seed=11, spacing_mm=3.0)
    return dest


@pytest.fixture(scope="module")
def planted(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("planted") / "bids"
    plant(cohort, dest, seed=1)
    return dest


@pytest.fixture(scope="module")
def real(real_data: Path) -> Iterator[tuple[nifti.Scan, planting.Tissue, float]]:
    scan = nifti.read(real_data / "ds002748_2mm/sub-04/anat/sub-04_res-2mm_T1w.nii.gz")
    brain, background = planting.brain_of(scan, None)
    yield scan, planting.estimate_tissue(scan, brain, background), background


def put(scan: nifti.Scan, tissue: planting.Tissue, background: float, lesions: float, sharpness: float):
    return planting.plant(
        scan, tissue, background, {"lesions": lesions, "sharpness": sharpness}, np.random.default_rng(0)
    )


# --------------------------------------------------------------------------------------------- one scan


def test_white_matter_of_a_real_brain_is_found(real: tuple) -> None:
    scan, tissue, _ = real
    share = tissue.white.sum() / tissue.brain.sum()
    assert 0.25 < share < 0.45  # of a real brain a good third
    values = scan.voxels[tissue.box]
    grey = tissue.brain & ~binary_dilation(tissue.white, iterations=1)
    assert values[tissue.deep_white].mean() > 1.3 * values[grey].mean()
    assert not (tissue.band & tissue.deep_white).any() and not (tissue.deep_white & ~tissue.white).any()
    assert tissue.band.sum() < 0.35 * tissue.brain.sum()


@pytest.mark.parametrize(("lesions", "sharpness"), [(2.0, -9.0), (-9.0, 1.5), (2.0, -1.5)])
def test_only_the_region_of_an_effect_changes(real: tuple, lesions: float, sharpness: float) -> None:
    scan, tissue, background = real
    done = put(scan, tissue, background, lesions, sharpness)
    allowed = np.zeros(scan.voxels.shape, bool)
    allowed[tissue.box] = tissue.band | done.lesion
    assert done.voxels.dtype == scan.voxels.dtype and (done.voxels != scan.voxels).sum() > 100
    np.testing.assert_array_equal(done.voxels[~allowed], scan.voxels[~allowed])
    assert done.voxels.min() >= scan.voxels.min() and done.voxels.max() <= scan.voxels.max()


def test_lesions_are_dark_small_and_added_by_severity(real: tuple) -> None:
    scan, tissue, background = real
    few, many = (put(scan, tissue, background, severity, 0.0) for severity in (0.0, 2.0))
    assert few.num_lesions == np.ceil(effects.lesion_load(0.0)) < many.num_lesions
    assert not (few.lesion & ~many.lesion).any()
    before, after = (voxels[tissue.box][many.lesion].astype(float) for voxels in (scan.voxels, many.voxels))
    assert (after <= before).all() and after.min() < 0.7 * before.mean()
    volume_mm3 = many.lesion.sum() * np.prod(spacing_mm(scan.affine))
    assert volume_mm3 / many.num_lesions < 4 / 3 * np.pi * (effects.LESION_RADIUS_MM[1] + 1) ** 3
    assert not (many.lesion & ~tissue.deep_white).any()


def test_sharpness_is_untouched_at_0_falls_above_and_rises_below(real: tuple) -> None:
    scan, tissue, background = real

    def detail(severity: float) -> float:
        values = put(scan, tissue, background, -99.0, severity).voxels[tissue.box].astype(float)
        return float(np.abs(np.diff(values, axis=0))[tissue.band[1:]].mean())

    original = np.abs(np.diff(scan.voxels[tissue.box].astype(float), axis=0))[tissue.band[1:]].mean()
    assert detail(0.0) == original and detail(1.5) < 0.95 * original and detail(-1.5) > 1.05 * original


def test_scaling_sign_and_byte_order_make_no_difference(real: tuple) -> None:
    scan, tissue, background = real
    done = put(scan, tissue, background, 1.0, 1.0).voxels
    big = replace(scan, voxels=scan.voxels.astype(">i2"), slope=0.5, inter=7.0)
    again = put(big, planting.estimate_tissue(big, *planting.brain_of(big, None)), background, 1.0, 1.0).voxels
    assert again.dtype == np.dtype(">i2")
    np.testing.assert_array_equal(again, done)
    brain, dark = planting.brain_of(scan, None)
    upside_down = replace(scan, voxels=(4000 - scan.voxels).astype(np.int16), slope=-1.0, inter=4000.0)
    mirrored = planting.estimate_tissue(upside_down, brain, 4000 - int(dark))
    np.testing.assert_array_equal(mirrored.white, tissue.white)


def test_heads_need_a_mask_and_use_it(real: tuple) -> None:
    scan, *_ = real
    noise = np.random.default_rng(0).integers(1, 400, scan.voxels.shape).astype(np.int16)
    head = replace(scan, voxels=np.where(scan.voxels > 0, scan.voxels, noise))
    with pytest.raises(nifti.Refused, match="no brain mask"):
        planting.brain_of(head, None)
    # a mask on another grid of the same world: half the voxels, flipped along x
    mask = replace(scan, voxels=(scan.voxels > 0)[::-1].astype(np.uint8), affine=scan.affine @ np.diag([-1, 1, 1, 1]))
    mask.affine[:3, 3] = (scan.affine @ [scan.voxels.shape[0] - 1, 0, 0, 1])[:3]
    brain, _ = planting.brain_of(head, mask)
    np.testing.assert_array_equal(brain, scan.voxels > 0)


def test_labels_and_dark_balls_are_refused(real: tuple) -> None:
    scan, *_ = real
    with pytest.raises(nifti.Refused, match="labels"):
        planting.brain_of(replace(scan, voxels=(scan.voxels > 300).astype(np.int16)), None)
    x, y, z = np.meshgrid(*(np.arange(n) - n / 2 for n in (40, 40, 40)), indexing="ij")
    ball = np.where(x**2 + y**2 + z**2 < 100, 500 + np.random.default_rng(0).integers(-40, 40, x.shape), 0)
    small = replace(scan, voxels=ball.astype(np.int16), affine=np.eye(4))
    with pytest.raises(nifti.Refused, match="white matter"):
        planting.estimate_tissue(small, *planting.brain_of(small, None))


# --------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.slow
def test_a_copy_differs_in_its_voxels_alone(cohort: Path, tmp_path: Path, suffix: str) -> None:
    source = next(cohort.rglob("*T1w.nii.gz"))
    header = bytearray(plain(source))
    header[148:160] = b"Maria Muster"  # descrip is kept as it is
    extended = bytes(header[:108]) + np.float32(352 + 32).tobytes() + bytes(header[112:348]) + b"\1\0\0\0"
    content = extended + b"\x20\0\0\0\x06\0\0\0" + b"a comment, padded......."[:24] + bytes(header[352:]) + b"after"
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    scan = nifti.read(path)
    voxels = scan.voxels.copy(order="F")
    voxels[3, 4, 5] += 1
    copy_with_voxels(path, tmp_path / f"b{suffix}", voxels)
    one, other = plain(path), plain(tmp_path / f"b{suffix}")
    differing = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    place = 384 + 2 * (3 + voxels.shape[0] * (4 + voxels.shape[1] * 5))
    assert differing and set(differing) <= {place, place + 1}
    np.testing.assert_array_equal(nifti.read(tmp_path / f"b{suffix}").voxels, voxels)


@pytest.mark.slow
def test_the_planted_dataset_says_what_was_done_and_leaves_the_rest(cohort: Path, planted: Path) -> None:
    found = discover.find(planted).scans
    assert [scan.source for scan in found] == [scan.source for scan in discover.find(cohort).scans]
    rows = {row["scan"]: row for row in tables.read(planted / "planted.tsv")}
    for scan in found:
        before, after = nifti.read(cohort / scan.source), nifti.read(scan.path)
        assert plain(cohort / scan.source)[:352] == plain(scan.path)[:352]
        assert after.warnings == before.warnings
        changed = int((before.voxels != after.voxels).sum())
        assert changed == int(rows[scan.source]["changed_voxels"]) > 0
        assert changed < 0.35 * (before.voxels > 0).sum()
        assert float(rows[scan.source]["centroid_lesions_per_mm"]) > 0.08
    people, truth = tables.read(planted / "participants.tsv"), tables.read(planted / "truth.tsv")
    source = tables.read(cohort / "participants.tsv")
    for row, severe, original in zip(people, truth, source, strict=True):
        assert row["participant_id"] == severe["participant_id"] == original["participant_id"]
        assert row["source_label_lesions"] == original["label_lesions"] and row["age"] == original["age"]
        assert row["label_lesions"] in "01" and "severity_lesions" not in row
    columns = json.loads((planted / "participants.json").read_text())
    assert all("planted effects" in columns[f"label_{task}"]["Description"] for task in planting.PLANTED)
    assert "planted effects" in (planted / "README").read_text()
    assert "planted effects" in json.loads((planted / "dataset_description.json").read_text())["Name"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(cohort: Path, planted: Path, tmp_path: Path) -> None:
    source = files(cohort)
    plant(cohort, tmp_path / "again", seed=1, workers=2)
    assert files(tmp_path / "again") == files(planted)
    plant(cohort, tmp_path / "other", seed=2)
    name = "sub-001/anat/sub-001_T1w.nii.gz"
    assert files(tmp_path / "other")[name] != files(planted)[name]
    assert files(cohort) == source


@pytest.mark.slow
def test_a_plain_folder_becomes_bids_and_what_cannot_be_taken_is_counted(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for number in (1, 2):
        source = cohort / f"sub-00{number}/anat/sub-00{number}_T1w.nii.gz"
        shutil.copyfile(source, tmp_path / f"scans/person_{number}.nii.gz")
    (tmp_path / "scans/person_3.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match="holds no scans"):
        plant(tmp_path / "scans", tmp_path / "named", seed=0)
    summary = plant(tmp_path / "scans", tmp_path / "bids", seed=0, all_t1w=True)
    assert (summary.scans, summary.subjects, summary.left_out) == (2, 2, {"empty_file": 1})
    assert [scan.source for scan in discover.find(tmp_path / "bids").scans] == [
        f"sub-person{n}/anat/sub-person{n}_run-1_T1w.nii.gz" for n in (1, 2)
    ]


def test_bad_requests_are_one_sentence_and_write_nothing(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lies in"):
        plant(cohort, cohort / "derivatives/planted", seed=0)
    with pytest.raises(InputError, match="no folder"):
        plant(cohort / "participants.tsv", tmp_path / "planted", seed=0)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine").write_text("kept")
    assert "not an empty folder" in refusal(2, "plant", cohort, tmp_path / "used")
    assert files(tmp_path / "used") == {"mine": b"kept"} and not (cohort / "derivatives").exists()


@pytest.mark.slow
def test_real_scans_are_planted_and_converted_with_their_labels(real_data: Path, tmp_path: Path) -> None:
    said = run_brainscale("plant", real_data / "ds002748_2mm", tmp_path / "planted").stdout
    assert "47 scans of 47 subjects; left out: none" in said
    people = tables.read(tmp_path / "planted/participants.tsv")
    for name in ("label_lesions", "label_sharpness"):
        assert 20 <= sum(int(row[name]) for row in people) <= 27
    if FULL:
        plan = Path(__file__).parent.parent / "configs/prep/brain_2mm.toml"
        run_brainscale("to-zarr", tmp_path / "planted", tmp_path / "store", "--prep", plan)
        from brainscale import store

        column = store.open_store(tmp_path / "store").column("participant_label_sharpness")
        assert set(column) == {"0", "1"}
