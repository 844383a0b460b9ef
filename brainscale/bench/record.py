"""How every benchmark measures and what a line says.

Variants run in turn, A B C, B C A, C A B, …, so that a drift of the machine's speed meets all of them and none always
finds what another left in the caches; a line holds median and 20th and 80th percentile, and the ratio is the median of
the ratios taken pair by pair, round by round. schema.py describes a line, gate.py judges two of them.
"""

import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from brainscale import provenance
from brainscale.bench import schema
from brainscale.bench.line_text import figures
from brainscale_data_prep.pool import ENVIRONMENT

PEERS = ("scipy", "numcodecs", "nifti-zarr", "SimpleITK", "monai", "torchio", "triton", "nvidia-dali-cuda130")
"""Packages whose versions stand in a line where they are installed, beside those of `provenance`."""
MEASURES = {
    "convert": "seconds from a NIfTI file to a volume on disk, and its bytes, without and with resampling, against "
    "nifti-zarr, nibabel + zarr-python, scipy, SimpleITK and MONAI",
    "read": "seconds to read a volume or a 96³ crop from a store, by codec, chunk and state of the page cache, against "
    "zarr-python on the same store and nibabel on the source",
    "loader": "seconds of a volume in batches in the training process, warm and cold, with its bytes and CPU time, "
    "against MONAI, torchio and nibabel under torch's DataLoader",
    "kernels": "gathers and losses with their backward pass, seconds on a GPU, else counted bytes and launches, "
    "against eager, torch.compile, the paper's form, MONAI and Conv3d",
    "step": "seconds of a training step, against MONAI's MaskedAutoEncoderViT at the same FLOPs, plain PyTorch and "
    "compile off",
    "scaling": "seconds of a step over 1 to n ranks on this host, weak and strong, with what is sent, against one rank "
    "and the prediction of `brainscale plan`",
    "checkpoint": "seconds of saves, loads, hashes and resumed starts, and the stall of the steps, against DeepSpeed "
    "and torch.save",
}
"""What each benchmark measures, and against what."""


def measure(
    bench: str,
    case: str,
    variants: dict[str, Callable[[int], Any]],
    reference: str,
    n: int = 15,
    warmup: int = 2,
    before: Callable[[str, int], Any] | None = None,
    megabytes: Callable[[int], float] | None = None,
    bytes_per_volume: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Time each variant `n` times in turn, in seconds; a ratio above 1 means faster than `reference`. A line each.

    A variant is called with the number of the round, so that all do the same piece of work in it; `before` is called
    with name and round ahead of every call, untimed, and `megabytes` says how large a round's piece is.
    """
    print(f"measuring: {case}", file=sys.stderr, flush=True)
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, n):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if before is not None:
                before(name, turn + warmup)
            start = time.perf_counter()
            variants[name](turn + warmup)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    lines = sample_lines(bench, case, "s", seconds, reference)
    for line in lines:
        own = seconds[line["variant"]]
        if megabytes is not None:
            line["mb_per_s"] = statistics.median(megabytes(turn + warmup) / s for turn, s in enumerate(own))
        line["bytes_per_volume"] = (bytes_per_volume or {}).get(line["variant"])
    return lines


def announce(bench: str) -> None:
    """Say what a benchmark measures, before it begins."""
    print(f"bench {bench}: {MEASURES[bench]}", file=sys.stderr, flush=True)


def compare_sizes(bench: str, case: str, sizes: dict[str, list[float]], reference: str) -> list[dict[str, Any]]:
    """Lines over bytes per volume, an entry per volume; here a ratio below 1 means smaller than `reference`."""
    lines = sample_lines(bench, case, "B", sizes, reference)
    for line in lines:
        line["bytes_per_volume"] = statistics.fmean(sizes[line["variant"]])
    return lines


def sample_lines(
    bench: str,
    case: str,
    unit: str,
    samples: dict[str, list[float]],
    reference: str,
    kind: schema.Kind | None = None,
) -> list[dict[str, Any]]:
    """A line per variant: median, spread, and ratio to `reference` with its spread.

    kind: how the samples came about; none given: seconds were timed, all else was counted.
    """
    around, lines = surroundings(), []
    kind = kind or ("timed" if unit == "s" else "counted")
    for name, own in samples.items():
        p20, p80 = np.percentile(own, (20, 80))
        ratios = pair_ratios(unit, own, samples[reference])
        low, high = np.percentile(ratios, (20, 80)) if len(ratios) > 1 else (None, None)
        lines.append(
            {
                "bench": bench, "case": case, "variant": name, "measures": MEASURES.get(bench), "kind": kind,
                "unit": unit, "median": statistics.median(own), "p20": float(p20), "p80": float(p80), "n": len(own),
                "ratio_to": reference, "ratio": statistics.median(ratios),
                "ratio_p20": None if low is None else float(low), "ratio_p80": None if high is None else float(high),
                "pairs": [float(f"{ratio:.6g}") for ratio in ratios] if kind == "timed" else None,
                "mb_per_s": None, "bytes_per_volume": None, "skipped": None, **around,
            }
        )  # fmt: skip
    return lines


def pair_ratios(unit: str, own: list[float], other: list[float]) -> list[float]:
    """How many times faster (s) than the other, or how many times its size (B), a variant is, round by round."""
    return [b / a if unit == "s" else a / b for a, b in zip(own, other)]


def paired_ratio(unit: str, own: list[float], other: list[float]) -> float:
    """Median over pairs of how many times faster (s) than the other, or how many times its size (B), a variant is."""
    return statistics.median(pair_ratios(unit, own, other))


def skipped(bench: str, case: str, variant: str, reason: str) -> dict[str, Any]:
    """The line of a variant that could not run."""
    return {"bench": bench, "case": case, "variant": variant, "skipped": reason, **surroundings()}


def surroundings() -> dict[str, Any]:
    """Machine, versions, commit and time of a measurement."""
    versions, commit = _software()
    return {
        "machine": {"cpu": provenance.cpu_name(), "cores": os.cpu_count(), **_gpu()},
        "versions": versions,
        "commit": commit,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@lru_cache(maxsize=1)
def _software() -> tuple[dict[str, str], str]:
    """Versions and commit, asked for once in a process."""
    versions = provenance.versions()
    for name in PEERS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions, provenance.commit()


def _gpu() -> dict[str, str | None]:
    """Name and driver of the GPU that is measured; null without one, and where torch, so any GPU, is not in use."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {"gpu": None, "driver": None}
    return {"gpu": torch.cuda.get_device_name(), "driver": _driver()}


@lru_cache(maxsize=1)
def _driver() -> str | None:
    """Release of NVIDIA's driver; null where nvidia-ml-py (the extra "gpu") or its library is not there."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return None


def on_one_core(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a fresh process on one core, in the environment of conversion workers; its result.

    The process is bound to the core before it imports anything, so every library finds one core and sizes its pools so.
    """
    return in_fresh_process(ENVIRONMENT, {max(os.sched_getaffinity(0))}, function, *arguments)


def in_fresh_process(
    environment: dict[str, str], cores: set[int], function: Callable[..., Any], *arguments: Any
) -> Any:
    """Call a module's function in a new process that has more variables in its environment and these cores."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, cores)) as process:
            return process.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def write(lines: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Print a table, and append the lines to a JSON-lines file, each held to its schema (AssertionError)."""
    for line in lines:
        assert not (wrong := schema.mistake(line)), f"a line of {line['bench']}, {line['case']}: {wrong}"
    width = max((len(line["variant"]) for line in lines), default=0)
    case = ""
    for line in lines:
        if (title := f"{line['bench']}: {line['case']}") != case:
            case = title
            print(f"\n{case}")
        print(f"  {line['variant']:<{width}}  {figures(line)}".rstrip())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
