"""`brainscale bench checkpoint`: what a save, a load and a preempted week cost, against DeepSpeed's and torch's files.

One process loads, as a new process does, and then trains on synthetic brains. Each round saves in every way in turn,
takes some steps after each, and as many without a save: the stall of a save is the time for which it held the loop and
by how much the steps after it were slower. Before every save, all that other saves left unwritten is flushed (untimed),
since only ours waits for the disk. DeepSpeed loads into an engine of its own: after its load, moments can no longer be
read by parameter.

The week is simulated from what was just measured, with a start that really resumes in a new process. Its lines are
seconds of wall time for one week of training that counts, so that their ratio to an undisturbed week is the effective
training time ratio.
"""

import copy
import hashlib
import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import brainscale.distributed as distributed  # first: it tells DeepSpeed about the device
from brainscale import checkpoint, metrics, run_folder, train
from brainscale import checkpoint_files as files
from brainscale.bench.record import measure, sample_lines
from brainscale.bench.week import week_lines
from brainscale.checkpoint_files import Tensors
from brainscale.config import Config
from brainscale.engine import MOMENTS, fill, start
from brainscale.mae import Mae
from brainscale.monitor_settings import Checkpoint
from brainscale.prep_plan import Plan
from brainscale.session import Session, prepare
from brainscale.settings import load, to_toml
from brainscale.stores import store_paths
from brainscale.watch import Watch
from brainscale_data_prep.convert import convert
from brainscale_data_prep.phantom import make

DEFAULT = (
    "model.width=384", "model.depth=12", "model.heads=6", "model.patch_voxels_zyx=[8, 8, 8]", "mae.decoder_width=192",
    "mae.decoder_depth=4", "mae.decoder_heads=3", 'train.precision="fp32"', "train.global_batch_volumes=1",
)  # fmt: skip
"""23 million parameters, 1,200 tokens: a step of about a second on two cores."""
QUICK = (
    "model.width=96", "model.depth=4", "model.heads=4", "model.patch_voxels_zyx=[16, 16, 16]", "mae.decoder_width=48",
    "mae.decoder_depth=2", "mae.decoder_heads=2", 'train.precision="fp32"', "train.global_batch_volumes=2",
)  # fmt: skip
PLAN = Plan(grid_voxels_xyz=(80, 96, 80), spacing_mm_xyz=(2.0, 2.0, 2.0))
OURS, WAITING = "brainscale", "brainscale, background = false"
DEEPSPEED, TORCH = "DeepSpeed (no fsync, no hash)", "torch.save of a copy in memory (no fsync, no hash, no rename)"
TORCH_LOAD = "torch.load of its file, and the same filling (no hash)"
NO_SAVE, SHA256, IMPORTS = "no save", "hashlib.sha256", "import torch, deepspeed"


def run(overrides: tuple[str, ...], config: Path | None, folder: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Lines over saving, loading, hashing, starting and the week.

    overrides, config: the run that is measured (none: DEFAULT), on its own store or on one of phantoms; folder: the
    disk to write to (none: that of temporary files); quick: a small model and two rounds instead of seven. Raises
    InputError for settings that cannot work.
    """
    base = () if config else QUICK if quick else DEFAULT
    with TemporaryDirectory(prefix="brainscale-bench-", dir=folder) as name:
        scratch = Path(name)
        wanted = (*base, *overrides, "log.every_steps=1", f"run.dir={scratch / 'run'}")
        settings = load(Config, config, wanted)
        if not store_paths(settings.data):
            make(scratch / "phantoms", 6, seed=0, spacing_mm=4.0)
            convert(scratch / "phantoms", scratch / "store", PLAN, workers=1)
            settings = load(Config, config, (*wanted, f"data.store={scratch / 'store'}"))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # a process group of its own
            found = process.submit(lines, settings, scratch, 2 if quick else 7).result()
        found += start_lines(settings, scratch, 2 if quick else 5)

    def median_s(case: str, variant: str) -> float:
        return next(x["median"] for x in found if x["case"].startswith(case) and x["variant"] == variant)

    stall_s, write_s = median_s("stall", OURS), median_s("save", OURS)
    return found + week_lines(median_s("step", NO_SAVE), stall_s, write_s, median_s("start", OURS))


def lines(config: Config, scratch: Path, n: int) -> list[dict[str, Any]]:
    """What `run` returns of one process, over `n` rounds. Leaves a checkpoint to resume."""
    world, run_dir = distributed.find(), Path(config.run.dir)
    distributed.start(world)
    with run_folder.locked(run_dir, world):
        session = prepare(config, run_dir, world)
        assert session is not None, "a new run folder"
        weights, moments, _ = checkpoint.snapshot(session.engine, world)
        megabytes = 12e-6 * sum(tensor.numel() for tensor in weights.values())
        size = f"{megabytes / 12:.1f} million parameters, {megabytes:.0f} MB, 1 process"
        found = load_lines(session, scratch, weights, moments, size, megabytes, n)
        return found + save_lines(session, scratch, weights, moments, size, n)


def load_lines(
    session: Session, scratch: Path, weights: Tensors, moments: Tensors, size: str, megabytes: float, n: int
) -> list[dict[str, Any]]:
    """Lines over loads and hashes. weights, moments: what is saved first, to be loaded."""
    engine, world, root = session.engine, session.world, session.run_dir / "checkpoints"
    newest = files.write(root, replace(session.state, step=1), weights, moments)
    torch.save((weights, moments), scratch / "torch.pt")
    other = start(Mae(session.config, session.loader.reader.volume_zyx), session.config, world)
    other.save_checkpoint(str(scratch / "deepspeed"), tag="bench")

    def load_ours(turn: int) -> None:
        assert checkpoint.newest(root, world) == newest
        checkpoint.load(engine, newest)

    def load_torch(turn: int) -> None:
        values, states = torch.load(scratch / "torch.pt", weights_only=True)
        with torch.no_grad():
            for name, parameter in engine.module.named_parameters():
                fill(engine, parameter, values[name].to(world.device))
                for moment in MOMENTS:
                    fill(engine, parameter, states[f"{name}.{moment}"].to(world.device), moment)

    def sha256(turn: int) -> None:
        with file.open("rb") as handle:
            hashlib.file_digest(handle, "sha256")

    loads: dict[str, Callable[[int], Any]] = {
        OURS: load_ours,
        DEEPSPEED: lambda turn: other.load_checkpoint(str(scratch / "deepspeed"), tag="bench"),
        TORCH_LOAD: load_torch,
    }
    file = newest / files.OPTIMIZER
    hashed = file.stat().st_size / 1e6
    hashes: dict[str, Callable[[int], Any]] = {OURS: lambda turn: files.file_hash(file), SHA256: sha256}
    case = f"load, files in the page cache; ours compares hashes: {size}"
    found = measure("checkpoint", case, loads, DEEPSPEED, n, 1, megabytes=lambda turn: megabytes)
    case = f"hash of a file of {hashed:.0f} MB in the page cache"
    return found + measure("checkpoint", case, hashes, SHA256, n, 1, megabytes=lambda turn: hashed)


def save_lines(
    session: Session, scratch: Path, weights: Tensors, moments: Tensors, size: str, n: int
) -> list[dict[str, Any]]:
    """Lines over saves and the steps after them. weights, moments: for torch.save."""
    engine, world, root = session.engine, session.world, session.run_dir / "checkpoints"
    watch, clock = Watch(world, session.run_dir, session.config.health.first_timeout_s), metrics.Clock(0, 0.0)
    batches, steps = session.loader.batches(0), itertools.count()
    states = (replace(session.state, step=step) for step in itertools.count(2))
    behind = checkpoint.Saver(engine, root, world, Checkpoint())
    waiting = checkpoint.Saver(engine, root, world, Checkpoint(background=False))

    def take(count: int) -> float:
        begin = time.perf_counter()
        for step in itertools.islice(steps, count):
            train.compute(session, batches, step, watch, clock)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    saves: dict[str, Callable[[], Any]] = {
        OURS: lambda: behind.save(next(states), wait=False),
        WAITING: lambda: waiting.save(next(states), wait=False),
        DEEPSPEED: lambda: engine.save_checkpoint(str(scratch / "deepspeed"), tag="bench"),
        TORCH: lambda: torch.save((weights, moments), scratch / "torch.pt"),
        NO_SAVE: lambda: None,
    }
    take(2)
    waiting.save(next(states), wait=True)
    count = 1 + math.ceil(2 * waiting.write_s / (take(2) / 2))
    print(f"measuring: saves, each followed by {count} steps", file=sys.stderr, flush=True)
    names = list(saves)
    held: dict[str, list[float]] = {name: [] for name in names}
    whole, after = copy.deepcopy(held), copy.deepcopy(held)
    for turn in range(n):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == DEEPSPEED:
                shutil.rmtree(scratch / "deepspeed", ignore_errors=True)
            os.sync()
            begin = time.perf_counter()
            saves[name]()
            held[name].append(time.perf_counter() - begin)
            after[name].append(take(count))
            behind.finish()
            whole[name].append(held[name][-1] + (behind.write_s if name == OURS else 0.0))
    batches.close()
    stall = {name: [h + max(0.0, a - b) for h, a, b in zip(held[name], after[name], after[NO_SAVE])] for name in names}
    step_s = {name: [a / count for a in after[name]] for name in names}
    for samples in (held, whole, stall):
        del samples[NO_SAVE]
    found = []
    for case, samples, reference in (
        (f"save until it is over: {size}", whole, DEEPSPEED),
        (f"loop held by a save: {size}", held, DEEPSPEED),
        (f"step after a save: {size}", step_s, NO_SAVE),
        (f"stall, loop held and steps after it slower: {size}", stall, DEEPSPEED),
    ):
        found += sample_lines("checkpoint", case, "s", samples, reference)
    return found


def start_lines(config: Config, scratch: Path, n: int) -> list[dict[str, Any]]:
    """Lines over the start of a process that resumes, against the imports that any such process makes."""
    print("measuring: starts", file=sys.stderr, flush=True)
    file = scratch / "config.toml"
    file.write_text(to_toml(config))
    samples: dict[str, list[float]] = {OURS: [], IMPORTS: []}
    for _ in range(n):
        samples[OURS].append(start_s(file, Path(config.run.dir), scratch / "start.log"))
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
        samples[IMPORTS].append(time.perf_counter() - begin)
    return sample_lines("checkpoint", "start of a process until its first metrics line, resumed", "s", samples, IMPORTS)


def start_s(config: Path, run_dir: Path, log: Path) -> float:
    """Seconds from starting `brainscale pretrain` on a run to its first metrics line, after which it is killed.

    Raises RuntimeError with what it printed when it ends before.
    """
    line = run_dir / "metrics.jsonl"
    line.unlink(missing_ok=True)
    begin = time.perf_counter()
    with log.open("w") as output:
        command = [sys.executable, "-m", "brainscale", "pretrain", str(config)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not (line.exists() and line.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"pretrain ended with code {process.returncode}: {log.read_text()[-2000:]}")
            time.sleep(0.01)
        return time.perf_counter() - begin
    finally:
        process.kill()
        process.wait()
