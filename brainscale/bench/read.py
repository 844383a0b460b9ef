"""`brainscale bench read`: whole volumes and crops from a store, against zarr-python on the same store and nibabel.

First the store as it is, then its first volumes encoded again with every codec and several inner chunks, which is what
decides the defaults. Warm: the files are in the page cache. Cold: the file that is read next has just been dropped from
it (fsync, posix_fadvise), which is checked; what the disk or a host machine caches is not emptied. Before every read
64 MB of other memory are written, so that no reader finds the data in the processor's cache, and tensorstore's own
cache is cut to 1 MB, since training does not come back to a volume soon.
"""

import ctypes
import itertools
import math
import mmap
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from brainscale import store as stores
from brainscale.bench.record import measure, on_one_core, skipped
from brainscale.geometry import Zyx
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale.store import Store, open_store
from brainscale_data_prep.convert import convert
from brainscale_data_prep.phantom import make

CROP_VOXELS, WARMUP = 96, 2
CODECS: tuple[Any, ...] = ("lz4", "zstd")
SCRUB_BYTES = 64 << 20
SMALL_POOL = {"cache_pool": {"total_bytes_limit": 1 << 20}}
OURS, ZARR, NIBABEL = "brainscale (tensorstore)", "zarr-python", "nibabel, NIfTI file"


def run(store: Path | None, source: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Lines over seconds per read. source: the folder the store was made from; store: none for one of phantoms.

    quick: four volumes, 3 reads and two encodings instead of up to twelve, 36 and all.
    """
    with TemporaryDirectory(prefix="brainscale-bench-") as folder:
        scratch = Path(folder)
        if store is None:
            store, source = phantom_store(scratch, quick, 1 if quick else 6)
        found = on_one_core(lines, store, source, quick, "1 core", scratch)
        return found + lines(store, source, quick, f"{len(os.sched_getaffinity(0))} cores", None)


def phantom_store(scratch: Path, quick: bool, each: int) -> tuple[Path, Path]:
    """`each` skull-stripped brains and as many whole heads in a store of 2 mm (quick) or 1 mm; and their source."""
    source, plan = scratch / "phantoms", Plan()
    if quick:
        plan = Plan(grid_voxels_xyz=(80, 96, 80), spacing_mm_xyz=(2.0, 2.0, 2.0))
    for head in (False, True):
        make(source / f"head-{head}", each, seed=0, head=head, spacing_mm=4.0 if quick else 1.0)
    convert(source, scratch / "store", plan, workers=1)
    return scratch / "store", source


def lines(
    path: Path, source: Path | None, quick: bool, cores: str, encode_in: Path | None = None
) -> list[dict[str, Any]]:
    """What `run` returns for the store as it is and, where a folder is given for them, for it encoded in other ways."""
    n, num_rows = (3, 4) if quick else (36, 12)
    store = open_store(path)
    rows = store.rows[:num_rows].tolist()
    found = _store_lines(Store(path), rows, len(store.rows), source, f"as it is, {cores}", n)
    if encode_in is None:
        return found
    volumes = store.volumes(rows)
    shapes = chunks(store.volume_zyx)
    for codec, chunk in itertools.product(CODECS[:1], shapes[:4:3]) if quick else itertools.product(CODECS, shapes):
        encoded = encode_in / "encoded"
        _encode(store, rows, volumes, codec, chunk, encoded)
        found += _store_lines(Store(encoded), rows, len(rows), None, f"encoded again, {cores}", n)
        shutil.rmtree(encoded)
    return found


def chunks(volume_zyx: Zyx) -> list[Zyx]:
    """Inner chunks worth comparing: the whole volume, its eighths, blocks of whole rows, cubes of about 64 and 32."""

    def part(size: int, most: int) -> int:
        return max(n for n in range(1, size + 1) if size % n == 0 and n <= most)

    z, y, x = volume_zyx
    found = [
        volume_zyx,
        (part(z, -(-z // 2)), part(y, -(-y // 2)), part(x, -(-x // 2))),
        (part(z, 16), part(y, 32), x),
        (part(z, 16), part(y, 16), x),
        (part(z, 64), part(y, 64), part(x, 64)),
        (part(z, 32), part(y, 32), part(x, 32)),
    ]
    return list(dict.fromkeys(found))


def _encode(store: Store, rows: list[int], volumes: np.ndarray, codec: Any, chunk: Zyx, path: Path) -> None:
    """A copy of a store whose volumes have this codec and chunk, and of which only `rows` are there.

    Written past `store.py`, which writes what a plan can say only; it opens as a store but fails a check of its hashes.
    """
    shutil.copytree(store.path, path, ignore=shutil.ignore_patterns("c"))
    before = zarr.open_array(store.path / "volumes", mode="r")
    array = zarr.create_array(
        path / "volumes",
        shape=before.shape,
        dtype=before.dtype,
        chunks=(1, *chunk),
        shards=before.shards,
        compressors=[BloscCodec(cname=codec, clevel=stores.LEVELS[codec], shuffle="shuffle"), Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
        overwrite=True,
    )
    for row, volume in zip(rows, volumes):
        array[row] = volume


def _store_lines(
    store: Store, rows: list[int], num_written: int, source: Path | None, how: str, n: int
) -> list[dict[str, Any]]:
    """Whole volumes and crops from one store, warm and cold; `num_written` volumes are in its files."""
    vars(store)["_arrays"] = {
        name: stores._open(store.path / name, ts.Context({**stores.READ, **SMALL_POOL})) for name in stores.ARRAYS
    }
    array: Any = zarr.open_array(store.path / "volumes", mode="r")
    codec = next(codec.cname.value for codec in array.compressors if isinstance(codec, BloscCodec))
    shape, chunk = ("×".join(map(str, size)) for size in (store.volume_zyx, array.chunks[1:]))
    size: Any = tuple(min(CROP_VOXELS, axis) for axis in store.volume_zyx)
    rng = np.random.default_rng(0)
    corners = rng.integers(0, np.array(store.volume_zyx) - size + 1, (n + WARMUP, 3)).tolist()
    names = dict(zip(store.rows.tolist(), store.column("source")))
    files = [source / names[row] for row in rows] if source else []
    if missing_file := next((file for file in files if not file.is_file()), None):
        raise InputError(f"{missing_file} does not exist; give as --source the folder that {store.path} was made from")
    shards = [store.path / stores._shard_file("volumes", row // array.shards[0]) for row in rows]

    def row_of(turn: int) -> int:
        return rows[turn % len(rows)]

    def box(turn: int) -> tuple[slice, ...]:
        return tuple(slice(low, low + length) for low, length in zip(corners[turn], size))

    whole: dict[str, Callable[[int], np.ndarray]] = {
        OURS: lambda turn: store.volumes([row_of(turn)])[0],
        ZARR: lambda turn: np.asarray(array[row_of(turn)]),
        NIBABEL: lambda turn: np.asanyarray(nibabel.load(files[turn % len(rows)]).dataobj),
    }
    crop: dict[str, Callable[[int], np.ndarray]] = {
        OURS: lambda turn: store.crop(row_of(turn), corners[turn], size),
        ZARR: lambda turn: np.asarray(array[(row_of(turn), *box(turn))]),
    }
    for variants in (whole, crop):
        assert np.array_equal(variants[OURS](1), variants[ZARR](1)), f"{store.path}: two readers differ"
    stored = sum(file.stat().st_size for file in (store.path / "volumes" / "c").rglob("*") if file.is_file())
    sizes = dict.fromkeys((OURS, ZARR), stored / num_written)
    scrub = np.zeros(SCRUB_BYTES, np.uint8)
    found = []
    for cold, (what, voxels, variants) in itertools.product(
        (False, True), (("whole volume of " + shape, store.volume_zyx, whole), (_crop_name(size, shape), size, crop))
    ):
        case = f"{what} {store.dtype}, {codec}, chunk {chunk}, {'cold' if cold else 'warm'}, {how}"
        missing = "no folder of its sources given (--source)" if variants is whole and not source else ""
        if missing and how.startswith("as it is") and not cold:
            found.append(skipped("read", case, NIBABEL, missing))

        def before(name: str, turn: int, cold: bool = cold) -> None:
            if cold:
                drop_from_page_cache((files if name == NIBABEL else shards)[turn % len(rows)])
            scrub[...] += 1

        if cold and not all(map(drop_from_page_cache, shards)):
            found.append(skipped("read", case, OURS, "the page cache keeps what it is asked to drop on this disk"))
            continue
        chosen = {name: variant for name, variant in variants.items() if name != NIBABEL or source}
        found += measure("read", case, chosen, ZARR, n, WARMUP, before, partial(_megabytes, store, voxels), sizes)
    return found


def _megabytes(store: Store, voxels: Zyx, turn: int) -> float:
    return math.prod(voxels) * store.dtype.itemsize / 1e6


def _crop_name(size: Zyx, shape: str) -> str:
    return f"crop {'×'.join(map(str, size))} of {shape}"


def drop_from_page_cache(file: Path) -> bool:
    """Write a file out and drop it from the page cache; whether it is gone."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    return not in_page_cache(file)


def in_page_cache(file: Path) -> bool:
    """Whether any page of a file is in memory, by mincore(2), which changes nothing (a read that must not wait for the
    disk would start to read ahead)."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as pages:
        resident = np.empty(-(-len(pages) // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(pages, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        places = (ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(pages)), ctypes.c_void_p(resident.ctypes.data))
        failed = libc.mincore(*places)
        del view  # or the mapping cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    return bool((resident & 1).any())
