"""Several stores seen as one, with the interface of `Store`. No torch: the processes that read for DALI import this.

The rows of a store follow those of the stores before it, refused ones included. Among several, ids and subjects begin
with the store's number ("2/sub-01"), so that sub-01 of two datasets are two people. It is not the folder's name: which
subjects are held out depends on their names, and a store may move. One store is what it is alone.
"""

import operator
import os
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from brainscale.data_settings import Data
from brainscale.geometry import Zyx
from brainscale.settings import InputError, changed_keys
from brainscale.store import Store, open_store

LAYOUT = ("codec", "chunk_voxels_zyx", "shard_volumes")
"""Settings of a plan that say how voxels lie on disk, not what they are: stores of one run may differ in them."""
NAMES = ("id", "subject", "duplicate_of")
"""Columns that name scans or people."""


def store_paths(data: Data) -> tuple[str, ...]:
    """Paths of a run's stores, in order; none where none is given."""
    return (data.store,) if data.store else tuple(entry.path for entry in data.stores)


def open_stores(paths: Sequence[str | os.PathLike[str]]) -> "Stores":
    """Stores whose files have been checked as `open_store` does. Raises as it does, and as `Stores`."""
    for path in paths:
        open_store(path)
    return Stores(paths)


class Stores:
    """One or more finished stores, for reading. Cheap to pickle and safe with many threads, as `Store` is.

    `rows`, `refused`, `num_bytes`, `plan`, `volume_zyx` and `dtype` as there; `plan_hash` is that of the first store,
    since the others' plans differ in nothing but layout. The constructor does not check files: `open_stores` does.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Raises InputError for a store given twice, for stores of different plans or grids, with the difference,
        and as `Store`."""
        self.stores = [Store(path) for path in paths]
        if len({store.path.resolve() for store in self.stores}) < len(paths):
            raise InputError(f"two of the stores {', '.join(map(str, paths))} are the same folder; give each once")
        first = self.stores[0]
        for store in self.stores[1:]:
            _check_alike(first, store)
        self.plan, self.plan_hash, self.dtype = first.plan, first.plan_hash, first.dtype
        self.volume_zyx: Zyx = first.volume_zyx
        self.num_bytes = sum(store.num_bytes for store in self.stores)
        counts = [len(store.rows) + len(store.refused) for store in self.stores]
        self.first_rows = np.cumsum([0, *counts[:-1]])
        """(stores,) where the rows of each begin."""
        self.rows = self.column("row")
        self.refused = [
            {**record, "row": record["row"] + int(begin), "id": prefix + record["id"]}
            for store, begin, prefix in zip(self.stores, self.first_rows, self.prefixes)
            for record in store.refused
        ]

    @property
    def prefixes(self) -> list[str]:
        """What the names of each store begin with."""
        return [f"{number}/" for number in range(1, len(self.stores) + 1)] if len(self.stores) > 1 else [""]

    def number(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) which store each row is of, from 0."""
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def column(self, name: str) -> np.ndarray:
        """A column of all scans.parquet, aligned with `rows`. Raises InputError when a store has no such column."""
        parts = [store.column(name) for store in self.stores]
        if name == "row":
            parts = [part + begin for part, begin in zip(parts, self.first_rows)]
        if name in NAMES and len(parts) > 1:
            parts = [
                np.array([prefix + value if value else "" for value in part], dtype=object)
                for prefix, part in zip(self.prefixes, parts)
            ]
        column = np.concatenate(parts)
        if name == "duplicate_of":
            for at, twin in self._twins.items():
                column[at] = twin
        return column

    @cached_property
    def _twins(self) -> dict[int, str]:
        """Where in `rows` a scan's voxels are those of a scan of an earlier store, and that scan's id."""
        if len(self.stores) == 1:
            return {}
        first: dict[str, tuple[int, str]] = {}
        twins = {}
        numbers = self.number(self.rows).tolist()
        for at, (voxels, scan, number) in enumerate(zip(self.column("voxels_xxh3_128"), self.column("id"), numbers)):
            found, earlier = first.setdefault(voxels, (number, scan))
            if found < number:
                twins[at] = earlier
        return twins

    def volumes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,Z,Y,X) in storage dtype. Raises as `Store.volumes`."""
        return self._read("volumes", rows)

    def foreground(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,GZ,GY,GX) uint8. Raises as `Store.volumes`."""
        return self._read("foreground", rows)

    def crop(self, row: int, corner_zyx: Zyx, size_zyx: Zyx) -> np.ndarray:
        """(z,y,x) voxels from the corner on. Raises as `Store.crop`."""
        store, row = self._place(row)
        return store.crop(row, corner_zyx, size_zyx)

    def file_of(self, row: int) -> str:
        """Path of the file that holds the voxels of a row."""
        store, row = self._place(row)
        return store.file_of(row)

    def _place(self, row: int) -> tuple[Store, int]:
        """The store that a row is of, and its number there."""
        number = max(int(self.number([row])[0]), 0)
        return self.stores[number], row - int(self.first_rows[number])

    def _read(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.array([operator.index(row) for row in rows], dtype=np.int64)
        numbers = self.number(wanted).clip(0)
        found = None
        for number in np.unique(numbers) if len(wanted) else [0]:
            store, here = self.stores[number], numbers == number
            part = getattr(store, name)(wanted[here] - self.first_rows[number])
            if here.all():
                return part
            if found is None:
                found = np.empty((len(wanted), *part.shape[1:]), part.dtype)
            found[here] = part
        assert found is not None
        return found


def subjects_of(store: Store | Stores) -> np.ndarray:
    """(rows,) whose scan each row is: its subject, or its own id where none is named; for equal voxels under another
    id, the subject of the scan they repeat."""
    ids = store.column("id").tolist()
    subjects = {scan: subject or scan for scan, subject in zip(ids, store.column("subject").tolist())}
    return np.array(
        [subjects.get(twin) or subjects[scan] for scan, twin in zip(ids, store.column("duplicate_of").tolist())]
    )


def _check_alike(first: Store, other: Store) -> None:
    there, here = (store.plan.model_dump(mode="json", exclude=set(LAYOUT)) for store in (first, other))
    if changes := changed_keys(there, here):
        text = ", ".join(f"{key} = {now!r} in place of {before!r}" for key, before, now in changes)
        raise InputError(
            f"{other.path} was made with another plan than {first.path} ({text}); convert both with one plan, or train "
            "on one of them"
        )
    if first.volume_zyx != other.volume_zyx:
        raise InputError(
            f"{other.path} has volumes of {other.volume_zyx} voxels and {first.path} of {first.volume_zyx} (z, y, x); "
            "convert both with the same grid_voxels_xyz"
        )
