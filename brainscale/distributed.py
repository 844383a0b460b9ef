"""Who am I among how many: one `World` from torchrun's variables, Slurm's, or neither. Half an environment is an error.

Ranks meet by torch.distributed (NCCL with a GPU, gloo without). A CPU worker leaves with `os._exit`, because gloo's
threads abort the interpreter's shutdown in about 1 of 15 runs when DeepSpeed still holds a process group.
"""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from brainscale.settings import InputError

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
"""DeepSpeed reads this when it is imported, and warns of a CPU otherwise."""

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
T = TypeVar("T")
SLURM_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


@dataclass(frozen=True)
class World:
    """Place of this process: global rank, number of ranks, rank on this host, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    launcher: str

    @property
    def is_first(self) -> bool:
        """Whether this is global rank 0, which alone writes files."""
        return self.rank == 0


def find() -> World:
    """Read the launcher's environment; completes RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in it.

    Raises InputError when only some of a launcher's variables are set.
    """
    env = os.environ
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        _require(TORCHRUN, "torchrun")
        if env["MASTER_PORT"] == "0":
            raise InputError(
                "MASTER_PORT is 0, so the ranks would wait for each other; give torchrun --standalone or a port"
            )
        launcher = "torchrun"
    elif "SLURM_STEP_NUM_TASKS" in env:
        _require(SLURM_STEP, "srun")
        launcher = "slurm"
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], check=True, capture_output=True, text=True
        ).stdout.split()
        env.update(
            RANK=env["SLURM_PROCID"],
            WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"],
            LOCAL_RANK=env["SLURM_LOCALID"],
            MASTER_ADDR=hosts[0],
            MASTER_PORT=str(20000 + int(env["SLURM_JOB_ID"]) % 20000),
        )
    else:
        launcher = "single"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(env["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1:
            local_rank_device = 0  # srun --gpus-per-task shows each task its own device as number 0
        else:
            local_rank_device = local_rank
        device = torch.device("cuda", local_rank_device)
        torch.cuda.set_device(device)
    return World(int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank, device, launcher)


def start(world: World, timeout_s: float = 1800.0, store: dist.Store | None = None) -> None:
    """Join the process group; store: where the ranks have met (none: at MASTER_ADDR). A peer that is killed or silent
    for `timeout_s` becomes an error here."""
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=timeout_s)
    )
    if world.size > 1:  # NCCL connects at its first collective
        dist.all_reduce(torch.zeros(1, device=world.device))


def broadcast(value: T, world: World) -> T:
    """Rank 0's value (of plain Python types) on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T, world: World) -> list[T]:
    """Every rank's value (of plain Python types) on every rank, in the order of ranks."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


class Agreement:
    """The largest vote of any rank, told one call later, so that no step waits for it."""

    def __init__(self, world: World) -> None:
        """Collective."""
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.sent: tuple[torch.Tensor, Any] | None = None

    def vote(self, value: int) -> int:
        """Give this rank's vote; get the largest of the call before (0 at the first), or with one rank this one."""
        if self.group is None:
            return value
        told = 0
        if self.sent is not None:
            box, work = self.sent
            work.wait()
            told = int(box)
        box = torch.tensor(value)
        self.sent = box, dist.all_reduce(box, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return told


def set_timeouts(timeout_s: float) -> None:
    """Let every process group give up after `timeout_s`; they are made with a longer time for the first step."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def wait(world: World) -> None:
    """Return when every rank is here."""
    if world.size > 1:
        dist.barrier()


def leave(code: int) -> NoReturn:
    """End this process with `code`, skipping the interpreter's shutdown (see the module's docstring)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _require(names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(
            f"this looks like a process of {launcher}, but {', '.join(missing)} is not set; start it with {launcher}, "
            f"or unset {', '.join(n for n in names if n in os.environ)} to run a single process"
        )
