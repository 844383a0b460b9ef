"""Saving and loading a DeepSpeed engine of any world size, ZeRO stage and accumulation. The files: checkpoint_files.py.

A save gathers whole fp32 tensors on rank 0's host memory, which every rank takes part in and which stalls the step;
rank 0 then writes them, behind the following steps where that is wanted. A rank that is told to go on has no part in
the files, so the pointer can move when rank 0 has written. Whether the writing failed is agreed before anything else
is saved, so that all ranks stop for the same reason.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch

from brainscale import checkpoint_files as files
from brainscale.checkpoint_files import Tensors, TrainState
from brainscale.distributed import World, broadcast, gather
from brainscale.engine import MOMENTS, fill, full, torch_optimizer
from brainscale.faults import fault_point
from brainscale.monitor_settings import Checkpoint
from brainscale.settings import InputError


class SaveFailed(RuntimeError):
    """Rank 0 could not write a checkpoint; `error` is why (on every rank)."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"the checkpoint could not be saved ({error})")
        self.error = error


class Saver:
    """Saves an engine's state under `root` (RUN/checkpoints)."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, root: Path, world: World, settings: Checkpoint) -> None:
        self.engine, self.root, self.world, self.settings = engine, root, world, settings
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        self.copy_s = self.write_s = 0.0

    def save(self, state: TrainState, wait: bool) -> None:
        """Collective. `wait`: return when it is on disk on every rank's behalf, else when the copy is made.

        Raises SaveFailed on every rank when this save (with `wait`) or the one before it failed.
        """
        self.finish()
        fault_point("save.begin")
        begin = time.monotonic()
        weights, moments, updates = snapshot(self.engine, self.world)
        self.copy_s = max(self.copy_s, time.monotonic() - begin)
        fault_point("save.copied")
        if self.world.is_first:
            self.writing = self.writer.submit(self._write, replace(state, updates=updates), weights, moments)
        if wait or not self.settings.background:
            self.finish()

    def failed(self) -> bool:
        """Whether a save that went on behind the steps has ended in an error (known on rank 0)."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def finish(self) -> None:
        """Collective: wait for the writing. Raises SaveFailed on every rank if it failed."""
        error: BaseException | None = None
        if self.writing is not None:
            error, self.writing = self.writing.exception(), None
        error = broadcast(error, self.world)
        if isinstance(error, Exception):
            raise SaveFailed(error)

    def close(self) -> None:
        """Let go of the thread."""
        self.writer.shutdown()

    def _write(self, state: TrainState, weights: Tensors, moments: Tensors) -> None:
        begin = time.monotonic()
        files.write(self.root, state, weights, moments)
        files.prune(self.root, self.settings.keep_last, self.settings.keep_every_steps)
        self.write_s = max(self.write_s, time.monotonic() - begin)
        fault_point("save.end")


def snapshot(engine: deepspeed.DeepSpeedEngine, world: World) -> tuple[Tensors, Tensors, int]:
    """Collective: copies of the fp32 weights and moments in rank 0's host memory (empty elsewhere), and AdamW's count.

    One tensor is gathered at a time, so the device holds one whole tensor more than usual.
    """
    weights: Tensors = {}
    moments: Tensors = {}
    for name, parameter in engine.module.named_parameters():
        trained = [(f"{name}.{m}", moments, m) for m in MOMENTS] if parameter.requires_grad else []
        for key, target, moment in ((name, weights, None), *trained):
            tensor = full(engine, parameter, moment) if trained else engine.module.average.full(parameter)
            if world.is_first:
                target[key] = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
    updates = int(next(iter(torch_optimizer(engine).state.values()))["step"])
    return weights, moments, updates


def newest(root: Path, world: World) -> Path | None:
    """Collective: the newest checkpoint whose hashes hold where every rank reads them; None when there is none at all.

    A damaged one is named on standard output, set aside, and the one before it taken. The pointer is set right. Raises
    InputError when all are damaged. Rank 0 must hold the run folder.
    """
    if world.is_first and root.is_dir():
        files.sweep(root)
    candidates = broadcast([path.name for path in reversed(files.directories(root))], world)
    damaged: list[tuple[str, str]] = []
    for name in candidates:
        problems = gather(files.damage(root / name), world)
        found = next((f"{problem} (rank {rank})" for rank, problem in enumerate(problems) if problem), None)
        if found is None:
            break
        damaged.append((name, found))
    else:
        if candidates:
            raise InputError(
                f"none of the {len(candidates)} checkpoints in {root} is intact ({damaged[0][1]}); restore one, or "
                "move the folder away to begin again"
            )
        return None
    if world.is_first:
        for other, problem in damaged:
            aside = files.set_aside(root / other)
            print(f"DAMAGED CHECKPOINT, falling back to the one before it: {problem}; it is now {aside}", flush=True)
        if files.pointed(root) != name:
            files.point(root, name)
    fault_point("load.found")
    return root / name


def load(engine: deepspeed.DeepSpeedEngine, path: Path) -> TrainState:
    """Collective: put a verified checkpoint into an engine made by `engine.start`, of any world size and ZeRO stage.

    Every tensor and AdamW's step count are overwritten. Raises InputError when the checkpoint's tensors are not those
    of the model.
    """
    state, reader = files.read_state(path), files.Reader(path)
    parameters: dict[str, Any] = dict(engine.module.named_parameters())
    wanted = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    if different := sorted(n for n in wanted.keys() | reader.names() if wanted.get(n) != reader.shape(n)):
        raise InputError(
            f"{path} holds another model: {len(different)} tensors differ ({different[0]}, …); restore the settings of "
            "model and decoder, or choose another run.dir"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                engine.module.average.fill(parameter, reader.get(name))
            for moment in (None, *MOMENTS) if parameter.requires_grad else ():
                fill(engine, parameter, reader.get(name, moment).to(engine.device), moment)
        if hasattr(engine.module, "average"):
            engine.module.average.publish()
        for slot in torch_optimizer(engine).state.values():
            slot["step"].fill_(state.updates)
    fault_point("load.filled")
    return state
