"""Labels of scans: what is a class, what is left out and why, and the shipped tasks on synthetic tables."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tiny_store

from brainscale.settings import InputError
from brainscale.splits import make_splits
from brainscale.store import Store
from brainscale.task_settings import Task, canonical, load_tasks
from brainscale.tasks import labelled, session_key

TASKS = Path(__file__).parent.parent / "configs" / "tasks"


def table_store(path: Path, rows: list[dict[str, Any]]) -> Store:
    """A tiny store with one scan for each row: participant columns, and what its other keys change in the record."""

    def change(record: dict[str, Any]) -> None:
        row = rows[record["row"]]
        record["participant"] = {name: str(value) for name, value in row.items() if name not in record}
        record |= {name: value for name, value in row.items() if name in record}

    return Store(write_tiny_store(path, len(rows), change=change))


def people(count: int, **columns: Any) -> list[dict[str, Any]]:
    """One scan for each subject; a column is a list that is repeated."""
    return [
        {"subject": f"s{n:03d}", "id": f"s{n:03d}_T1w"} | {k: v[n % len(v)] for k, v in columns.items()}
        for n in range(count)
    ]


def task(**settings: Any) -> Task:
    return Task.model_validate({"name": "t", "kind": "binary", "column": "dx"} | settings)


def test_values_become_classes_in_the_order_of_labels(tmp_path):
    store = table_store(tmp_path / "s", people(6, dx=["AD", "NC", " 1.0"]))
    found = labelled(task(labels={"NC": ["NC"], "AD": ["AD", 1]}), store)
    assert found.classes == ("NC", "AD")
    assert found.y.tolist() == [1, 0, 1, 1, 0, 1]
    assert found.class_counts() == {"NC": 2, "AD": 4}
    swapped = labelled(task(labels={"AD": ["AD", 1], "NC": ["NC"]}), store)
    assert swapped.y.tolist() == [0, 1, 0, 0, 1, 0]


def test_what_is_left_out_is_counted_by_its_first_reason(tmp_path):
    rows = people(8, dx=["NC", "AD", "n/a", "", "odd", "NaN", "NC", "AD"], contrast=["T1w"] * 7 + ["FLAIR"])
    store = table_store(tmp_path / "s", rows)
    found = labelled(task(labels={"NC": ["NC"], "AD": ["AD"]}, where={"contrast": ["T1w"]}), store)
    assert found.left_out == {"another contrast": 1, "no dx": 3, "dx is in no class": 1}
    assert len(found.rows) + sum(found.left_out.values()) == 8
    assert found.ids.tolist() == ["s000_T1w", "s001_T1w", "s006_T1w"]
    with pytest.raises(InputError, match=r'"odd" of 1 scan'):
        labelled(task(labels={"NC": ["NC"], "AD": ["AD"]}, unlisted="refuse"), store)


def test_where_takes_participant_columns_and_numbers(tmp_path):
    store = table_store(tmp_path / "s", people(8, dx=["a", "b"], cause=["1", "1.0", "8", "0"]))
    assert labelled(task(where={"cause": [1, 8]}), store).ids.tolist() == [
        f"s{n:03d}_T1w" for n in (0, 1, 2, 4, 5, 6)
    ]  # fmt: skip
    with pytest.raises(InputError, match='no scan has cause "7"'):
        labelled(task(where={"cause": [7]}), store)
    with pytest.raises(InputError, match="has no column"):
        labelled(task(where={"effect": [7]}), store)


def test_a_regression_reads_numbers(tmp_path):
    store = table_store(tmp_path / "s", people(5, age=["61.5", "n/a", "90+", "70", "inf"]))
    found = labelled(task(kind="regression", column="AGE"), store)
    assert found.y.tolist() == [61.5, 70.0] and found.classes == ()
    assert found.left_out == {"no AGE": 1, "AGE is not a number": 2}
    with pytest.raises(InputError, match="90"):
        labelled(task(kind="regression", column="age", unlisted="refuse"), store)


def visits(*seen: tuple[str, str, str]) -> list[dict[str, Any]]:
    return [{"id": f"{s}_{visit}", "subject": s, "session": visit, "dx": dx} for s, visit, dx in seen]


def test_a_subject_of_two_classes_is_refused_unless_the_task_says_what_to_do(tmp_path):
    rows = visits(
        ("a", "m12", "AD"), ("a", "m6", "NC"), ("a", "m6", "NC"), ("b", "m0", "NC"), ("c", "m0", "AD"), ("d", "", "AD")
    )
    rows[2]["id"] = "a_again"
    store = table_store(tmp_path / "s", rows)
    labels = {"NC": ["NC"], "AD": ["AD"]}
    with pytest.raises(InputError, match='subject a has scans of the classes "NC", "AD"'):
        labelled(task(labels=labels), store)

    def subjects(conflict: str) -> tuple[list[str], dict[str, int]]:
        found = labelled(task(labels=labels, conflict=conflict), store)
        return found.ids.tolist(), found.left_out

    assert subjects("leave_out") == (["b_m0", "c_m0", "d_"], {"subject of several classes": 3})
    first, left = subjects("first_session")
    assert "a_m6" in first and "a_again" in first and "a_m12" not in first
    assert left == {"another class than in the first session": 1}
    last, left = subjects("last_session")
    assert "a_m12" in last and left == {"another class than in the last session": 2}


def test_two_classes_in_the_deciding_session_are_refused(tmp_path):
    rows = visits(("a", "m0", "NC"), ("b", "m0", "AD"), ("c", "m0", "NC"), ("c", "m0", "AD"))
    rows[3]["id"] = "c_again"
    with pytest.raises(InputError, match="in one session"):
        labelled(task(conflict="last_session"), table_store(tmp_path / "s", rows))


def test_sessions_sort_by_number():
    names = ["m12", "m6", "", "2010-01-02", "2009-12-31", "m6b"]
    assert sorted(names, key=session_key) == ["", "2009-12-31", "2010-01-02", "m6", "m6b", "m12"]


def test_equal_voxels_join_subjects_through_others(tmp_path):
    rows = people(6, dx=["x", "y"])
    for first, second in ((0, 1), (2, 3)):  # s0 = s1 and s2 = s3
        rows[second]["voxels_xxh3_128"] = rows[first]["voxels_xxh3_128"] = f"{first}"
    rows += [{"id": "more", "subject": "s001", "dx": "y", "voxels_xxh3_128": "9"},
             {"id": "more2", "subject": "s003", "dx": "y", "voxels_xxh3_128": "9"}]  # fmt: skip
    found = labelled(task(), table_store(tmp_path / "s", rows))
    groups = dict(zip(found.subjects.tolist(), found.groups.tolist()))
    assert groups == {"s000": "s000", "s001": "s000", "s002": "s000", "s003": "s000", "s004": "s004", "s005": "s005"}


def test_scans_without_a_subject_are_subjects(tmp_path):
    rows = people(4, dx=["x", "y"])
    rows[3]["subject"] = ""
    assert labelled(task(), table_store(tmp_path / "s", rows)).subjects.tolist() == ["s000", "s001", "s002", "s003_T1w"]


def test_sites_come_from_the_named_column_else_site_else_scanner(tmp_path):
    both = table_store(tmp_path / "a", people(4, dx=["x", "y"], site=["N", "n/a"], scanner=["A"]))
    assert labelled(task(), both).sites.tolist() == ["N", "", "N", ""]
    assert set(labelled(task(site_column="Scanner"), both).sites) == {"A"}
    assert set(labelled(task(), table_store(tmp_path / "b", people(4, dx=["x", "y"]))).sites) == {""}
    with pytest.raises(InputError, match="--participants centre"):
        labelled(task(site_column="centre"), both)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": {"a": ["x"]}}, "2 labels"),
        ({"labels": {"a": ["x", "1"], "b": [1.0]}}, '"1" is named twice'),
        ({"kind": "regression", "labels": {"a": ["x"], "b": ["y"]}}, "no labels"),
        ({"name": "../x"}, "pattern"),
        ({"split": {"kind": "file"}}, "split.file or split.parts"),
        ({"split": {"kind": "holdout", "file": "x.csv"}}, "split.file or split.parts"),
        ({"collumn": "x"}, "Extra inputs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        task(**settings)


def test_columns_that_cannot_be_labels_are_refused(tmp_path):
    store = table_store(tmp_path / "s", people(6, dx=["x", "y", "z"]))
    with pytest.raises(InputError, match=r'takes a column of 2 values, dx has 3 .*"x", "y", "z"'):
        labelled(task(), store)
    with pytest.raises(InputError, match=r'no scan left is of class "b" .*"x", "y", "z"'):
        labelled(task(labels={"a": ["x"], "b": ["B"]}), store)
    with pytest.raises(InputError, match=r'participant column "group".*--participants group'):
        labelled(task(column="group"), store)
    assert len(labelled(task(kind="multiclass"), store).classes) == 3


def test_two_tasks_of_one_name_are_refused(tmp_path):
    file = tmp_path / "t.toml"
    file.write_text(2 * '[[tasks]]\nname = "a"\nkind = "binary"\ncolumn = "x"\n')
    with pytest.raises(InputError, match='two tasks are named "a"'):
        load_tasks(file)


def test_numbers_are_written_one_way():
    same = [canonical(value) for value in ("1", "1.0", " 01 ", 1, 1.0)]
    assert set(same) == {"1"}
    assert (
        canonical("1_0") == "1_0" and canonical("NC") == "NC" and canonical(None) == "" and canonical("0.50") == "0.5"
    )


# ------------------------------------------------------------------------------------------------ shipped tasks

COHORTS: dict[str, list[dict[str, Any]]] = {
    "adni": people(90, group=["CN", "EMCI", "AD", "NC", "LMCI", "Dementia", "SMC", "MCI", "AD"]),
    "scan": people(90, naccudsd=[1, 3, 4, 1, 2, 4], naccalzd=[8, 0, 1, 8, 8, 1], contrast=["T1w", "FLAIR", "T2w"]),
    "ucsf_pdgm": people(90, who_grade=[2, 3, 4], contrast=["T1w", "ADC", "FLAIR"]),
    "abide": people(90, dx_group=[1, 2], site_id=["NYU", "UCLA_1", "Yale", "Pitt", "KKI", "USM", "Olin"]),
    "ds002748": people(90, gender=["f", "m"], group=["depr", "depr", "control"], age=[str(20 + n) for n in range(40)]),
    "phantom": people(
        90, age=[str(20 + n) for n in range(40)], site=["north", "south"],
        **{f"label_{name}": ["0", "1", "1"] for name in ("atrophy", "lesions", "sharpness", "mass", "distributed")},
    ),
}  # fmt: skip
COHORTS["demo"] = COHORTS["phantom"]
SUBJECTS = {
    "adni": [{"NC": 20, "MCI": 30}, {"NC": 20, "AD": 30}],
    "scan": [{"NC": 30, "MCI": 15}, {"NC": 30, "AD": 30}],
    "ucsf_pdgm": [{"2": 30, "3-4": 60}, {"2-3": 60, "4": 30}, {"2": 30, "3": 30, "4": 30}],
    "abide": [{"control": 45, "autism": 45}] * 2,
    "ds002748": [{"female": 45, "male": 45}, {"control": 30, "depression": 60}, {}],
    "phantom": [{"absent": 30, "present": 60}] * 5 + [{}],
    "demo": [{"absent": 30, "present": 60}] * 2,
}


def test_every_shipped_file_is_tried():
    assert {path.stem for path in TASKS.glob("*.toml")} == set(COHORTS) == set(SUBJECTS)


@pytest.mark.parametrize("name", COHORTS)
def test_shipped_tasks_run_on_a_synthetic_table(name, tmp_path):
    text = (TASKS / f"{name}.toml").read_text(encoding="utf-8")
    assert "# Run:" in text and "# Came out:" in text
    store = table_store(tmp_path / "s", COHORTS[name])
    tasks = load_tasks(TASKS / f"{name}.toml")
    assert [labelled(one, store).class_counts() for one in tasks] == SUBJECTS[name]
    for one in tasks:
        found = labelled(one, store)
        for split in make_splits(found, 0):
            assert not {*found.subjects[split.train]} & {*found.subjects[split.test]}
            assert len(split.train) + len(split.test) == len(found.rows)
            if one.split.site_disjoint:
                assert not {*found.sites[split.train]} & {*found.sites[split.test]}


@pytest.mark.parametrize("name", ["adni", "scan", "ucsf_pdgm", "abide"])
def test_the_papers_lists_are_read_in_place_of_a_split(name, tmp_path, monkeypatch):
    """The commented block of each file, with lists of the columns subject_id and scan_uid as they are published."""
    text = (TASKS / f"{name}.toml").read_text(encoding="utf-8")
    block = text.split("# paper:\n")[1].split("\n[[tasks]]")[0]
    first = text.split("# paper:\n")[0].replace(re.findall(r"\nsplit = .*", text)[0], "")
    file = tmp_path / "tasks.toml"
    file.write_text(first + re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    store = table_store(tmp_path / "s", COHORTS[name])
    one = load_tasks(file)[0]
    found = labelled(one, store)
    (part,) = one.split.parts
    thirds = np.array_split(np.arange(len(found.ids)), 3)
    for list_name, places in zip((*part.train, *part.test), thirds):
        path = tmp_path / list_name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{found.subjects[at]},{found.ids[at]}" for at in places]
        path.write_text("\n".join(["subject_id,scan_uid", *lines, "nobody,nothing"]) + "\n")
    monkeypatch.chdir(tmp_path)
    (split,) = make_splits(found, 0)
    assert split.test.tolist() == thirds[2].tolist()
    assert split.train.tolist() == [*thirds[0], *thirds[1]]
    assert split.notes == {"scans listed and not in the task": 1}
