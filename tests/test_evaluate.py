"""Scores of encoders on tasks, from a run to scores.json: what is planted is found, and nothing else."""

import json
import shutil
from dataclasses import replace

import filelock
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_brainscale, write_tiny_store

from brainscale import contestants, evaluate, features, report_evaluation, score_file
from brainscale.cli import main
from brainscale.evaluation_settings import EvaluationSettings
from brainscale.intervals import estimate, interval, paired_difference
from brainscale.pretrained import open_pretrained, random_like
from brainscale.settings import InputError
from brainscale.site_leakage import site_case
from brainscale.split_files import Split
from brainscale.store import open_store
from brainscale.task_scores import cut
from brainscale.task_settings import SplitSettings, Task
from brainscale.tasks import labelled

CPU = torch.device("cpu")
SCANS = 80
"""Two of each subject."""
QUICK = EvaluationSettings(probes=("linear",), cnn=False, permutations=19, few_shot=(4,), few_shot_draws=2)
FOLDS = SplitSettings(kind="cross_validation", folds=4, repeats=2)


def ill(row):
    return row // 2 % 2


def lucky(row):
    return int(np.random.default_rng(7).permutation(SCANS // 2)[row // 2] % 2)


def describe(record):
    row = record["row"]
    record["participant"] = {
        "ill": str(ill(row)), "lucky": str(lucky(row)), "age": f"{40 + 20 * ill(row) + row // 2 % 7}",
        "site": "north" if ill(row) else "south",
    }  # fmt: skip


def paint(row, values):
    """A bright spot in the ill, brighter in some than in others."""
    values[4:9, 10:15, 4:9] += (60 + 40 * (row // 2 % 3)) * ill(row)
    return values


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "store"
    return open_store(write_tiny_store(path, SCANS, change=describe, paint=paint))


@pytest.fixture(scope="module")
def scored(store, unbroken, tmp_path_factory):
    """The folder of an evaluation of one run on three tasks."""
    tasks = [
        Task(name="ill", kind="binary", column="ill", split=FOLDS),
        Task(name="lucky", kind="binary", column="lucky", split=FOLDS),
        Task(name="age", kind="regression", column="age", split=SplitSettings(kind="holdout", test_fraction=0.5)),
    ]
    out = tmp_path_factory.mktemp("scores") / "out"
    evaluate.run([unbroken], store, tasks, out, QUICK, CPU, lambda text: None)
    return out


def of(scored, task, encoder, metric="auroc"):
    found = score_file.read(scored)
    (record,) = (t for t in found.tasks if t.name == task)
    (score,) = (s for s in record.scores if (s.encoder, s.metric, s.probe) == (encoder, metric, "linear"))
    return score


def test_a_planted_effect_is_found_and_chance_is_not(scored):
    found, chance = of(scored, "ill", "unbroken"), of(scored, "lucky", "unbroken")
    assert found.value > 0.9 and found.low > 0.7 and found.p_permutation == 1 / 20
    assert chance.low < 0.5 < chance.high and chance.p_permutation > 0.1
    assert of(scored, "age", "unbroken", "r2").low > 0.3


def test_every_score_has_its_baselines_beside_it(scored):
    record = score_file.read(scored)
    assert {e.name: e.kind for e in record.encoders} == {
        "unbroken": "run", "random": "baseline", "histogram+volume": "baseline", "volume": "baseline",
    }  # fmt: skip
    for task in record.tasks:
        assert {score.encoder for score in task.scores} == {encoder.name for encoder in record.encoders}
        assert {(pair.a, pair.b) for pair in task.paired} == {
            ("unbroken", "random"), ("unbroken", "histogram+volume"), ("unbroken", "volume"),
        }  # fmt: skip
        assert task.power is not None and task.few_shot and task.subjects == SCANS // 2 and task.scans == SCANS


def test_a_site_that_follows_the_label_is_said(scored):
    """Every ill subject was scanned in the north."""
    record = score_file.read(scored)
    tasks = {task.name: task for task in record.tasks}
    site = {score.encoder: score.value for score in tasks["ill"].site.scores}
    assert site["unbroken"] > 0.9
    assert [finding.code for finding in tasks["ill"].lint] == ["label_follows_acquisition"]
    assert not tasks["lucky"].lint


def test_predictions_are_of_subjects_and_give_the_scores_again(scored):
    found = evaluate.read_predictions(scored / evaluate.PREDICTIONS)
    one = found["ill", "unbroken", "linear"]
    assert one.folds.shape == (2, SCANS // 2) and len(set(one.subjects.tolist())) == SCANS // 2
    assert sorted(set(one.folds.ravel().tolist())) == [0, 1, 2, 3]
    again, kept = interval(one, "auroc"), of(scored, "ill", "unbroken")
    assert (again.value, again.low, again.high) == (kept.value, kept.low, kept.high)
    assert found["age", "volume", "linear"].kind == "regression"
    other = found["ill", "random", "linear"]
    (pair,) = (p for p in score_file.read(scored).tasks[0].paired if p.b == "random")
    assert pair.difference == paired_difference(one, other, "auroc").value


def test_the_same_command_goes_on_with_what_is_finished(scored, store, unbroken, tmp_path):
    """With all pieces nothing is computed; with some of them, the rest comes out the same."""
    tasks = [Task(name="ill", kind="binary", column="ill", split=FOLDS)]
    run = lambda: json.loads(  # noqa: E731
        evaluate.run([unbroken], store, tasks, tmp_path / "out", QUICK, CPU, lambda text: None).read_text()
    )
    first = run()
    pieces = sorted((tmp_path / "out" / "parts").iterdir())
    times = [piece.stat().st_mtime_ns for piece in pieces]
    second = run()
    assert [piece.stat().st_mtime_ns for piece in pieces] == times
    for piece in pieces[::2]:
        piece.unlink()
    third = run()
    assert sorted((tmp_path / "out" / "parts").iterdir()) == pieces
    for other in (second, third):
        assert {**other, "created_utc": ""} == {**first, "created_utc": ""}
    assert first["tasks"][0]["scores"] == json.loads((scored / "scores.json").read_text())["tasks"][0]["scores"]


def test_the_same_folder_gives_what_a_fresh_one_gives(store, unbroken, tmp_path):
    """Whatever was asked there before: labels, seed, layers, pooling."""
    split = SplitSettings(kind="holdout", test_fraction=0.5)
    quick = QUICK.model_copy(update={"permutations": 0, "few_shot": ()})
    asked = [
        (Task(name="ill", kind="binary", column="ill", split=split), quick),
        (Task(name="ill", kind="binary", column="lucky", split=split), quick),
        (Task(name="ill", kind="binary", column="ill", where={"session": ["1"]}, split=split), quick),
        (Task(name="ill", kind="binary", column="ill", split=split), quick.model_copy(update={"seed": 1})),
        (Task(name="ill", kind="binary", column="ill", split=split), quick.model_copy(update={"layers": (0,)})),
        (Task(name="ill", kind="binary", column="ill", split=split), quick.model_copy(update={"pooling": "max"})),
    ]
    seen = []
    for number, (task, settings) in enumerate(asked):
        records = []
        for out in (tmp_path / "one", tmp_path / str(number)):
            path = evaluate.run([unbroken], store, [task], out, settings, CPU, lambda text: None)
            records.append(json.loads(path.read_text())["tasks"][0]["scores"])
        assert records[0] == records[1]
        seen.append(json.dumps(records[0]))
    assert len(set(seen)) == len(seen)


def test_the_random_encoder_is_of_the_same_shape_and_knows_nothing(scored, unbroken, store):
    random, trained = (
        np.array(pq.read_table(scored / "features" / f"{name}.parquet")["features"].to_pylist(), np.float32)
        for name in ("random", "unbroken")
    )
    assert random.shape == trained.shape and not np.allclose(random, trained)
    expected = features.embed(random_like(open_pretrained(unbroken), 0), store, store.rows)
    assert np.array_equal(random, expected)


def test_few_shot_curves_are_of_what_was_asked_for(scored):
    for task in score_file.read(scored).tasks:
        assert {(point.encoder, point.shots_per_class) for point in task.few_shot} == {
            (name, 4) for name in ("unbroken", "random", "histogram+volume", "volume")
        }


def test_two_evaluations_in_one_folder_are_refused(store, unbroken, tmp_path):
    tasks = [Task(name="ill", kind="binary", column="ill", split=FOLDS)]
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="another evaluation is at work"):
        evaluate.run([unbroken], store, tasks, tmp_path, QUICK, CPU, lambda text: None)


def test_features_that_are_not_finite_are_refused(store, unbroken, tmp_path):
    broken = shutil.copytree(unbroken, tmp_path / "broken")
    encoder = open_pretrained(broken)
    with torch.no_grad():
        encoder.encoder.trunk.norm.weight[0] = torch.nan
    with pytest.raises(InputError, match="features of broken are not finite"):
        contestants.gather({"broken": encoder}, [broken], store, store.rows, QUICK, tmp_path, CPU, lambda text: None)
    with pytest.raises(InputError, match="not finite"):
        contestants.tokens_on_disk(encoder, store, store.rows, tmp_path / "tokens.npy", CPU)
    assert not list(tmp_path.glob("*.npy"))[1:]


def test_subjects_with_equal_voxels_are_one(tmp_path, unbroken):
    """Sub-00 scanned again under the name of sub-02: one person, on one side."""

    def twin(record):
        describe(record)
        record["voxels_xxh3_128"] = f"{record['row'] % 4 if record['row'] in (4, 5) else record['row']:032x}"

    store = open_store(write_tiny_store(tmp_path / "store", 40, change=twin, paint=paint))
    tasks = [Task(name="ill", kind="binary", column="ill", split=SplitSettings(kind="holdout", test_fraction=0.5))]
    quick = QUICK.model_copy(update={"permutations": 0, "few_shot": ()})
    path = evaluate.run([unbroken], store, tasks, tmp_path / "out", quick, CPU, lambda text: None)
    record = json.loads(path.read_text())["tasks"][0]
    assert record["subjects"] == 19 and record["scans"] == 40


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ([Task(name="same", kind="regression", column="one")], 'task "same": every one is 1'),
        ([Task(name="ill", kind="binary", column="ill", split=SplitSettings(folds=30))], "too few subjects"),
    ],
)
def test_what_no_prediction_could_be_scored_on_is_refused_at_once(tmp_path, unbroken, tasks, sentence):
    def plain(record):
        describe(record)
        record["participant"]["one"] = "1"

    store = open_store(write_tiny_store(tmp_path / "store", 40, change=plain))
    with pytest.raises(InputError, match=sentence):
        evaluate.run([unbroken], store, tasks, tmp_path / "out", QUICK, CPU, lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_damaged_piece_is_one_sentence(store, unbroken, tmp_path):
    tasks = [Task(name="ill", kind="binary", column="ill", split=FOLDS)]
    quick = QUICK.model_copy(update={"permutations": 0, "few_shot": ()})
    evaluate.run([unbroken], store, tasks, tmp_path, quick, CPU, lambda text: None)
    piece = next((tmp_path / "parts").glob("*.json"))
    piece.write_text("{")
    with pytest.raises(InputError, match=f"{piece.name} is damaged"):
        evaluate.run([unbroken], store, tasks, tmp_path, quick, CPU, lambda text: None)


def test_features_are_written_as_embed_writes_them(scored, store, unbroken):
    table = pq.read_table(scored / "features" / "unbroken.parquet")
    expected = features.embed(open_pretrained(unbroken), store, store.rows)
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), expected)
    assert table["row"].to_pylist() == store.rows.tolist()


def test_the_page_is_written_and_says_what_was_planted(scored):
    page = report_evaluation.write(scored).read_text()
    assert "ill" in page and "unbroken" in page and "site" in page


def test_site_labels_leave_out_small_sites_and_subjects_of_several(store):
    case = labelled(Task(name="ill", kind="binary", column="ill"), store)
    sited, splits = site_case(case, store, 0)
    assert sited.classes == ("north", "south") and len(sited.rows) == SCANS and len(splits) == 10
    moved = case.sites.copy()
    moved[0] = "south" if moved[0] == "north" else "north"
    fewer, _ = site_case(replace(case, sites=moved), store, 0)
    assert case.groups[0] not in fewer.groups and len(fewer.rows) == SCANS - 2
    assert site_case(replace(case, sites=np.where(np.arange(SCANS) < 18, "north", "")), store, 0) is None


@pytest.mark.slow
def test_the_whole_ladder_meets_the_same_subjects(store, unbroken, tmp_path):
    tasks = [Task(name="ill", kind="binary", column="ill", split=SplitSettings(kind="holdout", test_fraction=0.5))]
    settings = EvaluationSettings(probes=("knn", "linear", "attentive", "finetune"), permutations=0, few_shot=())
    evaluate.run([unbroken], store, tasks, tmp_path, settings, CPU, lambda text: None)
    found = evaluate.read_predictions(tmp_path / evaluate.PREDICTIONS)
    assert {probe for _, _, probe in found} == {"knn", "linear", "attentive", "finetune", "cnn"}
    subjects = [one.subjects.tolist() for one in found.values()]
    assert all(names == subjects[0] for names in subjects) and len(subjects[0]) == SCANS // 4
    assert ("unbroken", "small CNN") in {(p.a, p.b) for p in score_file.read(tmp_path).tasks[0].paired}
    assert not (tmp_path / "scratch").exists()
    assert all((one.predictions >= 0).all() and np.allclose(one.predictions.sum(-1), 1) for one in found.values())


def test_networks_take_fewer_repeats_and_are_compared_over_those():
    rng = np.random.default_rng(0)
    y, subjects = rng.permutation(np.arange(40) % 2), np.array([f"s{k:02d}" for k in range(40)])
    folds = [np.arange(40)[k::4] for k in range(4)]
    splits = [replace_split(fold, 40) for fold in folds] * 3
    both = [
        estimate(lambda y, a, b, seed: np.stack([1 - (p := rng.random(len(b))), p], 1), "binary", y, subjects, s, 0)
        for s in (splits, splits[:4])
    ]
    found = paired_difference(cut(both[0], 1), both[1], "auroc")
    assert -1 < found.value < 1
    with pytest.raises(InputError, match="other subjects or splits"):
        paired_difference(*both, "auroc")


def replace_split(test, scans):
    return Split("fold", np.setdiff1d(np.arange(scans), test), test)


def test_what_cannot_be_scored_is_one_sentence(store, unbroken, tmp_path, capsys):
    tasks, out = tmp_path / "tasks.toml", tmp_path / "out"
    tasks.write_text('[[tasks]]\nname = "ill"\nkind = "binary"\ncolumn = "ill"\n')
    for words, sentence in (
        ((), "no run or export"),
        ((unbroken, unbroken), "give --out"),
        ((unbroken, unbroken, "--out", out), "given twice"),
        ((unbroken, "--out", out, "--probes", "magic"), "--probes got 'magic'"),
        ((unbroken, "--out", out, "--few-shot", "x"), "whole numbers"),
        ((unbroken, "--out", out, "--device", "abacus"), "abacus"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["evaluate", *map(str, words), "--store", str(store.path), "--tasks", str(tasks)])
        (said,) = capsys.readouterr().err.splitlines()
        assert left.value.code == 2 and said.startswith("error: ") and sentence in said, said
    assert not out.exists()


@pytest.mark.slow
def test_two_encoders_are_scored_from_the_command_line(store, unbroken, tmp_path):
    """A run and its export are the same encoder, and no difference is found between them."""
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('[[tasks]]\nname = "ill"\nkind = "binary"\ncolumn = "ill"\nsplit = {folds = 4, repeats = 2}\n')
    run_brainscale("export", unbroken, tmp_path / "exported")
    done = run_brainscale(
        "evaluate", unbroken, tmp_path / "exported", "--store", store.path, "--tasks", tasks, "--out", tmp_path / "out",
        "--probes", "linear", "--no-cnn", "--permutations", "0", "--few-shot", "",
    )  # fmt: skip
    assert str(tmp_path / "out" / "scores.html") in done.stdout
    record = score_file.read(tmp_path / "out")
    assert [(e.name, e.kind) for e in record.encoders[:2]] == [("unbroken", "run"), ("exported", "export")]
    (pair,) = (p for p in record.tasks[0].paired if (p.a, p.b) == ("unbroken", "exported"))
    assert pair.difference == 0 and pair.p == 1
