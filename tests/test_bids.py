"""What BIDS datasets give: selection by suffix and entity, joined tables, brain masks, real trees."""

import json
import tarfile

import pytest

from brainscale.settings import InputError
from brainscale_data_prep import discover


def dataset(root, *names):
    """A dataset of files without meaning."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.8.0"}))
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows))


def masks(root, **arguments):
    return {scan.id: scan.mask_source for scan in discover.find(root, **arguments).scans}


# --------------------------------------------------------------------------------------------- selection


def test_suffixes_and_entities_select(tmp_path):
    root = dataset(
        tmp_path,
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-1/anat/sub-1_space-MNI_res-1_desc-preproc_T1w.nii.gz",
        "sub-1/anat/sub-1_run-1_T2starw.nii.gz",
        "sub-1/anat/sub-1_run-2_T2starw.nii.gz",
        "sub-1/func/sub-1_task-x_T1w.nii.gz",
        "stray.nii.gz",
    )
    found = discover.find(root)
    assert [scan.id for scan in found.scans] == ["sub-1_T1w", "sub-1_space-MNI_res-1_desc-preproc_T1w"]
    assert found.skipped == {"T2starw": 2, "T1w": 1, "stray": 1}
    assert [scan.id for scan in discover.find(root, suffixes=["T2starw"]).scans] == [
        "sub-1_run-1_T2starw", "sub-1_run-2_T2starw",
    ]  # fmt: skip
    native = discover.find(root, entities={"space": ""})
    assert [scan.id for scan in native.scans] == ["sub-1_T1w"]
    assert native.skipped["T1w with space"] == 1
    there = discover.find(root, entities={"space": "MNI", "res": "1"})
    assert [scan.id for scan in there.scans] == ["sub-1_space-MNI_res-1_desc-preproc_T1w"]
    assert there.skipped["T1w without space-MNI"] == 1
    with pytest.raises(InputError, match=r"holds no scans.*3 T1w.*select others with --suffix"):
        discover.find(root, suffixes=["T2w"])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("sub-0.1/anat/sub-0.1_T1w.nii", "sub-0.1 has other characters"),
        ("sub-1/ses-2020-01-02/anat/sub-1_ses-2020-01-02_T1w.nii", "ses-2020-01-02 has other characters"),
        ("sub-1/anat/sub-2_T1w.nii", "its folder says sub-1"),
        ("sub-1/ses-a/anat/sub-1_ses-b_T1w.nii", "its folder says ses-a"),
        ("sub-1/anat/T1w.nii", "its folder says sub-1"),
    ],
)
def test_labels_that_would_name_the_wrong_subject_are_refused(tmp_path, source, words):
    root = dataset(tmp_path, source, "sub-2/anat/sub-2_desc-brain_mask.nii", "sub-3/anat/sub-3_T1w.nii")
    scans = {scan.source: scan for scan in discover.find(root).scans}
    assert scans[source].code == "bad_name"
    assert words in scans[source].sentence
    assert scans[source].mask is None
    assert scans["sub-3/anat/sub-3_T1w.nii"].code == ""


def test_linked_subjects_are_walked_when_asked(tmp_path):
    far = dataset(tmp_path / "far", "sub-2/anat/sub-2_T1w.nii", "sub-2/anat/sub-2_desc-brain_mask.nii")
    root = dataset(tmp_path / "root", "sub-1/anat/sub-1_T1w.nii")
    (root / "sub-2").symlink_to(far / "sub-2")
    assert [(s.source, s.code) for s in discover.find(root).scans] == [
        ("sub-1/anat/sub-1_T1w.nii", ""), ("sub-2", "outside_root"),
    ]  # fmt: skip
    assert masks(root, follow_links=True) == {"sub-1_T1w": "", "sub-2_T1w": "sub-2/anat/sub-2_desc-brain_mask.nii"}


# --------------------------------------------------------------------------------------------- people


@pytest.fixture
def visits(tmp_path):
    root = dataset(
        tmp_path,
        "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii",
        "sub-1/ses-a/anat/sub-1_ses-a_T2w.nii",
        "sub-1/ses-b/anat/sub-1_ses-b_T1w.nii",
        "sub-2/anat/sub-2_T1w.nii",
    )
    write(root / "participants.tsv", ("participant_id", "age", "site", "sex"), ("1", "30", "X", "F"))
    write(root / "sub-1/sub-1_sessions.tsv", ("session_id", "age", "site"), ("a", "31", "n/a"), ("ses-b", "32", "Y"))
    write(
        root / "sub-1/ses-a/sub-1_ses-a_scans.tsv",
        ("filename", "acq_time", "scanner", "age"),
        ("anat/sub-1_ses-a_T1w.nii", "1990-01-01", "Prisma", "31.5"),
        ("func/sub-1_ses-a_bold.nii", "1990-01-01", "Skyra", "n/a"),
    )
    write(root / "sub-2/sub-2_scans.tsv", ("filename", "scanner"), ("anat/sub-2_T1w.nii", "Trio"))
    return root


def test_the_most_specific_table_wins_and_only_allowed_columns_are_taken(visits):
    assert {scan.id: scan.participant for scan in discover.find(visits).scans} == {
        "sub-1_ses-a_T1w": {"age": "31.5", "site": "X", "sex": "F", "scanner": "Prisma"},
        "sub-1_ses-a_T2w": {"age": "31", "site": "X", "sex": "F"},
        "sub-1_ses-b_T1w": {"age": "32", "site": "Y", "sex": "F"},
        "sub-2_T1w": {"scanner": "Trio"},
    }
    named = {scan.id: scan.participant for scan in discover.find(visits, participant_columns=["Acq_Time"]).scans}
    assert named["sub-1_ses-a_T1w"] == {"acq_time": "1990-01-01"}
    assert named["sub-1_ses-b_T1w"] == {}


@pytest.mark.parametrize(
    ("table", "rows", "words"),
    [
        ("sub-1/sub-1_sessions.tsv", (("visit", "age"), ("a", "3")), "without session_id .columns: visit, age"),
        ("sub-2/sub-2_scans.tsv", (("filename", "age"), ("x", "3"), ("x", "4")), "describes x twice"),
        ("participants.tsv", (("age",), ("4",)), "without participant_id"),
    ],
)
def test_a_table_that_cannot_be_joined_is_an_error(visits, table, rows, words):
    write(visits / table, *rows)
    with pytest.raises(InputError, match=words):
        discover.find(visits)


def test_a_table_that_is_a_link_without_content_or_leads_outside_is_an_error(visits, tmp_path_factory):
    table = visits / "participants.tsv"
    table.unlink()
    table.symlink_to(".git/annex/objects/K/K.tsv")
    with pytest.raises(InputError, match=r"cannot be read .No such file"):
        discover.find(visits)
    far = tmp_path_factory.mktemp("far") / "p.tsv"
    write(far, ("participant_id", "age"), ("2", "50"))
    table.unlink()
    table.symlink_to(far)
    with pytest.raises(InputError, match="outside the source"):
        discover.find(visits)
    scans = discover.find(visits, follow_links=True).scans
    assert scans[-1].participant == {"age": "50", "scanner": "Trio"}


# --------------------------------------------------------------------------------------------- masks


def test_masks_belong_to_the_same_entities_space_and_reference(tmp_path):
    prep = "derivatives/prep/sub-1/ses-a/anat/sub-1_ses-a"
    root = dataset(
        tmp_path,
        "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz",
        "sub-1/ses-a/anat/sub-1_ses-a_FLAIR.nii.gz",
        "sub-1/ses-a/anat/sub-1_ses-a_acq-fast_T1w.nii.gz",
        "sub-1/ses-b/anat/sub-1_ses-b_T2w.nii.gz",
        f"{prep}_desc-brain_mask.nii.gz",
        f"{prep}_desc-tumour_mask.nii.gz",
        f"{prep}_space-MNI_desc-brain_mask.nii.gz",
        f"{prep}_task-x_desc-brain_mask.nii.gz",
        "derivatives/prep/sub-1/ses-b/func/sub-1_ses-b_desc-brain_mask.nii.gz",
        "derivatives/prep/sub-1/ses-b/anat/sub-1_ses-b_label-brain_mask.nii.gz",
    )
    assert masks(root) == {
        "sub-1_ses-a_T1w": f"{prep}_desc-brain_mask.nii.gz",
        "sub-1_ses-a_FLAIR": "",
        "sub-1_ses-a_acq-fast_T1w": "",
        "sub-1_ses-b_T2w": "derivatives/prep/sub-1/ses-b/anat/sub-1_ses-b_label-brain_mask.nii.gz",
    }
    assert masks(root, suffixes=["FLAIR"]) == {"sub-1_ses-a_FLAIR": ""}
    assert discover.find(root).scans[1].mask == root / f"{prep}_desc-brain_mask.nii.gz"


def test_processed_contrasts_share_a_mask(tmp_path):
    root = dataset(
        tmp_path,
        "sub-1/anat/sub-1_desc-preproc_T1w.nii.gz",
        "sub-1/anat/sub-1_desc-preproc_T2w.nii.gz",
        "sub-1/anat/sub-1_space-MNI_res-1_desc-preproc_T2w.nii.gz",
        "sub-1/anat/sub-1_space-MNI_res-2_desc-preproc_T2w.nii.gz",
        "sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "sub-1/anat/sub-1_space-MNI_res-2_desc-brain_mask.nii.gz",
    )
    assert masks(root) == {
        "sub-1_desc-preproc_T1w": "sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "sub-1_desc-preproc_T2w": "sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "sub-1_space-MNI_res-1_desc-preproc_T2w": "",
        "sub-1_space-MNI_res-2_desc-preproc_T2w": "sub-1/anat/sub-1_space-MNI_res-2_desc-brain_mask.nii.gz",
    }


def test_masks_of_several_pipelines_are_not_guessed(tmp_path):
    root = dataset(
        tmp_path,
        "sub-1/anat/sub-1_T1w.nii",
        "sub-2/anat/sub-2_T1w.nii",
        "sub-2/anat/sub-2_desc-brain_mask.nii",
        *(f"derivatives/{name}/sub-{n}/anat/sub-{n}_desc-brain_mask.nii" for name in ("prep", "bet") for n in (1, 2)),
    )
    with pytest.raises(InputError, match=r"sub-1_T1w.nii has several brain masks .*/bet/.*/prep/.*--masks PIPELINE"):
        discover.find(root)
    assert masks(root, mask_pipeline="bet") == {
        f"sub-{n}_T1w": f"derivatives/bet/sub-{n}/anat/sub-{n}_desc-brain_mask.nii" for n in (1, 2)
    }
    assert set(masks(root, mask_pipeline="none").values()) == {""}
    with pytest.raises(InputError, match=r"no derivatives/fsl .*there is: bet, prep"):
        discover.find(root, mask_pipeline="fsl")
    (root / "sub-1/anat/sub-1_desc-brain_mask.nii").write_bytes(b"x")
    assert masks(root) == {f"sub-{n}_T1w": f"sub-{n}/anat/sub-{n}_desc-brain_mask.nii" for n in (1, 2)}


def test_masks_outside_the_source_are_not_taken_unless_asked(tmp_path):
    far = dataset(tmp_path / "far", "m.nii", "sub-2/anat/sub-2_desc-brain_mask.nii")
    root = dataset(tmp_path / "root", "sub-1/anat/sub-1_T1w.nii", "sub-2/anat/sub-2_T1w.nii")
    (root / "sub-1/anat/sub-1_desc-brain_mask.nii").symlink_to(far / "m.nii")
    (root / "derivatives").mkdir()
    (root / "derivatives/prep").symlink_to(far)
    found = discover.find(root)
    assert [scan.mask for scan in found.scans] == [None, None]
    assert found.skipped == {"mask": 1, "mask outside the source": 1, "folder link": 1}
    assert masks(root, follow_links=True) == {
        "sub-1_T1w": "sub-1/anat/sub-1_desc-brain_mask.nii",
        "sub-2_T1w": "derivatives/prep/sub-2/anat/sub-2_desc-brain_mask.nii",
    }


# --------------------------------------------------------------------------------------------- real trees


@pytest.fixture(scope="module")
def trees(real_data, tmp_path_factory):
    """Datasets of the BIDS examples collection, files without content."""
    archive = real_data / "bids_trees" / "bids_examples_subset.tar.gz"
    if not archive.is_file():
        pytest.skip(f"no BIDS trees: {archive} is not there")
    folder = tmp_path_factory.mktemp("bids_trees")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    ("name", "num_scans", "skipped"),
    [
        ("synthetic", 10, {"bold": 30}),
        ("ds005", 32, {"bold": 48}),
        ("pet001", 1, {"pet": 1}),
        ("pheno004", 2, {}),
        ("ds000001-fmriprep", 8, {"bold": 24, "boldref": 12, "dseg": 40, "mask": 20, "probseg": 24}),
    ],
)
def test_real_trees_are_counted_exactly(trees, name, num_scans, skipped):
    found = discover.find(trees / name)
    assert (len(found.scans), found.skipped) == (num_scans, skipped)
    assert not any(scan.code for scan in found.scans)
    assert len({scan.id for scan in found.scans}) == num_scans


def test_real_trees_without_default_contrasts_say_what_is_there(trees):
    for name, words in (("volume_timing", "6 bold are there"), ("qmri_mp2rage", "4 MP2RAGE, .*1 UNIT1")):
        with pytest.raises(InputError, match=words):
            discover.find(trees / name)
    assert [scan.id for scan in discover.find(trees / "qmri_mp2rage", suffixes=["UNIT1"]).scans] == ["sub-1_UNIT1"]
    parts = discover.find(trees / "qmri_mp2rage", suffixes=["MP2RAGE"], entities={"part": "mag"})
    assert [scan.id for scan in parts.scans] == ["sub-1_inv-1_part-mag_MP2RAGE", "sub-1_inv-2_part-mag_MP2RAGE"]


def test_real_fmriprep_masks_are_found_in_both_spaces(trees):
    found = masks(trees / "ds000001-fmriprep")
    space = "space-MNI152NLin2009cAsym_res-2"
    assert found == {
        f"sub-{n}{part}_desc-preproc_T1w": f"sub-{n}/anat/sub-{n}{part}_desc-brain_mask.nii.gz"
        for n in (10, 11, 13, 16)
        for part in ("", f"_{space}")
    }
    assert len(masks(trees / "ds000001-fmriprep", entities={"space": "MNI152NLin2009cAsym"})) == 4


def test_real_tables_are_joined(trees):
    columns = ["age", "sex", "systolic_blood_pressure"]
    people = {
        scan.id: scan.participant for scan in discover.find(trees / "synthetic", participant_columns=columns).scans
    }
    assert people["sub-04_ses-01_T1w"] == {"age": "21", "sex": "F", "systolic_blood_pressure": "111"}
    assert people["sub-04_ses-02_T1w"] == {"age": "21", "sex": "F", "systolic_blood_pressure": "115"}
    timed = {s.id: s.participant for s in discover.find(trees / "synthetic", participant_columns=["acq_time"]).scans}
    assert timed["sub-04_ses-02_T1w"] == {"acq_time": "1847-10-17T10:15:19"}
    assert all("acq_time" not in scan.participant for scan in discover.find(trees / "synthetic").scans)
