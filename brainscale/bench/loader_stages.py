"""Where the time of a volume goes in our loader, on one core: read, decode, foreground, copy, augment.

What cannot be timed by itself is a difference, taken row by row: decoding is the store's read less that of the same
bytes, augmenting is a changed sample less the same one unchanged. A difference of noise may be negative.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from brainscale import store as stores
from brainscale.bench.loader_passes import BENCH, synchronize
from brainscale.bench.read import drop_from_page_cache
from brainscale.bench.record import sample_lines, skipped
from brainscale.data_settings import Augment
from brainscale.geometry import Zyx
from brainscale.reader import Reader
from brainscale.sampling import Change, Draw, draw_change
from brainscale.store import Store

WARMUP = 2
WHOLE = "whole sample"
MOVED = Augment(affine_fraction=1.0)
ALTERED = Augment(gamma_fraction=1.0, gain_fraction=1.0, bias_fraction=1.0, noise_fraction=1.0, blur_fraction=1.0)


def lines(path: Path, rows: Sequence[int], patch_zyx: Zyx, n: int) -> list[dict[str, Any]]:
    """Lines over seconds per stage, warm and cold, over at most `n` rows, each read once by every form."""
    torch.set_num_threads(1)
    found = []
    for cold in (False, True):
        shape = "×".join(map(str, Store(path).volume_zyx))
        case = f"stages of a volume of {shape}, {'cold' if cold else 'warm'}, one core"
        print(f"measuring: {case}", file=sys.stderr, flush=True)
        samples = timed(path, list(rows)[: n + WARMUP], patch_zyx, cold)
        if samples is None:
            found.append(skipped(BENCH, case, WHOLE, "the page cache keeps what it is asked to drop on this disk"))
            continue
        parts = stage_seconds(samples)
        for line in sample_lines(BENCH, case, "s", parts, WHOLE):
            found.append({**line, "share": float(np.median(np.array(parts[line["variant"]]) / parts[WHOLE]))})
    return found


def stage_seconds(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """From seconds per form, row by row, to seconds per stage. Pure."""
    of = {name: np.array(seconds) for name, seconds in samples.items()}
    parts = {
        WHOLE: of["sample"] + of["copy"] + of.get("to the device", 0.0),
        "read the encoded bytes": of["encoded"],
        "decode": of["volumes"] - of["encoded"],
        "foreground": of["foreground"],
        "copy into the batch": of["copy"],
        **({"copy to the device": of["to the device"]} if "to the device" in of else {}),
        "augment: rotate and scale": of["moved"] - of["sample"],
        "augment: gamma, gain, bias, noise, blur": of["altered"] - of["sample"],
    }
    return {name: part.tolist() for name, part in parts.items()}


def timed(path: Path, rows: list[int], patch_zyx: Zyx, cold: bool) -> dict[str, list[float]] | None:
    """Seconds of every form for every row but the first WARMUP, in turn; None where files cannot be dropped."""
    shards = [
        tuple(path / stores._shard_file(name, shard) for name in stores.ARRAYS) for shard in row_shards(path, rows)
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A store of its own for each form, or one would find in tensorstore's cache what another has read.
    readers = {
        name: Reader(Store(path), patch_zyx, None) for name in ("volumes", "foreground", "sample", "moved", "altered")
    }
    volume_zyx, dtype = readers["sample"].volume_zyx, readers["sample"].store.dtype
    ready = np.ones(volume_zyx, dtype)
    tensor = torch.from_numpy(ready)
    held = tensor.pin_memory() if device.type == "cuda" else tensor

    def sample(name: str, augment: Augment | None) -> Callable[[int], Any]:
        def read(at: int) -> Any:
            change = draw_change(augment, 0, at) if augment else Change()
            return readers[name].sample(Draw(at, rows[at], (0, 0, 0), False, change))

        return read

    def copy(at: int) -> None:
        torch.empty((1, 1, *volume_zyx), dtype=tensor.dtype)[0, 0].numpy()[...] = ready

    def move(at: int) -> None:
        held.to(device, non_blocking=True)
        synchronize(device)

    forms: dict[str, Callable[[int], Any]] = {
        "encoded": lambda at: read_encoded(shards[at][0], ranges[at]),
        "volumes": lambda at: readers["volumes"].store.volumes([rows[at]]),
        "foreground": lambda at: readers["foreground"].store.foreground([rows[at]]),
        "sample": sample("sample", None),
        "moved": sample("moved", MOVED),
        "altered": sample("altered", ALTERED),
        "copy": copy,
        **({"to the device": move} if device.type == "cuda" else {}),
    }
    ranges = [chunk_ranges(path, row) for row in rows]
    names = list(forms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for at in range(len(rows)):
        for name in names[at % len(names) :] + names[: at % len(names)]:
            if cold and not all([drop_from_page_cache(file) for file in shards[at]]):
                return None
            if not cold:
                for file in shards[at]:
                    file.read_bytes()
            begin = time.perf_counter()
            forms[name](at)
            if at >= WARMUP:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def row_shards(path: Path, rows: Sequence[int]) -> list[int]:
    """The shard of every row."""
    size: Any = zarr.open_array(path / "volumes", mode="r").shards
    return [row // size[0] for row in rows]


def chunk_ranges(path: Path, row: int) -> list[tuple[int, int]]:
    """(offset, bytes) of every chunk of a row in its shard of volumes. The index ends the file: both numbers of each
    chunk as little-endian uint64, then four bytes of checksum (Zarr v3 sharding codec)."""
    array: Any = zarr.open_array(path / "volumes", mode="r")
    chunks = math.prod(size // chunk for size, chunk in zip(array.shape[1:], array.chunks[1:]))
    shard, place = divmod(row, array.shards[0])
    with (path / stores._shard_file("volumes", shard)).open("rb") as file:
        file.seek(-(16 * array.shards[0] * chunks + 4) + 16 * place * chunks, os.SEEK_END)
        index = np.frombuffer(file.read(16 * chunks), "<u8").reshape(-1, 2)
    return [(int(offset), int(length)) for offset, length in index]


def read_encoded(file: Path, ranges: list[tuple[int, int]]) -> int:
    """Read the chunks of a row, and return how many bytes they have."""
    handle = os.open(file, os.O_RDONLY)
    try:
        return sum(len(os.pread(handle, length, offset)) for offset, length in ranges)
    finally:
        os.close(handle)
