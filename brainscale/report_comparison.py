"""The page of `brainscale compare`, drawn from compare.json alone: its two tables, and what they leave open.

The words are in report_comparison.html.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from brainscale.evaluation_figures import Style, scale, styles
from brainscale.evaluation_words import METRICS, MOST, difference, figure, interval, p_value, signed
from brainscale.pages import put, render
from brainscale.score_file import Encoder, Metric, Number, Paired, Part, parse

NAME = "compare.json"
TITLES = {"equal_samples": "Equal samples seen", "equal_flops": "Equal training FLOPs"}


class Row(Part):
    """The score of an arm or a baseline on a task: mean over seeds, with its 95 % interval."""

    task: str
    arm: str
    metric: Metric
    value: Number
    low: Number = None
    high: Number = None
    seeds: int
    test_subjects: int | None = None


class Pair(Part):
    """a − b on a task."""

    task: str
    a: str
    b: str
    difference: Number
    low: Number = None
    high: Number = None
    p: Number = None


class Compared(Part):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    probe: str = "linear"
    planted: bool = False
    batch_volumes: int | None = None
    steps: dict[str, dict[str, int]] = Field(default_factory=dict)
    flops_per_sample: dict[str, float] = Field(default_factory=dict)
    tables: dict[str, tuple[Row, ...]]
    paired: dict[str, tuple[Pair, ...]] = Field(default_factory=dict)


def write(path: Path, out: Path | None = None) -> Path:
    """Write the page of a compare.json (or of the folder that has one), by default to compare.html beside it.

    The same file gives the same bytes. Raises InputError when it is none.
    """
    file = path / NAME if path.is_dir() else path
    found = parse(Compared, file, "brainscale compare")
    return put(render("report_comparison.html", c=found, e=view(found)), out or file.with_suffix(".html"))


def view(found: Compared) -> dict[str, Any]:
    """What the template shows."""
    names = list(dict.fromkeys((*found.arms, *(row.arm for rows in found.tables.values() for row in rows))))
    drawn_as = styles([Encoder(name=name, kind="run" if name in found.arms else "baseline") for name in names])
    tables = [table(found, key, drawn_as) for key in TITLES if key in found.tables]
    return {"tables": tables, "styles": drawn_as, "baselines": set(names) - set(found.arms), "figure": figure,
            "interval": interval, "signed": signed, "p_value": p_value}  # fmt: skip


def table(found: Compared, key: str, drawn_as: dict[str, Style]) -> dict[str, Any]:
    """One of the two tables: the cost of every arm, a forest plot of every task, the differences of every two arms."""
    rows, metric_of = found.tables[key], {row.task: row.metric for row in found.tables[key]}
    pairs: list[dict[str, Any]] = []
    for pair in found.paired.get(key, ()):
        judged = Paired(probe=found.probe, metric=metric_of[pair.task], **pair.model_dump(exclude={"task"}))
        pairs.append({"pair": pair, "metric": METRICS[judged.metric][0], "verdict": difference(judged)})
    forests = []
    for task, metric in metric_of.items():
        mine = [row for row in rows if row.task == task]
        axis = scale([end for row in mine for end in (row.value, row.low, row.high)],
                     [0.5] if metric == "auroc" else [], most=MOST.get(metric))  # fmt: skip
        marks = [{"encoder": row.arm, "mark": axis.mark(row.value, row.low, row.high),
                  "text": f"{figure(row.value)} {interval(row.low, row.high)}"} for row in mine]  # fmt: skip
        forests.append({"title": task, "metric": METRICS[metric][0], "less": not METRICS[metric][1], "axis": axis,
                        "line": axis.percent(0.5) if metric == "auroc" else None, "rows": marks})  # fmt: skip
    batch, steps = found.batch_volumes or 0, found.steps.get(key, {})
    costs = [{"arm": arm, "steps": steps[arm], "samples": steps[arm] * batch or None,
              "flops": steps[arm] * batch * found.flops_per_sample.get(arm, 0.0) or None}
             for arm in found.arms if arm in steps]  # fmt: skip
    apart = [pair for pair in pairs if pair["verdict"].kind != "past"]
    return {"title": TITLES[key], "rows": rows, "names": {m: METRICS[m][0] for m in metric_of.values()},
            "pairs": pairs, "apart": apart, "forests": forests, "costs": costs}  # fmt: skip
