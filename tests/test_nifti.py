"""Reading NIfTI: what is taken, with which warning, what is refused and why; writing it back."""

import csv
import gzip

import nibabel as nib
import numpy as np
import pytest
from conftest import REAL_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brainscale.config import Plan
from brainscale_data_prep import nifti
from brainscale_data_prep.nifti import Refused
from brainscale_data_prep.preprocess import prepare

ODDITIES = REAL_DATA / "oddities_derived"
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])


def expected():
    if not (ODDITIES / "EXPECTED.tsv").exists():
        return [pytest.param({}, marks=pytest.mark.skip(reason="real data absent: set BRAINSCALE_TEST_DATA"))]
    with (ODDITIES / "EXPECTED.tsv").open(encoding="utf-8", newline="") as file:
        return [pytest.param(row, id=row["file"][:2]) for row in csv.DictReader(file, delimiter="\t")]


@pytest.mark.parametrize("row", expected())
def test_every_derived_oddity_gets_its_verdict(row):
    plan = Plan(grid_voxels_xyz=(48, 48, 48), spacing_mm_xyz="native", crop="centre")
    try:
        warnings = prepare(nifti.read(ODDITIES / row["file"]), plan, (48, 48, 48)).record["warnings"]
        verdict = ("warning", warnings[0].partition(":")[0]) if warnings else ("taken", "")
        assert len(warnings) < 2
    except Refused as refused:
        verdict = ("refused", refused.code)
        assert refused.sentence
    assert verdict == (row["verdict"], row["code"])


@given(
    hnp.arrays(
        st.sampled_from([np.int16, np.uint8, np.uint16, np.float32]),
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=2),
    ),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_written_volumes_are_read_back(tmp_path_factory, voxels, packed, sheared):
    path = tmp_path_factory.mktemp("nifti") / f"a.nii{'.gz' if packed else ''}"
    affine = AFFINE + (np.eye(4, k=1) * 0.25 if sheared else 0)
    nifti.write(path, voxels, affine, slope=0.5, inter=-3)
    scan = nifti.read(path)
    np.testing.assert_array_equal(scan.voxels, voxels)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-5)
    assert (scan.slope, scan.inter, scan.warnings) == (0.5, -3.0, ["sheared"] if sheared else [])
    other = nib.load(path)
    np.testing.assert_allclose(other.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(other.dataobj), voxels.astype(np.float64) * 0.5 - 3)


def test_writing_is_deterministic_and_leaves_no_free_text(tmp_path):
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nifti.write(tmp_path / "a.nii.gz", voxels, AFFINE)
    nifti.write(tmp_path / "b.nii.gz", voxels, AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header["descrip"], image.header["db_name"] = b"Jane Doe", b"1970-01-01"
    nib.save(image, tmp_path / "c.nii")
    scan = nifti.read(tmp_path / "c.nii")
    assert len(scan.header) == 348
    assert b"Jane" not in scan.header and b"1970" not in scan.header


def changed(tmp_path, **fields):
    """A good file whose header fields are overwritten."""
    nifti.write(tmp_path / "good.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE)
    content = (tmp_path / "good.nii").read_bytes()
    header = nib.Nifti1Header(content[:348])
    for name, value in fields.items():
        header[name] = value
    (tmp_path / "bad.nii").write_bytes(header.binaryblock + content[348:])
    return tmp_path / "bad.nii"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"vox_offset": 0}, "not_nifti"),
        ({"vox_offset": np.nan}, "not_nifti"),
        ({"vox_offset": 1e9}, "truncated"),
        ({"dim": [0, 3, 4, 5, 1, 1, 1, 1]}, "not_nifti"),
        ({"dim": [3, -3, 4, 5, 1, 1, 1, 1]}, "not_nifti"),
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "too_large"),
        ({"dim": [3, 4000, 4000, 4000, 1, 1, 1, 1]}, "too_large"),
        ({"dim": [3, 3, 4, 6, 1, 1, 1, 1]}, "truncated"),
        ({"datatype": 1}, "unreadable"),
        ({"bitpix": 8}, "unreadable"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "singular_affine"),
        ({"srow_x": [0, 1.5, 0, 0]}, "singular_affine"),
        ({"srow_z": [0, 0, 1e6, 0]}, "singular_affine"),
        ({"scl_slope": np.inf}, "unreadable"),
        ({"sform_code": 0, "pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, "singular_affine"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, fields, code):
    with pytest.raises(Refused) as refused:
        nifti.read(changed(tmp_path, **fields))
    assert refused.value.code == code


def test_a_quaternion_that_is_no_rotation_needs_an_sform(tmp_path):
    assert nifti.read(changed(tmp_path, quatern_b=3.0)).warnings == ["qform_sform_conflict"]
    with pytest.raises(Refused, match="singular_affine"):
        nifti.read(changed(tmp_path, quatern_b=3.0, sform_code=0))


def test_every_damage_to_a_gzip_stream_is_found(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.nii.gz"
    nifti.write(path, rng.integers(0, 1000, (12, 13, 14)).astype(np.int16), AFFINE)
    good = path.read_bytes()
    for cut in (9, 100, len(good) // 2, len(good) - 8, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(Refused) as refused:
            nifti.read(path)
        assert refused.value.code == "truncated"
    for at in rng.integers(20, len(good), 40):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1 :])
        with pytest.raises(Refused) as refused:
            nifti.read(path)
        assert refused.value.code in ("gzip_crc", "truncated", "not_nifti", "too_large")


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path):
    path = changed(tmp_path)
    content = path.read_bytes()
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(gzip.compress(content + bytes(64 << 20)))
    with pytest.raises(Refused) as refused:
        nifti.read(bomb)
    assert refused.value.code == "too_large"


def test_links_and_pointers_are_named(tmp_path):
    (tmp_path / "annex.nii.gz").symlink_to("../.git/annex/objects/aa/bb/MD5E-s1--0.nii.gz")
    (tmp_path / "gone.nii.gz").symlink_to("nowhere.nii.gz")
    (tmp_path / "unlocked.nii.gz").write_text("/annex/objects/MD5E-s1--0.nii.gz\n")
    (tmp_path / "alone.hdr").write_bytes(nib.Nifti1Pair(np.ones((2, 2, 2), np.int16), AFFINE).header.binaryblock)
    codes = {}
    for path in tmp_path.iterdir():
        with pytest.raises(Refused) as refused:
            nifti.read(path)
        codes[path.name.partition(".")[0]] = refused.value.code
    assert codes == {"annex": "pointer_file", "gone": "unreadable", "unlocked": "pointer_file", "alone": "truncated"}


def test_the_header_alone_gives_the_shape(tmp_path):
    nifti.write(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(50, 60, 70)).astype(np.float32), AFFINE)
    shape, affine = nifti.read_shape(tmp_path / "a.nii.gz")
    assert shape == (50, 60, 70)
    np.testing.assert_allclose(affine, AFFINE)
