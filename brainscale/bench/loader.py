"""`brainscale bench loader`: batches of volumes in the training process, from our loaders and from what one would pick
instead (loader_peers.py); what that feeds (loader_consumers.py); our own time by stage (loader_stages.py).

A pass begins to load, takes `fill` batches, and is timed over the next ones while the loader reads on beyond them: the
pace of a long epoch, without its start and end. Passes of all variants run in turn. Cold: all files that a variant
reads were dropped from the page cache before its pass (checked), and no volume comes twice in it; what the disk or a
host machine caches is not emptied. Warm: they were read just before it. Ours opens the store anew in every pass, so
that nothing is left in tensorstore's cache.

CPU seconds are those of this process, with all its threads, and of its worker processes. Ours delivers stored integers
with the numbers that make them z-scores, and the foreground of every token; peers deliver values and nothing else.
"""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from brainscale import dali_loader
from brainscale import store as stores
from brainscale.bench import loader_consumers as consumers
from brainscale.bench import loader_peers as peers
from brainscale.bench import loader_stages as stages
from brainscale.bench.loader_passes import BENCH, Variant, Work, pass_lines, with_persistent_ratio
from brainscale.bench.read import phantom_store
from brainscale.bench.record import compare_sizes, on_one_core, sample_lines, skipped
from brainscale.config import Config
from brainscale.data_settings import Augment, Data
from brainscale.geometry import Zyx
from brainscale.loader import Loader
from brainscale.reader import Reader
from brainscale.samplers import make_order
from brainscale.settings import InputError
from brainscale.stores import Stores, open_stores
from brainscale_data_prep.export import export_nifti

TORCH, DALI = "brainscale, torch loader", "brainscale, DALI loader"
OURS: dict[str, tuple[type[Loader], str]] = {
    TORCH: (Loader, ""),
    DALI: (dali_loader.DaliLoader, "nvidia.dali"),
}
"""Our loaders, and a module that may be missing."""
CROP_VOXELS, MAX_WORKERS = 96, 16
FILL, TIMED, PASSES = 8, 12, 5
"""Batches, and passes. DALI and our reading ahead hold up to eight batches, torch's workers two each."""
CHANGED = "every change done to each"
AUGMENTED = Augment.model_validate({name: 1.0 for name in Augment.model_fields if name.endswith("_fraction")})
EXTRA = (
    "volumes_per_s", "cpu_s_per_volume", "ratio_to_persistent", "flops_per_sample", "starved_tflops", "gpu_share",
    "idle_share", "share",
)  # fmt: skip
"""What a line of this benchmark has beside the common keys; null where it says nothing."""


def run(store: Path | None, folder: Path | None, batch: int, quick: bool) -> list[dict[str, Any]]:
    """Lines over loaders, bytes, consumers and stages.

    store: none for one of phantoms; folder: where the peers' files are put for the time being, on the store's disk
    (none: where temporary files lie); batch: volumes of a batch; quick: few volumes and passes, one worker, batches of
    one. Raises InputError for a batch below 1 and for a folder on another disk.
    """
    if batch < 1:
        raise InputError(f"--batch is {batch}; at least one volume is needed")
    cores = min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    counts = [1] if quick else sorted({cores, *(2**n for n in range(cores.bit_length()))})
    with TemporaryDirectory(prefix="brainscale-bench-", dir=folder) as name:
        scratch = Path(name)
        if store is None:
            store = phantom_store(scratch, quick, 5 if quick else 28)[0]
        volume_zyx = open_stores([store]).volume_zyx
        if os.stat(store).st_dev != os.stat(scratch).st_dev:
            raise InputError(
                f"{scratch.parent} is on another disk than {store}, so that cold reads would compare two disks; give "
                "--folder FOLDER on the store's disk"
            )
        work = make_work(store, scratch, 1 if quick else batch, counts[-1], quick)
        found = []
        for workers in counts:
            found += lines(work, workers, 2 if quick else PASSES, workers == counts[0], workers == counts[-1])
            gc.collect()  # the peers' processes end
        cases = [whole_case(cache, work, counts[-1]) for cache in ("warm", "cold")]
        paces = [x for x in found if x["case"] in cases and x["variant"] in OURS and not x["skipped"]]
        found += consumers.feed_lines(paces, volume_zyx)
        found += on_one_core(stages.lines, store, work.rows, patch(work, volume_zyx), 3 if quick else 24)
        return [line if line["skipped"] else dict.fromkeys(EXTRA) | line for line in found]


def make_work(path: Path, scratch: Path, batch: int, workers: int, quick: bool) -> Work:
    """The work for at most so many workers; its NIfTI files are written, and PersistentDataset's cache."""
    fill, timed = (2, 6) if quick else (max(FILL, 2 * workers), max(TIMED, 2 * workers))
    store, volumes = Stores([path]), (2 * fill + timed) * batch
    rows = tuple(store.rows[:volumes].tolist())
    order = make_order(store, store.rows[:volumes], settings(1))
    sequence = tuple(order.row(index) for index in range(volumes))
    folder = scratch / "nifti"
    folder.mkdir()
    print(f"writing {len(rows)} volumes as NIfTI files", file=sys.stderr, flush=True)
    files = {row: folder / f"row-{row}.nii.gz" for row in rows}
    for row, file in files.items():
        export_nifti(path, row, file)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Work(path, rows, sequence, files, scratch / "persistent", batch, fill, timed, device)
    if not peers.missing("monai"):
        print("filling the cache of PersistentDataset", file=sys.stderr, flush=True)
        peers.fill_cache(work)
    return work


def whole_case(cache: str, work: Work, workers: int) -> str:
    """What a line over whole volumes calls itself."""
    return f"whole volumes, {cache}, {how(work, workers)}"


def how(work: Work, workers: int) -> str:
    """Workers, batches and size, for a case."""
    store = Stores([work.path])
    size = "×".join(map(str, store.volume_zyx))
    return f"{workers} worker{'s' * (workers > 1)}, batches of {work.batch}, {size} {store.dtype}"


# --------------------------------------------------------------------------------------------- ours


def settings(workers: int, crop: Zyx | None = None, augment: Augment | None = None) -> Config:
    """Of our loaders."""
    return Config(data=Data(workers=workers, crop_voxels_zyx=crop), augment=augment or Augment())


def patch(work: Work, volume_zyx: Zyx) -> Zyx:
    """A patch that divides volumes of this size: 16, 8 or one cell of the foreground."""
    cell = Stores([work.path]).plan.foreground_cell_voxels
    size = next((n for n in (16, 8) if n % cell == 0 and not any(length % n for length in volume_zyx)), cell)
    return size, size, size


def make_loader(kind: type[Loader], work: Work, config: Config) -> Loader:
    """One of our loaders over the work's rows, with the store opened anew."""
    store, crop = Stores([work.path]), config.data.crop_voxels_zyx
    reader = Reader(store, patch(work, crop or store.volume_zyx), crop, config.seed)
    order = make_order(store, store.rows[: len(work.rows)], config)
    return kind(reader, order, config, 0, 1, work.batch, work.device)


def open_ours(kind: type[Loader], work: Work, config: Config) -> Variant:
    """One of our loaders, to be timed."""

    def batches() -> Generator[Tensor, None, None]:
        source = make_loader(kind, work, config).batches(0)
        try:
            for batch, _ in source:
                yield batch.volumes
        finally:
            source.close()

    shards = sorted(set(stages.row_shards(work.path, work.rows)))
    files = (work.path / stores._shard_file(name, shard) for name in stores.ARRAYS for shard in shards)
    return Variant(batches, tuple(files), codes=True)


def open_all(work: Work, workers: int) -> tuple[dict[str, Variant], dict[str, list[float]]]:
    """All loaders that are installed, and the seconds that each took to its first batch; the batches before the timed
    ones have been checked."""
    openers: dict[str, tuple[str, Callable[[], Variant]]] = {
        name: (needs, partial(open_ours, kind, work, settings(workers))) for name, (kind, needs) in OURS.items()
    }
    for name, peer in peers.PEERS.items():
        openers[name] = peer.needs, partial(peers.open_peer, peer, work, workers)
    variants, starts = {}, {}
    for name, (needs, opener) in openers.items():
        if peers.missing(needs):
            continue
        begin = time.perf_counter()
        variants[name] = opener()
        batches = variants[name].batches()
        try:
            batch = next(batches)
            starts[name] = [time.perf_counter() - begin]
            for number in range(work.fill):
                peers.check(work, name, variants[name], number * work.batch, batch)
                batch = next(batches)
        finally:
            batches.close()
    return variants, starts


# --------------------------------------------------------------------------------------------- what is measured


def lines(work: Work, workers: int, n: int, first: bool, last: bool) -> list[dict[str, Any]]:
    """Lines over all loaders with this number of workers. first: also bytes and what is missing; last: also crops,
    changed volumes and consumers."""
    work = replace(work, timed=-(-work.timed // workers) * workers)  # as many batches for each worker
    store, what = Stores([work.path]), how(work, workers)
    print(f"starting: {what}", file=sys.stderr, flush=True)
    variants, starts = open_all(work, workers)
    sizes = {name: own for name, own in disk_bytes(work).items() if name in variants}
    found = skipped_lines(what) if first else []
    found += sample_lines(BENCH, f"start-up until the first batch, {what}", "s", starts, peers.NIBABEL)
    for cold in (False, True):
        case = whole_case("cold" if cold else "warm", work, workers)
        chosen = {name: variant for name, variant in variants.items() if variant.files or not cold}
        if cold and (needed := (work.fill + work.timed) * work.batch) > len(work.rows):
            reason = f"a pass takes {needed} different volumes, the store has {len(work.rows)}; lower --batch"
            found.append(skipped(BENCH, case, TORCH, reason))
            continue
        found += pass_lines(case, work, chosen, peers.NIBABEL, n, cold, megabytes(store, store.volume_zyx))
        for name in variants.keys() - chosen.keys():
            found.append(skipped(BENCH, case, name, "it holds all in memory: a cold page cache means nothing to it"))
    for line in found:
        if line["variant"] in sizes and line.get("volumes_per_s"):
            line["bytes_per_volume"] = sum(sizes[line["variant"]]) / len(sizes[line["variant"]])
    if first:
        found += size_lines(work, sizes)
    if last:
        found += own_lines(work, workers, min(n, 3))
        warm = whole_case("warm", work, workers)
        median_s = next(x["median"] for x in found if (x["case"], x["variant"]) == (warm, TORCH))
        found += consumers.pace_lines(what, work, variants, peers.NIBABEL, 2 * median_s * work.batch, min(n, 3))
        larger = replace(work, batch=consumers.TRAINING_BATCH)
        makers: dict[str, Callable[[Config], Loader]] = {
            name: partial(make_loader, OURS[name][0], larger) for name in variants if name in OURS
        }
        found += consumers.training_lines(how(larger, workers), larger, makers, workers, min(n, 3))
    return found


def skipped_lines(what: str) -> list[dict[str, Any]]:
    """Lines of the loaders that are not installed."""
    wanted = {name: (needs, dali_loader.INSTALL) for name, (_, needs) in OURS.items()}
    wanted |= {name: (peer.needs, peers.INSTALL) for name, peer in peers.PEERS.items()}
    return [
        skipped(BENCH, f"whole volumes, {what}", name, reason)
        for name, (needs, install) in wanted.items()
        if (reason := peers.missing(needs, install))
    ]


def megabytes(store: Stores, voxels_zyx: Zyx) -> float:
    """Of so many voxels in the store's type."""
    return math.prod(voxels_zyx) * store.dtype.itemsize / 1e6


def disk_bytes(work: Work) -> dict[str, list[float]]:
    """Bytes on disk that each loader reads from, volume by volume; of ours the mean over all files of the store."""
    store = Stores([work.path])
    nifti = [float(file.stat().st_size) for file in work.files.values()]
    cached = [float(file.stat().st_size) for file in peers.cached_files(work)]
    own = dict.fromkeys(OURS, [store.num_bytes / len(store.rows)] * len(work.rows))
    return (
        own
        | {name: nifti for name, peer in peers.PEERS.items() if peer.files is peers.nifti_files}
        | {name: cached for name, peer in peers.PEERS.items() if peer.files is peers.cached_files}
    )


def size_lines(work: Work, sizes: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Lines over bytes per volume."""
    if not peers.missing("monai"):
        sizes = sizes | {f"{peers.CACHE}: in memory": [float(peers.memory_bytes(work))] * len(work.rows)}
    found = compare_sizes(BENCH, "bytes per volume on disk", sizes, peers.NIBABEL)
    return with_persistent_ratio(found, sizes)


def own_lines(work: Work, workers: int, n: int) -> list[dict[str, Any]]:
    """Lines over our loaders alone: crops, and volumes changed in every way that there is."""
    store, what = Stores([work.path]), how(work, workers)
    z, y, x = (min(CROP_VOXELS, size) for size in store.volume_zyx)
    crop = f"crops of {z}×{y}×{x}"
    found = []
    for case, config, size in (
        (crop, settings(workers, (z, y, x)), (z, y, x)),
        (f"{crop}, {CHANGED}", settings(workers, (z, y, x), AUGMENTED), (z, y, x)),
        (f"whole volumes, {CHANGED}", settings(workers, None, AUGMENTED), store.volume_zyx),
    ):
        own = {name: open_ours(kind, work, config) for name, (kind, needs) in OURS.items() if not peers.missing(needs)}
        found += pass_lines(f"{case}, warm, {what}", work, own, TORCH, n, False, megabytes(store, size))
    return found
