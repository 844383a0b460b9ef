"""Settings of tasks and splits: TASKS.toml is a list of `[[tasks]]`.

Values of participant columns are strings; two that are the same number are the same value ("1" and "1.0").
"""

import math
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from brainscale.settings import Model, load

Value = str | int | float


class FilePart(Model):
    """One split that was published as separate id lists; lists to validate on belong to `train`."""

    train: tuple[str, ...] = Field(min_length=1)
    test: tuple[str, ...] = Field(min_length=1)


class SplitSettings(Model):
    """Who is trained on and who is tested."""

    kind: Literal["auto", "holdout", "cross_validation", "file"] = "auto"
    """auto: cross-validation where a held-out test set would have fewer than 200 subjects, else holdout."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """holdout: share of subjects that are tested."""
    folds: int = Field(default=5, ge=2)
    """cross_validation: every subject is tested once in each repeat."""
    repeats: int = Field(default=10, ge=1)
    """cross_validation: how often subjects are dealt to folds anew."""
    site_disjoint: bool = False
    """All subjects of a site on one side."""
    file: str = ""
    """file: one table with columns subject_id or scan_uid and split (train, val, test), or repeat_1, repeat_2 … or fold
    (numbers of the fold that tests). `splits make` writes such tables."""
    parts: tuple[FilePart, ...] = ()
    """file: in place of `file`, id lists that were published in pieces, one entry per fold."""

    @model_validator(mode="after")
    def _agree(self) -> "SplitSettings":
        if (self.kind == "file") != (bool(self.file) != bool(self.parts)):
            raise ValueError(
                'split.kind = "file" needs either split.file or split.parts, and the other kinds neither; got '
                f'kind = "{self.kind}", file = "{self.file}" and {len(self.parts)} parts'
            )
        return self


class Task(Model):
    """One question: a participant column, and what its values mean."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    kind: Literal["binary", "multiclass", "regression"]
    column: str
    """Participant column, without "participant_"; upper and lower case are the same."""
    labels: dict[str, list[Value]] = Field(default={})
    """Class → the values that mean it, in the order of the classes; of two, the last is the positive one. Without it
    every value is a class of its own, in alphabetical order."""
    unlisted: Literal["leave_out", "refuse"] = "leave_out"
    """What is done with scans whose value no class names."""
    where: dict[str, list[Value]] = Field(default={})
    """Only scans with one of these values, by column of scans.parquet or participant column, e.g. contrast."""
    conflict: Literal["refuse", "leave_out", "first_session", "last_session"] = "refuse"
    """What is done with a subject whose scans are of several classes, as when a disease begins between sessions:
    leave_out leaves the subject out; first_session (last_session) keeps the scans of the class that the subject has in
    the first (last) session. Values of a regression may differ from scan to scan, as age does."""
    site_column: str = ""
    """Participant column that names the site; default: site, else scanner, if there is one."""
    split: SplitSettings = SplitSettings()

    @model_validator(mode="after")
    def _agree(self) -> "Task":
        if self.kind == "regression" and self.labels:
            raise ValueError(f'task "{self.name}": a regression has no labels; its values are numbers')
        if self.kind == "binary" and self.labels and len(self.labels) != 2:
            raise ValueError(f'task "{self.name}": a binary task has 2 labels, got {", ".join(self.labels)}')
        if self.kind == "multiclass" and len(self.labels) == 1:
            raise ValueError(f'task "{self.name}": a multiclass task needs at least 2 labels')
        taken = Counter(canonical(value) for values in self.labels.values() for value in values)
        if twice := [value for value, count in taken.items() if count > 1]:
            raise ValueError(f'task "{self.name}": the value "{twice[0]}" is named twice in labels; name it once')
        return self


class TaskList(Model):
    """The content of TASKS.toml."""

    tasks: tuple[Task, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _agree(self) -> "TaskList":
        if twice := [name for name, count in Counter(task.name for task in self.tasks).items() if count > 1]:
            raise ValueError(f'two tasks are named "{twice[0]}"; give each its own name')
        return self


def load_tasks(path: str | Path) -> list[Task]:
    """The tasks of a file. Raises InputError as `settings.load`."""
    return list(load(TaskList, path).tasks)


def canonical(value: Value | None) -> str:
    """A value as it is compared: without spaces around it, numbers in one way of writing."""
    text = "" if value is None else str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return text if "_" in text or not math.isfinite(number) else repr(int(number) if number.is_integer() else number)
