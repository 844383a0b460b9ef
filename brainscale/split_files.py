"""Splits as files: tables that `splits make` writes, and id lists that others published."""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from brainscale import id_lists
from brainscale.provenance import write_text
from brainscale.settings import InputError
from brainscale.store import Store
from brainscale.stores import Stores
from brainscale.tasks import Labelled, SplitSettings, Task


@dataclass(frozen=True)
class Split:
    """Scans of a task (places in `Labelled`) that are trained on and tested; sorted, disjoint."""

    name: str
    train: np.ndarray
    test: np.ndarray
    notes: dict[str, int] = field(default_factory=dict)
    """Of a split from files: what did not fit the store, with numbers."""


def from_files(labelled: Labelled) -> list[Split]:
    """The splits that a task's files describe, as they are: a subject may be on both sides (`split_lint` says so).

    Raises InputError for files that cannot be read or that share nothing with the scans of the task.
    """
    settings = labelled.task.split
    if settings.file:
        table = id_lists.read_list(settings.file)
        return [
            _sided(labelled, name, [(table, sides)]) for name, sides in _columns_of_sides(table).items()
        ]  # fmt: skip
    splits = []
    for number, part in enumerate(settings.parts, 1):
        lists = [(file, side) for side, files in (("train", part.train), ("test", part.test)) for file in files]
        tables = [(id_lists.read_list(file), side) for file, side in lists]
        sided = [(table, np.full(len(table.scans), side)) for table, side in tables]
        splits.append(_sided(labelled, f"fold-{number}" if len(settings.parts) > 1 else "holdout", sided))
    return splits


def _columns_of_sides(table: id_lists.IdList) -> dict[str, np.ndarray]:
    """Split → (n,) "train", "test" or "" of every line of a table."""
    sides = {"train": "train", "val": "train", "valid": "train", "validation": "train", "dev": "train", "test": "test"}
    if (column := table.column("split")) is not None:
        return {"holdout": np.array([sides.get(value.lower(), "") for value in column.tolist()])}
    names = sorted(name for name in table.columns or {} if name == "fold" or name.startswith("repeat_"))
    found = {}
    for name in names:
        column = table.column(name)
        assert column is not None
        for fold in sorted(set(column.tolist()) - {""}, key=lambda text: (len(text), text)):
            tested = np.where(column == fold, "test", "train")
            found[f"{name.replace('_', '-')}_fold-{fold}"] = np.where(column == "", "", tested)
    if not found:
        raise InputError(
            f"{table.source} has the columns {', '.join(table.columns or {})}; a split needs a column split (train, "
            "val, test), fold, or repeat_1, repeat_2 …"
        )
    return found


def _sided(labelled: Labelled, name: str, lists: Sequence[tuple[id_lists.IdList, np.ndarray]]) -> Split:
    """A split from lists with the side of each line. Scans are matched by id; by subject where no scan's id fits."""
    scans = {"train": set(), "test": set()}  # type: dict[str, set[str]]
    people = {"train": [], "test": []}  # type: dict[str, list[id_lists.Subject]]
    for table, sides in lists:
        for scan, subject, side in zip(table.scans.tolist(), table.names(), sides.tolist()):
            if side:
                scans[side].add(id_lists.scan_name(scan))
                people[side].append(subject)
    ours = np.array([id_lists.scan_name(scan) for scan in labelled.ids.tolist()])
    masks = {side: np.isin(ours, sorted(named - {""})) for side, named in scans.items()}
    notes = {}
    listed = len((scans["train"] | scans["test"]) - {""})
    if found := len(set(ours[masks["train"] | masks["test"]].tolist())):
        notes["scans listed and not in the task"] = listed - found
    else:
        names = [id_lists.subject_name(subject) for subject in labelled.subjects.tolist()]
        known = {side: id_lists.by_id(subjects) for side, subjects in people.items()}
        masks = {side: np.array([id_lists.same(n, ids) for n in names], dtype=bool) for side, ids in known.items()}
        mine = id_lists.by_id(names)
        everyone = {subject for subjects in people.values() for subject in subjects if subject[1]}
        notes["scans matched by subject, since no scan id fits"] = int((masks["train"] | masks["test"]).sum())
        notes["subjects listed and not in the task"] = sum(not id_lists.same(subject, mine) for subject in everyone)
    notes["scans of the task and not listed"] = int((~(masks["train"] | masks["test"])).sum())
    for side, mask in masks.items():
        if not mask.any():
            example = next((table.subjects[0] or table.scans[0] for table, _ in lists), "")
            raise InputError(
                f'task "{labelled.task.name}": {lists[0][0].source} has no {side} scan of this store (it lists e.g. '
                f'"{example}", the store has "{labelled.subjects[0]}" and "{labelled.ids[0]}"); give the list that '
                "belongs to this store"
            )
    return Split(
        name, np.flatnonzero(masks["train"]), np.flatnonzero(masks["test"]), {k: v for k, v in notes.items() if v}
    )


def write(path: Path, labelled: Labelled, splits: Sequence[Split]) -> None:
    """A table that `split.file` reads back: subject_id, scan_uid, label, and split or repeat_1 … (the testing fold)."""
    columns: dict[str, np.ndarray] = {}
    for split in splits:
        repeat, _, fold = split.name.partition("_fold-")
        if fold:
            column = columns.setdefault(repeat.replace("-", "_"), np.full(len(labelled.ids), "", dtype=object))
            column[split.test] = fold
        else:
            column = columns.setdefault("split", np.full(len(labelled.ids), "", dtype=object))
            column[split.train], column[split.test] = "train", "test"
    label = [labelled.classes[int(y)] if labelled.classes else repr(float(y)) for y in labelled.y]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subject_id", "scan_uid", "label", *columns])
    writer.writerows(zip(labelled.subjects, labelled.ids, label, *columns.values()))
    write_text(path, text.getvalue())


def read_labelled(
    lists: Sequence[tuple[str | Path, str]], store: Store | Stores | None = None
) -> tuple[Labelled, list[Split], np.ndarray]:
    """Lists alone as a task and its splits, to be looked at by `split_lint`: (task, splits, hash of each scan's file).

    lists: (file, "train" or "test"), or one file with columns split, fold or repeat_1 … and "". Labels are its column
    label. A scan is hashed where the column path or nii_file_path leads to a file. store: its rows in place of the
    list's lines; scans that it lacks are left out.
    """
    tables = [(id_lists.read_list(file), side) for file, side in lists]
    columns = ("label", "path", "nii_file_path", "site")
    joined = {
        name: np.concatenate([_or_empty(table, name) for table, _ in tables]) for name in columns
    }  # fmt: skip
    spelled: dict[id_lists.Subject, str] = {}
    subjects = [
        spelled.setdefault(name, subject) if name[1] else f"(unnamed) {scan}"
        for table, _ in tables
        for name, subject, scan in zip(table.names(), table.subjects.tolist(), table.scans.tolist())
    ]
    scans = np.concatenate([table.scans for table, _ in tables])
    ids = np.where(scans == "", np.array([f"{subject} (line {at})" for at, subject in enumerate(subjects, 2)]), scans)
    if len(lists) == 1 and not lists[0][1]:
        sides = _columns_of_sides(tables[0][0])
    else:
        sides = {"holdout": np.concatenate([np.full(len(table.scans), side) for table, side in tables])}
    rows, kept = np.full(len(ids), -1), np.arange(len(ids))
    if store is not None:
        row_of = {id_lists.scan_name(scan): row for scan, row in zip(store.column("id").tolist(), store.rows.tolist())}
        rows = np.array([row_of.get(id_lists.scan_name(scan), -1) for scan in scans.tolist()])
        kept = np.flatnonzero(rows >= 0)
        if not len(kept):
            raise InputError(
                f'{lists[0][0]} names no scan of the store (it lists e.g. "{ids[0]}", the store has '
                f'"{store.column("id")[0]}"); give the list that belongs to this store'
            )
    classes, y = np.unique(joined["label"][kept], return_inverse=True)
    task = Task(name="lists", kind="multiclass", column="label", split=SplitSettings(kind="holdout"))
    found = Labelled(
        task, rows[kept], ids[kept], np.array(subjects, dtype=str)[kept], y, tuple(classes.tolist()),
        joined["site"][kept], {"listed and not in the store": len(ids) - len(kept)} if len(kept) < len(ids) else {},
        np.array(subjects, dtype=str)[kept],
    )  # fmt: skip
    splits = [Split(n, np.flatnonzero(s[kept] == "train"), np.flatnonzero(s[kept] == "test")) for n, s in sides.items()]
    paths = np.where(joined["path"] == "", joined["nii_file_path"], joined["path"])[kept]
    return found, splits, np.array([_file_hash(path) for path in paths.tolist()], dtype=str)


def _or_empty(table: id_lists.IdList, name: str) -> np.ndarray:
    column = table.column(name)
    return np.full(len(table.scans), "", dtype=str) if column is None else column


def _file_hash(path: str) -> str:
    """Hash of a file's bytes; "" where there is none."""
    if not path or not Path(path).is_file():
        return ""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
