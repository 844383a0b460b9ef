"""Which scans a source holds: ids, subjects, suffixes, names, links, and what must not be followed."""

import json
import os

import pytest

from brainscale.settings import InputError
from brainscale_data_prep import discover, nifti


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


@pytest.fixture
def bids(tmp_path):
    root = tmp_path / "bids"
    touch(
        root,
        "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_run-2_FLAIR.nii",
        "sub-01/anat/sub-01_desc-brain_mask.nii.gz",
        "sub-01/func/sub-01_task-rest_bold.nii.gz",
        "derivatives/other/sub-01/anat/sub-01_T1w.nii.gz",
    )
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.8.0"}))
    return root


def test_bids_takes_anatomical_contrasts_and_counts_the_others(bids):
    found = discover.find(bids)
    assert [(s.id, s.subject, s.session, s.contrast) for s in found.scans] == [
        ("sub-01_T1w", "sub-01", "", "T1w"),
        ("sub-01_run-2_FLAIR", "sub-01", "", "FLAIR"),
        ("sub-02_ses-b_T1w", "sub-02", "ses-b", "T1w"),
    ]
    assert found.scans[2].source == "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz"
    assert found.skipped == {"mask": 1, "bold": 1}


def test_participants_are_joined_by_allow_list(bids):
    (bids / "participants.tsv").write_text(
        "participant_id\tage\tSex\tname\tlabel_ms\tsite\n01\t35\tF\tJane\t1\tn/a\nsub-02\tn/a\tM\tJoe\t0\tA\n"
    )
    people = {scan.id: scan.participant for scan in discover.find(bids).scans}
    assert people["sub-01_T1w"] == {"age": "35", "sex": "F", "label_ms": "1"}
    assert people["sub-02_ses-b_T1w"] == {"sex": "M", "label_ms": "0", "site": "A"}


def test_a_participant_described_twice_is_an_error(bids):
    (bids / "participants.tsv").write_text("participant_id\tage\nsub-01\t35\nsub-01\t36\n")
    with pytest.raises(InputError, match="sub-01 twice"):
        discover.find(bids)


def test_any_folder_takes_every_volume(tmp_path):
    touch(
        tmp_path, "b/scan one.nii.gz", "a/sub-7_ses-1_T2w.nii", "pair.hdr", "pair.img", "notes.txt", ".git/o/x.nii.gz"
    )
    found = discover.find(tmp_path)
    assert [(s.id, s.subject, s.contrast) for s in found.scans] == [
        ("a/sub-7_ses-1_T2w", "sub-7", "T2w"),
        ("b/scan one", "b", ""),
        ("pair", "pair", ""),
    ]
    assert all(s.path == tmp_path / s.source for s in found.scans)


def test_a_repeated_id_is_refused_the_second_time(tmp_path):
    touch(tmp_path, "a.nii", "a.nii.gz")
    assert [(s.source, s.code) for s in discover.find(tmp_path).scans] == [("a.nii", ""), ("a.nii.gz", "duplicate")]


def test_links_that_leave_the_source_are_refused_and_inner_ones_followed(tmp_path):
    root = tmp_path / "root"
    touch(tmp_path, "secret/x.nii.gz")
    touch(root, "real.nii.gz")
    (root / "out.nii.gz").symlink_to(tmp_path / "secret" / "x.nii.gz")
    (root / "inner.nii.gz").symlink_to(root / "real.nii.gz")
    (root / "folder").symlink_to(tmp_path / "secret")
    codes = {scan.source: scan.code for scan in discover.find(root).scans}
    assert codes == {"out.nii.gz": "outside_root", "folder": "outside_root", "inner.nii.gz": "", "real.nii.gz": ""}


def test_a_source_without_scans_is_an_error(tmp_path, bids):
    (tmp_path / "empty").mkdir()
    table = tmp_path / "t.csv"
    table.write_text("file\nx.nii\n")
    for source, words in (
        (tmp_path / "empty", "holds no scans"),
        (tmp_path / "absent", "neither a folder nor"),
        (table, "has no usable 'path'"),
    ):
        with pytest.raises(InputError, match=words):
            discover.find(source)


@pytest.mark.parametrize(
    ("source", "subject"),
    [
        ("a.nii.gz", "a"),
        ("patientA/day1/t1.nii.gz", "patientA"),
        ("site1/sub-07/x/t1.nii.gz", "sub-07"),
        ("site1/x/sub-08_T1w.nii.gz", "sub-08"),
    ],
)
def test_whose_scan_a_file_is(tmp_path, source, subject):
    """Both sides of a training split must never hold one subject, so folders count where names say nothing."""
    touch(tmp_path, source)
    assert discover.find(tmp_path).scans[0].subject == subject
    (tmp_path / "table.csv").write_text(f"path\n{source}\n")
    assert discover.find(tmp_path / "table.csv").scans[0].subject == subject


# --------------------------------------------------------------------------------------------- selection


def test_suffixes_select_in_folders_and_tables_and_the_others_are_counted(tmp_path):
    touch(tmp_path, "a/p1_T1w.nii.gz", "a/p1_T2w.nii.gz", "b/p2_T1w.nii", "b/p2_bold.nii.gz", "b/x-1.nii")
    found = discover.find(tmp_path, suffixes=["T1w"])
    assert [(s.id, s.contrast, s.code) for s in found.scans] == [("a/p1_T1w", "T1w", ""), ("b/p2_T1w", "T1w", "")]
    assert found.skipped == {"T2w": 1, "bold": 1, "other": 1}
    table = tmp_path / "t.csv"
    table.write_text("path,contrast\na/p1_T2w.nii.gz,T1w\na/p1_T1w.nii.gz,\nb/p2_T1w.nii,FLAIR\n")
    found = discover.find(table, suffixes=["T1w"])
    assert [(s.source, s.contrast) for s in found.scans] == [("a/p1_T1w.nii.gz", "T1w"), ("a/p1_T2w.nii.gz", "T1w")]
    assert found.skipped == {"FLAIR": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"suffixes": ["T1W"]}, "'T1W' is no BIDS suffix .did you mean T1w.*FLAIR, .*T2w"),
        ({"suffixes": []}, "no suffix was given"),
        ({"entities": {"spaec": "MNI"}}, "'spaec' is no BIDS entity .did you mean space"),
        ({"mask_pipeline": "fmriprep"}, "is no BIDS dataset"),
    ],
)
def test_a_misspelt_selection_is_an_error_that_names_what_there_is(tmp_path, arguments, words):
    touch(tmp_path, "a_T1w.nii")
    with pytest.raises(InputError, match=words):
        discover.find(tmp_path, **arguments)


def test_what_is_no_anatomical_image_by_name_is_refused(tmp_path):
    bad = ("dseg", "probseg", "mask", "bold", "dwi", "sbref", "epi", "phasediff", "magnitude1", "pet")
    touch(tmp_path, *(f"p1_{suffix}.nii.gz" for suffix in bad), "p1_t1.nii.gz", "p1_brain.nii", "mask_p1.nii")
    scans = {scan.id: scan for scan in discover.find(tmp_path).scans}
    assert {scan.id for scan in scans.values() if scan.code == "not_a_brain_scan"} == {f"p1_{name}" for name in bad}
    assert "a segmentation or mask by its name (suffix dseg)" in scans["p1_dseg"].sentence
    assert [scans[name].code for name in ("p1_t1", "p1_brain", "mask_p1")] == ["", "", ""]
    (tmp_path / "t.csv").write_text("path,contrast\np1_bold.nii.gz,T1w\n")
    assert discover.find(tmp_path / "t.csv").scans[0].code == "not_a_brain_scan"


def test_volumes_that_are_not_read_are_counted_by_kind(tmp_path):
    names = ("a.mgz", "a.nrrd", "a.dcm", "B.IMA", "c.nii.zst", "alone.img", "._x.nii.gz", "readme.txt")
    touch(tmp_path, *names, "pair.img", "pair.hdr", "old.img.gz", "old.hdr.gz", "LOUD.NII.GZ")
    found = discover.find(tmp_path)
    assert [scan.id for scan in found.scans] == ["LOUD", "old", "pair"]
    assert found.skipped == {
        "dicom": 2, "mgz": 1, "nrrd": 1, "nii in another compression": 1, "img without hdr": 1, "hidden": 1,
    }  # fmt: skip


def test_where_only_dicom_is_the_sentence_names_dcm2niix(tmp_path):
    touch(tmp_path, "a/1.dcm", "a/2.dcm")
    with pytest.raises(InputError, match=r"2 dicom are there.*dcm2niix"):
        discover.find(tmp_path)


def test_rare_kinds_are_counted_together(tmp_path):
    touch(tmp_path, "p_T1w.nii", *(f"p_kind{n}.nii" for n in range(30)))
    found = discover.find(tmp_path, suffixes=["T1w"])
    assert sum(found.skipped.values()) == 30
    assert len(found.skipped) <= discover.KINDS_SHOWN + 1


# --------------------------------------------------------------------------------------------- links and names


def test_links_are_followed_when_asked_and_each_folder_once(tmp_path):
    root = tmp_path / "root"
    touch(tmp_path, "far/s/1.nii.gz", "far/2.nii.gz")
    touch(root, "z/3.nii.gz")
    (root / "b").symlink_to(tmp_path / "far")
    (root / "c").symlink_to(tmp_path / "far" / "s")
    (root / "a").symlink_to(root / "z")
    (root / "z" / "up").symlink_to(root)
    (tmp_path / "far" / "s" / "loop").symlink_to(tmp_path / "far")
    (root / "file.nii.gz").symlink_to(tmp_path / "far" / "2.nii.gz")
    found = discover.find(root, follow_links=True)
    assert [scan.source for scan in found.scans] == ["b/2.nii.gz", "b/s/1.nii.gz", "file.nii.gz", "z/3.nii.gz"]
    assert not any(scan.code for scan in found.scans)
    codes = {scan.source: scan.code for scan in discover.find(root).scans}
    assert codes == {"b": "outside_root", "c": "outside_root", "file.nii.gz": "outside_root", "z/3.nii.gz": ""}
    assert discover.find(root).skipped == {"folder link": 2}  # a and z/up


def test_what_the_reader_must_name_is_handed_on(tmp_path):
    """git-annex links with and without content, a git-lfs pointer, an empty file, a link to itself."""
    touch(tmp_path, ".git/annex/objects/K1/K1.nii.gz")
    (tmp_path / "there.nii.gz").symlink_to(".git/annex/objects/K1/K1.nii.gz")
    (tmp_path / "absent.nii.gz").symlink_to(".git/annex/objects/K2/K2.nii.gz")
    (tmp_path / "lfs.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "empty.nii").touch()
    (tmp_path / "self.nii").symlink_to("self.nii")
    scans = discover.find(tmp_path).scans
    assert not any(scan.code for scan in scans)
    codes = {}
    for scan in scans:
        with pytest.raises(nifti.Refused) as refused:
            nifti.read(scan.path)
        codes[scan.id] = refused.value.code
    assert codes == {
        "there": "not_nifti", "absent": "pointer_file", "lfs": "pointer_file", "empty": "empty_file",
        "self": "unreadable",
    }  # fmt: skip


@pytest.mark.parametrize("dataset", [False, True])
def test_names_that_no_file_can_hold_are_refused(tmp_path, dataset):
    anat = tmp_path / "sub-1" / "anat"
    anat.mkdir(parents=True)
    if dataset:
        (tmp_path / "dataset_description.json").write_text("{}")
    touch(anat, "sub-1_acq-é\u3000x_T1w.nii", "sub-1_acq-a\nb_T1w.nii", "sub-1_acq-\x1b_T1w.nii")
    (anat / os.fsdecode(b"sub-1_acq-\xff_T1w.nii")).write_bytes(b"x")
    scans = discover.find(tmp_path).scans
    assert [scan.code for scan in scans].count("bad_name") == 3
    assert [scan.source for scan in scans if not scan.code] == ["sub-1/anat/sub-1_acq-é\u3000x_T1w.nii"]
    assert len({scan.source for scan in scans}) == 4
    for scan in scans:
        json.dumps([scan.id, scan.source, scan.sentence], ensure_ascii=False).encode()
        assert "\n" not in scan.id + scan.source
        assert scan.path.exists()


def test_an_unfetched_annex_file_below_a_subfolder_is_left_to_the_reader(tmp_path):
    """Its link leads to .git/annex above the folder that was given; nothing is there, so nothing can leak."""
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01" / "a.nii.gz").symlink_to("../.git/annex/objects/aa/bb/KEY/KEY")
    assert [scan.code for scan in discover.find(tmp_path / "sub-01").scans] == [""]
