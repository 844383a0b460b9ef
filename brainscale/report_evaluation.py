"""The page of an evaluation, drawn from scores.json and nothing else; a run's page has the same section.

The words are in report_evaluation.html, for the section in report_scores.html, and in evaluation_words.py.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from brainscale import score_file
from brainscale.evaluation_figures import Style, few_shot, panel, scale, styles
from brainscale.evaluation_words import (
    METRICS,
    MOST,
    against,
    chance,
    difference,
    figure,
    headline,
    interval,
    p_value,
    place,
    probe_name,
    signed,
    verdicts,
)
from brainscale.pages import put, render
from brainscale.score_file import Paired, Scores, TaskScores, Valued
from brainscale.settings import InputError


def write(scores_path: Path, out: Path | None = None) -> Path:
    """Write the page of a scores.json (or of the folder that has one), by default to scores.html beside it.

    The same file gives the same bytes. Raises InputError when it is no record of scores, or when `out` cannot be a
    page.
    """
    scores = score_file.read(scores_path)
    folder = scores_path if scores_path.is_dir() else scores_path.parent
    out = out or folder / "scores.html"
    if out.suffix != ".html" or out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out {out} cannot be the page; give FILE.html in a folder that exists")
    return put(render("report_evaluation.html", evaluation=view(scores)), out)


def section(run_dir: Path) -> dict[str, Any] | None:
    """What a run's page says of RUN/evaluation/scores.json; None where it is absent."""
    path = run_dir / "evaluation" / score_file.NAME
    return view(score_file.read(path)) if path.is_file() else None


def view(scores: Scores) -> dict[str, Any]:
    """What the templates show."""
    drawn_as = styles(scores.encoders)
    baselines = {encoder.name for encoder in scores.encoders if encoder.kind == "baseline"}
    tasks = [task_view(at, task, drawn_as, baselines) for at, task in enumerate(scores.tasks)]
    return {
        "scores": scores,
        "styles": drawn_as,
        "baselines": baselines,
        "tasks": tasks,
        "maps": maps(scores),
        "intervals": sum(len(task.scores) + len(task.paired) for task in scores.tasks),
        "figure": figure,
        "interval": interval,
        "signed": signed,
        "p_value": p_value,
        "probe": probe_name,
    }


# ------------------------------------------------------------------------------------------------- a task


def task_view(number: int, task: TaskScores, drawn_as: dict[str, Style], baselines: set[str]) -> dict[str, Any]:
    """What the page shows of a task; number: its place, which makes the names of its charts differ from others'."""
    metrics = [metric for metric in METRICS if any(score.metric == metric for score in task.scores)]
    order = {name: at for at, name in enumerate(drawn_as)}
    probes = sorted({score.probe for score in task.scores}, key=place)
    rows = []
    for probe in probes:
        for encoder in sorted({s.encoder for s in task.scores if s.probe == probe}, key=order.__getitem__):
            found = {s.metric: s for s in task.scores if s.probe == probe and s.encoder == encoder}
            chosen = " · ".join(dict.fromkeys(s.chosen for s in found.values() if s.chosen))
            rows.append({"encoder": encoder, "probe": probe, "scores": found, "chosen": chosen})
    shown = [m for m in metrics if m in ("auroc", "mae", "r2")]
    return {
        "task": task,
        "metrics": [
            (metric, METRICS[metric][0], any(s.p_permutation is not None for s in task.scores if s.metric == metric))
            for metric in metrics
        ],
        "rows": rows,
        "verdicts": verdicts(task, list(drawn_as), baselines),
        "forests": [forest(metric, rows, chance(metric, task)) for metric in shown],
        "differences": [
            differences([pair for pair in task.paired if pair.metric == metric], metric)
            for metric in METRICS
            if metric in {pair.metric for pair in task.paired}
        ],
        "few_shot": curves(number, task, drawn_as),
        "site": site(task, drawn_as),
        "methods": list(dict.fromkeys(score.method for score in task.scores if score.method)),
        "permutations": sorted({score.permutations for score in task.scores if score.permutations}),
    }


def forest(metric: str, rows: list[dict[str, Any]], line: float | None) -> dict[str, Any]:
    """A forest plot of a metric, grouped by probe; line: where chance lies."""
    kept = [(row, score) for row in rows if (score := row["scores"].get(metric))]
    axis = scale([end for _, s in kept for end in (s.value, s.low, s.high)], [line], most=MOST.get(metric))
    groups = []
    for probe, members in groupby(kept, key=lambda pair: pair[0]["probe"]):
        marks = [
            {"encoder": row["encoder"], "mark": axis.mark(s.value, s.low, s.high),
             "text": f"{figure(s.value)} {interval(s.low, s.high)}"}
            for row, s in members
        ]  # fmt: skip
        groups.append({"title": f"{probe_name(probe)} probe" if probe not in ("finetune", "cnn") else probe_name(probe),
                       "rows": marks})  # fmt: skip
    return {"title": METRICS[metric][0], "axis": axis, "line": axis.percent(line), "groups": groups,
            "line_text": None if line is None else f"chance, {line:g}", "less": not METRICS[metric][1]}  # fmt: skip


def differences(pairs: Sequence[Paired], metric: str) -> dict[str, Any]:
    """The paired differences in a metric: a table, and a forest plot around zero."""
    axis = scale([end for pair in pairs for end in (pair.difference, pair.low, pair.high)], [0.0])
    rows = [
        {"pair": pair, "mark": axis.mark(pair.difference, pair.low, pair.high),
         "open": difference(pair).kind == "past",
         "text": f"{signed(pair.difference)} {interval(pair.low, pair.high, signed)}"}
        for pair in pairs
    ]  # fmt: skip
    return {"title": METRICS[metric][0], "less": not METRICS[metric][1], "axis": axis, "line": axis.percent(0.0),
            "rows": rows}  # fmt: skip


def curves(number: int, task: TaskScores, drawn_as: dict[str, Style]) -> list[dict[str, Any]]:
    """A few-shot chart for every probe and metric."""
    kinds = sorted({(s.probe, s.metric) for s in task.few_shot}, key=lambda kind: (place(kind[0]), kind[1]))
    found, across = [], "labelled subjects" + (" per class" if task.kind != "regression" else "")
    for at, (probe, metric) in enumerate(kinds):
        points = [s for s in task.few_shot if (s.probe, s.metric) == (probe, metric)]
        mine = {name: style for name, style in drawn_as.items() if name in {s.encoder for s in points}}
        svg = few_shot(points, mine, chance(metric, task), (across, METRICS[metric][0]), f"few-{number}-{at}")
        found.append({"title": f"{METRICS[metric][0]}, {probe_name(probe)} probe", "chart": svg, "encoders": mine,
                      "draws": sorted({s.draws for s in points if s.draws})})  # fmt: skip
    return found


def site(task: TaskScores, drawn_as: dict[str, Style]) -> dict[str, Any] | None:
    """How well the site is predicted from the same features, beside the label; None where it was not measured."""
    if task.site is None:
        return None
    rows: list[dict[str, Any]] = []
    for name in drawn_as:
        for score in task.site.scores:
            if score.encoder == name:
                label = headline(task, name, score.metric)
                rows.append({"encoder": name, "site": score, "label": label, "word": against(score, 0.5),
                             "as_high": label is not None and leaks(score, label)})  # fmt: skip
    ends = [end for row in rows for s in (row["site"], row["label"]) if s for end in (s.value, s.low, s.high)]
    axis = scale(ends, [0.5], most=1.0)
    for row in rows:
        row["marks"] = [(what, axis.mark(s.value, s.low, s.high), f"{figure(s.value)} {interval(s.low, s.high)}")
                        for what, s in (("label", row["label"]), ("site", row["site"])) if s]  # fmt: skip
    return {"rows": rows, "axis": axis, "line": axis.percent(0.5)}


def leaks(site_score: Valued, label: Valued) -> bool:
    """Whether the site is told apart from chance and predicted at least as well as the label."""
    if site_score.value is None or label.value is None:
        return False
    return against(site_score, 0.5) == "above chance" and site_score.value >= label.value


def maps(scores: Scores) -> list[dict[str, Any]]:
    """The maps of embeddings: for every encoder a panel for every label, and one for the site."""
    found = []
    for at, (name, points) in enumerate(scores.maps.items()):
        columns = [(f"label: {label}", values) for label, values in points.labels.items()]
        columns += [("site", points.site)] if any(points.site) else []
        panels = [{"title": title, **panel(points, values, f"map-{at}-{j}")}
                  for j, (title, values) in enumerate(columns or [("", [None] * len(points.x))])]  # fmt: skip
        found.append({"encoder": name, "panels": panels, "points": len(points.x)})
    return found
