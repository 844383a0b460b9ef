"""Who is trained on and who is tested: subjects, never scans, are dealt to the two sides.

Subjects of equal voxels go together (`Labelled.groups`). Classes are dealt one by one, values of a regression by
quantile, in the order of a hash of (seed, repeat, subject), so that a split depends on seed, subjects and labels alone:
another scan of a subject moves nobody. Whole sites are dealt by scikit-learn's StratifiedGroupKFold.
"""

import numpy as np
import xxhash
from sklearn.model_selection import StratifiedGroupKFold

from brainscale.settings import InputError
from brainscale.split_files import Split, from_files
from brainscale.tasks import Labelled, some

FEW_TEST_SUBJECTS = 200
"""Below this, a held-out test set resolves so little that cross-validation is the default."""
QUANTILES = 10


def make_splits(labelled: Labelled, seed: int) -> list[Split]:
    """The splits of a task: one (holdout), folds × repeats (cross_validation), or those of its files.

    Raises InputError for too few subjects of a class or too few sites, and when files put a subject on both
    sides or leave a class out of one.
    """
    settings = labelled.task.split
    if settings.kind == "file":
        splits = from_files(labelled)
        for split in splits:
            if both := sorted({*labelled.groups[split.train]} & {*labelled.groups[split.test]}):
                raise InputError(
                    f'task "{labelled.task.name}": {split.name} has {len(both)} subject(s) on both sides '
                    f"({some(both)}); look at it with `brainscale splits lint`, and mend the list"
                )
            _refuse_lacking(labelled, split, "mend the list, or leave the class out of labels")
        return splits
    if design(labelled) == "holdout":
        parts = max(2, round(1 / min(settings.test_fraction, 1 - settings.test_fraction)))
        _check_counts(labelled, parts)
        names, inverse = np.unique(labelled.groups, return_inverse=True)
        tested = _holdout(labelled, names, inverse, seed)[inverse]
        return [_split(labelled, "holdout", tested)]
    _check_counts(labelled, settings.folds)
    splits, seen = [], set()
    for repeat in range(settings.repeats):
        folds = _folds(labelled, seed, repeat, settings.folds)
        partition = frozenset(frozenset(labelled.groups[folds == fold].tolist()) for fold in range(settings.folds))
        if partition in seen:  # few sites can be dealt in few ways
            continue
        seen.add(partition)
        for fold in range(settings.folds):
            splits.append(_split(labelled, f"repeat-{repeat + 1}_fold-{fold + 1}", folds == fold))
    return splits


def design(labelled: Labelled) -> str:
    """ "holdout", "cross_validation" or "file": what the task's settings come to."""
    settings = labelled.task.split
    if settings.kind != "auto":
        return settings.kind
    tested = settings.test_fraction * len(set(labelled.groups.tolist()))
    return "cross_validation" if tested < FEW_TEST_SUBJECTS else "holdout"


def _split(labelled: Labelled, name: str, tested: np.ndarray) -> Split:
    """A split from (n,) bool. Raises InputError when a side lacks a class."""
    split = Split(name, np.flatnonzero(~tested), np.flatnonzero(tested))
    _refuse_lacking(labelled, split, "use fewer folds, or split.site_disjoint = false")
    return split


def _refuse_lacking(labelled: Labelled, split: Split, advice: str) -> None:
    """Raise InputError when a side of a split has nobody, or nobody of a class."""
    for side, scans in (("train", split.train), ("test", split.test)):
        lacking = [label for at, label in enumerate(labelled.classes) if at not in labelled.y[scans]]
        if lacking or not len(scans):
            raise InputError(
                f'task "{labelled.task.name}": {split.name} would have nobody of {some(lacking) or "any value"} in '
                f"{side}; {advice}"
            )


def _check_counts(labelled: Labelled, folds: int) -> None:
    counts = labelled.class_counts() or {"any value": len(set(labelled.groups.tolist()))}
    if few := {name: count for name, count in counts.items() if count < 2 * folds}:
        have = ", ".join(f'{count} of "{name}"' for name, count in few.items())
        raise InputError(
            f'task "{labelled.task.name}": {have} are too few subjects, at least {2 * folds} of each class are needed '
            f"(two for each of {folds} folds); set split.folds lower, or join classes in labels"
        )


def _strata(labelled: Labelled, inverse: np.ndarray) -> np.ndarray:
    """(groups,) class of each group, or the quantile of its mean value; the last class where it has several."""
    count = int(inverse.max()) + 1
    if labelled.classes:
        strata = np.zeros(count, dtype=np.int64)
        np.maximum.at(strata, inverse, labelled.y)
        return strata
    mean = np.bincount(inverse, labelled.y) / np.bincount(inverse)
    bins = max(1, min(QUANTILES, count // 10))
    return np.argsort(np.argsort(mean, kind="stable"), kind="stable") * bins // count


def _shuffled(names: np.ndarray, seed: int, repeat: int) -> np.ndarray:
    """Places of the names in the order of their hash."""
    hashes = [xxhash.xxh3_128_hexdigest(f"split/{seed}/{repeat}/{name}".encode()) for name in names.tolist()]
    return np.argsort(hashes, kind="stable")


def _dealt(strata: np.ndarray, order: np.ndarray, hands: int) -> np.ndarray:
    """(groups,) 0..hands−1: stratum after stratum dealt in turn, going on where the stratum before ended."""
    hand = np.empty(len(strata), dtype=np.int64)
    dealt = order[np.argsort(strata[order], kind="stable")]
    hand[dealt] = np.arange(len(dealt)) % hands
    return hand


def _folds(labelled: Labelled, seed: int, repeat: int, folds: int) -> np.ndarray:
    """(n,) the fold that tests each scan."""
    names, inverse = np.unique(labelled.groups, return_inverse=True)
    strata = _strata(labelled, inverse)
    if labelled.task.split.site_disjoint:
        return _site_folds(labelled, names, inverse, strata, seed, repeat, folds)[inverse]
    return _dealt(strata, _shuffled(names, seed, repeat), folds)[inverse]


def _holdout(labelled: Labelled, names: np.ndarray, inverse: np.ndarray, seed: int) -> np.ndarray:
    """(groups,) bool: tested. Of every stratum the share asked for, rounded so that the total fits too."""
    strata, fraction = _strata(labelled, inverse), labelled.task.split.test_fraction
    if labelled.task.split.site_disjoint:
        sites = len(set(_site_units(labelled, names, inverse).tolist()))
        folds = max(2, min(round(1 / fraction) if fraction <= 0.5 else round(1 / (1 - fraction)), sites))
        first = _site_folds(labelled, names, inverse, strata, seed, 0, folds) == 0
        return first if fraction <= 0.5 else ~first
    order = _shuffled(names, seed, 0)
    dealt = order[np.argsort(strata[order], kind="stable")]
    steps = np.floor(np.arange(len(dealt) + 1) * fraction + 0.5)
    tested = np.empty(len(names), dtype=bool)
    tested[dealt] = np.diff(steps) > 0
    return tested


def _site_units(labelled: Labelled, names: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """(groups,) site of each group; sites that share a subject are one, named by the first of them.

    Raises InputError for subjects without a site.
    """
    if (labelled.sites == "").any():
        lost = sorted(set(labelled.subjects[labelled.sites == ""].tolist()))
        raise InputError(
            f'task "{labelled.task.name}": site_disjoint needs the site of every subject, {len(lost)} have none '
            f"({some(lost)}); name the column in site_column, or leave them out with where"
        )
    unit = {site: site for site in labelled.sites.tolist()}
    for group in range(len(names)):
        here = {unit[site] for site in labelled.sites[inverse == group].tolist()}
        unit = {site: min(here) if joined in here else joined for site, joined in unit.items()}
    first = np.full(len(names), "", dtype=object)
    first[inverse] = labelled.sites
    return np.array([unit[site] for site in first.tolist()], dtype=str)


def _site_folds(
    labelled: Labelled, names: np.ndarray, inverse: np.ndarray, strata: np.ndarray, seed: int, repeat: int, folds: int
) -> np.ndarray:
    """(groups,) fold of each group, whole sites in one fold. Raises InputError for fewer sites than folds."""
    units = _site_units(labelled, names, inverse)
    if (sites := len(set(units.tolist()))) < folds:
        raise InputError(
            f'task "{labelled.task.name}": {sites} site(s) cannot be dealt to {folds} folds (sites that share a '
            "subject count as one); set split.folds lower, or split.site_disjoint = false"
        )
    state = int(xxhash.xxh3_64_intdigest(f"sites/{seed}/{repeat}".encode()) % 2**32)
    fold = np.empty(len(names), dtype=np.int64)
    dealer = StratifiedGroupKFold(folds, shuffle=True, random_state=state)
    for number, (_, test) in enumerate(dealer.split(names, strata, units)):
        fold[test] = number
    return fold
