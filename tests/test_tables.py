"""Tables as a source: columns, masks, paths that lead outside, and cells that are missing or too many."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brainscale.settings import InputError
from brainscale_data_prep import discover


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


def test_a_table_names_masks(tmp_path):
    (tmp_path / "t.csv").write_text("path,mask\n1.nii,m/1.nii\n2.nii,n/a\n3.nii,../3.nii\n")
    scans = discover.find(tmp_path / "t.csv").scans
    assert [(s.mask, s.mask_source, s.code) for s in scans[:2]] == [
        (tmp_path / "m/1.nii", "m/1.nii", ""), (None, "", ""),
    ]  # fmt: skip
    assert (scans[2].code, scans[2].sentence.split(" leads")[0]) == ("outside_root", "its mask")
    assert all(scan.mask is None for scan in discover.find(tmp_path / "t.csv", mask_pipeline="none").scans)


def test_a_table_may_lead_outside_when_asked_and_subjects_stay_apart(tmp_path):
    (tmp_path / "lists").mkdir()
    table = tmp_path / "lists" / "t.csv"
    table.write_text(f"path\n{tmp_path}/data/p1/a.nii\n../data/p2/b.nii\n../data/c.nii\n../data/sub-9_T1w.nii\nd.nii\n")
    assert [scan.code for scan in discover.find(table).scans].count("outside_root") == 4
    scans = {scan.path.name: scan for scan in discover.find(table, follow_links=True).scans}
    assert not any(scan.code for scan in scans.values())
    assert scans["a.nii"].path == tmp_path / "data/p1/a.nii"
    assert {name: scan.subject for name, scan in scans.items()} == {
        "a.nii": "p1", "b.nii": "p2", "c.nii": "../data/c", "sub-9_T1w.nii": "sub-9", "d.nii": "d",
    }  # fmt: skip


def test_a_table_is_found_through_a_path_with_dots(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "t.csv").write_text("path\n1.nii\n")
    monkeypatch.chdir(tmp_path / "here")
    assert [scan.code for scan in discover.find(Path("../t.csv")).scans] == [""]


def test_a_torn_table_is_an_error(tmp_path):
    (tmp_path / "t.csv").write_text("path,age\n1.nii,3\n2.nii,4,surplus\n")
    with pytest.raises(InputError, match="row 2 has more cells"):
        discover.find(tmp_path / "t.csv")


def test_missing_numbers_of_a_parquet_table_are_left_out(tmp_path):
    pq.write_table(pa.table({"path": ["1.nii", "2.nii"], "age": [float("nan"), 4.5]}), tmp_path / "t.parquet")
    assert [scan.participant for scan in discover.find(tmp_path / "t.parquet").scans] == [{}, {"age": "4.5"}]
