"""The page of scores: its words follow from its numbers, gaps are sentences, names are text, the bytes are the same."""

import copy
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import EVIL, text_of
from test_report_health import write_run

from brainscale import cli, evaluation_figures, evaluation_words, report, report_evaluation, score_file
from brainscale.settings import InputError

ENCODERS = [
    {"name": "mae", "kind": "run", "source": "runs/mae", "objective": "mae", "step": 400, "samples": 1600,
     "dimensions": 128},
    {"name": "jepa_vcr", "kind": "run", "source": "runs/jepa_vcr", "objective": "jepa", "step": 400, "samples": 1600,
     "dimensions": 128},
    {"name": "export-b", "kind": "export", "source": "exports/b", "objective": "mae", "step": 100_000,
     "samples": 6_400_000, "dimensions": 768},
    {"name": "random", "kind": "baseline", "source": None, "objective": None, "step": None, "samples": None,
     "dimensions": 128},
    {"name": "histogram+volume", "kind": "baseline", "dimensions": 66},
    {"name": "small CNN", "kind": "baseline"},
    {"name": "mean of training", "kind": "baseline", "dimensions": 1},
]  # fmt: skip
LEVELS = {"mae": 0.7, "jepa_vcr": 0.62, "export-b": 0.83, "random": 0.6, "histogram+volume": 0.78, "small CNN": 0.58,
          "mean of training": 0.5}  # fmt: skip
METRICS = {"binary": ("auroc", "auprc", "balanced_accuracy"), "regression": ("mae", "r2")}
METRICS["multiclass"] = METRICS["binary"]


def score(encoder, probe, metric, rng):
    """A made-up score, its interval about as wide as that of some 50 subjects."""
    level = LEVELS[encoder] + {"knn": -0.04, "linear": 0.0, "attentive": 0.02, "finetune": 0.01, "cnn": 0.0}[probe]
    value = {"mae": 12 - 8 * level, "r2": 2 * level - 1.05}.get(metric, level - 0.05 * (metric != "auroc"))
    value += rng.normal(0, 0.01)
    half = (1.2 if metric == "mae" else 0.12) * rng.uniform(0.8, 1.2)
    low, high = value - half, value + half
    return {
        "encoder": encoder, "probe": probe, "metric": metric, "value": value, "low": low,
        "high": high if metric == "mae" else min(high, 1.0), "method": "subject bootstrap, refitting",
        "p_permutation": max(1 / 201, round(float(0.5 - (level - 0.5) * 2.5), 3)) if metric != "auprc" else None,
        "permutations": 200, "chosen": {"knn": "k=15", "linear": "C=0.1"}.get(probe, "lr=0.001, 20 epochs"),
    }  # fmt: skip


def task(name, kind, rng, **more):
    """A made-up task in all parts."""
    probes = {encoder["name"]: ("linear", "knn", "attentive", "finetune") for encoder in ENCODERS[:3]}
    probes |= {"random": ("linear", "knn"), "histogram+volume": ("linear",), "small CNN": ("cnn",)}
    probes["mean of training"] = ("linear",)
    scores = [score(e, p, m, rng) for e, several in probes.items() for p in several for m in METRICS[kind]]
    main = METRICS[kind][0]
    sign = -8 if main == "mae" else 1
    paired = []
    for a in ("mae", "jepa_vcr", "export-b"):
        for b in ("random", "histogram+volume"):
            value = sign * (LEVELS[a] - LEVELS[b])
            half = abs(sign) * 0.09
            p = 0.2 if abs(value) < half else 0.01
            paired.append({"a": a, "b": b, "probe": "linear", "metric": main, "difference": value,
                           "low": value - half, "high": value + half, "p": p})  # fmt: skip
    few = [
        {"encoder": e, "probe": "linear", "shots_per_class": n, "metric": main,
         "value": v if main != "mae" else 12 - 8 * v, "low": (v if main != "mae" else 12 - 8 * v) - 0.1,
         "high": (v if main != "mae" else 12 - 8 * v) + 0.1, "draws": 20}
        for e in ("mae", "export-b", "random", "histogram+volume") for n in (1, 2, 4, 8, 16)
        for v in [0.5 + (LEVELS[e] - 0.5) * n / (n + 3)]
    ]  # fmt: skip
    return {
        "name": name, "kind": kind, "classes": [], "column": name, "subjects": 47, "scans": 52, "class_counts": {},
        "left_out": {"no value": 2, "not of the chosen groups": 3}, "design": "cross_validation", "folds": 5,
        "repeats": 10, "train_subjects": 38, "test_subjects": 9, "lint": [],
        "power": {"metric": main, "smallest_difference": 0.21, "half_width": 0.15,
                  "sentence": "With 47 subjects a difference of 0.21 in the main metric can be resolved (power 0.8)."},
        "scores": scores, "paired": paired, "few_shot": few, "site": None, **more,
    }  # fmt: skip


def record():
    """scores.json of three encoders and four baselines on three tasks; the same each time."""
    rng = np.random.default_rng(0)
    site = {"column": "site", "classes": 3, "scores": [
        {"encoder": e, "metric": "auroc", "value": v, "low": v - 0.06, "high": min(v + 0.06, 1.0)}
        for e, v in (("mae", 0.93), ("jepa_vcr", 0.52), ("export-b", 0.71), ("random", 0.88))
    ]}  # fmt: skip
    tasks = [
        task("sex", "binary", rng, classes=["f", "m"], class_counts={"f": 34, "m": 13}, column="gender", site=site),
        task("diagnosis", "multiclass", rng, classes=["CN", "MCI", "AD"], class_counts={"CN": 20, "MCI": 15, "AD": 12},
             lint=[{"code": "label_follows_site", "sentence": "AD comes from site B alone."}]),
        task("age", "regression", rng, design="holdout", folds=None, repeats=None, power=None),
    ]  # fmt: skip
    labels = rng.integers(0, 2, 47)
    maps = {}
    for name in ("mae", "export-b", "random"):
        points = rng.normal(0, 1, (2, 47)) + 1.2 * labels
        maps[name] = {
            "explained": [0.31, 0.12], "x": points[0].tolist(), "y": points[1].tolist(),
            "subject": [f"sub-{i:02d}" for i in range(47)], "site": [f"site {'ABC'[i % 3]}" for i in range(47)],
            "labels": {
                "sex": ["fm"[i] for i in labels], "age": rng.uniform(18, 80, 47).round(1).tolist(),
                "diagnosis": [None if i < 3 else ("CN", "MCI", "AD")[i % 3] for i in range(47)],
            },
        }  # fmt: skip
    return {
        "schema": 1, "store": "stores/ds002748", "plan_hash": "ab" * 16, "created_utc": "2026-01-01T10:00:00+00:00",
        "seed": 0, "versions": {"scikit-learn": "1.9.1", "torch": "2.11.0"}, "encoders": copy.deepcopy(ENCODERS),
        "tasks": tasks, "maps": maps,
    }  # fmt: skip


def written(folder, data):
    """The page of a record."""
    (folder / "scores.json").write_text(json.dumps(data))
    return report_evaluation.write(folder / "scores.json").read_text(encoding="utf-8")


def small(**change):
    """A record of one task with one encoder and one baseline, every number chosen."""
    base = {"probe": "linear", "metric": "auroc", "p_permutation": None, "permutations": None, "chosen": None}
    one = {
        "name": "sex", "kind": "binary", "classes": ["f", "m"], "column": "gender", "subjects": 47, "scans": 47,
        "design": "cross_validation",
        "scores": [{**base, "encoder": "enc", "value": 0.71, "low": 0.55, "high": 0.85},
                   {**base, "encoder": "random", "value": 0.6, "low": 0.45, "high": 0.75}],
        **change,
    }  # fmt: skip
    return {"schema": 1, "encoders": [{"name": "enc", "kind": "run"}, {"name": "random", "kind": "baseline"}],
            "tasks": [one]}  # fmt: skip


def said(folder, data):
    """The list at the top of the page: (class, sentence)."""
    page = written(folder, data).partition("<h2>Encoders</h2>")[0]
    return [(kind, text_of(item).strip()) for kind, item in re.findall(r'<li class="(\w+)">(.*?)</li>', page, re.S)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(tmp_path_factory.mktemp("scores"), record())


# ------------------------------------------------------------------------------------------------- numbers and words


def test_numbers_stand_on_the_page(page):
    text = text_of(page)
    data = record()
    for one in data["tasks"]:
        for s in one["scores"]:
            low, high = (evaluation_words.figure(s[end]) for end in ("low", "high"))
            assert f"{evaluation_words.figure(s['value'])} [{low}, {high}]" in text
    assert (
        "column gender, two classes: f 34, m 13" in text and "column diagnosis, 3 classes: CN 20, MCI 15, AD 12" in text
    )
    assert "47 subjects, 52 scans; scores are per subject" in text
    assert "2 no value, 3 not of the chosen groups" in text
    assert "cross-validation, 5 folds × 10 repeats, split by subject: 38 to train, 9 to test in a fold" in text
    assert "one held-out test set, split by subject: 38 to train, 9 to test" in text
    assert "n = 47 subjects tested." in text and "n = 9 subjects tested." in text and "200 permutations" in text
    assert "label_follows_site AD comes from site B alone." in text
    assert "a difference of 0.21 in the main metric can be resolved" in text
    assert "What difference this test set can resolve was not computed." in text
    assert "C=0.1" in text and "k=15" in text and "subject bootstrap, refitting" in text
    assert "export-b export mae 100,000 6,400,000 768 exports/b" in text
    assert "none is corrected for their number" in text and "has 154 intervals" in text


@pytest.mark.parametrize(
    ("low", "high", "p", "kind", "words"),
    [
        (0.55, 0.85, None, "good", "above chance."),
        (0.55, 0.85, 0.01, "good", "above chance."),
        (0.5, 0.85, 0.01, "past", "not told apart from chance."),
        (0.45, 0.85, None, "past", "not told apart from chance."),
        (
            0.55,
            0.85,
            0.05,
            "past",
            "not told apart from chance (its interval excludes it, the permutation test does",
        ),
        (0.3, 0.499, 0.9, "past", "not told apart from chance (its interval"),
        (0.3, 0.499, None, "bad", "below chance."),
        (None, None, None, "past", "without an interval, so nothing follows from it."),
        (0.55, float("nan"), 0.01, "past", "without an interval, so nothing follows from it."),
    ],
)
def test_what_is_said_of_chance(low, high, p, kind, words, tmp_path):
    data = small()
    data["tasks"][0]["scores"][0].update(low=low, high=high, p_permutation=p)
    found, sentence = said(tmp_path, data)[0]
    assert found == kind and sentence.startswith("enc (linear): AUROC 0.710 ") and words in sentence


@pytest.mark.parametrize(
    ("metric", "difference", "low", "high", "p", "kind", "words"),
    [
        ("auroc", 0.05, -0.03, 0.13, 0.2, "past", "not told apart from random: {} +0.050 [−0.030, +0.130], p = 0.200."),
        ("auroc", 0.05, 0.01, 0.09, 0.012, "good", "better than random: {} +0.050 [+0.010, +0.090], p = 0.012."),
        ("auroc", -0.05, -0.09, -0.01, 0.0, "bad", "worse than random: {} −0.050 [−0.090, −0.010], p < 0.001."),
        ("auroc", 0.05, 0.01, 0.09, 0.07, "past", "not told apart from random"),
        ("auroc", 0.05, 0.0, 0.09, None, "past", "not told apart from random: {} +0.050 [0.000, +0.090]."),
        ("auroc", 0.05, None, None, 0.001, "past", "{} +0.050 no interval, p = 0.001, so nothing follows"),
        ("mae", -1.5, -2.0, -1.0, 0.01, "good", "better than random: {} −1.500"),
        ("mae", 1.5, 1.0, 2.0, 0.01, "bad", "worse than random: {} +1.500"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_difference(metric, difference, low, high, p, kind, words, tmp_path):
    pair = {"a": "enc", "b": "random", "probe": "linear", "metric": metric, "difference": difference, "low": low,
            "high": high, "p": p}  # fmt: skip
    data = small(paired=[pair])
    if metric == "mae":
        data["tasks"][0].update(kind="regression", classes=[])
        for s in data["tasks"][0]["scores"]:
            s["metric"] = "r2"
    found, sentence = said(tmp_path, data)[1]
    name = {"auroc": "AUROC", "mae": "mean absolute error"}[metric]
    assert found == kind and sentence.startswith("enc ") and words.format(f"difference in {name}") in sentence
    row = re.search(r'<td class="name">enc</td><td class="name">random</td>.*?</tr>', written(tmp_path, data)).group()
    assert re.search(r"<td>([a-z ]+)</td></tr>", row).group(1) == ("not told apart" if kind == "past" else "told apart")


def test_a_baseline_as_good_is_named(tmp_path):
    data = small()
    assert said(tmp_path, data)[-1] == (
        "past", "The best baseline, random (linear), reaches AUROC 0.600 [0.450, 0.750], less than every encoder."
    )  # fmt: skip
    data["tasks"][0]["scores"][1]["value"] = 0.71
    assert said(tmp_path, data)[-1] == (
        "bad", "The best baseline, random (linear), reaches AUROC 0.710 [0.450, 0.750], no less than enc."
    )  # fmt: skip


def test_sentences_take_the_linear_probe_and_not_the_best(tmp_path):
    data = small()
    better = {**data["tasks"][0]["scores"][0], "probe": "finetune", "value": 0.9, "low": 0.8, "high": 0.95}
    data["tasks"][0]["scores"].insert(0, better)
    assert said(tmp_path, data)[0][1].startswith("enc (linear): AUROC 0.710")
    assert "0.900 [0.800, 0.950]" in text_of(written(tmp_path, data))


def site_of(value, low=0.9, high=0.99):
    return {"column": "scanner", "classes": 3,
            "scores": [{"encoder": "enc", "metric": "auroc", "value": value, "low": low, "high": high}]}  # fmt: skip


def test_leakage_of_the_site_is_said(tmp_path):
    leaking = [sentence for kind, sentence in said(tmp_path, small(site=site_of(0.95))) if "scanner" in sentence]
    assert leaking == ["enc predicts the scanner (AUROC 0.950) no worse than the label (AUROC 0.710): "
                       "a score of the label may rest on it."]  # fmt: skip
    text = text_of(written(tmp_path, small(site=site_of(0.95))))
    assert "enc: the scanner is predicted no worse than the label." in text
    for value, low, high, words in (
        (0.65, 0.6, 0.7, "enc: the scanner is above chance."),
        (0.72, 0.4, 0.9, "enc: the scanner is not told apart from chance."),
    ):
        text = text_of(written(tmp_path, small(site=site_of(value, low, high))))
        assert words in text and "may rest on it" not in text
    assert "The site was not predicted" in text_of(written(tmp_path, small()))


def test_findings_of_the_linter_come_first(tmp_path):
    data = small(lint=[{"code": "duplicate", "sentence": "sub-01 is in both."}])
    kind, sentence = said(tmp_path, data)[0]
    assert kind == "bad" and sentence.startswith("The linter of splits found 1 thing")
    page = written(tmp_path, data)
    assert page.index("sub-01 is in both.") < page.index("<h3>Scores</h3>")


@given(st.none() | st.floats(-1e9, 1e9))
def test_numbers_are_written_alike(value):
    text = evaluation_words.figure(value)
    assert text == "n/a" if value is None else re.fullmatch(r"−?[\d,]+\.\d{3}", text)
    assert text != "−0.000"
    if value is not None:
        assert float(text.replace(",", "").replace("−", "-")) == pytest.approx(value, abs=5.1e-4)
        assert evaluation_words.signed(value).lstrip("+") == text


@given(st.floats(0, 1))
def test_no_p_value_is_zero(p):
    text = evaluation_words.p_value(p)
    assert text == "< 0.001" if p < 0.001 else float(text) == pytest.approx(p, abs=5.1e-4)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1), st.floats(-1e3, 1e3))
def test_a_forest_plot_holds_every_value_in_order(values, line):
    axis = evaluation_figures.scale(values, [line, None], most=1.0)
    places = [axis.percent(value) for value in (*values, line)]
    assert all(0 <= place <= 100 for place in places) and list(axis.ticks) == sorted(axis.ticks)
    order = sorted(range(len(places)), key=[*values, line].__getitem__)
    assert all(places[a] <= places[b] for a, b in itertools.pairwise(order))


# ------------------------------------------------------------------------------------------------- charts


def test_charts_hold_no_name_and_are_all_there(page):
    svgs = re.findall(r"<svg(?! class).*?</svg>", page, re.S)
    assert len(svgs) == 3 + 3 * 4, "a few-shot chart for every task; three labels and the site of three encoders"
    names = [encoder["name"] for encoder in ENCODERS if encoder["name"] != "mae"]
    assert not any(name in svg for svg in svgs for name in (*names, "site A", "MCI"))
    bars = re.findall(r'<svg class="bar" aria-hidden="true" style=.*?</svg>', page)
    forests = sum(len({(s["encoder"], s["probe"]) for s in one["scores"]}) for one in record()["tasks"])
    forests += len({(s["encoder"], s["probe"]) for s in record()["tasks"][2]["scores"]})
    assert len(bars) == forests + 3 * 6 + 2 * 4
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_baselines_look_different(page):
    data = score_file.Scores.model_validate(record())
    styles = evaluation_figures.styles(data.encoders)
    grey = {name for name, style in styles.items() if style.colour == evaluation_figures.QUIET}
    assert grey == {encoder["name"] for encoder in ENCODERS if encoder["kind"] == "baseline"}
    assert len(set(styles.values())) == len(styles)
    rows = re.findall(r'<tr class="baseline">.*?</tr>', page, re.S)
    assert all(any(f">{name}</td>" in row for name in grey) for row in rows)
    assert len(rows) == 4 + 3 * (2 + 1 + 1 + 1)
    assert page.count('class="hollow"') == 4 * (2 + 1 + 1 + 1) + 3 * 3 + 4, "baselines, open differences, sites"


def test_a_map_counts_what_it_colours():
    found = score_file.Map(x=range(40), y=range(40))
    values = [None] * 4 + [f"s{i % 8}" for i in range(36)]
    legend = evaluation_figures.panel(found, values, "m")["legend"]
    assert sum(n for _, _, n in legend) == 40 and len(legend) == evaluation_figures.CLASSES + 2
    assert [text for _, text, _ in legend[-2:]] == ["2 others", "not known"] and legend[-1][2] == 4
    numeric = evaluation_figures.panel(found, [None, *map(float, range(39))], "m")
    assert numeric["range"] == (0, 38) and numeric["legend"] == [(evaluation_figures.QUIET, "not known", 1)]
    few = evaluation_figures.panel(found, [float(i % 3) for i in range(40)], "m")
    assert [(text, n) for _, text, n in few["legend"]] == [("0", 14), ("1", 13), ("2", 13)] and few["range"] is None
    many = score_file.Map(x=range(5000), y=range(5000))
    assert len(evaluation_figures.panel(many, ["a"] * 5000, "m")["chart"]) < 100_000


# ------------------------------------------------------------------------------------------------- the file


def test_names_are_text(tmp_path):
    text = json.dumps(record())
    for name in ("jepa_vcr", "histogram+volume", "diagnosis", "site A", "C=0.1", "AD comes from site B alone.", "CN",
                 "no value", "label_follows_site", "stores/ds002748", "subject bootstrap, refitting", "knn",
                 "With 47 subjects"):  # fmt: skip
        assert name in text
        text = text.replace(json.dumps(name)[1:-1], f"{name}{EVIL} $x$ é脳".replace('"', ""))
    (tmp_path / "scores.json").write_text(text)
    page = report_evaluation.write(tmp_path).read_text(encoding="utf-8")
    assert EVIL not in page and page.count("<script") == 1 and "&lt;script&gt;alert(1)" in page
    assert not any("alert" in svg or "$x$" in svg for svg in re.findall(r"<svg.*?</svg>", page, re.S))


def test_the_same_file_gives_the_same_bytes(page, tmp_path):
    assert written(tmp_path, record()) == page == written(tmp_path, record())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.html", "scores.json"]


def test_what_is_missing_is_a_sentence(tmp_path):
    bare = small(scores=[])
    text = text_of(written(tmp_path, bare))
    for words in ("There are no scores of this task.", "No encoders were compared in pairs.", "left out nothing",
                  "No few-shot curves were asked for.", "The site was not predicted", "No maps of embeddings",
                  "No encoder but baselines has a score here."):  # fmt: skip
        assert words in text
    assert "No task was evaluated." in text_of(written(tmp_path, {"schema": 1, "encoders": [], "tasks": []}))
    blank = small()
    blank["tasks"][0]["scores"][0].update(value=None, low=None, high=None)
    text = text_of(written(tmp_path, blank))
    assert "n/a no interval" in text and not re.search(r"\b(nan|None)\b", text)


def broken(change):
    data = record()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"scores\.json is not valid JSON"),
        ("[]", r"scores\.json is not what `brainscale evaluate` writes"),
        (broken(lambda d: d.update(schema=2)), r"writes \(schema: "),
        (broken(lambda d: d["tasks"][1].update(kind="ordinal")), r"\(tasks\.1\.kind: "),
        (broken(lambda d: d["tasks"][0]["scores"][3].update(encoder="mea")), r"'mea' is not among the encoders"),
        (broken(lambda d: d["encoders"][0].update(name="random")), r"two encoders are called 'random'"),
        (broken(lambda d: d["maps"]["mae"]["x"].pop()), r"maps\.mae: x, y, site and labels differ in length"),
        (broken(lambda d: d["tasks"][0]["scores"][0].update(metric="accuracy")), r"tasks\.0\.scores\.0\.metric: "),
    ],
)
def test_what_is_no_record_is_refused_in_a_sentence(text, sentence, tmp_path):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(InputError, match=sentence) as caught:
        report_evaluation.write(tmp_path / "scores.json")
    assert "\n" not in str(caught.value) and "brainscale evaluate" in str(caught.value)
    assert not (tmp_path / "scores.html").exists()


def test_the_command_takes_the_file_or_its_folder(tmp_path, capsys):
    (tmp_path / "scores.json").write_text(json.dumps(small()))
    for arguments, where in (
        ([tmp_path], tmp_path / "scores.html"),
        ([tmp_path / "scores.json", "--out", tmp_path / "other.html"], tmp_path / "other.html"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.app(["report", *map(str, arguments)])
        assert ended.value.code in (0, None) and where.is_file() and str(where) in capsys.readouterr().out
    for arguments, words in (
        ([tmp_path / "scores.json", "--out", tmp_path / "x.txt"], "cannot be the page"),
        ([tmp_path / "none.json"], "does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *map(str, arguments)])
        assert ended.value.code == 2 and words in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- a run's page


def test_a_run_s_page_has_its_scores_and_its_probes_during_training(tmp_path):
    lines = [{"step": step, "probe_auroc": None if step == 20 else 0.5 + step / 200, "probe_r2": step / 100}
             for step in (0, 20, 40, 60)]  # fmt: skip
    run = write_run(tmp_path / "run", lines=lines)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "scores.json").write_text(json.dumps(record()))
    page = report.write(run).read_text(encoding="utf-8")
    text = text_of(page)
    assert "export-b (linear): AUROC" in text and "Task: diagnosis" in text and "no scores on" not in text
    curve = re.search(r"<figcaption>AUROC of the probe</figcaption>(<svg.*?</svg>)", page, re.S).group(1)
    assert "chance" in curve and ">step<" in curve
    assert "<figcaption>R² of the probe</figcaption>" in page and "balanced accuracy of the probe" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_run_without_scores_says_so(tmp_path):
    text = text_of(report.write(write_run(tmp_path / "run")).read_text(encoding="utf-8"))
    assert "This run has no scores on labelled scans." in text and "Probes during training" not in text
