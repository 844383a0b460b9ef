"""The store of volumes: the only file that knows how they lie on disk, and the only one with zarr and tensorstore.

A store is one Zarr v3 group with a row per scan: `volumes` (rows, z, y, x) and `foreground` (rows, cells), in shards of
whole volumes; `store_files` holds what lies beside them. zarr-python makes the metadata. tensorstore encodes a shard in
memory and it is put in place whole, so that one owner per shard, an interruption anywhere and any number of workers
lead to the same bytes; it also reads. Both libraries leave out volumes of zeros when they write, and read missing data
as zeros, unless told otherwise; here every volume is written, and a missing one is an error.
"""

import math
import operator
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from brainscale import store_files
from brainscale.geometry import Zyx
from brainscale.prep_plan import Plan
from brainscale.settings import InputError, changed_keys
from brainscale.store_files import COMPLETE, PLAN, REFUSED, SCANS, StoreDamage

ARRAYS = ("volumes", "foreground")
ZARR_JSON = ("zarr.json", *(f"{name}/zarr.json" for name in ARRAYS))
METADATA = (*ZARR_JSON, PLAN, SCANS, REFUSED)
ROWS = 16
"""Planes, and rows of each, in a chunk of whole rows, at most."""
LEVELS = {"zstd": 1, "lz4": 5}
READ = {
    "cache_pool": {"total_bytes_limit": 64 << 20},
    "data_copy_concurrency": {"limit": 4},
    "file_io_concurrency": {"limit": 16},
}
"""tensorstore's context: room for shard indexes but not for many volumes, and no more than 4 cores that decode."""


def shard_volumes(plan: Plan, num_rows: int) -> int:
    """Volumes in each shard file: the plan's number, or clamp(rows // 64, 1, 32)."""
    return plan.shard_volumes or min(max(num_rows // 64, 1), 32)


def shard_rows(plan: Plan, num_rows: int, shard: int) -> range:
    """The rows that a shard holds; the last shard may hold fewer than the others."""
    size = shard_volumes(plan, num_rows)
    return range(num_rows)[shard * size : (shard + 1) * size]


def chunk_zyx(plan: Plan, grid_zyx: Zyx) -> Zyx:
    """Voxels of an inner chunk. Raises InputError when the plan's do not divide the grid."""
    z, y, x = grid_zyx
    if plan.chunk_voxels_zyx == "volume":
        return z, y, x
    if plan.chunk_voxels_zyx == "rows":
        planes, rows = (max(n for n in range(1, ROWS + 1) if size % n == 0) for size in (z, y))
        return planes, rows, x
    if any(size % n for size, n in zip(grid_zyx, plan.chunk_voxels_zyx)):
        fits = " or ".join(f"{[n for n in range(4, 65) if size % n == 0]}" for size in grid_zyx)
        raise InputError(
            f"chunk_voxels_zyx {plan.chunk_voxels_zyx} does not divide the grid {tuple(grid_zyx)} (z, y, x); choose "
            f'"rows", "volume", or numbers from {fits} in turn'
        )
    return plan.chunk_voxels_zyx


def _shard_file(name: str, shard: int) -> str:
    return f"{name}/c/{shard}/0/0/0"


def shard_bytes(path: Path, shard: int) -> int:
    """Size of a shard's files."""
    return sum((path / _shard_file(name, shard)).stat().st_size for name in ARRAYS)


def _num_shards(path: Path) -> int:
    array = zarr.open_array(path / "volumes", mode="r")
    return -(-array.shape[0] // array.shards[0])  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ writing


def create(path: Path, plan: Plan, grid_zyx: Zyx, num_rows: int) -> None:
    """Make the folder, its array metadata and `plan.json`; the same call again changes nothing.

    Raises InputError when the folder holds something else, or a store of another plan, grid or number of rows, and
    StoreDamage for a finished store whose metadata are not as they were written.
    """
    path = Path(path)
    if num_rows < 1:
        raise InputError(f"a store needs at least one scan, got {num_rows} for {path}; check the source")
    files = _metadata(plan, grid_zyx, num_rows)
    if (path / COMPLETE).exists():
        listed = store_files.read_complete(path)["files"]
        if problem := next(filter(None, (store_files.file_damage(path, n, listed[n], True) for n in METADATA)), None):
            raise StoreDamage(f"{problem}; restore the file, or convert into a new folder")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give the path of a new folder for the store")
    if (path / PLAN).exists():
        changes = changed_keys(store_files.read_plan(path).model_dump(mode="json"), plan.model_dump(mode="json"))
        if changes:
            text = ", ".join(f"{key} was {old!r}, is now {new!r}" for key, old, new in changes)
            raise InputError(f"{path} was begun with another plan ({text}); use the same plan or another folder")
    elif path.exists() and any(not file.name.startswith(".") and file.suffix != ".partial" for file in path.iterdir()):
        raise InputError(f"{path} is not empty and holds no store; give the path of a new folder for the store")
    if (path / ZARR_JSON[1]).exists():
        rows, *grid = zarr.open_array(path / "volumes", mode="r").shape
        if (rows, *grid) != (num_rows, *grid_zyx):
            raise InputError(
                f"{path} was begun with {rows} scans of {tuple(grid)} voxels (z, y, x), now they are {num_rows} of "
                f"{tuple(grid_zyx)}; restore the source as it was or use another folder"
            )
    for name, data in {PLAN: store_files.to_json(plan.model_dump(mode="json")), **files}.items():
        if not (path / name).exists():
            store_files.write(path, name, data)


def _metadata(plan: Plan, grid_zyx: Zyx, num_rows: int) -> dict[str, bytes]:
    """The three zarr.json; the group's carries OME-Zarr 0.5 multiscales over (t, z, y, x) with t = scan."""
    chunk = chunk_zyx(plan, grid_zyx)
    cells = tuple(-(-size // plan.foreground_cell_voxels) for size in grid_zyx)
    memory: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(memory), zarr_format=3, attributes={"ome": store_files.ome_multiscales(plan)})
    codec: Any
    for name, dtype, volume, inner, codec in (
        ("volumes", plan.dtype, tuple(grid_zyx), chunk, plan.codec),
        ("foreground", "uint8", cells, cells, "zstd"),
    ):
        group.create_array(
            name=name,
            shape=(num_rows, *volume),
            dtype=dtype,
            chunks=(1, *inner),
            shards=(shard_volumes(plan, num_rows), *volume),
            compressors=[BloscCodec(cname=codec, clevel=LEVELS[codec], shuffle="shuffle"), Crc32cCodec()],
            fill_value=0,
            dimension_names=("t", "z", "y", "x"),
        )
    return {name: memory[name].to_bytes() for name in ZARR_JSON}


def write_shard(path: Path, shard: int, volumes: np.ndarray, foreground: np.ndarray, records: list[dict]) -> None:
    """Write one shard of volumes (n,Z,Y,X) and foreground (n,GZ,GY,GX), then the journal record that says it is whole.

    `records` describe its rows in order, with the keys `store_files.COLUMNS` and `participant`, or `REFUSED_KEYS`. One
    process may own a shard. Raises InputError when arrays or records are not those of this shard.
    """
    path = Path(path)
    arrays = {name: _in_memory(path / name) for name in ARRAYS}
    rows = shard_rows(store_files.read_plan(path), arrays["volumes"].shape[0], shard)
    store_files.check_records(records, rows)
    blocks = {"volumes": volumes, "foreground": foreground}
    for name, block in blocks.items():
        shape, dtype = (len(rows), *arrays[name].shape[1:]), arrays[name].dtype.numpy_dtype
        if block.shape != shape or block.dtype != dtype:
            raise InputError(
                f"shard {shard} of {path / name} takes {dtype} of {shape}, got {block.dtype} of {block.shape}"
            )
    # Names become durable when the store is finished: until then a file lost to a power cut is a shard to make again,
    # but for a record that outlives the shard it was about.
    journal = store_files.journal_name(shard)
    if (path / journal).exists():
        (path / journal).unlink()
        store_files.sync_tree((path / journal).parent)
    files = {}
    for name, block in blocks.items():
        arrays[name][rows.start : rows.stop].write(block, can_reference_source_data_indefinitely=True).result()
        file = _shard_file(name, shard)
        encoded = arrays[name].kvstore.read(file.removeprefix(f"{name}/")).result().value
        files[file] = store_files.write(path, file, encoded, False)
    store_files.write(path, journal, store_files.to_json({"files": files, "records": records}), False)


def _in_memory(array: Path) -> Any:
    """An empty array with the metadata of one on disk, that keeps what is written to it to itself."""
    context = ts.Context({"data_copy_concurrency": {"limit": 1}, "cache_pool": {"total_bytes_limit": 0}})
    memory = ts.KvStore.open({"driver": "memory"}, context=context).result()
    memory.write("zarr.json", (array / "zarr.json").read_bytes()).result()
    spec = {"driver": "zarr3", "kvstore": {"driver": "memory"}, "store_data_equal_to_fill_value": True}
    return ts.open(spec, open=True, read=True, write=True, context=context).result()


def finished_shards(path: Path) -> set[int]:
    """Shards whose files have the sizes that the journal (in a finished store: COMPLETE.json) records."""
    path = Path(path)
    shards = range(_num_shards(path))
    if not (path / COMPLETE).exists():
        return {s for s in shards if store_files.read_journal(path, s)}
    files = store_files.read_complete(path)["files"]
    names = {s: [_shard_file(name, s) for name in ARRAYS] for s in shards}
    return {s for s in shards if store_files.sizes_match(path, {name: files[name] for name in names[s]})}


def finish(path: Path) -> None:
    """Write scans.parquet, refused.jsonl and last COMPLETE.json, then remove the journal. The bytes depend on the
    shards alone; interrupted anywhere, the next call ends in the same bytes.

    A row whose voxels equal an earlier taken row's gets that row's id as `duplicate_of`. Raises InputError when shards
    are missing, StoreDamage when a shard of a finished store was written again with other bytes.
    """
    path = Path(path)
    shards = range(_num_shards(path))
    journal = {s: record["files"] for s in shards if (record := store_files.read_journal(path, s))}
    written = {name: entry for files in journal.values() for name, entry in files.items()}
    if (path / COMPLETE).exists():
        listed = store_files.read_complete(path)["files"]
        if changed := sorted(name for name, entry in written.items() if listed[name] != entry):
            raise StoreDamage(
                f"{path / changed[0]} was written again with other bytes than {COMPLETE} lists (another source, "
                "other versions or another CPU type); convert into a new folder"
            )
    elif missing := len(shards) - len(journal):
        raise InputError(
            f"{path}: {missing} of {len(shards)} shards are not written; run the conversion again as before"
        )
    else:
        store_files.sync_tree(path)
        store_files.write_tables(path, shards)
        num_rows, *grid_zyx = zarr.open_array(path / "volumes", mode="r").shape
        store_files.write_complete(path, num_rows, grid_zyx, written, METADATA)
    if (path / "journal").exists():
        shutil.rmtree(path / "journal")


# ------------------------------------------------------------------------------------------------ reading


class Store:
    """A finished store, for reading. Cheap to pickle, opened again where it is unpickled; safe with many threads.

    `rows` (int64, sorted) are the rows that may be read, `refused` the records of the others, `num_bytes` the size of
    all files. The constructor does not check the files: `open_store` does (one rank of many may do it for all).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        complete = store_files.read_complete(self.path)
        self.plan = store_files.read_plan(self.path)
        self.plan_hash: str = complete["plan_hash"]
        self.num_bytes = sum(entry["bytes"] for entry in complete["files"].values())
        z, y, x = complete["grid_zyx"]
        self.volume_zyx: Zyx = (z, y, x)
        self.dtype = np.dtype(self.plan.dtype)
        self.rows = self.column("row")
        self.refused = store_files.read_refused(self.path)
        self._shard_volumes = shard_volumes(self.plan, complete["rows"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_arrays"}

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        context = ts.Context(READ)
        return {name: _open(self.path / name, context) for name in ARRAYS}

    def column(self, name: str) -> np.ndarray:
        """A column of scans.parquet, aligned with `rows`. Raises InputError for an unknown name, with the columns."""
        return store_files.read_column(self.path, name)

    def volumes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,Z,Y,X) in storage dtype. Raises IndexError for a row not in `rows`, StoreDamage for damaged data."""
        return self._read("volumes", rows, np.empty((len(rows), *self.volume_zyx), self.dtype))

    def foreground(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,GZ,GY,GX) uint8: 0..255 for a share of foreground of 0..1 in each cell. Raises as `volumes`."""
        return self._read("foreground", rows, np.empty((len(rows), *self._arrays["foreground"].shape[1:]), np.uint8))

    def crop(self, row: int, corner_zyx: Zyx, size_zyx: Zyx) -> np.ndarray:
        """(z,y,x) voxels from the corner on. Raises as `volumes`, and IndexError for a box that leaves the grid."""
        if any(c < 0 or s < 1 or c + s > v for c, s, v in zip(corner_zyx, size_zyx, self.volume_zyx)):
            raise IndexError(f"a crop of {size_zyx} at {corner_zyx} (z, y, x) leaves the grid {self.volume_zyx}")
        crop = np.empty(size_zyx, self.dtype)
        self._read("volumes", [row], crop[None], tuple(slice(c, c + s) for c, s in zip(corner_zyx, size_zyx)))
        return crop

    def file_of(self, row: int) -> str:
        """Path of the file that holds the voxels of a row."""
        return str(self.path / _shard_file("volumes", row // self._shard_volumes))

    def _read(self, name: str, rows: Any, out: np.ndarray, box: tuple[slice, ...] = ()) -> np.ndarray:
        """Fill out[i] with the box of row rows[i]; tensorstore decodes into it directly, several rows at a time."""
        rows = [operator.index(row) for row in rows]
        for row in rows:
            at = np.searchsorted(self.rows, row)
            if at == len(self.rows) or self.rows[at] != row:
                raise IndexError(f"row {row} of {self.path} cannot be read: it was refused or does not exist")
        array = self._arrays[name]
        reads = [
            ts.array(target, copy=False).write(array[(row, *box)].translate_to[0, 0, 0])
            for row, target in zip(rows, out)
        ]
        for row, read in zip(rows, reads):
            try:
                read.result()
            except ValueError as error:
                file = self.path / _shard_file(name, row // self._shard_volumes)
                raise StoreDamage(
                    f"row {row} cannot be read from {file}: {str(error).splitlines()[0]}; restore the file, or remove "
                    "it and convert again"
                ) from None
        return out


def _open(array: Path, context: Any) -> Any:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{array.absolute()}/"},
        "recheck_cached_metadata": "open",
        "recheck_cached_data": True,
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, read=True, context=context).result()


def open_store(path: str | os.PathLike[str]) -> Store:
    """A store that has been checked as `damage(path, deep=False)` does. Raises InputError with the first problem."""
    store_files.read_complete(Path(path))
    problems = damage(path, deep=False)
    if problems:
        more = f" ({len(problems) - 1} more: brainscale doctor {path})" if len(problems) > 1 else ""
        raise StoreDamage(problems[0] + more)
    return Store(path)


def damage(path: str | os.PathLike[str], deep: bool) -> list[str]:
    """Every problem of a store, one sentence each; none for a healthy one.

    Shallow: size of every file, hash of the metadata, checksum and entries of every shard's index. Deep: hash of every
    file too, and every volume is decoded.
    """
    path = Path(path)
    try:
        complete = store_files.read_complete(path)
    except InputError as error:
        return [str(error)]
    files = complete["files"]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda name: store_files.file_damage(path, name, files[name], deep or name in METADATA), files)
        problems = {name: problem for name, problem in zip(files, found) if problem}
        if problems.keys() & set(METADATA):
            return list(problems.values())
        plan = store_files.read_plan(path)
        for name in ARRAYS:
            array, reader = zarr.open_array(path / name, mode="r"), _open(path / name, ts.Context(READ))
            chunks = math.prod(size // chunk for size, chunk in zip(array.shape[1:], array.chunks[1:]))
            volumes = shard_volumes(plan, complete["rows"])
            index_damage = partial(store_files.index_damage, volumes=volumes, chunks=chunks)
            shards = {_shard_file(name, s): shard_rows(plan, complete["rows"], s) for s in range(_num_shards(path))}
            found = pool.map(index_damage, (path / file for file in shards), shards.values())
            for (file, rows), problem in zip(shards.items(), found):
                if problem:
                    problems.setdefault(file, problem)
                decoded = pool.map(partial(_decodes, reader), rows if deep else ())
                if lost := [row for row, whole in zip(rows, decoded) if not whole]:
                    problems[file] = f"{problems.get(file, path / file)}; rows {lost} cannot be decoded"
    return list(problems.values())


def _decodes(reader: Any, row: int) -> bool:
    try:
        reader[row].read().result()
    except ValueError:
        return False
    return True
