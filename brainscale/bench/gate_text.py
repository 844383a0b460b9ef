"""What `brainscale bench compare` prints."""

from collections.abc import Sequence
from pathlib import Path

from brainscale.bench.gate import Judgement, by_key
from brainscale.bench.schema import Line, Measured, Skipped, only


def text(
    files: tuple[Path, Path],
    before: Sequence[Line],
    after: Sequence[Line],
    judged: Sequence[Judgement],
    threshold: float,
) -> str:
    """The differences between the machines, a table, the lines that one file lacks, and what comes out."""
    lines = [f"{files[0]} (before) and {files[1]} (after); slower is {threshold:.0%} more time against the reference"]
    lines += surroundings(before, after) + table(judged) + absent(files, before, after)
    counts = {word: sum(one.verdict == word for one in judged) for word in dict.fromkeys(one.verdict for one in judged)}
    summary = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    failed = [one for one in judged if one.failed]
    lines += ["", f"{len(judged)} lines: {summary or 'nothing to judge'}"]
    lines += [f"regression: {'; '.join((*one.key[:2], name(one)))}: {change_text(one)}" for one in failed]
    return "\n".join(lines)


def table(judged: Sequence[Judgement]) -> list[str]:
    """A row per line under its case."""
    lines, case = [], ""
    width = max((len(name(one)) for one in judged), default=0)
    heads = ("before", "after", "change [interval]")
    lines += ["", f"{'':{width + 2}} {heads[0]:>10} {heads[1]:>10}  {heads[2]:<26} verdict"]
    for one in judged:
        if (title := f"{one.key[0]}: {one.key[1]}") != case:
            case = title
            lines.append(title)
        verdict = f"{one.verdict}{f' ({one.why})' if one.why else ''}"
        lines.append(
            f"  {name(one):<{width}} {one.before:10.4g} {one.after:10.4g}  {change_text(one):<26} {verdict}".rstrip()
        )
    return lines


def name(one: Judgement) -> str:
    """Of the row: a variant, or what the reference is ours to."""
    return f"ours to {one.key[2]}" if one.turned else one.key[2]


def change_text(one: Judgement) -> str:
    """The change with its interval, in per cent."""
    if one.change is None:
        return ""
    if one.low is None or one.high is None:
        return f"{100 * one.change:+.4g} %"
    return f"{100 * one.change:+.1f} % [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def surroundings(before: Sequence[Line], after: Sequence[Line]) -> list[str]:
    """What differs between where the sides were measured, a line each."""
    found = []
    for what in ("cpu", "cores", "gpu", "driver"):
        old, new = ({str(getattr(line.machine, what)) for line in lines} for lines in (before, after))
        if old != new:
            found.append(f"another {what}: {', '.join(sorted(old))} → {', '.join(sorted(new))}")
    old_versions, new_versions = (versions(lines) for lines in (before, after))
    for name in sorted({*old_versions, *new_versions}):
        old, new = old_versions.get(name, {"none"}), new_versions.get(name, {"none"})
        if old != new:
            found.append(f"another {name}: {', '.join(sorted(old))} → {', '.join(sorted(new))}")
    commits = [", ".join(sorted({line.commit[:8] or "none" for line in lines})) for lines in (before, after)]
    return [*found, f"commit: {commits[0]} → {commits[1]}"]


def versions(lines: Sequence[Line]) -> dict[str, set[str]]:
    """All versions of each library."""
    found: dict[str, set[str]] = {}
    for line in lines:
        for name, version in line.versions.items():
            found.setdefault(name, set()).add(version)
    return found


def absent(files: tuple[Path, Path], before: Sequence[Line], after: Sequence[Line]) -> list[str]:
    """Lines that were measured in one file alone, with the reason where it was skipped in the other."""
    found = []
    for here, lines, other in ((files[0], before, after), (files[1], after, before)):
        there = by_key(other)
        why = {(line.bench, line.case, line.variant): line.skipped for line in only(other, Skipped)}
        alone = [key for key in by_key(lines) if key not in there]
        found += [f"  {'; '.join(key)}{f' (skipped in the other: {why[key]})' if key in why else ''}" for key in alone]
        if alone:
            found.insert(len(found) - len(alone), f"only in {here}, not judged:")
    return ["", *found] if found else []


def in_common(before: Sequence[Line], after: Sequence[Line]) -> bool:
    """Whether any line was measured on both sides."""
    return bool(by_key(only(before, Measured)).keys() & by_key(only(after, Measured)).keys())
