"""Which scans a source holds: BIDS, any folder, tables; ids, participants, and what must not be followed."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brainscale.config import InputError
from brainscale_data_prep import discover


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


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, kind):
    rows = [
        {
            "path": "x/2.nii.gz",
            "id": "two",
            "subject": "S",
            "session": "",
            "contrast": "T1w",
            "age": "40",
            "phone": "1",
        },
        {"path": "1.nii", "id": "", "subject": "", "session": "v1", "contrast": "", "age": "", "phone": "2"},
        {"path": "../elsewhere.nii", "id": "", "subject": "", "session": "", "contrast": "", "age": "", "phone": "3"},
        {"path": "/etc/passwd", "id": "p", "subject": "", "session": "", "contrast": "", "age": "", "phone": "4"},
    ]
    table = tmp_path / f"scans.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    else:
        sep = "," if kind == "csv" else "\t"
        table.write_text("\n".join([sep.join(rows[0]), *(sep.join(row.values()) for row in rows)]) + "\n")
    scans = {scan.source: scan for scan in discover.find(table).scans}
    two, one = scans["x/2.nii.gz"], scans["1.nii"]
    assert (two.id, two.subject, two.contrast, two.participant) == ("two", "S", "T1w", {"age": "40"})
    assert (one.id, one.subject, one.session, one.participant) == ("1", "1", "v1", {})
    assert two.path == tmp_path / "x/2.nii.gz"
    assert [scans[s].code for s in ("../elsewhere.nii", "/etc/passwd")] == ["outside_root", "outside_root"]


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
