"""Who is tested: subjects never on both sides, classes and sites dealt evenly, files read back as they were written."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_brainscale
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import people, table_store, task

from brainscale.settings import InputError
from brainscale.split_files import from_files, read_labelled, write
from brainscale.splits import design, make_splits
from brainscale.task_settings import SplitSettings
from brainscale.tasks import Labelled, labelled


def cohort(
    y: np.ndarray, scans: int = 1, sites: np.ndarray | None = None, split: dict[str, Any] | None = None
) -> Labelled:
    """Subjects with these labels, each with `scans` scans, without a store."""
    classes = () if y.dtype.kind == "f" else tuple(f"c{k}" for k in range(int(y.max()) + 1))
    kind = "regression" if not classes else "binary" if len(classes) == 2 else "multiclass"
    one = task(kind=kind, split=split or {})
    subjects = np.array([f"s{n:04d}" for n in range(len(y))])
    site = np.full(len(y), "") if sites is None else sites
    repeat = [np.repeat(column, scans) for column in (subjects, y, site)]
    ids = np.array([f"{subject}_{n}" for n, subject in enumerate(repeat[0])])
    return Labelled(one, np.arange(len(ids)), ids, repeat[0], repeat[1], classes, repeat[2], {}, repeat[0])


CV = {"kind": "cross_validation", "folds": 5, "repeats": 3}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), counts=st.tuples(st.integers(10, 40), st.integers(10, 60)), scans=st.integers(1, 3))
def test_folds_test_everybody_once_in_each_repeat_and_share_classes(seed, counts, scans):
    one = cohort(np.repeat([0, 1], counts), scans, split=CV)
    splits = make_splits(one, seed)
    assert len(splits) == 15
    for repeat in range(3):
        folds = splits[5 * repeat : 5 * repeat + 5]
        assert sorted(np.concatenate([split.test for split in folds]).tolist()) == list(range(len(one.ids)))
        sizes = [len(split.test) // scans for split in folds]
        assert max(sizes) - min(sizes) <= 1
        for k, count in enumerate(counts):
            tested = [len(set(one.subjects[split.test[one.y[split.test] == k]])) for split in folds]
            assert max(tested) - min(tested) <= 1 and sum(tested) == count
        for split in folds:
            assert not {*one.subjects[split.train]} & {*one.subjects[split.test]}
            assert sorted({*split.train, *split.test}) == list(range(len(one.ids)))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), share=st.floats(0.1, 0.9), counts=st.tuples(st.integers(20, 99), st.integers(20, 60))
)
def test_a_holdout_has_the_share_asked_for_of_every_class(seed, share, counts):
    one = cohort(np.repeat([0, 1], counts), 2, split={"kind": "holdout", "test_fraction": share})
    (split,) = make_splits(one, seed)
    for k, count in enumerate(counts):
        assert abs(len(set(one.subjects[split.test[one.y[split.test] == k]])) - share * count) <= 1
    assert abs(len(set(one.subjects[split.test])) - share * sum(counts)) <= 0.5 + 1e-9


def test_values_of_a_regression_are_dealt_by_quantile():
    rng = np.random.default_rng(0)
    one = cohort(rng.permutation(np.arange(100.0)), split=CV)
    means = [one.y[split.test].mean() for split in make_splits(one, 3)]
    assert np.std(means) < 3  # of 20 values drawn without regard to them: 100/√12/√20·0.9 ≈ 5.8
    assert len(set(means)) > 3


def test_a_split_depends_on_seed_and_subjects_alone():
    one = cohort(np.repeat([0, 1], [30, 30]), 2, split=CV)
    order = np.random.default_rng(1).permutation(len(one.ids))
    mixed = dataclasses.replace(
        one, ids=one.ids[order], subjects=one.subjects[order], y=one.y[order], groups=one.groups[order]
    )
    fewer = cohort(np.repeat([0, 1], [30, 30]), 1, split=CV)

    def tested(of: Labelled, seed: int) -> list[set[str]]:
        return [set(of.subjects[split.test].tolist()) for split in make_splits(of, seed)]

    assert tested(one, 5) == tested(mixed, 5) == tested(fewer, 5)
    assert tested(one, 5) != tested(one, 6)
    assert len({frozenset(subjects) for subjects in tested(one, 5)}) == 15  # repeats differ


def test_subjects_of_equal_voxels_stay_together(tmp_path):
    rows = people(40, dx=["x", "y"])
    for first in range(0, 20, 2):
        rows[first + 1]["voxels_xxh3_128"] = rows[first]["voxels_xxh3_128"] = f"same{first}"
    one = labelled(task(split=CV), table_store(tmp_path / "s", rows))
    for split in make_splits(one, 0):
        assert not {*one.groups[split.train]} & {*one.groups[split.test]}
        for first in range(0, 20, 2):
            assert len({f"s{first:03d}", f"s{first + 1:03d}"} & {*one.subjects[split.test]}) in (0, 2)


def test_auto_means_cross_validation_below_200_test_subjects():
    assert design(cohort(np.repeat([0, 1], [400, 599]))) == "cross_validation"
    assert design(cohort(np.repeat([0, 1], [400, 600]))) == "holdout"
    assert design(cohort(np.repeat([0, 1], [400, 599]), split={"kind": "holdout"})) == "holdout"


@pytest.mark.parametrize("kind", ["holdout", "cross_validation"])
def test_too_few_subjects_of_a_class_are_refused(kind):
    make_splits(cohort(np.repeat([0, 1], [10, 10]), split={"kind": kind}), 0)
    with pytest.raises(InputError, match='9 of "c1" are too few subjects, at least 10'):
        make_splits(cohort(np.repeat([0, 1], [30, 9]), 3, split={"kind": kind}), 0)


# ------------------------------------------------------------------------------------------------ sites


@pytest.mark.parametrize("seed", range(5))
def test_sites_stay_on_one_side(seed):
    rng = np.random.default_rng(seed)
    sites = np.array([f"site{k}" for k in rng.integers(0, 12, 120)])
    one = cohort(rng.permutation(np.repeat([0, 1], 60)), 2, sites, CV | {"site_disjoint": True})
    splits = make_splits(one, seed)
    for split in splits:
        assert not {*one.sites[split.train]} & {*one.sites[split.test]}
        assert 0.2 < one.y[split.test].mean() < 0.8
    assert sorted(np.concatenate([split.test for split in splits[:5]]).tolist()) == list(range(240))
    (half,) = make_splits(cohort(one.y[::2], 1, sites, {"kind": "holdout", "site_disjoint": True}), seed)
    assert not {*sites[half.train]} & {*sites[half.test]} and 0.1 < len(half.test) / 120 < 0.35


def test_repeats_that_few_sites_make_equal_are_left_out():
    sites = np.array([f"site{k}" for k in np.arange(60) % 5])
    one = cohort(np.arange(60) // 5 % 2, 1, sites, CV | {"site_disjoint": True, "repeats": 20})
    assert len(make_splits(one, 0)) == 5  # five sites can be dealt to five folds in one way


def test_sites_that_cannot_be_kept_apart_are_refused():
    y, disjoint = np.arange(60) % 2, CV | {"site_disjoint": True}
    with pytest.raises(InputError, match=r"4 site\(s\) cannot be dealt to 5 folds"):
        make_splits(cohort(y, 1, np.array([f"{k}" for k in np.arange(60) // 15]), disjoint), 0)
    with pytest.raises(InputError, match="60 have none"):
        make_splits(cohort(y, 1, None, disjoint), 0)
    follows = np.array([f"site{k}" for k in 2 * (np.arange(60) // 2 % 5) + y])  # every site has one class
    with pytest.raises(InputError, match="would have nobody of"):
        make_splits(cohort(y, 1, follows, disjoint | {"folds": 10}), 0)
    traveller = cohort(y, 2, np.array([f"{k}" for k in np.arange(60) // 12]), disjoint)
    traveller.sites[0] = "4"  # a subject of site 0 was scanned at site 4 too
    with pytest.raises(InputError, match=r"4 site\(s\) cannot be dealt"):
        make_splits(traveller, 0)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("split", [CV, {"kind": "holdout"}])
def test_a_written_table_is_read_back(split, tmp_path):
    one = cohort(np.repeat([0, 1], 30), 2, split=split)
    made = make_splits(one, 0)
    write(tmp_path / "t.csv", one, made)
    again = dataclasses.replace(
        one, task=one.task.model_copy(update={"split": SplitSettings(kind="file", file=str(tmp_path / "t.csv"))})
    )
    read = make_splits(again, 9)
    assert [s.name for s in read] == [s.name for s in made]
    assert all((a.train == b.train).all() and (a.test == b.test).all() for a, b in zip(read, made))
    assert not any(s.notes for s in read)
    found, splits, _ = read_labelled([(tmp_path / "t.csv", "")])
    assert found.classes == ("c0", "c1") and found.y.tolist() == one.y.tolist()
    assert [s.test.tolist() for s in splits] == [s.test.tolist() for s in made]


def from_text(one: Labelled, path: Path, text: str) -> Labelled:
    path.write_text(text)
    return dataclasses.replace(
        one, task=one.task.model_copy(update={"split": SplitSettings(kind="file", file=str(path))})
    )


def test_files_match_by_subject_where_no_scan_id_fits_and_say_so(tmp_path):
    one = cohort(np.array([0, 1] * 5), 2)
    lines = [f"sub-S{n:04d},I{n + 12345},{'test' if n < 3 else 'val' if n < 5 else 'train'}" for n in range(9)]
    text = "\n".join(["Subject,Image Data ID,split", *lines, "sub-S9999,I1,test"])
    (split,) = make_splits(from_text(one, tmp_path / "t.csv", text), 0)
    assert set(one.subjects[split.test]) == {"s0000", "s0001", "s0002"}
    assert set(one.subjects[split.train]) == {f"s{n:04d}" for n in range(3, 9)}
    assert split.notes == {
        "scans matched by subject, since no scan id fits": 18,
        "subjects listed and not in the task": 1,
        "scans of the task and not listed": 2,
    }


def test_files_with_a_subject_on_both_sides_are_refused_but_can_be_looked_at(tmp_path):
    one = cohort(np.array([0, 1] * 5), 2)
    lines = [f"{s},{scan},{'test' if n < 5 else 'train'}" for n, (s, scan) in enumerate(zip(one.subjects, one.ids))]
    bad = from_text(one, tmp_path / "t.csv", "\n".join(["subject_id,scan_uid,split", *lines]))
    with pytest.raises(InputError, match=r'1 subject\(s\) on both sides \("s0002"\).*splits lint'):
        make_splits(bad, 0)
    (split,) = from_files(bad)
    assert {*one.subjects[split.train]} & {*one.subjects[split.test]} == {"s0002"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "columns a, b, none of which is known to hold ids"),
        ("subject_id,x\ns1,2\n", "a split needs a column split"),
        ("subject_id,split\nother,train\nanother,test\n", 'no train scan of this store .*"other"'),
        ("subject_id,split\n", "has no rows"),
        ("subject_id,split\ns0001\n", "row 2 has 1 cells where the header has 2"),
        ("subject_id,split\ns0001,train\n", "no test scan"),
        ("subject_id,split\ns0000,train\ns0001,train\ns0002,test\n", 'nobody of "c1" in test; mend the list'),
    ],
)
def test_files_that_do_not_fit_are_refused(text, words, tmp_path):
    with pytest.raises(InputError, match=words):
        make_splits(from_text(cohort(np.array([0, 1] * 5)), tmp_path / "t.csv", text), 0)


@pytest.mark.slow
def test_the_command_writes_tables_and_prints_counts(tmp_path):
    table_store(tmp_path / "s", people(24, dx=["NC", "AD"], age=["50", "60", "n/a"]))
    (tmp_path / "t.toml").write_text(
        '[[tasks]]\nname = "dx"\nkind = "binary"\ncolumn = "dx"\nlabels = { NC = ["NC"], AD = ["AD"] }\n'
        '[[tasks]]\nname = "age"\nkind = "regression"\ncolumn = "age"\nsplit = { kind = "holdout" }\n'
    )
    out = run_brainscale(
        "splits", "make", tmp_path / "s", "--tasks", tmp_path / "t.toml", "--out", tmp_path / "o"
    ).stdout
    assert "24 subjects, 24 scans, 50 split(s)" in out and "left out: 8 scan(s), no age" in out
    assert "(10 NC, 10 AD), 20 scans" in out or "(9 NC, 10 AD), 19 scans" in out or "(10 NC, 9 AD), 19 scans" in out
    header, *lines = (tmp_path / "o" / "dx.csv").read_text().splitlines()
    assert header.split(",") == ["subject_id", "scan_uid", "label", *(f"repeat_{k}" for k in range(1, 11))]
    assert len(lines) == 24 and set(lines[0].split(",")[3:]) <= set("12345")
    assert (tmp_path / "o" / "age.csv").read_text().splitlines()[0] == "subject_id,scan_uid,label,split"
