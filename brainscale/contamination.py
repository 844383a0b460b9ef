"""Which subjects that are tested were pretrained on: a list, a store or a run held against a list or a store.

Names are compared in one form per cohort (`id_lists`). Two people with one bare number in two cohorts cannot be told
apart unless both lists say their cohort; cohorts that share people under different ids (OASIS-3 and NACC share
participants of the Knight ADRC) cannot be matched by name at all.
"""

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from brainscale import id_lists
from brainscale.config import Config
from brainscale.id_lists import IdList
from brainscale.provenance import write_text
from brainscale.run_folder import split_rows
from brainscale.settings import InputError, load
from brainscale.store import Store, open_store
from brainscale.store_files import COMPLETE
from brainscale.stores import open_stores, store_paths

PSEUDONYM = re.compile(r"(\d+/)?(sub-)?[0-9a-f]{20}")


@dataclass(frozen=True)
class Report:
    """Test subjects and scans that pretraining has seen."""

    pretraining: IdList
    test: IdList
    seen: np.ndarray
    """(n,) bool: lines of the test list whose subject is pretrained on."""
    seen_scans: np.ndarray
    """(n,) bool: lines whose very scan is."""

    @property
    def found(self) -> bool:
        return bool(self.seen.any() or self.seen_scans.any())

    def text(self) -> str:
        """The report as lines of text."""
        names = self.test.names()
        subjects = {name: False for name in names if name[1]}
        for name, seen in zip(names, self.seen.tolist()):
            if name[1]:
                subjects[name] |= seen
        hit = [name for name, seen in subjects.items() if seen]
        pretrained = {name for name in self.pretraining.names() if name[1]}
        lines = [
            f"pretraining  {self.pretraining.source}: {len(pretrained)} subjects, {_scans(self.pretraining)} scans",
            f"test         {self.test.source}: {len(subjects)} subjects, {_scans(self.test)} scans",
            f"seen         {len(hit)} of {len(subjects)} test subjects ({_percent(len(hit), len(subjects))}), "
            f"{int(self.seen_scans.sum())} test scans themselves",
        ]
        cohorts = Counter(name[0] for name in subjects)
        for cohort, count in sorted(cohorts.items()):
            ours = sum(name[0] == cohort for name in hit)
            lines.append(f"  {cohort or 'no cohort':<11}{ours} of {count} ({_percent(ours, count)})")
        if unnamed := sum(not name[1] for name in names):
            lines.append(f"{unnamed} test scan(s) name no subject and are compared by scan alone")
        if unnamed := sum(not name[1] for name in self.pretraining.names()):
            lines.append(f"{unnamed} pretraining scan(s) name no subject and are compared by scan alone")
        if not {n[0] for n in pretrained} & set(cohorts) and "" not in {*cohorts, *(n[0] for n in pretrained)}:
            lines.append("the lists share no cohort: people who are in both under different ids are not found by name")
        if any(not name[0] for name in hit):
            lines.append("ids of no known cohort are compared as they stand: equal numbers may be different people")
        return "\n".join(lines)


def compare(pretraining: IdList, test: IdList) -> Report:
    """Hold a test list against a pretraining list. Raises InputError when only one of them holds keyed hashes."""
    if (hashed := _hashed(pretraining)) != _hashed(test):
        raise InputError(
            f"the subjects of {(pretraining if hashed else test).source} are keyed hashes (converted with --hash-ids), "
            "which no list of names can be compared with; compare before names are hashed"
        )
    known = id_lists.by_id(pretraining.names())
    scans = {id_lists.scan_name(scan) for scan in pretraining.scans.tolist()} - {""}
    seen = np.array([id_lists.same(name, known) for name in test.names()], dtype=bool)
    seen_scans = np.array([id_lists.scan_name(scan) in scans for scan in test.scans.tolist()], dtype=bool)
    return Report(pretraining, test, seen, seen_scans)


def tested(table: IdList) -> IdList:
    """The lines of a list that are tested: those of "test" where it has a column split, else all."""
    side = table.column("split")
    if side is None or not (here := np.char.lower(side) == "test").any():
        return table
    return replace(table, subjects=table.subjects[here], scans=table.scans[here], columns=None)


def read_source(path: Path, what: str = "test") -> IdList:
    """A list, the scans of a store, or (what = "pretraining") the scans that a run was trained on.

    Raises InputError for what is none of these, and for a store whose names are keyed hashes.
    """
    if path.is_dir() and (path / COMPLETE).exists():
        return _of_store(str(path), [open_store(path)], [None])
    if path.is_dir() and (path / "config.toml").is_file():
        if what != "pretraining":
            raise InputError(
                f"{path} is a run folder, which lists what it trained on; give the test scans as list or store"
            )
        config = load(Config, path / "config.toml")
        stores = open_stores(store_paths(config.data))
        rows, _ = split_rows(stores, config)
        ends = [*stores.first_rows.tolist()[1:], np.iinfo(np.int64).max]
        parts = [rows[(rows >= a) & (rows < b)] - a for a, b in zip(stores.first_rows.tolist(), ends)]
        return _of_store(str(path), stores.stores, list(parts))
    if path.is_dir():
        raise InputError(f"{path} is neither a finished store nor a run folder; give one of these, or a .csv")
    return id_lists.read_list(path)


def _of_store(source: str, stores: list[Store], rows: list[np.ndarray | None]) -> IdList:
    """Subjects and scans of rows of stores (none: all)."""
    subjects, scans = [], []
    for store, chosen in zip(stores, rows):
        at = np.arange(len(store.rows)) if chosen is None else np.searchsorted(store.rows, chosen)
        subjects += store.column("subject")[at].tolist()
        scans += store.column("id")[at].tolist()
    return IdList(source, np.array([s or "" for s in subjects], dtype=str), np.array(scans, dtype=str))


def write(path: Path, report: Report) -> None:
    """The test scans whose subject, or which themselves, were pretrained on, as .csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subject_id", "scan_uid", "cohort", "subject_seen", "scan_seen"])
    names = report.test.names()
    for at in np.flatnonzero(report.seen | report.seen_scans).tolist():
        line = (report.test.subjects[at], report.test.scans[at], names[at][0])
        writer.writerow([*line, int(report.seen[at]), int(report.seen_scans[at])])
    write_text(path, text.getvalue())


def _hashed(table: IdList) -> bool:
    """Whether every subject is a pseudonym, as `to_zarr.py --hash-ids` makes them."""
    named = [subject for subject in table.subjects.tolist() if subject]
    return bool(named) and all(PSEUDONYM.fullmatch(subject) for subject in named)


def _scans(table: IdList) -> int:
    return len({id_lists.scan_name(scan) for scan in table.scans.tolist()} - {""})


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.0f} %"
