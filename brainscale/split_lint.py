"""What is wrong with a split, or with what is to be learnt: subjects and scans on both sides, labels that follow the
scanner, files counted as people.

An error makes a score meaningless, a warning changes what may be said of it, a note is only said.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import chi2_contingency

from brainscale import acquisition
from brainscale.split_files import Split
from brainscale.store import Store
from brainscale.stores import Stores
from brainscale.tasks import Labelled, some

LEVEL_P = 0.01
"""A label is said to follow an acquisition column at a corrected p below this."""
TOLD_AUROC, TOLD_R2 = 0.8, 0.5
"""A label that acquisition alone tells this well is an error."""
UNEVEN_P = 0.001


@dataclass(frozen=True)
class Finding:
    """One thing found, with numbers, examples and what to do in one sentence."""

    code: str
    severity: Literal["error", "warning", "note"]
    sentence: str


def lint(
    labelled: Labelled, splits: Sequence[Split], store: Store | Stores | None, contents: np.ndarray | None = None
) -> list[Finding]:
    """Everything found in the splits of a task, errors first.

    store: none for lists alone, whose scans cannot be looked at. contents: (n,) a hash of each scan's file, "" where it
    is not known; beside it, the store's hashes of voxels and source files are used.
    """
    findings = [
        *_empty(splits),
        *_subjects(labelled, splits),
        *_duplicates(labelled, splits, [*_hashes(labelled, store), *([] if contents is None else [contents])]),
        *_repeated(labelled, splits),
        *_conflicts(labelled),
        *_uneven(labelled, splits),
        *_sites(labelled, splits),
        *(_acquisition(labelled, acquisition.columns_of(labelled, store)) if store is not None else []),
    ]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def _empty(splits: Sequence[Split]) -> list[Finding]:
    empty = [
        f"{split.name} ({side})"
        for split in splits
        for side, scans in (("train", split.train), ("test", split.test))
        if not len(scans)
    ]
    if not empty:
        return []
    return [Finding("empty_side", "error", f"nothing is in {some(empty)}; give both sides scans")]


def _subjects(labelled: Labelled, splits: Sequence[Split]) -> list[Finding]:
    """Subjects on both sides of one split."""
    both = {s.name: sorted({*labelled.subjects[s.train]} & {*labelled.subjects[s.test]}) for s in splits}
    both = {name: subjects for name, subjects in both.items() if subjects}
    if not both:
        return []
    worst = max(both, key=lambda name: len(both[name]))
    tested = len(set(labelled.subjects[next(s.test for s in splits if s.name == worst)].tolist()))
    sentence = (
        f"{len(both[worst])} of the {tested} test subjects of {worst} are trained on too ({some(both[worst])})"
        f"{_elsewhere(both)}; put all scans of a subject on one side, as `brainscale splits make` does"
    )
    return [Finding("subject_overlap", "error", sentence)]


def _hashes(labelled: Labelled, store: Store | Stores | None) -> list[np.ndarray]:
    """What scans are equal by: voxels with their scale, and bytes of the source file."""
    if store is None:
        return []
    at = np.searchsorted(store.rows, labelled.rows)
    columns = [store.column(name)[at].tolist() for name in ("voxels_xxh3_128", "scale", "offset")]
    voxels = np.array([f"{code} {scale!r} {offset!r}" for code, scale, offset in zip(*columns)], dtype=str)
    return [voxels, np.array([source or "" for source in store.column("source_xxh3_128")[at].tolist()], dtype=str)]


def _duplicates(labelled: Labelled, splits: Sequence[Split], hashes: Sequence[np.ndarray]) -> list[Finding]:
    """Equal scans on both sides; of subjects with different labels; and elsewhere."""
    alike: dict[tuple[int, str], list[int]] = {}
    for kind, column in enumerate(hashes):
        for at, content in enumerate(column.tolist()):
            if content:
                alike.setdefault((kind, content), []).append(at)
    sets = sorted({tuple(places) for places in alike.values() if len(places) > 1})
    if not sets:
        return []
    across: dict[str, list[str]] = {}
    for split in splits:
        trained, tested = set(split.train.tolist()), set(split.test.tolist())
        known = {
            test: train[0]
            for places in sets
            if (train := [at for at in places if at in trained])
            for test in places
            if test in tested
        }
        if known:
            across[split.name] = [f"{labelled.ids[a]} = {labelled.ids[b]}" for a, b in known.items()]
    findings = []
    if across:
        worst = max(across, key=lambda name: len(across[name]))
        sentence = (
            f"{len(across[worst])} test scan(s) of {worst} equal a scan trained on ({some(across[worst])})"
            f"{_elsewhere(across)}; leave one of each pair out"
        )
        findings.append(Finding("duplicate_scan", "error", sentence))
    named = {places: " = ".join(labelled.ids[list(places[:3])]) for places in sets}
    if disagree := [named[places] for places in sets if len(set(labelled.y[list(places)].tolist())) > 1]:
        sentence = f"equal scans have different labels ({some(disagree)}); correct the table"
        findings.append(Finding("duplicate_scan", "error", sentence))
    if not findings:
        people = sum(len(set(labelled.subjects[list(places)].tolist())) > 1 for places in sets)
        sentence = (
            f"{len(sets)} set(s) of scans are equal, {people} of them of several subjects ({some(named.values())}); "
            "leave all but one of each out"
        )
        findings.append(Finding("duplicate_scan", "warning", sentence))
    return findings


def _repeated(labelled: Labelled, splits: Sequence[Split]) -> list[Finding]:
    """More scans than subjects."""
    used = np.unique(np.concatenate([np.concatenate([s.train, s.test]) for s in splits] or [np.arange(0)]).astype(int))
    counts = Counter(labelled.subjects[used].tolist())
    if len(used) <= len(counts) or not counts:
        return []
    tested = [(len(s.test), len(set(labelled.subjects[s.test].tolist()))) for s in splits]
    scans, subjects = max(tested)
    most, number = counts.most_common(1)[0]
    each = np.median(list(counts.values()))
    sentence = (
        f'{len(used)} scans are of {len(counts)} subjects (median {each:g} each, {number} of "{most}"), the largest '
        f"test set is {scans} scans of {subjects} subjects: n is the number of subjects; score per subject, as "
        "`brainscale evaluate` does, and take no interval that counts scans"
    )
    return [Finding("repeated_subject", "warning", sentence)]


def _conflicts(labelled: Labelled) -> list[Finding]:
    """Subjects of several classes."""
    if not labelled.classes:
        return []
    pairs = {(subject, y) for subject, y in zip(labelled.subjects.tolist(), labelled.y.tolist())}
    several = sorted(subject for subject, count in Counter(subject for subject, _ in pairs).items() if count > 1)
    if not several:
        return []
    sentence = (
        f"{len(several)} subject(s) have scans of several classes ({some(several)}); decide with conflict in the task"
    )
    return [Finding("label_conflict", "warning", sentence)]


def _uneven(labelled: Labelled, splits: Sequence[Split]) -> list[Finding]:
    """Classes that a side lacks, and shares of classes that differ between the sides by more than chance."""
    lacking, uneven = [], []
    for split in splits:
        if not labelled.classes or not len(split.train) or not len(split.test):
            continue
        table = np.array(
            [
                [
                    len(set(labelled.subjects[side[labelled.y[side] == k]].tolist()))
                    for k in range(len(labelled.classes))
                ]
                for side in (split.train, split.test)
            ]
        )
        for at, name in enumerate(labelled.classes):
            lacking += [f"{name} in {split.name} ({('train', 'test')[side]})" for side in (0, 1) if not table[side, at]]
        if table.all() and len(labelled.classes) > 1 and chi2_contingency(table)[1] < UNEVEN_P:
            train, test = 100 * table[:, -1] / table.sum(axis=1)
            uneven.append(f"{split.name}: {labelled.classes[-1]} {train:.0f} % of train and {test:.0f} % of test")
    findings = []
    if lacking:
        sentence = f"no subject is of class {some(lacking)}; a score needs every class on both sides, split again"
        findings.append(Finding("class_missing", "error", sentence))
    if uneven:
        sentence = f"the share of classes differs between train and test ({some(uneven)}); split by class"
        findings.append(Finding("class_imbalance", "warning", sentence))
    return findings


def _sites(labelled: Labelled, splits: Sequence[Split]) -> list[Finding]:
    """Sites that are tested and trained on."""
    if not labelled.sites.any():
        return []
    shared = [sorted(({*labelled.sites[s.train]} & {*labelled.sites[s.test]}) - {""}) for s in splits]
    most = max(shared, key=lambda sites: len(sites), default=[])
    if not most:
        return []
    sentence = (
        f"{len(most)} of {len({*labelled.sites} - {''})} sites are both trained on and tested ({some(most)}): the "
        "score says nothing of a new site; split.site_disjoint = true does"
    )
    return [Finding("site_overlap", "note", sentence)]


def _acquisition(labelled: Labelled, columns: dict[str, np.ndarray]) -> list[Finding]:
    """Labels that the acquisition tells."""
    found = acquisition.follows(labelled, columns, LEVEL_P)
    subjects = len(set(labelled.subjects.tolist()))
    if columns and found is None:
        sentence = f"{subjects} subjects are too few to say whether labels follow {some(sorted(columns))}"
        return [Finding("acquisition_not_checked", "note", sentence)]
    if not found:
        return []
    score, limit = ("AUROC", TOLD_AUROC) if labelled.classes else ("R² of ranks", TOLD_R2)
    strongest = next((column for column in found if column.name != acquisition.TOGETHER), found[0])
    others = [f"{c.name} {c.score:.2f}" for c in found if c is not strongest]
    example = "" if strongest.name == acquisition.TOGETHER else f", {_shares_text(labelled, columns[strongest.name])}"
    sentence = (
        f"{labelled.task.column} follows how scans were acquired: {strongest.name} alone tells it with {score} "
        f"{strongest.score:.2f} in left-out subjects (p = {strongest.p:.3f}, corrected for {len(columns)} columns; "
        f"{subjects} subjects{example})" + (f", and so do {some(others)}" if others else "")
    )
    advice = "; compare scores with these, or keep scans of one kind with where, or balance the classes in each kind"
    severity: Literal["error", "warning"] = "error" if found[0].score >= limit else "warning"
    return [Finding("label_follows_acquisition", severity, sentence + advice)]


def _shares_text(labelled: Labelled, values: np.ndarray) -> str:
    """The most frequent values of a column, and the label of their subjects."""
    texts = []
    for value, _ in Counter(values.tolist()).most_common(3):
        here = values == value
        if labelled.classes:
            counts = Counter(labelled.y[here][np.unique(labelled.subjects[here], return_index=True)[1]].tolist())
            label = ", ".join(f"{counts[k]} {name}" for k, name in enumerate(labelled.classes) if counts[k])
        else:
            label = f"mean {labelled.y[here].mean():.3g}"
        texts.append(f"{value or 'unknown'}: {label}")
    return "; ".join(texts)


def _elsewhere(found: dict[str, list[str]]) -> str:
    return f", and {len(found) - 1} other split(s) are alike" if len(found) > 1 else ""
