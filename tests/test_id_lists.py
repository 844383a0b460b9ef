"""Ids of one person in many ways of writing, and who was pretrained on."""

from pathlib import Path

import numpy as np
import pytest
from conftest import run_brainscale, write_tiny_store
from hypothesis import given
from hypothesis import strategies as st

from brainscale import contamination, id_lists
from brainscale.cli import main
from brainscale.config import Config
from brainscale.run_folder import split_rows
from brainscale.settings import InputError, load
from brainscale.stores import open_stores


@pytest.mark.parametrize(
    ("cohort", "ways"),
    [
        (
            "ADNI",
            ["002_S_0295", "sub-ADNI002S0295", "002S0295", "sub-002S0295", "1/sub-002_s_0295", "ADNI_002_S_0295_MR"],
        ),
        ("NACC", ["NACC123456", "sub-NACC123456", "nacc123456"]),
        ("OASIS", ["OAS30001", "OAS30001_MR_d0129", "sub-OAS30001", "OAS3_0001"]),
        ("UCSF-PDGM", ["UCSF-PDGM-0004", "UCSF-PDGM-004", "UCSF-PDGM-0004_nifti", "sub-UCSFPDGM0004"]),
        ("BraTS", ["BraTS-GLI-00005-100", "BraTS-GLI-00005-101", "brats-gli-00005"]),
        ("IXI", ["IXI002-Guys-0828-T1", "sub-IXI002"]),
        ("ABIDE", ["0050002", "sub-0050002"]),
        ("", ["patient-07a", "Patient_07A", "sub-patient07a"]),
    ],
)
def test_ways_of_writing_are_one_subject(cohort, ways):
    found = {id_lists.subject_name(way) for way in ways}
    assert len(found) == 1 and found.pop()[0] == cohort


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 9999)), min_size=2, max_size=9, unique=True))
def test_different_subjects_stay_different(numbers):
    assert len({id_lists.subject_name(f"{a:03d}_S_{b:04d}") for a, b in numbers}) == len(numbers)
    assert len({id_lists.subject_name(f"NACC{a:03d}{b % 1000:03d}") for a, b in numbers}) == len(
        {(a, b % 1000) for a, b in numbers}
    )


def test_different_cohorts_stay_different():
    ids = [
        "OAS10001",
        "OAS20001",
        "OAS30001",
        "BraTS-GLI-00001",
        "BraTS-MET-00001",
        "IXI001",
        "NACC000001",
        "001_S_0001",
    ]
    assert len({id_lists.subject_name(text) for text in ids}) == len(ids)
    assert id_lists.subject_name("50002", "ABIDE") == id_lists.subject_name("0050002")
    assert id_lists.subject_name("Unknown") == id_lists.subject_name("n/a") == ("", "")


@pytest.mark.parametrize(
    ("name", "cohort"),
    [
        ("abide_downtest_ids.csv", "ABIDE"), ("PPMI_T1w_test.csv", "PPMI"), ("scan_pretrain_ids.csv", "NACC"),
        ("NACC_AD_T1w_test.csv", "NACC"), ("ucsf_multiclass_test_uids.csv", "UCSF-PDGM"),
        ("oasis3_pretrain_ids.csv", "OASIS"),
        ("list.csv", ""), ("adni_and_ppmi.csv", ""), ("scanner.csv", ""), ("brats24_pretrain_ids.csv", "BraTS"),
    ],
)  # fmt: skip
def test_a_files_name_says_the_cohort(name, cohort):
    assert id_lists.cohort_of_file(Path(name)) == cohort
    assert id_lists.cohort_of_file(Path("ABIDE") / "test.csv") == "ABIDE"


def test_scans_are_compared_by_image_number_or_name():
    assert id_lists.scan_name("ADNI_002_S_0295_MR_MT1__N3m_Br_2012_S172268_I349805.nii.gz") == "I349805"
    assert id_lists.scan_name("I349805") == "I349805"
    assert id_lists.scan_name("UCSF-PDGM-0448_T1.nii.gz") == id_lists.scan_name("UCSF-PDGM-0448_T1")
    assert id_lists.scan_name("sub-01_T1w") != id_lists.scan_name("sub-01_T2w")
    assert id_lists.scan_name("n/a") == ""


@pytest.mark.parametrize(
    "header",
    ["subject_id,scan_uid", "Subject,Image Data ID", "SUBJECT_ID,MR_ID", "NACCID,scan_uid", "participant_id,scan"],
)
def test_columns_are_found_by_the_names_that_are_in_use(tmp_path, header):
    (tmp_path / "l.csv").write_text(f"\ufeff{header},label\n002_S_0295,I1234,1\nUnknown,I1235,0\n", encoding="utf-8")
    found = id_lists.read_list(tmp_path / "l.csv")
    assert found.subjects.tolist() == ["002_S_0295", ""] and found.scans.tolist() == ["I1234", "I1235"]
    assert found.column("label").tolist() == ["1", "0"] and found.column("split") is None
    (tmp_path / "l.tsv").write_text(
        (tmp_path / "l.csv").read_text(encoding="utf-8").replace(",", "\t"), encoding="utf-8"
    )
    assert id_lists.read_list(tmp_path / "l.tsv").subjects.tolist() == ["002_S_0295", ""]


def test_what_is_no_list_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("age,dx\n1,2\n")
    with pytest.raises(InputError, match="columns age, dx, none of which"):
        id_lists.read_list(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"subject_id\n\xff\xfe\n")
    with pytest.raises(InputError, match="UTF-8"):
        id_lists.read_list(tmp_path / "b.csv")
    with pytest.raises(InputError, match="no such list"):
        id_lists.read_list(tmp_path / "c.csv")


# ------------------------------------------------------------------------------------------------ contamination


def a_list(path: Path, *rows: str, header: str = "subject_id,scan_uid") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def report(*arguments: Path | str, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main(["splits", "contamination", *map(str, arguments)])
    assert (left.value.code or 0) == code
    printed = capsys.readouterr()
    return printed.err if code == 2 else printed.out


def test_test_subjects_in_a_pretraining_list_are_counted_by_cohort(tmp_path, capsys):
    old = a_list(tmp_path / "pre.csv", "002_S_0295,I1111", "002_S_0295,I1112", "OAS30001,", "NACC123456,I3333")
    new = a_list(
        tmp_path / "test.csv", "sub-ADNI002S0295,I1112", "sub-ADNI002S0295,I9999", "003_S_0001,I8888",
        "OAS30001_MR_d0129,", "OAS30002,", ",I3333",
    )  # fmt: skip
    text = report(old, new, "--out", tmp_path / "seen.csv", code=4, capsys=capsys)
    assert "seen         2 of 4 test subjects (50 %), 2 test scans themselves" in text
    assert "ADNI       1 of 2 (50 %)" in text and "OASIS      1 of 2 (50 %)" in text
    assert "1 test scan(s) name no subject" in text
    header, *rows = (tmp_path / "seen.csv").read_text().splitlines()
    assert header == "subject_id,scan_uid,cohort,subject_seen,scan_seen"
    assert rows == [
        "sub-ADNI002S0295,I1112,ADNI,1,1", "sub-ADNI002S0295,I9999,ADNI,1,0", "OAS30001_MR_d0129,,OASIS,1,0",
        ",I3333,,0,1",
    ]  # fmt: skip


def test_lists_that_share_nobody_are_clean_and_say_what_names_cannot_show(tmp_path, capsys):
    text = report(
        a_list(tmp_path / "a.csv", "OAS30001,x"), a_list(tmp_path / "b.csv", "NACC123456,y"), code=0, capsys=capsys
    )
    assert "seen         0 of 1 test subjects (0 %)" in text and "the lists share no cohort" in text


def test_bare_numbers_are_told_apart_by_the_files_names(tmp_path, capsys):
    abide = a_list(tmp_path / "abide_pretrain.csv", "50028,")
    assert "0 of 1" in report(abide, a_list(tmp_path / "ppmi_test.csv", "50028,"), code=0, capsys=capsys)
    text = report(abide, a_list(tmp_path / "list.csv", "50028,"), code=4, capsys=capsys)
    assert "equal numbers may be different people" in text
    assert "1 of 1" in report(abide, a_list(tmp_path / "t.csv", "sub-0050028,"), code=4, capsys=capsys)


def test_only_the_test_lines_of_a_split_are_tested(tmp_path, capsys):
    old = a_list(tmp_path / "pre.csv", "NACC000001,")
    header = "subject_id,scan_uid,split"
    new = a_list(tmp_path / "t.csv", "NACC000001,,train", "NACC000002,,test", header=header)
    assert "0 of 1" in report(old, new, code=0, capsys=capsys)
    assert "1 of 1" in report(old, a_list(new, "NACC000001,,test", header=header), code=4, capsys=capsys)


def test_a_store_is_a_list_of_its_scans(tiny_store, tmp_path, capsys):
    new = a_list(tmp_path / "t.csv", "sub-03,", "sub-99,")
    text = report(tiny_store, new, code=4, capsys=capsys)
    assert "5 subjects, 10 scans" in text and "1 of 2 (50 %)" in text
    assert "1 of 5 test subjects" in report(a_list(tmp_path / "p.csv", "Sub-03,"), tiny_store, code=4, capsys=capsys)


def test_hashed_names_cannot_be_compared_with_names(tmp_path, capsys):
    def hide(record):
        record["subject"] = f"{record['row'] // 2:020x}"

    store = write_tiny_store(tmp_path / "s", 4, change=hide)
    text = report(a_list(tmp_path / "p.csv", "sub-01,"), store, code=2, capsys=capsys)
    assert "keyed hashes" in text
    assert "2 of 2" in report(store, store, code=4, capsys=capsys)


@pytest.mark.slow
def test_a_run_has_seen_its_training_subjects_alone(unbroken, tiny_store, capsys):
    config = load(Config, unbroken / "config.toml")
    stores = open_stores([tiny_store])
    trained, held = split_rows(stores, config)
    subjects = stores.column("subject")
    expected = set(subjects[np.searchsorted(stores.rows, trained)])
    found = contamination.compare(
        contamination.read_source(unbroken, "pretraining"), contamination.read_source(tiny_store)
    )
    assert set(found.test.subjects[found.seen]) == expected and len(held) > 0
    assert not found.seen.all()
    text = report(unbroken, tiny_store, code=4, capsys=capsys)
    assert f"{len(expected)} of 5 test subjects" in text
    with pytest.raises(InputError, match="run folder"):
        contamination.read_source(unbroken)
    with pytest.raises(InputError, match="neither a finished store nor a run folder"):
        contamination.read_source(unbroken.parent)


def test_the_command_is_there():
    assert "contamination" in run_brainscale("splits", "--help").stdout
