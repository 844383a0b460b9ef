"""Who takes part in an evaluation: encoders of runs and exports, and the baselines that give a score its meaning.

The baselines: an encoder of the same shape with random weights, the intensity histogram with volumes in ml, and the
volumes alone. A contestant is its features of every scan; the encoders are kept for probes that need more than these.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainscale import baselines, features
from brainscale.evaluation_settings import EvaluationSettings
from brainscale.geometry import token_grid
from brainscale.pretrained import Pretrained, open_pretrained, random_like
from brainscale.report_compare import distinct
from brainscale.settings import InputError
from brainscale.store import Store


@dataclass(frozen=True)
class Contestant:
    """One encoder or baseline."""

    name: str
    kind: str
    """run, export or baseline."""
    source: str
    about: dict[str, Any]
    """objective, step and samples of an encoder; empty for baselines without one."""
    features: np.ndarray
    """(n,D) float32 of all scans that any task uses, in the order of their rows."""
    pretrained: Pretrained | None = None

    @property
    def key(self) -> str:
        """32 hex digits over the features, and over the weights where there are any."""
        digest = hashlib.sha256(repr(self.features.shape).encode())
        digest.update(np.ascontiguousarray(self.features).tobytes())
        for tensor in self.pretrained.state_dict().values() if self.pretrained is not None else ():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]


def open_all(sources: Sequence[Path], part: str, store: Store) -> dict[str, Pretrained]:
    """Name → encoder of each run folder or export, checked against the store and made for its volumes.

    Names are those of the folders, with as many of the folders above as tell them apart. Raises InputError for a source
    that is given twice or is none, and for one that was trained on volumes of another plan.
    """
    places = [str(path.resolve()) for path in sources]
    if twice := [path for path, place in zip(sources, places) if places.count(place) > 1]:
        raise InputError(f"{twice[0]} is given twice; give every run or export once")
    found = {}
    for path, name in zip(sources, distinct(places)):
        is_run = (path / "config.toml").is_file()
        encoder = open_pretrained(path, part if is_run else "encoder")
        encoder.check(store.plan, f"the store {store.path}")
        found[name] = encoder.at(store.volume_zyx)
    return found


def gather(
    opened: dict[str, Pretrained],
    sources: Sequence[Path],
    store: Store,
    rows: np.ndarray,
    settings: EvaluationSettings,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> list[Contestant]:
    """All contestants with their features of the given rows of a store; one random encoder for every shape.

    folder: where features are kept for another start. Raises InputError when a run has the name of a baseline.
    """
    encoders = [
        (name, "run" if (path / "config.toml").is_file() else "export", str(path), encoder)
        for (name, encoder), path in zip(opened.items(), sources)
    ]
    shapes = {encoder.settings: name for name, encoder in reversed(opened.items())}
    for name in shapes.values():
        label = "random" if len(shapes) == 1 else f"random like {name}"
        encoders.append((label, "baseline", "random weights", random_like(opened[name], settings.random_seed)))
    found = []
    for number, (name, kind, source, encoder) in enumerate(encoders, 1):
        say(f"features of {len(rows)} scans by {name} ({number} of {len(encoders)})")
        make = partial(
            features.embed, encoder, store, rows, layers=settings.layers, pooling=settings.pooling, device=device
        )
        values = kept(folder / f"features-{weights_hash(encoder, store, rows, settings)}.npy", make)
        found.append(Contestant(name, kind, source, encoder.about, values, encoder))
    for name, measure in (("histogram+volume", baselines.histogram_and_volume), ("volume", baselines.volume)):
        say(f"features of {len(rows)} scans: {name}")
        path = folder / f"features-{name}-{rows_hash(store, rows)}.npy"
        found.append(Contestant(name, "baseline", "intensities", {}, kept(path, partial(measure, store, rows))))
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"a run is called {twice[0]!r}, as a baseline is; give it under another folder name")
    return found


def tokens_on_disk(pretrained: Pretrained, store: Store, rows: np.ndarray, path: Path, device: torch.device) -> Any:
    """(n,N,C) float16 memory map of the last layer's tokens of rows, made where the file is not there yet."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        n_tokens = int(np.prod(token_grid(store.volume_zyx, pretrained.settings.patch_voxels_zyx)))
        shape = (len(rows), n_tokens, pretrained.settings.width)
        if shutil.disk_usage(path.parent).free < 2 * np.prod(shape, dtype=np.int64):
            raise InputError(
                f"{path.parent} has no room for {2 * np.prod(shape, dtype=np.int64) / 1e9:.1f} GB of tokens; give an "
                "--out with more room, or leave out attentive"
            )
        partial = path.with_suffix(".partial")
        tokens = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
        encoder, size = pretrained.to(device), features.batch_volumes(pretrained, store.volume_zyx, 1, device)
        with torch.no_grad():
            for begin in range(0, len(rows), size):
                volumes = features.read_normalised(store, rows[begin : begin + size]).to(device)
                tokens[begin : begin + size] = encoder.tokens(volumes)[0].half().cpu().numpy()
        tokens.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that is made once and then read."""
    if not path.is_file():
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, make())
        partial.rename(path)
    return np.load(path, allow_pickle=False)


def rows_hash(store: Store, rows: np.ndarray) -> str:
    """32 hex digits over the voxels that rows of a store hold."""
    digest = hashlib.sha256(store.plan_hash.encode() + rows.tobytes())
    digest.update("".join(store.column("voxels_xxh3_128")[np.searchsorted(store.rows, rows)]).encode())
    return digest.hexdigest()[:32]


def weights_hash(encoder: Pretrained, store: Store, rows: np.ndarray, settings: EvaluationSettings) -> str:
    """32 hex digits over all that features depend on."""
    text = f"{rows_hash(store, rows)} {settings.layers} {settings.pooling} {encoder.settings.model_dump_json()}"
    digest = hashlib.sha256(text.encode())
    for tensor in encoder.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
