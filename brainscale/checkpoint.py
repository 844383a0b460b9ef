"""Checkpoints: atomic, hashed, independent of the number of ranks.

    RUN/checkpoints/step-00000300/   weights.safetensors    fp32 parameters by name
                                     optimizer.safetensors  exp_avg and exp_avg_sq by parameter name
                                     state.json             step, cursor, config, plan hash, versions
                                     MANIFEST.json          bytes and xxh3_128 of the three
    RUN/checkpoints/latest           name of the newest one

A save is written to a temporary directory, hashed, flushed to disk and renamed; the pointer moves last. What a kill
leaves behind is a temporary directory, swept by the next start. DeepSpeed's own pointer can be published before other
ranks have finished, so its format is not used.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import xxhash
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors.torch import load_file, save_file

from brainscale.config import InputError
from brainscale.distributed import World, broadcast
from brainscale.engine import torch_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainState:
    """Everything a run is besides tensors. step: finished steps; updates: AdamW's own count, lower where DeepSpeed left
    out a step with a gradient that is not finite; cursor: global index of the next sample;
    time_s: seconds spent training so far; config, versions: as dumped; plan_hash, data_hash: of the store's plan and of
    the training rows; volume_zyx: voxels of what the model sees."""

    step: int
    updates: int
    cursor: int
    time_s: float
    config: dict[str, Any]
    plan_hash: str
    data_hash: str
    volume_zyx: tuple[int, int, int]
    versions: dict[str, str]


def save(engine: deepspeed.DeepSpeedEngine, state: TrainState, root: Path, world: World) -> None:
    """Collective: every rank takes part in gathering, rank 0 writes. root: RUN/checkpoints.

    Raises FloatingPointError when a tensor is not finite; then nothing is written.
    """
    weights, moments = _gather(engine, world)
    if not world.is_first:
        return
    broken = [name for name, tensor in {**weights, **moments}.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise FloatingPointError(f"step {state.step}: {len(broken)} tensors are not finite ({broken[0]}, …); not saved")
    updates = next(iter(torch_optimizer(engine).state.values()))["step"]
    state = replace(state, updates=int(updates))
    final = root / f"step-{state.step:08d}"
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir(parents=True)
    save_file(weights, temporary / "weights.safetensors")
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
    manifest = {p.name: {"bytes": p.stat().st_size, "xxh3_128": _hash(p)} for p in sorted(temporary.iterdir())}
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(root)
    pointer = root / "latest.tmp"
    pointer.write_text(final.name)
    _fsync(pointer)
    pointer.replace(root / "latest")
    _fsync(root)


def newest(root: Path, world: World) -> Path | None:
    """The newest checkpoint whose hashes hold, agreed by all ranks; None when there is none at all.

    A damaged one is named on standard output and the one before it taken. Raises InputError when all are damaged.
    """
    choice: tuple[str | None, str | None] = (None, None)
    if world.is_first and root.is_dir():
        for litter in root.glob(".tmp-*"):
            shutil.rmtree(litter)
        steps = sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)
        for path in steps:
            problem = damage(path)
            if problem is None:
                choice = (path.name, None)
                break
            print(f"DAMAGED CHECKPOINT, falling back to the one before it: {problem}", flush=True)
        else:
            if steps:
                choice = (None, f"none of the {len(steps)} checkpoints in {root} is intact; move the folder away")
    name, fault = broadcast(choice, world)
    if fault:
        raise InputError(fault)
    return root / name if name else None


def damage(path: Path) -> str | None:
    """One sentence about what is wrong with a checkpoint directory, or None."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
    except (OSError, ValueError) as error:
        return f"{path}/MANIFEST.json cannot be read ({error})"
    for name, record in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != record["bytes"]:
            return f"{file} is missing or has another size than its manifest says"
        if _hash(file) != record["xxh3_128"]:
            return f"{file} does not have the hash of its manifest"
    return None


def read_state(path: Path) -> TrainState:
    """The state of a checkpoint directory."""
    fields = json.loads((path / "state.json").read_text())
    return TrainState(**{**fields, "volume_zyx": tuple(fields["volume_zyx"])})


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """fp32 parameters by name, on the CPU."""
    return load_file(path / "weights.safetensors")


def load(engine: deepspeed.DeepSpeedEngine, path: Path) -> TrainState:
    """Collective: put a checkpoint into an engine made by `engine.start`, of any world size and ZeRO stage 1 or 2.

    Every tensor and AdamW's step count are overwritten; DeepSpeed's setter does not refresh the model's own copy of a
    weight, so that is written too.
    """
    state, tensors = read_state(path), {**read_weights(path), **load_file(path / "optimizer.safetensors")}
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, tensors[name])
            parameter.data.copy_(tensors[name])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}.{moment}"], moment)
        for slot in torch_optimizer(engine).state.values():
            slot["step"].fill_(state.updates)
    return state


def prune(root: Path, keep_last: int, keep_every_steps: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those at multiples of `keep_every_steps` (0: none)."""
    for path in sorted(root.glob("step-*"))[:-keep_last]:
        if not keep_every_steps or int(path.name.removeprefix("step-")) % keep_every_steps:
            shutil.rmtree(path)


def _gather(engine: deepspeed.DeepSpeedEngine, world: World) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Full fp32 parameters and moments on rank 0's CPU (empty elsewhere), one parameter at a time."""
    weights, moments = {}, {}
    for name, parameter in engine.module.named_parameters():
        full = {name: safe_get_full_fp32_param(parameter)}
        full |= {f"{name}.{moment}": safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        if world.is_first:
            kept = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in full.items()}
            weights[name] = kept.pop(name)
            moments.update(kept)
    return weights, moments


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
