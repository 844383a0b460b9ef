"""The DALI loader: the same batches as `loader.py`, placed and altered by a DALI graph, on the GPU where there is one.

Processes read and decode (a parallel external source, `dali_source.py`); the graph cuts, pads, rotates, scales, mirrors
and alters intensities, on the GPU or on DALI's CPU backend. Nothing is drawn by DALI: every number comes from
`sampling.py`, so a batch is a pure function of (seed, cursor). `augment.py` says what the graph computes; a test holds
the two together.

DALI waits for ever for a process that was killed, so `workers.py` looks after them from outside.
"""

import gc
import importlib
import importlib.util
import shutil
from collections.abc import Callable, Generator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainscale.dali_source import Source
from brainscale.feed import Feed
from brainscale.loader import MAX_AHEAD, Batch, Loader, collate
from brainscale.settings import InputError
from brainscale.stream import Stream
from brainscale.workers import Workers

INSTALL = "pip install 'brainscale-mri[dali]'"
SHARED_MEMORY = Path("/dev/shm")
PIPELINE_DEPTH = 2
"""Batches inside DALI's graph."""


def available() -> bool:
    """Whether DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def choose_loader(name: str, device: torch.device) -> tuple[type[Loader], str]:
    """The loader that `data.loader` names, and what to say about the choice. Raises InputError where it is missing."""
    on = "on the GPU" if device.type == "cuda" else "on the CPU"
    if name == "torch":
        return Loader, "torch"
    if available():
        if name == "dali" or device.type == "cuda":
            return DaliLoader, f"DALI {on}"
        return Loader, "torch, since there is no GPU for DALI"
    if name == "dali":
        raise InputError(f'data.loader = "dali" needs DALI, which is not installed: {INSTALL}, or set it to "torch"')
    return Loader, f"torch, since DALI is not installed ({INSTALL})"


class DaliLoader(Loader):
    """As `Loader`, through DALI."""

    name = "dali"

    def batches(self, cursor: int) -> Generator[tuple[Batch, int], None, None]:
        """As `Loader.batches`. Raises InputError also where the machine's shared memory is too small, and LoaderFailed,
        at once, also when one of the processes that read dies."""
        ahead = min(self.batches_in_memory(PIPELINE_DEPTH + 3) - PIPELINE_DEPTH - 2, MAX_AHEAD)
        room_mb = shutil.disk_usage(SHARED_MEMORY).free / 1e6
        needed_mb = (ahead + PIPELINE_DEPTH) * self.batch_bytes / 1e6
        if room_mb < needed_mb:
            raise InputError(
                f"{SHARED_MEMORY} has {room_mb:.0f} MB free, and batches of together {needed_mb:.0f} MB pass "
                'through it; enlarge it (docker: --shm-size), lower data.prefetch_mb, or set data.loader = "torch"'
            )
        at = cursor
        self.remember_names()
        workers = Workers(lambda: self.awaited(at), self.damage)
        started = workers.started_by(lambda: self._pipeline(cursor, ahead, workers.report))
        feed: Feed[Batch] = Feed(
            lambda feed: self._run(workers, started, cursor), 1, self.config.data.timeout_s, lambda: self.awaited(at)
        )
        workers.watch(feed)
        try:
            while True:
                batch = next(feed)
                if batch.volumes.is_cuda:
                    batch.volumes.record_stream(torch.cuda.current_stream(self.device))
                at += self.stride
                yield batch, at
        finally:
            workers.close(feed)

    def _pipeline(self, cursor: int, ahead: int, report: str) -> list[Any]:
        """A DALI pipeline that is ready to run, with its processes; in a list, so that one holder can let go of it."""
        augment = self.config.augment
        on_gpu = self.device.type == "cuda"
        padded = any(c > v for c, v in zip(self.reader.volume_zyx, self.reader.store.volume_zyx))
        intensities = ("gamma", "gain", "bias", "noise", "blur")
        kinds = {kind: getattr(augment, f"{kind}_fraction") > 0 for kind in ("affine", *intensities)}
        kinds["intensity"] = any(kinds[kind] for kind in intensities)
        names = ["voxels", "foreground", "start", "mirrored"]
        names += ["background"] if kinds["intensity"] or not self.reader.zero_background else []
        names += ["moves", "matrix"] if kinds["affine"] else []
        names += ["alters", "low", "span", "gamma", "gain"] if kinds["intensity"] else []
        names += ["blurs", "sigma", "window"] if kinds["blur"] else []
        names += ["log_field"] if kinds["bias"] else []
        names += ["noise_std"] if kinds["noise"] else []
        stream = Stream(*(getattr(self, field.name) for field in fields(Stream)))
        make = importlib.import_module("nvidia.dali").pipeline_def(graph, enable_conditionals=True)
        pipeline = make(
            dali={name: importlib.import_module(f"nvidia.dali.{name}") for name in ("fn", "types", "math")},
            source=Source(stream, cursor, tuple(names), report), noise=self._noise(cursor), kinds=kinds,
            crop=self.reader.volume_zyx, zero_background=self.reader.zero_background, padded=padded, ahead=ahead,
            on_gpu=on_gpu, batch_size=self.micro_batch,
            num_threads=self.config.data.workers, device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PIPELINE_DEPTH, py_num_workers=self.config.data.workers, py_start_method="spawn",
        )  # fmt: skip
        pipeline.build()
        return [pipeline]

    def _noise(self, cursor: int) -> Callable[[int], list[Any]]:
        """From the number of a batch to the noise of its samples, each (Z,Y,X,1): views of one table on the device."""
        table: Any = None

        def noise(batch: int) -> list[Any]:
            nonlocal table
            if table is None:
                table = torch.from_numpy(self.reader.noise.table).to(self.device)
            number = self.reader.noise.num_voxels
            places = [d.change.noise_place for d in self.draws(cursor + batch * self.stride)]
            found = [table[place : place + number].view(*self.reader.volume_zyx, 1) for place in places]
            return found if self.device.type == "cuda" else [view.numpy() for view in found]

        return noise

    def _run(self, workers: Workers, holder: list[Any], cursor: int) -> Generator[Batch, None, None]:
        pipeline = holder.pop()
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        try:
            while True:
                try:
                    volumes, foreground = pipeline.run()
                except Exception as error:
                    raise workers.reason(error) from None
                copy = to_torch(volumes.as_tensor(), self.device, side).view(-1, 1, *self.reader.volume_zyx)
                yield collate(self.reader, self.draws(cursor), copy, np.array(foreground.as_tensor()))
                cursor += self.stride
        finally:
            workers.leaving.set()
            volumes = foreground = None
            del pipeline  # DALI ends its processes when it is forgotten
            gc.collect()


def to_torch(volumes: Any, device: torch.device, side: "torch.cuda.Stream | None") -> Tensor:
    """A copy of an output of DALI, which it will write over. side: the stream that copies on a GPU."""
    if side is None:
        return torch.from_numpy(np.array(volumes))
    plugin = importlib.import_module("nvidia.dali.plugin.pytorch")
    with torch.cuda.stream(side):
        copy = torch.empty(volumes.shape(), dtype=plugin.to_torch_type[volumes.dtype], device=device)
        plugin.feed_ndarray(volumes, copy, cuda_stream=side)
    side.synchronize()
    return copy


def graph(
    dali: dict[str, Any],
    source: Source,
    noise: Callable[[int], list[Any]],
    kinds: dict[str, bool],
    crop: tuple[int, int, int],
    zero_background: bool,
    padded: bool,
    ahead: int,
    on_gpu: bool,
) -> Any:
    """The DALI graph (converted by its autograph: an `if` of data splits the batch): volumes (Z,Y,X,1) in storage type,
    and foreground shares on the host. kinds: which changes there may be."""
    fn, types, math = dali["fn"], dali["types"], dali["math"]
    layouts = ["DHWC" if name in ("voxels", "log_field") else "" for name in source.names]
    outputs = fn.external_source(
        source, num_outputs=len(source.names), layout=layouts, parallel=True, batch=False, prefetch_queue_depth=ahead
    )
    given = dict(zip(source.names, outputs))
    storage = {"int16": types.INT16, "uint8": types.UINT8, "float32": types.FLOAT}[
        source.stream.reader.store.dtype.name
    ]

    def near(name: str) -> Any:
        return given[name].gpu() if on_gpu else given[name]

    volume = near("voxels")
    background = near("background") if "background" in given else 0.0
    as_it_is = zero_background or not padded
    as_float = kinds["affine"] or kinds["intensity"] or not as_it_is
    if as_float:
        volume = fn.cast(volume, dtype=types.FLOAT)
    if kinds["affine"]:
        if given["moves"]:
            above = volume if zero_background else volume - background
            volume = fn.warp_affine(above, matrix=given["matrix"], size=crop, fill_value=0.0)
            volume = volume if zero_background else volume + background
        else:
            volume = cut(fn, volume, given["start"], crop, background, as_it_is)
    else:
        volume = cut(fn, volume, given["start"], crop, background, as_it_is)
    volume = fn.flip(volume, horizontal=given["mirrored"])
    if kinds["intensity"]:
        low, span = near("low"), near("span")
        gamma, gain = near("gamma"), near("gain")
        drawn = (
            fn.external_source(noise, layout="DHWC", no_copy=True, device="gpu" if on_gpu else "cpu")
            if kinds["noise"]
            else 0.0
        )
        noise_std = near("noise_std") if kinds["noise"] else 0.0
        log_field = near("log_field") if kinds["bias"] else 0.0
        if given["alters"]:
            u = math.clamp((volume - low) * (1.0 / span), 0.0, 1.0)
            if kinds["blur"]:
                if given["blurs"]:
                    u = fn.gaussian_blur(u, sigma=given["sigma"], window_size=given["window"])
            u = math.pow(u, gamma) * gain
            if kinds["bias"]:
                u = u * math.exp(fn.resize(log_field, size=crop, interp_type=types.INTERP_LINEAR))
            if kinds["noise"]:
                u = u + noise_std * drawn
            inside = fn.cast(volume != background, dtype=types.FLOAT)
            volume = inside * (low + span * math.clamp(u, 0.0, 1.0)) + (1.0 - inside) * volume
    if as_float:
        volume = fn.cast(volume, dtype=storage)
    return volume, given["foreground"]


def cut(fn: Any, volume: Any, start: Any, crop: tuple[int, int, int], background: Any, as_it_is: bool) -> Any:
    """A crop from a place on. as_it_is: whether nothing, or nothing but zeros, is padded."""
    above = volume if as_it_is else volume - background
    above = fn.slice(above, start=start, shape=list(crop), axes=[0, 1, 2], out_of_bounds_policy="pad", fill_values=0.0)
    return above if as_it_is else above + background
