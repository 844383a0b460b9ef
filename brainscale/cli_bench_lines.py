"""The commands of `brainscale bench` that measure all, and that judge or show what was measured."""

import sys
from pathlib import Path

from brainscale.cli_data import share
from brainscale.settings import InputError


def everything(*, quick: bool = False, json: Path | None = None) -> None:
    """Run convert, read, loader, kernels, step, scaling and checkpoint in turn, each in a process of its own, and say
    what was measured, and what needs a GPU or a peer that is not installed.

    Each measures against what one would pick instead; its own --help says what. One that fails is a line with the
    reason, keeps nothing from the others, and makes the exit code 1.

    Example: brainscale bench all --quick --json before.jsonl

    Parameters
    ----------
    quick
        Small inputs and few rounds: under 10 minutes on 2 cores without a GPU.
    json
        File that the lines are appended to, after each benchmark.
    """
    from brainscale.bench import everything as bench_everything

    if bench_everything.run(quick, json):
        sys.exit(1)


def compare(before: Path, after: Path, /, *, threshold: str = "10%") -> None:
    """Judge whether anything became slower beyond doubt: exit code 4 when something did.

    Lines are matched by benchmark, case and variant; what is judged is their ratio to the reference of the same run,
    with its spread, so that another machine's pace cancels. Counted bytes are compared exactly. With 95 % all intervals
    hold at once. A file may hold several runs of the same lines (--json appends), which makes the answer sharper.

    Example: brainscale bench compare before.jsonl after.jsonl --threshold 10%

    Parameters
    ----------
    before
        Lines of the older state.
    after
        Lines of the newer one.
    threshold
        How much more time (or bytes) is a regression, e.g. 10% or 0.1.
    """
    from brainscale.bench import gate, gate_text, schema

    limit = share(threshold, "--threshold")
    if not limit:
        raise InputError(f"--threshold {threshold!r} leaves no room for noise; give e.g. 10% or 0.1")
    old, new = schema.read(before), schema.read(after)
    if not gate_text.in_common(old, new):
        raise InputError(f"{before} and {after} have no measured line in common; give two files of the same benchmarks")
    judged = gate.judge(old, new, limit)
    print(gate_text.text((before, after), old, new, judged, limit))
    if any(one.failed for one in judged):
        sys.exit(4)


def markdown(*files: Path) -> None:
    """Print the README's table of what was measured.

    Example: brainscale bench markdown

    Parameters
    ----------
    files
        Files of lines. None: those kept in brainscale/bench/results of the checkout.
    """
    from brainscale.bench import schema, table

    print(table.markdown([line for file in files or table.kept() for line in schema.read(file)]), end="")


def schema() -> None:
    """Print the JSON schema (draft 2020-12) that every line of --json meets.

    Example: brainscale bench schema > lines.schema.json
    """
    from brainscale.bench.schema import json_schema

    print(json_schema(), end="")
