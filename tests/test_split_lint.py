"""The four defects that make scores lie, each found; and nothing found where there is none."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import FULL, run_brainscale
from test_splits import cohort, from_text
from test_tasks import people, table_store, task

from brainscale import acquisition
from brainscale.cli import main
from brainscale.split_files import Split, from_files
from brainscale.split_lint import Finding, lint
from brainscale.splits import make_splits
from brainscale.store import Store
from brainscale.tasks import labelled

HOLDOUT = {"kind": "holdout"}


def by_code(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings}


def test_a_clean_split_has_no_finding(tmp_path):
    store = table_store(tmp_path / "s", people(40, dx=["x", "y"]))
    one = labelled(task(split=HOLDOUT), store)
    assert lint(one, make_splits(one, 0), store) == []


def test_a_subject_on_both_sides(tmp_path):
    one = cohort(np.array([0, 1] * 20), 2)
    sides = ["test" if n in (5, 20, 21) else "train" for n in range(len(one.ids))]
    lines = [f"{s},{scan},{side}" for s, scan, side in zip(one.subjects, one.ids, sides)]
    splits = from_files(from_text(one, tmp_path / "t.csv", "\n".join(["subject_id,scan_uid,split", *lines])))
    found = by_code(lint(one, splits, None))["subject_overlap"]
    assert found.severity == "error"
    assert '1 of the 2 test subjects of holdout are trained on too ("s0002")' in found.sentence


def test_a_duplicated_scan_on_both_sides(tmp_path):
    rows = people(40, dx=["x", "y"])
    rows[7]["voxels_xxh3_128"] = rows[3]["voxels_xxh3_128"] = "same"
    store = table_store(tmp_path / "s", rows)
    one = labelled(task(split=HOLDOUT), store)
    everyone = np.arange(40)
    apart = [Split("holdout", everyone[everyone != 7], np.array([7, 8]))]
    found = by_code(lint(one, apart, store))["duplicate_scan"]
    assert found.severity == "error" and "1 test scan(s) of holdout" in found.sentence
    assert '"s007_T1w = s003_T1w"' in found.sentence
    kept = by_code(lint(one, make_splits(one, 0), store))["duplicate_scan"]
    assert kept.severity == "warning" and "1 of them of several subjects" in kept.sentence


def test_other_scales_are_other_voxels_but_equal_files_are_equal(tmp_path):
    rows = people(40, dx=["x", "y"])
    for at, scale in ((3, 1.0), (7, 2.0)):
        rows[at] |= {"voxels_xxh3_128": "same", "scale": scale}
    store = table_store(tmp_path / "a", rows)
    one = labelled(task(split=HOLDOUT), store)
    assert "duplicate_scan" not in by_code(lint(one, make_splits(one, 0), store))
    for at in (3, 7):
        rows[at]["source_xxh3_128"] = "file"
    store = table_store(tmp_path / "b", rows)
    apart = [Split("holdout", np.arange(6), np.arange(6, 12))]
    assert by_code(lint(one, apart, store))["duplicate_scan"].severity == "error"


def test_equal_scans_with_different_labels(tmp_path):
    rows = people(40, dx=["x", "y"])
    rows[3]["voxels_xxh3_128"] = rows[4]["voxels_xxh3_128"] = "same"
    store = table_store(tmp_path / "s", rows)
    one = labelled(task(split=HOLDOUT), store)
    found = [f for f in lint(one, [], store) if f.code == "duplicate_scan"]
    assert [f.severity for f in found] == ["error"] and "different labels" in found[0].sentence


def test_eleven_files_of_each_subject():
    one = cohort(np.array([0, 1] * 17), 11, split=HOLDOUT | {"test_fraction": 0.5})
    (found,) = lint(one, make_splits(one, 0), None)
    assert (found.code, found.severity) == ("repeated_subject", "warning")
    assert "374 scans are of 34 subjects (median 11 each, 11 of" in found.sentence
    assert "the largest test set is 187 scans of 17 subjects" in found.sentence


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_a_label_that_follows_how_values_are_coded(tmp_path, kind):
    values = {"binary": ["1", "2"], "multiclass": ["1", "2", "3"], "regression": ["1", "2", "3", "4"]}[kind]
    rows = people(48, dx=values)
    for at, row in enumerate(rows):
        row["scale"] = 0.5 if row["dx"] == values[-1] and at % 8 else 1.0  # most cases stored with a slope of 0.5
    store = table_store(tmp_path / "s", rows)
    one = labelled(task(kind=kind, split=HOLDOUT), store)
    found = by_code(lint(one, make_splits(one, 0), store))["label_follows_acquisition"]
    assert "dx follows how scans were acquired: intensity scale alone tells it" in found.sentence
    assert found.severity == ("error" if kind == "binary" else found.severity)


def write_nifti(path: Path, seed: int, step: float) -> None:
    """A head of noise as float32 whose grey levels are multiples of a step, as in files of two exports."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, 48),) * 3, indexing="ij")
    rng = np.random.default_rng(seed)
    voxels = np.where(z**2 + y**2 + x**2 < 0.8, 600 + 200 * x + rng.normal(0, 80, z.shape), 0).clip(0)
    voxels = np.round(voxels / step) * step
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([3.0, 3, 3, 1])), path)


def write_sparse_levels(path: Path) -> None:
    """Whole numbers up to 32000, of which the scan holds few: most neighbouring levels are more than one apart."""
    rng = np.random.default_rng(0)
    voxels = np.where(rng.random((48, 48, 48)) < 0.25, rng.integers(1, 32000, (48, 48, 48)), 16000).astype(np.int16)
    voxels[:, :4] = 0
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([3.0, 3, 3, 1])), path)


@pytest.mark.slow
def test_a_label_that_follows_the_quantisation_of_files(tmp_path, splits_lint):
    """Nothing in the header tells the files apart: only their grey levels do, and only those stored unresampled."""
    bids = tmp_path / "bids"
    names = [f"sub-{n:02d}" for n in range(17)]
    for n, name in enumerate(names[:16]):
        write_nifti(bids / name / "anat" / f"{name}_T1w.nii.gz", n, (3.4, 5.0)[n % 2])
    write_sparse_levels(bids / names[16] / "anat" / f"{names[16]}_T1w.nii.gz")
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    table = "".join(f"sub-{n:02d}\t{('depr', 'control')[n % 2]}\t{'fm'[n // 2 % 2]}\n" for n in range(16))
    (bids / "participants.tsv").write_text("participant_id\tgroup\tsex\n" + table)
    store = tmp_path / "store"
    run_brainscale("to-zarr", bids, store, "--workers", "1", "--prep", "configs/prep/identity.toml")
    (tmp_path / "t.toml").write_text(
        "".join(
            f'[[tasks]]\nname = "{name}"\nkind = "binary"\ncolumn = "{name}"\nsplit = {{ kind = "holdout", '
            f"test_fraction = 0.25 }}\n"
            for name in ("group", "sex")
        )
    )
    command = ("--store", store, "--tasks", tmp_path / "t.toml")
    out = splits_lint(*command, code=4)
    assert "ERROR label_follows_acquisition: group follows how scans were acquired: grey-level step alone" in out
    assert "3.4: 8 depr" in out and "5: 8 control" in out
    opened = Store(store)
    steps = acquisition._grey_levels(opened.rows, opened.column("scale"), opened)["grey-level step"]
    assert steps.tolist() == ["3.4", "5"] * 8 + [""]  # chance gaps between levels are no step
    assert "nothing found" in splits_lint(*command, "--task", "sex")


def test_a_planted_site_confound_in_part(tmp_path):
    rng = np.random.default_rng(0)
    rows = people(100, dx=["x", "y"])
    for row in rows:
        chance = 0.8 if row["dx"] == "x" else 0.35
        row["site"] = "north" if rng.random() < chance else "south"
    store = table_store(tmp_path / "s", rows)
    one = labelled(task(split=HOLDOUT), store)
    found = by_code(lint(one, make_splits(one, 0), store))
    follows = found["label_follows_acquisition"]
    assert follows.severity == "warning" and "site alone tells it with AUROC 0.6" in follows.sentence
    assert found["site_overlap"].severity == "note" and "2 of 2 sites" in found["site_overlap"].sentence


def test_a_label_is_not_held_against_itself(tmp_path):
    store = table_store(tmp_path / "s", people(40, site=["north", "south"], dx=["x"]))
    one = labelled(task(column="site", split=HOLDOUT), store)
    assert "label_follows_acquisition" not in by_code(lint(one, make_splits(one, 0), store))


def test_shapes_of_files_cut_around_each_head_are_no_acquisition(tmp_path):
    rows = people(40, dx=["x", "y"])
    for at, row in enumerate(rows):
        row["shape_source_xyz"] = [60 + at // 2 + 8 * (at % 2), 80, 70]
    store = table_store(tmp_path / "a", rows)
    assert acquisition.columns_of(labelled(task(), store), store) == {}
    for at, row in enumerate(rows):
        row["shape_source_xyz"] = [256, 256, (170, 192)[at % 2]]
    store = table_store(tmp_path / "b", rows)
    assert set(acquisition.columns_of(labelled(task(), store), store)) == {"source shape z"}


def random_columns(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Columns as they occur: two kinds to twenty, even and rare ones."""
    kinds = (2, 2, 3, 4, 8, 20)
    found = {f"column {k}": rng.integers(0, size, n).astype(str) for k, size in enumerate(kinds)}
    return found | {"rare": (rng.random(n) < 0.06).astype(str)}


@pytest.mark.parametrize(("n", "classes"), [(24, 2), (47, 2), (150, 2), (60, 3), (60, 0)])
def test_labels_that_follow_nothing_raise_few_alarms(n, classes):
    """p is for all columns together: at 1 % one or two in a hundred, whatever the columns are."""
    repeats = 300 if FULL else 40
    alarms = 0
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, classes, n) if classes else rng.normal(size=n)
        told = acquisition.follows(cohort(y), random_columns(rng, n), 0.01)
        assert told is not None
        alarms += bool(told)
    assert alarms / repeats <= (0.03 if FULL else 0.05)


def test_scans_of_one_subject_are_no_evidence_of_their_own():
    """Ten scans of each subject at one of two sites: evidence is counted in subjects."""
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        one = cohort(rng.integers(0, 2, 24), 10)
        site = np.repeat(rng.integers(0, 2, 24).astype(str), 10)
        alarms += bool(acquisition.follows(one, {"site": site}, 0.05))
    assert alarms <= 6
    one = cohort(np.array([0, 1] * 12), 10)
    (told,) = acquisition.follows(one, {"site": np.where(one.y, "north", "south")}, 0.01) or []
    assert told.score == 1.0


def test_a_side_that_is_empty_or_lacks_a_class():
    one = cohort(np.array([0] * 20 + [1] * 20))
    found = by_code(lint(one, [Split("a", np.arange(40), np.arange(0))], None))
    assert "nothing is in" in found["empty_side"].sentence and found["empty_side"].severity == "error"
    found = by_code(lint(one, [Split("a", np.arange(10, 40), np.arange(10))], None))
    assert found["class_missing"].severity == "error" and '"c1 in a (test)"' in found["class_missing"].sentence
    found = by_code(lint(one, [Split("a", np.r_[1:18, 38:40], np.r_[0, 18:38])], None))
    assert found["class_imbalance"].severity == "warning"
    assert "11 % of train and 86 % of test" in found["class_imbalance"].sentence


def test_a_subject_of_two_labels_in_a_list():
    one = cohort(np.array([0, 1] * 10), 2)
    y = one.y.copy()
    y[0] = 1
    assert "1 subject(s)" in by_code(lint(dataclasses.replace(one, y=y), [], None))["label_conflict"].sentence


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def splits_lint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command here; returns what it printed."""

    def run(*arguments: str | Path, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main(["splits", "lint", *map(str, arguments)])
        assert (left.value.code or 0) == code
        printed = capsys.readouterr()
        return printed.err if code == 2 else printed.out

    return run


def lists(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text("subject_id,scan_uid,label\n" + text)


def test_published_lists_are_looked_at_without_a_store(tmp_path, splits_lint):
    train = "".join(f"002_S_{n:04d},I{n + 10000},{n % 2}\n" for n in range(20))
    lists(tmp_path, train=train, val="002_S_0500,I500500,0\n", test="002-S-0003,I999999,1\n002_S_0900,I900900,0\n")
    files = ("--train", tmp_path / "train.csv", "--train", tmp_path / "val.csv", "--test", tmp_path / "test.csv")
    out = splits_lint(*files, code=4)
    assert '1 of the 2 test subjects of holdout are trained on too ("002_S_0003")' in out
    lists(tmp_path, test="002_S_0800,I999999,1\n002_S_0900,I900900,0\n")
    assert "nothing found" in splits_lint(*files)


def test_files_of_a_list_are_compared_by_content(tmp_path, splits_lint):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        (tmp_path / f"{name}.nii.gz").write_bytes(content)
    rows = "".join(f"{n},{side},{tmp_path / n}.nii.gz\n" for n, side in (("a", "train"), ("b", "train"), ("c", "test")))
    (tmp_path / "t.csv").write_text("subject_id,split,path\n" + rows)
    out = splits_lint(tmp_path / "t.csv", code=4)
    assert "ERROR duplicate_scan: 1 test scan(s) of holdout equal a scan trained on" in out


def test_a_table_is_held_against_a_store(tmp_path, splits_lint):
    rows = people(24, dx=["x", "y"])
    rows[1]["voxels_xxh3_128"] = rows[4]["voxels_xxh3_128"] = "same"
    table_store(tmp_path / "s", rows)
    text = "".join(
        f"s{n:03d},s{n:03d}_T1w,{'xy'[n % 2]},{'test' if n > 11 or n == 4 else 'train'}\n" for n in range(24)
    )
    (tmp_path / "t.csv").write_text("subject_id,scan_uid,label,split\n" + text + "s099,s099_T1w,x,train\n")
    out = splits_lint(tmp_path / "t.csv", "--store", tmp_path / "s", code=4)
    assert "1 scan(s), listed and not in the store" in out and "s001_T1w = s004_T1w" in out
    (tmp_path / "tasks.toml").write_text('[[tasks]]\nname = "dx"\nkind = "binary"\ncolumn = "dx"\n')
    told = ("--store", tmp_path / "s", "--tasks", tmp_path / "tasks.toml")
    assert "s001_T1w = s004_T1w" in splits_lint(tmp_path / "t.csv", *told, code=4)


def test_what_cannot_be_looked_at_is_refused(tmp_path, splits_lint):
    (tmp_path / "t.toml").write_text('[[tasks]]\nname = "dx"\nkind = "binary"\ncolumn = "dx"\n')
    assert "nothing to look at" in splits_lint(code=2)
    assert "--store" in splits_lint("--tasks", tmp_path / "t.toml", code=2)
    assert "both --train and --test" in splits_lint("--train", tmp_path / "t.toml", code=2)
