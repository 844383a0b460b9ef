"""Reading NIfTI: what is taken, with which warning, what is refused and why; writing it back."""

import errno
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brainscale.geometry import voxel_to_mm
from brainscale_data_prep import nifti, source_bytes
from brainscale_data_prep.nifti import Refused

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])


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
        ({"scl_slope": 1e20}, "unreadable"),
        ({"scl_slope": 1, "scl_inter": -1e16}, "unreadable"),
        ({"srow_x": [-2, 0, 0, 1e7]}, "singular_affine"),
        ({"sform_code": 0, "qform_code": 17}, "no_affine"),
        ({"magic": b"n+2"}, "not_nifti"),
        ({"sform_code": 0, "pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, "singular_affine"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, fields, code):
    with pytest.raises(Refused) as refused:
        nifti.read(changed(tmp_path, **fields))
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("fields", "warnings"),
    [
        ({}, []),
        ({"vox_offset": 350}, ["size_mismatch"]),
        ({"dim": [3, 3, 4, 4, 1, 1, 1, 1]}, ["size_mismatch"]),
        ({"scl_slope": -1}, ["negative_slope"]),
        ({"xyzt_units": 3}, ["odd_units"]),
        ({"pixdim": [1, 2, 1.5, 1.003, 0, 0, 0, 0]}, ["bad_pixdim"]),
        ({"pixdim": [1, 2, 1.5, -1, 0, 0, 0, 0]}, ["bad_pixdim"]),
        ({"pixdim": [1, 2, 1.5, 1, 0, 0, 0, 0]}, ["qform_sform_conflict"]),
        ({"qoffset_x": 90.2}, ["qform_sform_conflict"]),
        ({"qoffset_x": 90.05}, []),
        ({"srow_y": [0, 1.5, 0.2, -126]}, ["qform_sform_conflict", "sheared"]),
        ({"sform_code": 300}, []),  # no such code: the qform, which says the same
    ],
)
def test_headers_that_contradict_themselves_are_taken_with_a_warning(tmp_path, fields, warnings):
    assert nifti.read(changed(tmp_path, **fields)).warnings == warnings


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


# --------------------------------------------------------------------------------------------- series, orientation


def write_series(path: Path, frames: int = 4) -> np.ndarray:
    voxels = np.arange(3 * 4 * 5 * frames, dtype=np.int16).reshape((3, 4, 5, frames), order="F")
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)
    return voxels


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_one_frame_of_a_series_is_taken_when_asked(tmp_path, name):
    voxels = write_series(tmp_path / name)
    for call in (nifti.read, nifti.read_shape):
        with pytest.raises(Refused, match="--frame N") as refused:
            call(tmp_path / name)
        assert refused.value.code == "four_d" and "series of 4 volumes" in refused.value.sentence
        with pytest.raises(Refused, match="not one of 0 to 3") as refused:
            call(tmp_path / name, frame=4)
        assert refused.value.code == "four_d"
    for frame in range(4):
        scan = nifti.read(tmp_path / name, frame=frame)
        np.testing.assert_array_equal(scan.voxels, voxels[..., frame])
        assert scan.warnings == ["frame"]
        held = scan.voxels
        while isinstance(held.base, np.ndarray):
            held = held.base
        assert held.base is None and held.nbytes == voxels[..., 0].nbytes  # not the whole series
    assert nifti.read_shape(tmp_path / name, frame=1)[0] == (3, 4, 5)


def test_a_frame_says_nothing_about_single_volumes(tmp_path):
    nifti.write(tmp_path / "a.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE)
    assert nifti.read(tmp_path / "a.nii", frame=7).warnings == []


def test_damage_behind_the_frame_is_found(tmp_path):
    path = tmp_path / "a.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 9999, (8, 8, 8, 9)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, AFFINE), path)
    good = path.read_bytes()
    path.write_bytes(good[:-8] + bytes([good[-8] ^ 1]) + good[-7:])
    with pytest.raises(Refused, match="gzip_crc"):
        nifti.read(path, frame=0)
    path.write_bytes(gzip.compress(gzip.decompress(good)[:-1]))
    with pytest.raises(Refused, match="truncated"):
        nifti.read(path, frame=0)


@pytest.mark.parametrize("code", ["RAS", "LAS", "LPS", "RPI"])
@pytest.mark.parametrize("kind", ["nifti", "analyze"])
def test_an_orientation_can_be_assumed_where_the_file_gives_none(tmp_path, kind, code):
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    if kind == "nifti":
        path = changed(tmp_path, sform_code=0, qform_code=0)
    else:
        path = tmp_path / "a.hdr"
        image = nib.Spm2AnalyzeImage(voxels, None)
        image.header.set_zooms((2, 1.5, 1))
        nib.save(image, tmp_path / "a.img")
        head = bytearray(path.read_bytes())
        head[148:156], head[263:273], head[293:303] = b"Jane Doe", b"1970-01-01", b"Patient 12"
        path.write_bytes(head)
    for call in (nifti.read, nifti.read_shape):
        with pytest.raises(Refused, match="--assume-orientation RAS") as refused:
            call(path)
        assert refused.value.code == "no_affine"
    scan = nifti.read(path, assume_orientation=code)
    assert scan.warnings == ["assumed_orientation"]
    np.testing.assert_array_equal(scan.voxels, voxels)
    assert "".join(nib.aff2axcodes(scan.affine)) == code
    np.testing.assert_allclose(np.abs(np.diag(scan.affine)), [2, 1.5, 1, 1])
    np.testing.assert_allclose(voxel_to_mm(scan.affine, np.array([1.0, 1.5, 2.0])), 0, atol=1e-12)
    np.testing.assert_array_equal(nifti.read_shape(path, code)[1], scan.affine)
    assert not any(text in scan.header for text in (b"Jane", b"1970", b"Patient"))
    if code == "LAS":
        np.testing.assert_allclose(scan.affine, nib.load(path).affine)  # nibabel assumes this without a word


def test_an_assumed_orientation_does_not_replace_one_that_is_given(tmp_path):
    path = changed(tmp_path)
    assert nifti.read(path, assume_orientation="RPI").warnings == []
    np.testing.assert_allclose(nifti.read(path, assume_orientation="RPI").affine, AFFINE)
    with pytest.raises(Refused, match="singular_affine"):
        nifti.read(changed(tmp_path, sform_code=0, qform_code=0, pixdim=[1, 0, 1, 1, 0, 0, 0, 0]), "RAS")


def test_slabs_are_refused_before_their_voxels_are_read(tmp_path):
    nifti.write(tmp_path / "a.nii", np.ones((30, 40, 12), np.int16), np.diag([2.0, 2, 3, 1]))
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(content[:400])
    for call in (nifti.read, nifti.read_shape):
        with pytest.raises(Refused, match="36 mm along its k axis; at least 40 mm") as refused:
            call(tmp_path / "a.nii", min_extent_mm=40)
        assert refused.value.code == "thin_slab"
    (tmp_path / "a.nii").write_bytes(content)
    assert nifti.read_shape(tmp_path / "a.nii", min_extent_mm=36)[0] == (30, 40, 12)


def test_a_header_that_announces_more_than_its_file_can_hold_decides_no_grid(tmp_path):
    nifti.write(tmp_path / "a.nii", np.ones((30, 40, 12), np.int16), np.diag([2.0, 2, 3, 1]))
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[42:48] = np.array([1000, 1000, 1000], "<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(Refused, match="too small for the voxels") as refused:
        nifti.read_shape(tmp_path / "a.nii")
    assert refused.value.code == "truncated"


# --------------------------------------------------------------------------------------------- bytes


def test_streams_of_several_members_are_read_whole(tmp_path):
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nifti.write(tmp_path / "a.nii", voxels, AFFINE)
    content = (tmp_path / "a.nii").read_bytes()
    pieces = [gzip.compress(content[at : at + 50]) for at in range(0, len(content), 50)]
    (tmp_path / "b.nii.gz").write_bytes(b"".join(pieces))
    scan = nifti.read(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(scan.voxels, voxels)
    assert scan.warnings == []
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content) * 2)
    assert nifti.read(tmp_path / "b.nii.gz").warnings == ["size_mismatch"]
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content) + bytes(512))
    assert nifti.read(tmp_path / "b.nii.gz").warnings == []  # padding of a tape or a block device
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content) + b"rubbish" * 3)
    with pytest.raises(Refused, match="gzip_crc"):
        nifti.read(tmp_path / "b.nii.gz")


def test_both_files_of_a_compressed_pair_are_checked(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 999, (7, 8, 9)).astype(np.int16)
    nib.save(nib.Nifti1Pair(voxels, AFFINE), tmp_path / "a.hdr")
    for suffix in (".hdr", ".img"):
        (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress((tmp_path / f"a{suffix}").read_bytes()))
    np.testing.assert_array_equal(nifti.read(tmp_path / "b.hdr.gz").voxels, voxels)
    for suffix in (".hdr", ".img"):
        path = tmp_path / f"b{suffix}.gz"
        good = path.read_bytes()
        path.write_bytes(good[:-6] + bytes([good[-6] ^ 4]) + good[-5:])
        with pytest.raises(Refused, match="gzip_crc"):
            nifti.read(tmp_path / "b.hdr.gz")
        path.write_bytes(good)


def test_voxels_at_an_odd_byte_are_read(tmp_path):
    voxels = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float64)
    nifti.write(tmp_path / "a.nii", voxels, AFFINE)
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[108:112] = np.float32(355).tobytes()
    for suffix, pack in ((".nii", bytes), (".nii.gz", gzip.compress)):
        (tmp_path / f"b{suffix}").write_bytes(pack(content[:352] + b"odd" + content[352:]))
        np.testing.assert_array_equal(nifti.read(tmp_path / f"b{suffix}").voxels, voxels)


def test_a_disk_that_stumbles_is_asked_three_times(tmp_path, monkeypatch):
    nifti.write(tmp_path / "a.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE)
    monkeypatch.setattr(source_bytes, "PAUSE_S", 0.001)
    real, failures = source_bytes._read, []

    def stumbling(path, limit):
        if failures:
            raise OSError(failures.pop(), "the server is out")
        return real(path, limit)

    monkeypatch.setattr(source_bytes, "_read", stumbling)
    failures[:] = [errno.ESTALE, errno.EIO]
    assert nifti.read(tmp_path / "a.nii").voxels.size == 60
    failures[:] = [errno.EIO] * 3
    with pytest.raises(Refused, match=r"the server is out \(tried 3 times\)") as refused:
        nifti.read(tmp_path / "a.nii")
    assert refused.value.code == "unreadable" and not failures
    failures[:] = [errno.EACCES, errno.EACCES]
    with pytest.raises(Refused, match="the server is out; check"):
        nifti.read(tmp_path / "a.nii")
    assert len(failures) == 1  # a file that may not be read is not asked for again


def test_a_real_input_output_error_is_a_refusal(monkeypatch):
    monkeypatch.setattr(source_bytes, "PAUSE_S", 0.001)
    with pytest.raises(Refused, match=r"cannot be read: .+ \(tried 3 times\)") as refused:
        nifti.read(Path("/proc/self/mem"))
    assert refused.value.code == "unreadable"


def test_upper_case_pairs_are_read(tmp_path):
    nifti.write(tmp_path / "a.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[344:348], content[108:112] = b"ni1\0", np.float32(0).tobytes()
    (tmp_path / "B.HDR").write_bytes(content[:348])
    (tmp_path / "B.IMG").write_bytes(content[352:])
    scan = nifti.read(tmp_path / "B.HDR")
    assert scan.warnings == [] and scan.voxels.ravel(order="F").tolist() == list(
        np.arange(60).reshape(3, 4, 5).ravel(order="F")
    )
