"""Which scan every sample is of: a pure function of (seed, global sample index), so that it is the same for any number
of ranks, and a resumed run goes on where it was. No torch: the processes that read for DALI import this.

uniform            every scan once per epoch of N samples, N the number of training scans
subject_balanced   every subject once per epoch of S samples, S the number of subjects; of a subject's n scans, each
                   once in n epochs, in an order of its own every time
weighted           the stream is cut in blocks of B samples, B the number of scans that may be drawn. In every block,
                   every value of `data.weight_column` has exactly its quota of places, shuffled: B × weight / sum of
                   weights by largest remainder, and 1 at least. Of a value's scans, none comes twice before all came
several stores     blocks with quotas in the same way by the stores' weights; inside a store scans are taken by the
                   sampler. Weighted: every value of every store has a quota, by the store's weight times the value's
                   share among those that occur in the store

Nothing is dropped or repeated at the end of an epoch or block; batches straddle them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import numpy as np

from brainscale.config import Config
from brainscale.sampling import ORDER
from brainscale.settings import InputError
from brainscale.stores import Stores, subjects_of

SLOTS, ROUNDS = 4, 5
"""Streams of random words, beside those of `sampling.py`: places in a block; scans of a subject."""
LISTED = 20
"""Values named in a message, at most."""


@dataclass(frozen=True)
class Group:
    """Scans that share a quota. They are taken unit by unit, every unit once per epoch of the group: a unit is a scan,
    or a subject, whose scans take turns from epoch to epoch."""

    name: str
    rows: np.ndarray
    """(scans,) int64, unit after unit."""
    first: np.ndarray
    """(units,) int64: where in `rows` each unit begins."""
    weight: Fraction
    """Share of the samples, relative to the other groups' weights."""

    def unit(self, number: int) -> np.ndarray:
        """Rows of a unit."""
        end = self.first[number + 1] if number + 1 < len(self.first) else len(self.rows)
        return self.rows[self.first[number] : end]


class Order:
    """The row of every sample. Cheap to pickle; safe with many threads.

    `rows` (int64, sorted) are the rows that may be drawn, `quotas` the samples of each group in a block of len(rows).
    """

    def __init__(self, seed: int, groups: Sequence[Group]) -> None:
        """groups: at least one, each with at least one row; no row in two of them."""
        self.seed, self.groups = seed, tuple(groups)
        self.rows = np.sort(np.concatenate([group.rows for group in groups]))
        self.quotas = tuple(quotas([group.weight for group in groups], len(self.rows)))
        self._slots = lru_cache(2)(partial(slots, seed, self.quotas))
        # One memory for each group: in a shared one, a group of few scans would push out a large one's epoch.
        self._epochs = [
            lru_cache(2)(partial(permutation, seed, ORDER, number, len(group.first)))
            for number, group in enumerate(groups)
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self.seed, self.groups)

    def row(self, index: int) -> int:
        """The row of the sample at a global index."""
        number, turn = 0, index
        if len(self.groups) > 1:
            block, place = divmod(index, len(self.rows))
            groups, turns = self._slots(block)
            number = int(groups[place])
            turn = block * self.quotas[number] + int(turns[place])
        group = self.groups[number]
        epoch, position = divmod(turn, len(group.first))
        rows = group.unit(int(self._epochs[number](epoch)[position]))
        if len(rows) == 1:
            return int(rows[0])
        turns_taken, scan = divmod(epoch, len(rows))
        return int(rows[permutation(self.seed, ROUNDS, int(rows[0]), len(rows), turns_taken)[scan]])


def permutation(seed: int, stream: int, part: int, count: int, index: int) -> np.ndarray:
    """A permutation of range(count) that depends on the arguments alone. part: a group, or whatever has an order of
    its own. Part 0 has the words of `sampling.words`."""
    random = np.random.Philox(key=[seed, stream], counter=[0, 0, index, part]).random_raw(count)
    return np.argsort(random, kind="stable")


def quotas(weights: Sequence[Fraction], total: int) -> list[int]:
    """`total` places dealt by weight: largest remainder (of equal ones the first), then 1 at least to each, taken from
    the largest quota (of equal ones that of less weight). total: at least as many as weights, which are above 0."""
    exact = [total * weight / sum(weights) for weight in weights]
    dealt = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: dealt[at] - exact[at])
    for at in by_remainder[: total - sum(dealt)]:
        dealt[at] += 1
    while 0 in dealt:
        dealt[max(range(len(exact)), key=lambda at: (dealt[at], -exact[at]))] -= 1
        dealt[dealt.index(0)] = 1
    return dealt


def slots(seed: int, quotas: tuple[int, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """(group, turn), each (places,): the group of every place of a block, and how many places of that group come
    before it in the block."""
    count = sum(quotas)
    groups = np.repeat(np.arange(len(quotas)), quotas)[permutation(seed, SLOTS, 0, count, block)]
    turns = np.empty(count, dtype=np.int64)
    turns[np.argsort(groups, kind="stable")] = np.arange(count) - np.repeat(np.cumsum(quotas) - quotas, quotas)
    return groups, turns


def make_order(store: Stores, rows: np.ndarray, config: Config) -> Order:
    """The order that a run's settings ask for. rows: the training rows, sorted.

    Raises InputError for weights that do not fit the scans, and for a store that would give none.
    """
    data, at = config.data, np.searchsorted(store.rows, rows)
    units = numbered(subjects_of(store)[at])[1] if data.sampler == "subject_balanced" else rows
    values, value_of = [""], np.zeros(len(rows), dtype=np.int64)
    weights = {"": 1.0}
    if data.sampler == "weighted":
        values, value_of = numbered(store.column(data.weight_column)[at])
        weights = data.weights
        check_weights(data.weight_column, values, weights)
    groups, store_of = [], store.number(rows)
    for number, prefix in enumerate(store.prefixes):
        here = {value: (store_of == number) & (value_of == v) for v, value in enumerate(values) if weights[value] > 0}
        here = {value: mask for value, mask in here.items() if mask.any()}
        if not here:
            path = store.stores[number].path
            raise InputError(
                f"{path} has no training scan whose {data.weight_column} has a weight above 0; leave it out of "
                "data.stores, or give its scans a weight"
                if (store_of == number).any()
                else f"{path} has no training scan (all its subjects are held out); leave it out of data.stores, or "
                "lower data.holdout_fraction"
            )
        share = Fraction(data.stores[number].weight if data.stores else 1)
        share /= sum(Fraction(weights[value]) for value in here)
        for value, mask in here.items():
            groups.append(group(f"{prefix}{value}", rows[mask], units[mask], share * Fraction(weights[value])))
    return Order(config.seed, groups)


def group(name: str, rows: np.ndarray, units: np.ndarray, weight: Fraction) -> Group:
    """Rows (sorted) with the unit of each, as a group."""
    order = np.argsort(units, kind="stable")
    return Group(name, rows[order], np.unique(units[order], return_index=True)[1], weight)


def numbered(names: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(different names in order, number of each item's name); a value that is missing is named "n/a" as in BIDS."""
    texts = ["n/a" if name is None else str(name) for name in names.tolist()]
    different = sorted(set(texts))
    number = {text: at for at, text in enumerate(different)}
    return different, np.array([number[text] for text in texts], dtype=np.int64)


def check_weights(column: str, values: Sequence[str], weights: dict[str, float]) -> None:
    """Raises InputError unless the values that occur are those that have a weight."""
    if missing := [value for value in values if value not in weights]:
        raise InputError(
            f"training scans with {column} {listed(missing)} have no weight in data.weights, which has "
            f"{listed(sorted(weights))}; give every value one (0 leaves its scans out)"
        )
    if unknown := [value for value in sorted(weights) if value not in values]:
        raise InputError(
            f"data.weights names {listed(unknown)}, and no training scan has that as {column}; those that occur are "
            f"{listed(values)}"
        )


def listed(values: Sequence[str]) -> str:
    """Values in quotes, the first of them where there are many."""
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(f'"{value}"' for value in values[:LISTED]) + more
