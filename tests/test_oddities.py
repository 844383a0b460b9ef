"""Real files that are wrong, odd or no brain scan, through the whole conversion: each gets its verdict."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FULL, ROOT

from brainscale import store as stores
from brainscale.prep_plan import Plan
from brainscale.settings import load
from brainscale_data_prep import foreground, nifti
from brainscale_data_prep.convert import convert
from brainscale_data_prep.foreground import label_like
from brainscale_data_prep.nifti import Refused
from brainscale_data_prep.preprocess import prepare

IDENTITY, BRAIN_1MM = (ROOT / f"configs/prep/{name}.toml" for name in ("identity", "brain_1mm"))
Converted = Callable[[str, Path], tuple[stores.Store, dict[str, str]]]

NATURAL = {
    "5D_small.nii": "not_3d",
    "air.hdr.gz": "",  # a compressed pair
    "complex64_epi.nii.gz": "not_a_brain_scan",  # a field map by its name (and complex)
    "dipy_small_64D.nii": "four_d",
    "git_lfs_pointer_101_t1.nii.gz": "pointer_file",
    "header_only_T1w.nii.gz": "truncated",
    "nibabel_anatomical.nii": "",  # big-endian, 66 × 82 × 50 mm
    "nibabel_example4d.nii.gz": "four_d",
    "nibabel_example_nifti2.nii.gz": "four_d",
    "nibabel_functional.nii": "four_d",
    "nibabel_resampled_anat_moved.nii": "thin_slab",  # 24 mm high
    "nibabel_someones_anatomy.nii.gz": "",
    "nibabel_someones_epi.nii.gz": "not_a_brain_scan",  # a field map by its name
    **{
        f"nifti_rs/27_{kind}.nii": "thin_slab"  # 3 mm
        for kind in ("float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
    },
    "nifti_rs/complex_complex64.nii": "complex",  # and 2D
    "nifti_rs/minimal.hdr": "no_affine",  # neither sform nor qform
    "nifti_rs/rgb_4D.nii": "rgb",  # and 4D: no --frame would help
    "nifti_rs/rgba_4D.nii": "rgb",
    "not-nifti.nii": "not_nifti",
    "oro_avg152T1.hdr.gz": "no_affine",  # Analyze 7.5
    "ras.hdr": "",
    "rgb24_fa_map.nii.gz": "rgb",
    "stat_map_nan.nii.gz": "bright_background,non_finite",  # a statistic: nothing in its header or name says so
    "with_extension.nii.gz": "not_a_brain_scan",  # a mask
}
SCANNERS = {"GE_fmri_4d.nii": "four_d", "Siemens_fmri_4d.nii": "four_d", "Siemens_pcasl_m0.nii": ""}
SAME_AS_00 = ("01", "05", "06", "09", "10", "14", "15", "16", "25", "26", "29", "30", "35", "36", "37")
"""Derived files that hold the voxels of file 00 at the same places."""
WARNED = {
    "ds002748_native/sub-21/anat/sub-21_T1w.nii.gz": ["qform_sform_conflict"],  # 4.6 mm: the sform is a registration
}


@pytest.fixture(scope="module")
def converted(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Converts a folder of the real data, once per plan: the store, and warnings or the reason of every source."""
    known: dict[tuple[str, Path], tuple[stores.Store, dict[str, str]]] = {}

    def run(folder: str, plan_file: Path) -> tuple[stores.Store, dict[str, str]]:
        if (folder, plan_file) not in known:
            path = tmp_path_factory.mktemp(folder) / "store"
            convert(real_data / folder, path, load(Plan, plan_file), workers=1)
            store = stores.open_store(path)
            verdicts = {scan["source"]: scan["reason"] for scan in store.refused}
            for source, codes in zip(store.column("source"), store.column("warnings")):
                verdicts[source] = ",".join(code.partition(":")[0] for code in codes if code != "duplicate_of")
            known[folder, plan_file] = store, verdicts
        return known[folder, plan_file]

    return run


def test_every_derived_oddity_gets_its_verdict(real_data, converted):
    """`duplicate_of` is left out: most of these files hold the voxels of the first, and are told so."""
    store, verdicts = converted("oddities_derived", IDENTITY)
    with (real_data / "oddities_derived/EXPECTED.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert verdicts == {row["file"]: row["code"] for row in rows}
    refused = {scan["source"]: scan for scan in store.refused}
    for row in rows:
        assert (row["verdict"] == "refused") == (row["file"] in refused)
        assert (row["verdict"] == "taken") == (row["code"] == "")
    assert all(len(scan["sentence"]) > 20 for scan in refused.values())


def test_oddities_that_hold_the_same_image_become_the_same_row(converted):
    store, _ = converted("oddities_derived", IDENTITY)
    rows = {source[:2]: at for at, source in enumerate(store.column("source"))}
    values = {
        name: store.volumes(store.rows[at : at + 1])[0] * store.column("scale")[at] + store.column("offset")[at]
        for name, at in rows.items()
    }
    affines = np.stack(store.column("affine_stored").tolist())
    for name in SAME_AS_00:
        np.testing.assert_array_equal(values[name], values["00"])
        np.testing.assert_allclose(affines[rows[name]], affines[rows["00"]], atol=1e-5)
    quantum = store.column("scale")
    for name in ("02", "03", "04"):
        assert np.abs(values[name] - values["00"]).max() <= quantum[rows[name]] / 2 + 1e-4
        np.testing.assert_allclose(affines[rows[name]], affines[rows["00"]], atol=1e-5)


@pytest.mark.parametrize(("folder", "expected"), [("oddities_natural", NATURAL), ("scanners", SCANNERS)])
def test_every_natural_oddity_gets_its_verdict(converted, folder, expected):
    assert converted(folder, IDENTITY)[1] == expected


@pytest.mark.parametrize("plan_file", [IDENTITY, BRAIN_1MM], ids=lambda path: path.stem)
def test_twelve_orientations_become_one_array(converted, plan_file):
    store, verdicts = converted("orientations", plan_file)
    assert len(store.rows) == 12 and set(verdicts.values()) == {""}
    first = store.volumes(store.rows[:1])[0].astype(int)
    assert first.any()
    for row in store.rows[1:]:
        assert np.abs(store.volumes([row])[0] - first).max() <= (0 if plan_file == IDENTITY else 1)
    affines = np.stack(store.column("affine_stored").tolist())
    np.testing.assert_allclose(affines, affines[:1].repeat(12, axis=0), atol=1e-5)  # srow is float32
    for column in ("scale", "offset", "background_code"):
        assert len(set(store.column(column).tolist())) == 1


def test_ordinary_files_carry_no_warning(real_data):
    folders = ["ds000011", "ds002748_2mm", "ds002748_native", "orientations", "templates", "stroke_cstar"]
    files = [path for folder in folders for path in (real_data / folder).rglob("*.nii*")]
    files += sorted((real_data / "msd_hippocampus/imagesTr").glob("*.nii.gz"))[:: 1 if FULL else 8]
    warned = {str(path.relative_to(real_data)): nifti.read(path).warnings for path in files}
    assert len(warned) > 80
    assert {name: codes for name, codes in warned.items() if codes} == WARNED


# --------------------------------------------------------------------------------------------- labels


def label_files(data: Path) -> list[Path]:
    lesions, parts = (
        sorted((data / folder).glob("*.nii.gz")) for folder in ("soop_lesions", "msd_hippocampus/labelsTr")
    )
    step = 1 if FULL else 8
    masks = [data / "open_ms_crosssectional_mni/patient07/lesion_consensus.nii.gz"]
    maps = [path for path in (data / "labels").glob("*.nii.gz") if "rgba" not in path.name]
    return maps + masks + lesions[::step] + parts[::step]


def image_files(data: Path) -> list[Path]:
    folders = ["ds000011", "ds002748_2mm", "ds002748_native", "orientations", "templates", "misc", "stroke_cstar"]
    files = [path for folder in folders for path in (data / folder).rglob("*.nii*")]
    files += sorted((data / "msd_hippocampus/imagesTr").glob("*.nii.gz"))[:: 1 if FULL else 8]
    files += (data / "open_ms_longitudinal_raw").rglob("*.nii.gz")
    files += (data / "oddities_natural").glob("nibabel_*anat*.nii*")
    return files + sorted((data / "oddities_derived").glob("0[0-5]*.nii.gz"))


@pytest.mark.parametrize("share", [0.2, foreground.REPEATED_SHARE, 0.75])
def test_labels_and_masks_are_told_from_images_with_room_to_spare(real_data, share, monkeypatch):
    monkeypatch.setattr(foreground, "REPEATED_SHARE", share)
    assert [path.name for path in label_files(real_data) if not label_like(nifti.read(path).voxels)] == []
    assert [path.name for path in image_files(real_data) if label_like(nifti.read(path).voxels)] == []


def blocks(dtype: str, values: int) -> np.ndarray:
    """(40,48,32) labels in cubes of 8³ voxels within a background."""
    labels = np.random.default_rng(0).integers(1, values + 1, (5, 6, 4)).repeat(8, 0).repeat(8, 1).repeat(8, 2)
    labels[:, :12] = 0
    return np.asfortranarray(labels.astype(dtype))


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "int32", "float32", "float64"])
def test_labels_are_told_in_every_type(dtype):
    labels = blocks(dtype, 60)
    assert label_like(labels)
    noise = np.random.default_rng(1).normal(0, 12, labels.shape)
    assert not label_like(np.asfortranarray(np.clip(labels + noise, 0, 120).round().astype(dtype)))
    if "f" in dtype:
        assert not label_like(labels + labels.dtype.type(0.25))


def test_small_masks_constants_and_thin_arrays():
    mask = np.zeros((180, 220, 180), np.uint8, order="F")
    assert not label_like(mask)  # constant: another verdict
    mask[90, 110, 77] = 1  # not among the voxels that are looked at first
    assert label_like(mask)
    assert label_like(1 - mask)
    assert not label_like(np.ones((1, 40, 40), np.int16))
    assert not label_like(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    assert not label_like(np.full((4, 4, 4), np.nan, np.float32))


def test_a_mask_is_refused_with_a_sentence(tmp_path):
    nifti.write(tmp_path / "a.nii.gz", blocks("int16", 5), np.diag([2.0, 2, 2, 1]))
    plan = Plan(grid_voxels_xyz=(48, 48, 48), spacing_mm_xyz="native")
    with pytest.raises(Refused, match="not_a_brain_scan"):
        prepare(nifti.read(tmp_path / "a.nii.gz"), plan, (48, 48, 48))
