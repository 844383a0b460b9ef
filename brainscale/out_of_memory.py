"""A step that runs out of memory: one sentence that says what was asked for, who holds what and what to change, and
RUN/oom, with the traceback and, of a GPU, torch's snapshot of its memory.

The snapshot is taken at the moment at which nothing is freed yet. In the first steps of a process, in which memory
nearly always runs out, it holds who allocated what; later the sizes alone, since noting the stack of every allocation
takes some µs each. torch writes it as a pickle, which is not read here: https://pytorch.org/memory_viz shows it.
"""

import os
import re
import resource
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from brainscale import plan_memory
from brainscale.config import Config
from brainscale.distributed import World
from brainscale.geometry import Zyx
from brainscale.model_counts import tokens_of
from brainscale.phases import phase_of
from brainscale.plan_memory import GIB
from brainscale.run_folder import device_name
from brainscale.settings import InputError, set_override
from brainscale.zero import batch_split, zero_stage

HISTORY_STEPS = 10
"""Steps of a process in which allocations are noted."""
HISTORY_ENTRIES = 20_000
"""Newest allocations and frees that are kept, some KB each."""
TEXTS = ("out of memory", "can't allocate memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc")
"""In messages of errors that have no class of their own."""
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
ROOM_FRACTION = 0.9
"""Of the memory at hand, that a change should leave the prediction below."""
EXPANDABLE = "expandable_segments:True"


class OutOfMemory(InputError):
    """The settings need more memory than there is (exit code 2); every rank that runs out says so itself."""


class Usage(NamedTuple):
    """Bytes. asked: None where it is not known; tensors: held by tensors; kept: by torch besides, for later; both None
    on a CPU; process: all that this process holds."""

    asked: float | None
    total: float
    free: float
    tensors: float | None
    kept: float | None
    process: float


class Change(NamedTuple):
    """What to change. gib: memory of a rank that is predicted with it, None where nothing is."""

    what: str
    gib: float | None


class Guard:
    """Looks at memory as it runs out. On a CPU there is nothing to look at before."""

    def __init__(self, config: Config, run_dir: Path, world: World) -> None:
        self.config, self.folder, self.world = config, run_dir / "oom", world
        self.volume_zyx: Zyx | None = None
        self.step, self.begun = 0, 0
        self.usage: Usage | None = None
        self.snapshot: Path | None = None
        if world.device.type == "cuda":
            torch.cuda.init()  # before it there is no allocator that could be told
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=HISTORY_ENTRIES)
            torch._C._cuda_attach_out_of_memory_observer(self._note)  # type: ignore[attr-defined]

    def start(self, step: int, volume_zyx: Zyx) -> None:
        """The loop begins after `step` steps."""
        self.step, self.begun, self.volume_zyx = step, step, volume_zyx

    def at(self, step: int) -> None:
        """A step begins, counted from 1."""
        self.step = step
        if step == self.begun + HISTORY_STEPS + 1 and self.world.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    @property
    def stem(self) -> str:
        """Names the files."""
        return f"rank-{self.world.rank:04d}-step-{self.step:08d}"

    def _note(self, device: int, asked: int, total: int, free: int) -> None:
        """torch calls this where an allocation fails for good, before the error is raised."""
        tensors, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        self.usage = Usage(asked, total, free, tensors, reserved - tensors, reserved)
        path = self.folder / f"{self.stem}.pickle"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            self.snapshot = path
        except OSError as error:  # a full disk; the error of the allocation is the one to tell
            print(f"{path} could not be written ({error})", flush=True)

    def explain(self, error: BaseException) -> OutOfMemory | None:
        """What to raise in place of an error, or None for one that is not about memory. Writes RUN/oom."""
        if not is_about_memory(error):
            return None
        usage = self.usage or (of_host(str(error)) if self.world.device.type == "cpu" else of_gpu(self.world, error))
        tried = changes(self.config, self.world, self.volume_zyx, usage, phase_of(error))
        phase = f" ({phase_of(error)})" if phase_of(error) else ""
        where = f"in step {self.step}{phase}" if self.volume_zyx else "at the start"
        text = sentence(where, device_name(self.world), usage, tried)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            report = self.folder / f"{self.stem}.txt"
            report.write_text(f"{text}\n\n{''.join(traceback.format_exception(error))}", encoding="utf-8")
            text += f"; {report} has the traceback"
        except OSError as failed:
            text += f"; {self.folder} could not be written ({failed})"
        if self.snapshot is not None:
            text += f", {self.snapshot} the memory, to be dropped on https://pytorch.org/memory_viz"
        return OutOfMemory(text)


def is_about_memory(error: BaseException) -> bool:
    """Whether an error says that memory is out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def asked_bytes(message: str) -> float | None:
    """How much an error says was asked for: of torch's allocators, or of numpy."""
    found = re.search(r"(?:ried to allocate|Unable to allocate) ([\d.]+) (bytes|[KMGTP]iB)", message)
    return float(found[1]) * UNITS[found[2]] if found else None


def of_host(message: str) -> Usage:
    """The host's memory now: of the machine, or within this process's limit where that is less."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (1024 * float(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    pages, resident = (resource.getpagesize() * int(n) for n in Path("/proc/self/statm").read_text().split()[:2])
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit - pages < free:
        total, free = limit, max(0, limit - pages)
    return Usage(asked_bytes(message), total, free, None, None, resident)


def of_gpu(world: World, error: BaseException) -> Usage:
    """A GPU's memory now, for an error that torch's allocator did not see coming."""
    free, total = torch.cuda.mem_get_info(world.device)
    tensors, reserved = torch.cuda.memory_allocated(world.device), torch.cuda.memory_reserved(world.device)
    return Usage(asked_bytes(str(error)), total, free, tensors, reserved - tensors, reserved)


def changes(config: Config, world: World, volume_zyx: Zyx | None, usage: Usage, phase: str) -> list[Change]:
    """What may help, the cheapest first, each by itself. volume_zyx: None where the run had not begun, when weights and
    optimizer are too large. On a GPU what by prediction leaves too little room is left out, if any leaves enough."""
    found: list[Change] = []
    on_gpu, begun = world.device.type == "cuda", volume_zyx is not None
    if on_gpu and usage.kept is not None:
        if (others := usage.total - usage.free - usage.process) > 0.05 * usage.total:
            found.append(Change(f"end what else is on this GPU ({_gib(others)})", None))
        if usage.kept > (usage.asked or 0) and EXPANDABLE not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
            found.append(Change(f"set PYTORCH_CUDA_ALLOC_CONF={EXPANDABLE} in the environment", None))
    if not on_gpu and phase == "data":
        found.append(Change(f"lower data.prefetch_mb (now {config.data.prefetch_mb}) or data.workers", None))
    micro, accumulation = batch_split(config, world.size)
    share = config.train.global_batch_volumes // world.size
    smaller = [m for m in range(micro // 2, 0, -1) if share % m == 0]
    lists = [
        ["train.activation_checkpointing=true"] if begun and config.train.activation_checkpointing is not True else [],
        [f"train.micro_batch_volumes={m}" for m in smaller] if begun else [],
        [f"zero.stage={stage}" for stage in range(zero_stage(config, accumulation) + 1, 4)] if world.size > 1 else [],
        ["zero.offload_optimizer=true"] if on_gpu and not config.zero.offload_optimizer else [],
    ]
    allowed = [[(one, made) for one in each if (made := _changed(config, one))] for each in lists]
    possible = [[Change(one, None) for one, _ in each] for each in allowed]
    if on_gpu and volume_zyx is not None:
        possible = [[Change(one, _predicted(made, world, volume_zyx)) for one, made in each] for each in allowed]
        room = ROOM_FRACTION * min(_predicted(config, world, volume_zyx), usage.total / GIB)
        enough = [[one for one in each if one.gib is not None and one.gib <= room] for each in possible]
        possible = enough if any(enough) else [each[-1:] for each in possible]
    found += [each[0] for each in possible if each]
    last = [*(["more ranks"] if config.zero.stage else []), *(["a smaller data.crop_voxels_zyx"] if begun else [])]
    return [*found, Change(", ".join([*last, "a smaller model"]), None)]


def _changed(config: Config, override: str) -> Config | None:
    """The config with an override; None where the settings do not go together."""
    tree = config.model_dump()
    set_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError:
        return None


def _predicted(config: Config, world: World, volume_zyx: Zyx) -> float:
    """GiB of a rank, by the plan."""
    kernels = "reference" if config.kernels == "reference" else "triton"
    return plan_memory.predict(config, tokens_of(config, volume_zyx), world.size, kernels=kernels).total_bytes / GIB


def sentence(where: str, device: str, usage: Usage, tried: list[Change]) -> str:
    """All of it in one. where: at the start, or in which step. Pure."""
    asked = "" if usage.asked is None else f"{_gib(usage.asked)} were asked for, "
    held = (
        f"this process holds {_gib(usage.process)}" if usage.tensors is None or usage.kept is None
        else f"tensors hold {_gib(usage.tensors)}, torch keeps {_gib(usage.kept)} unused"
    )  # fmt: skip
    said = f"out of memory {where} on {device}: {asked}{_gib(usage.free)} of {_gib(usage.total)} are free, {held}"
    names = [
        one.what + (f" (about {one.gib:.1f} GiB by `brainscale plan`)" if one.gib is not None and usage.tensors else "")
        for one in tried
    ]
    return f"{said}; change one of these, the cheapest first: {'; or '.join(names)}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
