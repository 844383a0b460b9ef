"""How well the site, or scanner, can be told from the same features that tell a label.

A score of a label that is told no better than the site may rest on it. Frozen features of brains separate scanners well
(23 to 58 % of their variance in ON-Harmony), so this stands beside every score.
"""

from collections import Counter
from dataclasses import replace

import numpy as np

from brainscale.split_files import Split
from brainscale.splits import make_splits
from brainscale.store import Store
from brainscale.task_settings import SplitSettings, Task
from brainscale.tasks import Labelled, site_column

FOLDS, REPEATS = 5, 2
FEWEST = 2 * FOLDS
"""Subjects that a site must have to be told."""


def site_case(case: Labelled, store: Store, seed: int) -> tuple[Labelled, list[Split]] | None:
    """The scans of a task with their site as the label, and its splits.

    Scans without a site, subjects seen at several, and sites with fewer than `FEWEST` subjects are left out. None where
    fewer than two sites are left, or nothing names sites.
    """
    sites_of: dict[str, set[str]] = {}
    for who, site in zip(case.groups.tolist(), case.sites.tolist()):
        sites_of.setdefault(who, set()).add(site)
    settled = {who: sites.pop() for who, sites in sites_of.items() if len(sites) == 1}
    counts = Counter(site for site in settled.values() if site)
    classes = tuple(sorted(site for site, count in counts.items() if count >= FEWEST))
    if len(classes) < 2:
        return None
    kept = np.flatnonzero([settled.get(who) in classes for who in case.groups.tolist()])
    y = np.searchsorted(classes, case.sites[kept])
    split = SplitSettings(kind="cross_validation", folds=FOLDS, repeats=REPEATS)
    task = Task(
        name=f"{case.task.name}-site",
        kind="binary" if len(classes) == 2 else "multiclass",
        column=site_column(case.task, store),
        split=split,
    )
    sited = replace(
        case, task=task, rows=case.rows[kept], ids=case.ids[kept], subjects=case.subjects[kept], y=y.astype(np.int64),
        classes=classes, sites=case.sites[kept], left_out={}, groups=case.groups[kept],
    )  # fmt: skip
    return sited, make_splits(sited, seed)
