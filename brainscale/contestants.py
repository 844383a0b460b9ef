"""Who takes part in an evaluation: encoders of runs and exports, and the baselines that give a score its meaning.

The baselines: an encoder of the same shape with random weights, the intensity histogram with volumes in ml, and the
volumes alone. A contestant is its features of every scan; the encoders are kept for probes that need more than these.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainscale import baselines, features
from brainscale.config import Config
from brainscale.evaluation_settings import EvaluationSettings
from brainscale.geometry import token_grid
from brainscale.pretrained import Pretrained, open_pretrained, random_like
from brainscale.report_compare import distinct
from brainscale.settings import InputError, load
from brainscale.store import Store
from brainscale.store_files import COMPLETE

CNN, RANDOM = "small CNN", "random"
BASELINES = (CNN, "histogram+volume", "volume")
"""Names that no run may have, as `RANDOM`."""


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
        digest.update(self.pretrained.fingerprint().encode() if self.pretrained is not None else b"")
        return digest.hexdigest()[:32]


def open_all(sources: Sequence[Path], part: str, layers: Sequence[int], store: Store) -> dict[str, Pretrained]:
    """Name → encoder of each run folder or export, checked against the store and made for its volumes.

    Names are those of the folders, with as many of the folders above as tell them apart. Raises InputError for a source
    that is given twice or is none, that was trained on volumes of another plan, lacks a layer, or is called like a
    baseline. part: of JEPA runs; others have an encoder alone.
    """
    places = [str(path.resolve()) for path in sources]
    if twice := [path for path, place in zip(sources, places) if places.count(place) > 1]:
        raise InputError(f"{twice[0]} is given twice; give every run or export once")
    found = {}
    for path, name in zip(sources, distinct(places)):
        is_run = (path / "config.toml").is_file()
        is_jepa = is_run and load(Config, path / "config.toml").objective == "jepa"
        encoder = open_pretrained(path, part if is_jepa else "encoder")
        encoder.check(store.plan, f"the store {store.path}")
        if wrong := [k for k in layers if not -1 <= k < encoder.settings.depth]:
            raise InputError(
                f"{path} has blocks 0 to {encoder.settings.depth - 1} and no layer {wrong[0]}; give another"
            )
        if name in BASELINES or name == RANDOM or name.startswith(f"{RANDOM} like "):
            raise InputError(f"{path} is called like a baseline; give it under another folder name")
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

    folder: where features are kept for another start. Raises InputError for an encoder whose features are not finite.
    """
    encoders = [
        (name, "run" if (path / "config.toml").is_file() else "export", str(path), encoder)
        for (name, encoder), path in zip(opened.items(), sources)
    ]
    shapes = {encoder.settings: name for name, encoder in reversed(opened.items())}
    for name in shapes.values():
        label = RANDOM if len(shapes) == 1 else f"{RANDOM} like {name}"
        encoders.append((label, "baseline", "random weights", random_like(opened[name], settings.random_seed)))
    found = []
    for number, (name, kind, source, encoder) in enumerate(encoders, 1):
        say(f"features of {len(rows)} scans by {name} ({number} of {len(encoders)})")
        make = partial(
            features.embed, encoder, store, rows, layers=settings.layers, pooling=settings.pooling, device=device
        )
        recipe = f"{encoder.fingerprint()} {encoder.settings.model_dump_json()} {settings.layers} {settings.pooling}"
        values = kept(folder / f"features-{rows_hash(store, rows, recipe)}.npy", make)
        refuse_non_finite(values, name)
        found.append(Contestant(name, kind, source, encoder.about, values, encoder))
    for name, measure in (("histogram+volume", baselines.histogram_and_volume), ("volume", baselines.volume)):
        say(f"features of {len(rows)} scans: {name}")
        path = folder / f"features-{name}-{rows_hash(store, rows)}.npy"
        found.append(Contestant(name, "baseline", "intensities", {}, kept(path, partial(measure, store, rows))))
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
                values = encoder.tokens(volumes)[0].half().cpu().numpy()
                refuse_non_finite(values, "an encoder")
                tokens[begin : begin + size] = values
        tokens.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def refuse_non_finite(values: np.ndarray, name: str) -> None:
    """Raise InputError for features or tokens (float16) that are not finite: they would be scored as worst."""
    if not np.isfinite(values).all():
        raise InputError(
            f"features of {name} are not finite; look at its training (RUN/report.html), and give an earlier checkpoint"
        )


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that is made once and then read. Raises InputError for a file that is damaged."""
    if not path.is_file():
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, make())
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it and run the same again") from None


def rows_hash(store: Store, rows: np.ndarray, recipe: str = "") -> str:
    """32 hex digits over rows of a store, all that it holds (by its COMPLETE.json), and what is done to them."""
    complete = (store.path / COMPLETE).read_bytes()
    return hashlib.sha256(b"\0".join((complete, rows.tobytes(), recipe.encode()))).hexdigest()[:32]
