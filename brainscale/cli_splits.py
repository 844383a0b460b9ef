"""The commands `splits make|lint|contamination`."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from brainscale.settings import InputError

if TYPE_CHECKING:
    from brainscale.split_files import Split
    from brainscale.split_lint import Finding
    from brainscale.task_settings import Task
    from brainscale.tasks import Labelled

splits = App(
    name="splits",
    help="""Split subjects for evaluation, find what is wrong with a split, and who was pretrained on.

Example: brainscale splits make stores/brains --tasks configs/tasks/phantom.toml --out splits

Example: brainscale splits lint --store stores/brains --tasks configs/tasks/phantom.toml""",
    help_format="markdown",
)


@splits.command
def make(store: Path, /, *, tasks: Path, out: Path, task: tuple[str, ...] = (), seed: int = 0) -> None:
    """Write OUT/TASK.csv with the side, or the testing fold in every repeat, of every scan; print counts.

    Example: brainscale splits make stores/brains --tasks configs/tasks/phantom.toml --out splits

    Parameters
    ----------
    store
        A finished store.
    tasks
        What is asked, and how subjects are split (TOML).
    out
        Folder of the tables, which a task reads back with split = {kind = "file", file = "OUT/TASK.csv"}.
    task
        Only this task; repeatable.
    seed
        The same seed, subjects and labels give the same splits.
    """
    from brainscale.split_files import write
    from brainscale.splits import make_splits
    from brainscale.store import open_store
    from brainscale.tasks import labelled, load_tasks

    opened = open_store(store)
    found = [(one, labelled(one, opened)) for one in _chosen(load_tasks(tasks), task)]
    made = [(one, scans, make_splits(scans, seed)) for one, scans in found]
    out.mkdir(parents=True, exist_ok=True)
    for one, scans, parts in made:
        write(out / f"{one.name}.csv", scans, parts)
        print(f"{out / f'{one.name}.csv'}: {_counts(scans, parts)}")


@splits.command
def lint(
    file: Path | None = None,
    /,
    *,
    store: Path | None = None,
    tasks: Path | None = None,
    task: tuple[str, ...] = (),
    train: tuple[Path, ...] = (),
    test: tuple[Path, ...] = (),
    seed: int = 0,
) -> None:
    """Say what is wrong with a split; exit code 4 when a score on it would mean nothing.

    Looks at the splits of a table or of published lists, with the labels of a task or of the lists, and at the scans
    themselves where a store holds them.

    Example: brainscale splits lint splits/sex.csv --store stores/brains --tasks configs/tasks/ds002748.toml --task sex

    Example: brainscale splits lint --train abide_train_ids.csv --train abide_val_ids.csv --test abide_test_ids.csv

    Example: brainscale splits lint --store stores/brains --tasks configs/tasks/phantom.toml

    Parameters
    ----------
    file
        A table with columns subject_id, scan_uid, and split, fold or repeat_1 …; default: the splits that the tasks ask
        for.
    store
        A finished store with the scans, to find equal voxels and labels that follow the scanner.
    tasks
        Tasks (TOML) that say the labels; without it they are the column label of the lists, if there is one.
    task
        Only this task; repeatable.
    train
        In place of a table, a list of scans that are trained or validated on; repeatable.
    test
        A list of scans that are tested; repeatable.
    seed
        Seed of the splits that are made where no list is given.
    """
    from brainscale.split_files import from_files, read_labelled
    from brainscale.split_lint import lint as look
    from brainscale.splits import make_splits
    from brainscale.store import open_store
    from brainscale.task_settings import FilePart, SplitSettings
    from brainscale.tasks import labelled, load_tasks

    if (file is not None and (train or test)) or bool(train) != bool(test):
        raise InputError("give either one table with the sides of a split, or both --train and --test lists")
    opened = None if store is None else open_store(store)
    if tasks is None:
        if file is None and not train:
            raise InputError("nothing to look at; give a table, --train and --test lists, or --store and --tasks")
        lists = [(file, "")] if file else [*((path, "train") for path in train), *((path, "test") for path in test)]
        scans, parts, contents = read_labelled(lists, opened)
        if _report("lists", scans, parts, look(scans, parts, opened, contents)):
            sys.exit(4)
        return
    if opened is None:
        raise InputError("tasks take their labels from a store; give it with --store")
    wrong = False
    for one in _chosen(load_tasks(tasks), task):
        given: SplitSettings | None = None
        if file is not None:
            given = SplitSettings(kind="file", file=str(file))
        elif train:
            part = FilePart(train=tuple(map(str, train)), test=tuple(map(str, test)))
            given = SplitSettings(kind="file", parts=(part,))
        scans = labelled(one.model_copy(update={"split": given}) if given else one, opened)
        parts = from_files(scans) if scans.task.split.kind == "file" else make_splits(scans, seed)
        wrong |= _report(one.name, scans, parts, look(scans, parts, opened))
    if wrong:
        sys.exit(4)


@splits.command
def contamination(pretraining: Path, test: Path, /, *, out: Path | None = None) -> None:
    """Count the test subjects that were pretrained on, by cohort; exit code 4 when there are any.

    Example: brainscale splits contamination adni_pretrain_ids.csv ADNI1_AD_T1w_test.csv

    Example: brainscale splits contamination runs/mae splits/sex.csv --out seen.csv

    Parameters
    ----------
    pretraining
        What was pretrained on: a list with columns subject_id and scan_uid, a store, or a run (its training scans).
    test
        What is tested: a list or a store. Of a list with a column split, the lines of test.
    out
        File for the test scans that were seen (.csv).
    """
    from brainscale import contamination as names

    report = names.compare(names.read_source(pretraining, "pretraining"), names.tested(names.read_source(test)))
    print(report.text())
    if out is not None:
        names.write(out, report)
        print(f"listed in {out}")
    if report.found:
        sys.exit(4)


def _chosen(tasks: "list[Task]", names: tuple[str, ...]) -> "list[Task]":
    known = [task.name for task in tasks]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f'there is no task "{unknown[0]}"; the tasks are {", ".join(known)}')
    return [task for task in tasks if not names or task.name in names]


def _counts(scans: "Labelled", parts: "list[Split]") -> str:
    """Subjects (scans) of a task by class and side; of several splits, of the first."""
    lines = [f"{len(set(scans.subjects.tolist()))} subjects, {len(scans.ids)} scans, {len(parts)} split(s)"]
    if scans.left_out:
        lines.append("left out: " + ", ".join(f"{count} scan(s), {why}" for why, count in scans.left_out.items()))
    for side in ("train", "test") if parts else ():
        places = getattr(parts[0], side)
        subjects, y = scans.subjects[places], scans.y[places]
        classes = [f"{len(set(subjects[y == k].tolist()))} {name}" for k, name in enumerate(scans.classes) if name]
        counts = f"{len(set(subjects.tolist()))} subjects ({', '.join(classes)})" if classes else (
            f"{len(set(subjects.tolist()))} subjects"
        )  # fmt: skip
        lines.append(f"{side} of {parts[0].name}: {counts}, {len(places)} scans")
    lines += [f"{parts[0].name}: {count} {what}" for what, count in (parts[0].notes if parts else {}).items()]
    return "\n  ".join(lines)


def _report(name: str, scans: "Labelled", parts: "list[Split]", findings: "Iterable[Finding]") -> bool:
    """Print what was found; whether any of it is an error."""
    findings = list(findings)
    print(f"{name}: {_counts(scans, parts)}")
    for finding in findings:
        print(f"  {finding.severity.upper()} {finding.code}: {finding.sentence}")
    if not findings:
        print("  nothing found")
    return any(finding.severity == "error" for finding in findings)
