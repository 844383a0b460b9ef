"""What a checkpoint is on disk: atomic, hashed, independent of the number of ranks. No DeepSpeed in here.

    RUN/checkpoints/step-00000300/   weights.safetensors    fp32 parameters by name
                                     optimizer.safetensors  exp_avg and exp_avg_sq by parameter name
                                     state.json             step, cursor, config, plan hash, versions
                                     MANIFEST.json          bytes and xxh3_128 of the three
    RUN/checkpoints/latest           name of the newest one

A checkpoint is written to a temporary directory, hashed, flushed to disk and renamed; the pointer moves last. Whatever
a kill leaves behind is a temporary directory, swept by the next start. What counts is a directory whose hashes hold;
the pointer is for people and scripts, and is set right at every start. A damaged directory that a start fell back from
is renamed damaged-step-….
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from brainscale.faults import fault_point
from brainscale.settings import InputError

WEIGHTS, OPTIMIZER, STATE, MANIFEST, LATEST = (
    "weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json", "latest",
)  # fmt: skip
FORMAT = 1
"""Of state.json; another value is refused."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainState:
    """Everything a run is besides tensors.

    step: finished steps, those left out for want of a finite gradient included; updates: AdamW's own count, without
    them; skipped, skipped_in_a_row: how many those are, in all and up to now; cursor: global index of the next sample;
    time_s: seconds of training so far; config, versions: as dumped; plan_hash, data_hash: of the store's plan and of
    the training rows; volume_zyx: voxels of what the model sees; world_size, zero_stage, micro_batch_volumes,
    accumulation: how it was computed, which a resumed run may change; meter: sums and counts of the metrics line that
    was begun (`metrics.Meter`).
    """

    step: int
    cursor: int
    time_s: float
    config: dict[str, Any]
    plan_hash: str
    data_hash: str
    volume_zyx: tuple[int, int, int]
    versions: dict[str, str]
    world_size: int
    zero_stage: int
    micro_batch_volumes: int
    accumulation: int
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    meter: list[list[float]] = field(default_factory=list)
    format: int = FORMAT


def write(root: Path, state: TrainState, weights: Tensors, moments: Tensors) -> Path:
    """Put a checkpoint in place whole and on disk, then move the pointer; returns its directory.

    On any error nothing older has changed and the temporary directory is gone. Raises FloatingPointError when a tensor
    is not finite, OSError (of a full disk, say) as it came.
    """
    broken = [name for name, tensor in {**weights, **moments}.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise FloatingPointError(f"step {state.step}: {len(broken)} tensors are not finite ({broken[0]}, …); not saved")
    final = directory(root, state.step)
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    complete = False
    try:
        new = not root.exists()
        temporary.mkdir(parents=True)
        if new:
            fsync(root.parent)
        fault_point("save.directory")
        _save(weights, temporary / WEIGHTS)
        fault_point("save.weights")
        _save(moments, temporary / OPTIMIZER)
        fault_point("save.optimizer")
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1))
        fault_point("save.state")
        for name in (WEIGHTS, OPTIMIZER):  # safetensors lets nobody else read
            shutil.copymode(temporary / STATE, temporary / name)
        manifest = {}
        for path in sorted(temporary.iterdir()):
            fsync(path)
            manifest[path.name] = {"bytes": path.stat().st_size, "xxh3_128": file_hash(path)}
        fault_point("save.hashed")
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        fault_point("save.manifest")
        fsync(temporary / MANIFEST)
        fsync(temporary)
        fault_point("save.flushed")
        complete = True
    finally:
        if not complete:
            shutil.rmtree(temporary, ignore_errors=True)
    if final.exists():  # a damaged one that was fallen back from
        remove(final)
        fault_point("save.cleared")
    temporary.rename(final)
    fault_point("save.renamed")
    fsync(root)
    fault_point("save.durable")
    point(root, final.name)
    return final


def point(root: Path, name: str) -> None:
    """Move the pointer to a checkpoint."""
    pointer = root / f".{LATEST}.tmp"
    pointer.write_text(name)
    fault_point("save.pointer_written")
    fsync(pointer)
    pointer.replace(root / LATEST)
    fault_point("save.pointer_moved")
    fsync(root)


def directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint directory."""
    return int(path.name.removeprefix("step-"))


def directories(root: Path) -> list[Path]:
    """Checkpoint directories, whole or damaged, oldest first. Copies under other names (step-….bak) are none."""
    return sorted((p for p in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()), key=step_of)


def pointed(root: Path) -> str:
    """What the pointer names; "" where there is none."""
    return (root / LATEST).read_text(errors="replace") if (root / LATEST).is_file() else ""


def sweep(root: Path) -> None:
    """Remove what a killed save or removal left behind. Only for the process that holds the run folder."""
    for litter in root.glob(".tmp-*"):
        if litter.is_dir():
            shutil.rmtree(litter)
        else:
            litter.unlink()
        fault_point("load.swept")


def damage(path: Path) -> str | None:
    """One sentence about what is wrong with a checkpoint directory, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        names = sorted((WEIGHTS, OPTIMIZER, STATE))
        records = {name: (manifest[name]["bytes"], manifest[name]["xxh3_128"]) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / MANIFEST} cannot be read ({type(error).__name__}: {error})"
    expected = {name: {"bytes": size, "xxh3_128": digest} for name, (size, digest) in records.items()}
    if (path / MANIFEST).read_text() != json.dumps(expected, indent=1):
        return f"{path / MANIFEST} is not as it was written"
    for name, (size, digest) in records.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{file} is missing or has another size than its manifest says"
        try:
            found = file_hash(file)
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
        if found != digest:
            return f"{file} does not have the hash of its manifest"
    return None


def read_state(path: Path) -> TrainState:
    """The state of a checkpoint directory. Raises InputError for one of another version."""
    fields = json.loads((path / STATE).read_text())
    if fields.get("format") != FORMAT:
        raise InputError(
            f"{path} was written by another version (format {fields.get('format')}, this is {FORMAT}); continue it "
            f"with the versions it names ({fields.get('versions')}), or choose another run.dir"
        )
    return TrainState(**{**fields, "volume_zyx": tuple(fields["volume_zyx"])})


def read_weights(path: Path) -> Tensors:
    """fp32 parameters by name, on the CPU."""
    return load_file(path / WEIGHTS)


class Reader:
    """Tensors of a checkpoint one at a time: a parameter's name, or its name with a moment behind a dot."""

    def __init__(self, path: Path) -> None:
        self.files = {name: safe_open(path / name, framework="pt") for name in (WEIGHTS, OPTIMIZER)}

    def names(self) -> set[str]:
        """Parameter names."""
        return set(self.files[WEIGHTS].keys())

    def shape(self, name: str) -> list[int] | None:
        """Shape of a parameter; None where there is none of that name."""
        return self.files[WEIGHTS].get_slice(name).get_shape() if name in self.names() else None

    def get(self, name: str, moment: str | None = None) -> torch.Tensor:
        """A parameter (moment: None) or one of its moments, fp32 on the CPU."""
        return (
            self.files[WEIGHTS].get_tensor(name)
            if moment is None
            else self.files[OPTIMIZER].get_tensor(f"{name}.{moment}")
        )


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer taken for one; nothing of it is lost."""
    aside = path.with_name(f"damaged-{path.name}")
    if aside.exists():
        remove(aside)
    return path.rename(aside)


def expendable(found: list[Path], keep_last: int, keep_every_steps: int) -> list[Path]:
    """Of checkpoints, oldest first, all but the newest `keep_last` and multiples of `keep_every_steps` (0: none)."""
    return [path for path in found[:-keep_last] if not keep_every_steps or step_of(path) % keep_every_steps]


def prune(root: Path, keep_last: int, keep_every_steps: int) -> None:
    """Remove what is expendable."""
    for path in expendable(directories(root), keep_last, keep_every_steps):
        fault_point("prune.before")
        remove(path)
        fault_point("prune.after")


def remove(path: Path) -> None:
    """Remove a checkpoint so that a kill leaves litter, never half a checkpoint."""
    away = path.with_name(f".tmp-removed-{path.name}-{os.getpid()}")
    path.rename(away)
    fault_point("prune.renamed")
    shutil.rmtree(away)


def file_hash(path: Path) -> str:
    """xxh3_128 of a file's bytes, as hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _save(tensors: Tensors, path: Path) -> None:
    """Raises the system's error as OSError; safetensors hides its number in a sentence of its own error."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def fsync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
