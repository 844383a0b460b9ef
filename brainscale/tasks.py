"""The labels that a task gives to the scans of a store.

Scans without a usable label are left out, and counted with the reason.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from brainscale.settings import InputError
from brainscale.store import Store
from brainscale.store_files import COLUMNS, SCANS
from brainscale.stores import Stores
from brainscale.task_settings import SplitSettings as SplitSettings
from brainscale.task_settings import Task as Task
from brainscale.task_settings import canonical
from brainscale.task_settings import load_tasks as load_tasks

MISSING = frozenset({"", "n/a", "na", "nan"})
"""What tables write where there is no value, in lower case."""
SITES = ("site", "scanner")
"""Participant columns that are taken as the site where a task names none, the first that there is."""
LISTED = 6


@dataclass(frozen=True)
class Labelled:
    """The scans of a task, in row order; every array is (n,)."""

    task: Task
    rows: np.ndarray
    """int64 rows of the store."""
    ids: np.ndarray
    subjects: np.ndarray
    """Whose scan it is; a scan that names no subject is a subject of its own."""
    y: np.ndarray
    """int64 class, or float64 value of a regression."""
    classes: tuple[str, ...]
    """None for a regression."""
    sites: np.ndarray
    """"" where it is unknown."""
    left_out: dict[str, int]
    """Reason → scans of the store that the task does not use."""
    groups: np.ndarray
    """Subjects that share voxels under several names are one group; a split never parts a group."""

    def class_counts(self) -> dict[str, int]:
        """Class → subjects that have a scan of it; empty for a regression."""
        return {name: len(set(self.subjects[self.y == at].tolist())) for at, name in enumerate(self.classes)}


def labelled(task: Task, store: Store | Stores) -> Labelled:
    """The scans of a store that a task can use, with their labels.

    Raises InputError for a column that the store lacks, values that cannot be labels, fewer than two classes, and
    subjects of several classes unless the task says what to do with them.
    """
    raw = _participant(store, task.column, f'task "{task.name}"')
    ids, subjects = store.column("id").astype(str), named_subjects(store)
    reasons = np.full(len(ids), "", dtype=object)
    for name, wanted in task.where.items():
        values = _any_column(store, name, task)
        keep = np.isin(values.astype(str), [canonical(value) for value in wanted])
        if not keep.any():
            raise InputError(
                f'task "{task.name}": no scan has {name} {some(canonical(v) for v in wanted)}; the values are '
                f"{some(sorted(set(values)))}"
            )
        _leave_out(reasons, ~keep, f"another {name}")
    _leave_out(reasons, np.array([value.lower() in MISSING for value in raw]), f"no {task.column}")
    y, classes = (
        (_numbers(task, raw, reasons), ()) if task.kind == "regression" else _classes(task, raw, reasons)
    )  # fmt: skip
    if classes:
        _settle_conflicts(task, y, subjects, store.column("session"), classes, reasons)
    kept = np.flatnonzero(reasons == "")
    found = Labelled(
        task, store.rows[kept], ids[kept], subjects[kept], y[kept], classes, _sites(task, store)[kept],
        dict(Counter(reason for reason in reasons.tolist() if reason)), groups_of(store, subjects)[kept],
    )  # fmt: skip
    if empty := [name for name, count in found.class_counts().items() if not count]:
        raise InputError(
            f'task "{task.name}": no scan left is of class {some(empty)} (column {task.column} has the values '
            f"{some(sorted(set(raw)))}; left out: {found.left_out or 'none'}); correct labels or where"
        )
    if len(set(found.subjects.tolist())) < 2:
        raise InputError(f'task "{task.name}": fewer than 2 subjects have a usable {task.column} ({found.left_out})')
    return found


def named_subjects(store: Store | Stores) -> np.ndarray:
    """(rows,) the subject that each scan names, or its own id where it names none."""
    return np.array([subject or scan for subject, scan in zip(store.column("subject"), store.column("id"))], dtype=str)


def groups_of(store: Store | Stores, subjects: np.ndarray) -> np.ndarray:
    """(rows,) the first, in alphabetical order, of all subjects that equal voxels join, directly or through others."""
    parent = {subject: subject for subject in subjects.tolist()}

    def root(subject: str) -> str:
        while parent[subject] != subject:
            subject = parent[subject]
        return subject

    owner = dict(zip(store.column("id").tolist(), subjects.tolist()))
    for subject, twin in zip(subjects.tolist(), store.column("duplicate_of").tolist()):
        if twin and twin in owner:
            first, second = sorted((root(subject), root(owner[twin])))
            parent[second] = first
    return np.array([root(subject) for subject in subjects.tolist()], dtype=str)


def site_column(task: Task, store: Store | Stores) -> str:
    """The participant column that names sites; "" where there is none. Raises InputError when the task names one that
    the store lacks."""
    if task.site_column:
        _participant(store, task.site_column, f'task "{task.name}": site_column')
        return task.site_column if task.site_column in participant_names(store) else task.site_column.lower()
    names = participant_names(store)
    return next((name for name in SITES if name in names), "")


def participant_names(store: Store | Stores) -> list[str]:
    """Participant columns, without "participant_", that the store (or each of several) has."""
    stores = store.stores if isinstance(store, Stores) else [store]
    columns = [pq.read_schema(one.path / SCANS).names for one in stores]
    prefix = "participant_"
    return [n.removeprefix(prefix) for n in columns[0] if n.startswith(prefix) and all(n in c for c in columns)]


def _sites(task: Task, store: Store | Stores) -> np.ndarray:
    name = site_column(task, store)
    if not name:
        return np.full(len(store.rows), "", dtype=str)
    values = _participant(store, name, "")
    return np.array(["" if value.lower() in MISSING else value for value in values], dtype=str)


def _participant(store: Store | Stores, name: str, whose: str) -> np.ndarray:
    """A participant column as canonical strings."""
    try:  # conversion writes the names of columns in lower case
        values = store.column(f"participant_{name if name in participant_names(store) else name.lower()}")
    except InputError as error:
        raise InputError(
            f'{whose} asks for the participant column "{name}": {error}; convert with --participants {name},… to keep '
            "it, or name another"
        ) from None
    return np.array([canonical(value) for value in values], dtype=object)


def _any_column(store: Store | Stores, name: str, task: Task) -> np.ndarray:
    """A column of scans.parquet, or the participant column of that name, as canonical strings."""
    if name not in COLUMNS:
        return _participant(store, name, f'task "{task.name}": where')
    return np.array([canonical(value) for value in store.column(name).tolist()], dtype=object)


def _leave_out(reasons: np.ndarray, mask: np.ndarray, reason: str) -> None:
    """Give scans a reason to be left out; the first one stays."""
    reasons[mask & (reasons == "")] = reason


def _numbers(task: Task, raw: np.ndarray, reasons: np.ndarray) -> np.ndarray:
    y = np.full(len(raw), np.nan)
    for at in np.flatnonzero(reasons == ""):
        try:
            y[at] = float(raw[at])
        except ValueError:
            pass
    bad = ~np.isfinite(y) & (reasons == "")
    if bad.any() and task.unlisted == "refuse":
        raise InputError(
            f'task "{task.name}": {task.column} {some(sorted(set(raw[bad])))} of {int(bad.sum())} scan(s) is not a '
            'number; correct the table, or set unlisted = "leave_out"'
        )
    _leave_out(reasons, bad, f"{task.column} is not a number")
    return y


def _classes(task: Task, raw: np.ndarray, reasons: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    present = sorted(set(raw[reasons == ""].tolist()))
    if not task.labels and (len(present) < 2 or (task.kind == "binary" and len(present) != 2)):
        wanted = "2 values" if task.kind == "binary" else "2 values or more"
        raise InputError(
            f'task "{task.name}": {task.kind} without labels takes a column of {wanted}, {task.column} has '
            f"{len(present)} ({some(present)}); say in labels which value is which class"
        )
    names = task.labels or {value: [value] for value in present}
    number = {canonical(value): at for at, values in enumerate(names.values()) for value in values}
    y = np.array([number.get(value, -1) for value in raw], dtype=np.int64)
    bad = (y < 0) & (reasons == "")
    if bad.any() and task.unlisted == "refuse":
        raise InputError(
            f'task "{task.name}": no class of labels names {task.column} {some(sorted(set(raw[bad])))} of '
            f'{int(bad.sum())} scan(s); add them to labels, or set unlisted = "leave_out"'
        )
    _leave_out(reasons, bad, f"{task.column} is in no class")
    return y, tuple(names)


def _settle_conflicts(
    task: Task, y: np.ndarray, subjects: np.ndarray, sessions: np.ndarray, classes: tuple[str, ...], reasons: np.ndarray
) -> None:
    """Leave out scans until every subject is of one class."""
    used = np.flatnonzero(reasons == "")
    order = used[np.argsort(subjects[used], kind="stable")]
    for scans in np.split(order, np.flatnonzero(subjects[order][1:] != subjects[order][:-1]) + 1):
        if not len(scans) or len(set(y[scans].tolist())) == 1:
            continue
        names, whose = some(classes[k] for k in sorted(set(y[scans].tolist()))), subjects[scans[0]]
        if task.conflict == "refuse":
            raise InputError(
                f'task "{task.name}": subject {whose} has scans of the classes {names}; set conflict = "leave_out", '
                '"first_session" or "last_session"'
            )
        if task.conflict == "leave_out":
            reasons[scans] = "subject of several classes"
            continue
        keys = [session_key(sessions[at]) for at in scans]
        chosen = min(keys) if task.conflict == "first_session" else max(keys)
        kinds = {int(y[at]) for at, key in zip(scans, keys) if key == chosen}
        if len(kinds) > 1:
            raise InputError(
                f'task "{task.name}": subject {whose} has scans of the classes {names} in one session '
                f'({sessions[scans[keys.index(chosen)]]!r}); correct the table, or set conflict = "leave_out"'
            )
        reasons[scans[y[scans] != kinds.pop()]] = f"another class than in the {task.conflict.replace('_', ' ')}"


def session_key(session: str | None) -> tuple[tuple[int, float, str], ...]:
    """Sorts session names as people do: numbers in them by value ("m6" before "m12"), no name first."""
    pieces = re.findall(r"\d+|\D+", session or "")
    return tuple((0, float(piece), "") if piece.isdigit() else (1, 0.0, piece) for piece in pieces)


def some(values: Iterable[str]) -> str:
    """Values in quotes, the first of them where there are many."""
    texts = list(values)
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return ", ".join(f'"{text}"' for text in texts[:LISTED]) + more
