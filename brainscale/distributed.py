"""Who am I among how many: a `World` from the variables of torchrun, Slurm, submitit or none; half of them is an error.

Ranks meet by torch.distributed (NCCL with a GPU, gloo without). A CPU worker leaves with `os._exit`, because gloo's
threads abort the interpreter's shutdown in about 1 of 15 runs when DeepSpeed still holds a process group.
"""

import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from brainscale import slurm_job
from brainscale.settings import InputError

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
"""DeepSpeed reads this when it is imported, and warns of a CPU otherwise."""

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
T = TypeVar("T")
SLURM_STEP = (
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_ID", "SLURM_JOB_ID",
)  # fmt: skip
SUBMITIT_LOCAL = (
    "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_JOB_ID",
)  # fmt: skip


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

    sbatch and submitit start a Slurm job's tasks by srun, so both are "slurm" here. torchrun is asked first, since it
    may run inside a Slurm job. Raises InputError when only some of a launcher's variables are set, or when they do not
    fit together.
    """
    env = os.environ
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        _require(TORCHRUN, "torchrun")
        if env["MASTER_PORT"] == "0":
            raise InputError(
                "MASTER_PORT is 0, so the ranks would wait for each other; give torchrun --standalone or a port"
            )
        launcher = "torchrun"
    elif env.get("SUBMITIT_EXECUTOR") == "local":
        _require(SUBMITIT_LOCAL, "submitit")
        launcher = "submitit"
        port = int(env.get("MASTER_PORT") or _port(int(env["SUBMITIT_LOCAL_JOB_ID"])))
        _set(env["SUBMITIT_LOCAL_GLOBALID"], env["SUBMITIT_LOCAL_NTASKS"], env["SUBMITIT_LOCAL_LOCALID"], port=port)
    elif any(name in env for name in SLURM_STEP if name.startswith("SLURM_STEP")):
        _require(SLURM_STEP, "srun")
        launcher = "slurm"
        port = int(env.get("MASTER_PORT") or _port(int(env["SLURM_JOB_ID"]) * 8 + int(env["SLURM_STEP_ID"])))
        try:
            first = slurm_job.nodes(env["SLURM_STEP_NODELIST"])[0]
        except slurm_job.ERRORS as error:
            raise InputError(f"Slurm does not say which nodes {env['SLURM_STEP_NODELIST']} are ({error})") from None
        _set(env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env["SLURM_LOCALID"], first, port)
    elif max(int(env.get(name, "1")) for name in ("SLURM_NTASKS", "SLURM_NNODES")) > 1:
        raise InputError(
            f"this Slurm job has {env.get('SLURM_NNODES', '1')} nodes and {env.get('SLURM_NTASKS', 'as many')} tasks, "
            "but this process was not started by srun, so it would train alone; start it with srun or torchrun, or "
            "unset SLURM_NTASKS and SLURM_NNODES to run a single process"
        )
    else:
        launcher = "single"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            _set("0", "1", "0", port=probe.getsockname()[1])
    rank, size, local_rank = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not 0 <= rank < size:
        raise InputError(f"RANK is {rank} and WORLD_SIZE {size}; ranks count from 0, so start this with {launcher}")
    return World(rank, size, local_rank, _device(rank, local_rank), launcher)


def _set(rank: str, size: str, local_rank: str, address: str = "127.0.0.1", port: int = 0) -> None:
    """Say it in torchrun's variables, which torch and DeepSpeed read."""
    os.environ.update(
        RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local_rank, MASTER_ADDR=address, MASTER_PORT=str(port)
    )  # fmt: skip


def _port(number: int) -> int:
    """A port that differs between jobs on a node, below those that systems hand out by themselves (from 32768)."""
    return 20000 + number % 12000


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.removeprefix("-").isdigit():
        raise InputError(f"{name} is {text!r}; a launcher sets it to a whole number")
    return int(text)


def _device(rank: int, local_rank: int) -> torch.device:
    """The GPU of a local rank, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    at = 0 if count == 1 else local_rank  # srun --gpus-per-task shows each task its own device as number 0
    if at >= count:
        raise InputError(
            f"rank {rank} is number {local_rank} on its node, where it sees {count} GPUs; start one task per GPU"
        )
    device = torch.device("cuda", at)
    torch.cuda.set_device(device)
    return device


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
