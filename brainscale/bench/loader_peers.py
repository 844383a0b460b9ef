"""What a user would load volumes with: MONAI, torchio and nibabel under torch's DataLoader, each as it is used.

They read NIfTI files that already lie on the store's grid (every row exported once, .nii.gz as nibabel writes it, which
is quicker to read than what dcm2niix writes), so none resamples, and all deliver (B,1,Z,Y,X) in the order of ours. They
have as many workers as ours, started once (spawned, persistent), and need not make a tensor contiguous or normalise it.
Peers are imported where they are used.
"""

import importlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from brainscale.bench.loader_nifti import NiftiFiles, contiguous
from brainscale.bench.loader_passes import PERSISTENT, PERSISTENT_THREADS, Variant, Work
from brainscale.stores import Stores

INSTALL = "pip install -e '.[peers]'"
NIBABEL = "nibabel + torch DataLoader"
INTEGERS = "nibabel + torch DataLoader, stored integers"
CACHE = "MONAI CacheDataset + ThreadDataLoader, no workers"
TORCHIO = "torchio SubjectsLoader"
TOLERANCE = 1e-6
"""Largest distance from the stored value, as a share of the volume's largest: float32, and NIfTI rounds the slope."""


class Peer(NamedTuple):
    """How a loader is made for a number of workers, which of what it yields is the batch, and the files it reads."""

    make: Callable[[Work, int], Any]
    unpack: Callable[[Any], Tensor]
    files: Callable[[Work], list[Path]]
    needs: str = ""
    """A module that may be missing."""
    codes: bool = False


def missing(module: str, install: str = INSTALL) -> str:
    """Why a loader cannot run here; "" when it can."""
    try:
        if module:
            importlib.import_module(module)
    except ImportError:
        return f"{module} is not installed; {install}"
    return ""


def open_peer(peer: Peer, work: Work, workers: int) -> Variant:
    """Make a peer's loader. Its workers start with the first batches and end when the variant is forgotten."""
    loader = peer.make(work, workers)

    def batches() -> Generator[Tensor, None, None]:
        source = iter(loader)
        try:
            for item in source:
                yield peer.unpack(item).to(work.device, non_blocking=True)
        finally:
            for _ in source:  # workers that owe nothing are idle while others are timed
                pass

    return Variant(batches, tuple(peer.files(work)), peer.codes)


def check(work: Work, name: str, variant: Variant, first: int, batch: Tensor) -> None:
    """Raises AssertionError unless a batch holds the stored volumes from place `first` of the sequence on: the stored
    integers, or scale × integer + offset, TOLERANCE apart at most."""
    store = Stores([work.path])
    rows = work.sequence[first : first + len(batch)]
    codes = store.volumes(rows)
    assert tuple(batch.shape) == (work.batch, 1, *store.volume_zyx), f"{name}: a batch has the shape {batch.shape}"
    at = np.searchsorted(store.rows, rows)
    scale, offset = (store.column(column)[at][:, None, None, None].astype(float) for column in ("scale", "offset"))
    if variant.codes:
        assert np.array_equal(batch[:, 0].cpu().numpy(), codes), f"{name}: voxels of rows {rows} differ from the store"
        return
    wanted = codes * scale + offset
    apart = np.abs(batch[:, 0].cpu().numpy() - wanted).max((1, 2, 3)) / np.abs(wanted).max((1, 2, 3))
    assert apart.max() <= TOLERANCE, f"{name}: values of rows {rows} differ by {apart.max():.3g} of the largest"


def _options(work: Work, workers: int) -> dict[str, Any]:
    """DataLoader's arguments. A fork would copy the threads' locks of tensorstore and CUDA: workers are spawned."""
    place = {row: at for at, row in enumerate(work.rows)}
    options = {
        "batch_size": work.batch,
        "sampler": [place[row] for row in work.sequence],
        "num_workers": workers,
        "pin_memory": work.device.type == "cuda",
    }
    return options | ({"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {})


def nifti_files(work: Work) -> list[Path]:
    """The exported volumes."""
    return [work.files[row] for row in work.rows]


def _as_it_is(item: Any) -> Tensor:
    return item


# --------------------------------------------------------------------------------------------- nibabel


def _nibabel(codes: bool) -> Callable[[Work, int], Any]:
    return lambda work, workers: DataLoader(NiftiFiles(work.paths, codes), **_options(work, workers))


# --------------------------------------------------------------------------------------------- MONAI


def _transforms() -> Any:
    transforms = importlib.import_module("monai.transforms")
    return transforms.Compose(
        [
            transforms.LoadImage(image_only=True, reader="NibabelReader"),
            transforms.EnsureChannelFirst(),
            transforms.Transpose((0, 3, 2, 1)),
            transforms.Lambda(func=contiguous),
            transforms.EnsureType(track_meta=False),
        ]
    )


def _persistent_dataset(work: Work) -> Any:
    return importlib.import_module("monai.data").PersistentDataset(work.paths, _transforms(), work.cache)


def fill_cache(work: Work) -> None:
    """PersistentDataset's first pass, which writes every volume (float32, not compressed) into its folder."""
    dataset = _persistent_dataset(work)
    for at in range(len(dataset)):
        dataset[at]


def _persistent(work: Work, workers: int) -> Any:
    return importlib.import_module("monai.data").ThreadDataLoader(_persistent_dataset(work), **_options(work, workers))


def _persistent_threads(work: Work, workers: int) -> Any:
    options = _options(work, 0) | {"num_workers": workers, "use_thread_workers": True}
    return importlib.import_module("monai.data").ThreadDataLoader(_persistent_dataset(work), **options)


def _cache(work: Work, workers: int) -> Any:
    """No workers, as MONAI advises for what is in memory: ThreadDataLoader's own thread copies, and processes or more
    threads were slower. They fill the cache."""
    data = importlib.import_module("monai.data")
    dataset = data.CacheDataset(work.paths, _transforms(), progress=False, num_workers=workers)
    return data.ThreadDataLoader(dataset, **_options(work, 0))


def memory_bytes(work: Work) -> int:
    """What CacheDataset holds of a volume."""
    dataset = importlib.import_module("monai.data").CacheDataset(work.paths[:1], _transforms(), progress=False)
    return dataset[0].nbytes


def cached_files(work: Work) -> list[Path]:
    """What PersistentDataset wrote."""
    return sorted(work.cache.glob("*.pt"))


# --------------------------------------------------------------------------------------------- torchio


def _torchio(work: Work, workers: int) -> Any:
    torchio = importlib.import_module("torchio")
    dataset = torchio.SubjectsDataset([torchio.Subject(scan=torchio.ScalarImage(path)) for path in work.paths])
    return torchio.SubjectsLoader(dataset, **_options(work, workers))


def _torchio_scan(item: Any) -> Tensor:
    return item["scan"]["data"].permute(0, 1, 4, 3, 2)


PEERS = {
    NIBABEL: Peer(_nibabel(codes=False), _as_it_is, nifti_files),
    INTEGERS: Peer(_nibabel(codes=True), _as_it_is, nifti_files, codes=True),
    PERSISTENT: Peer(_persistent, _as_it_is, cached_files, "monai"),
    PERSISTENT_THREADS: Peer(_persistent_threads, _as_it_is, cached_files, "monai"),
    CACHE: Peer(_cache, _as_it_is, lambda work: [], "monai"),
    TORCHIO: Peer(_torchio, _torchio_scan, nifti_files, "torchio"),
}
