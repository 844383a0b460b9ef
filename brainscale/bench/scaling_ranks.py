"""Groups of real ranks that take steps when they are told to: torchrun's variables, gloo or NCCL, one process a rank.

Several groups are alive at once and all but those that are asked wait at a pipe, so that runs of different sizes can be
measured in turn. A rank that dies or does not answer is an error that names it and shows what it last wrote, and no
process outlives its group: they are killed, and one whose parent is gone leaves by itself.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import repeat
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from brainscale import distributed, metrics, step_profile, train
from brainscale.bench.scaling_sent import Counted
from brainscale.config import Config
from brainscale.loader import Batch
from brainscale.session import Session, build
from brainscale.settings import InputError
from brainscale.stopping import LostRank
from brainscale.watch import Watch

PATIENCE_S = 600.0
"""How long an answer may take: torch.compile's first step is among them."""
END_S = 10.0
LAST_CHARACTERS = 1500
"""Of what a rank wrote, that an error shows."""


class Worker:
    """What a rank does. Each method is called on all ranks of a group at once."""

    def __init__(self, scratch: Path, group: str, threads: int) -> None:
        """Collective: join the group, whose ranks meet at a file."""
        torch.set_num_threads(threads)
        self.scratch, self.world = scratch, distributed.find()
        met = dist.FileStore(str(scratch / f"{group}.store"), self.world.size)
        met.set_timeout(timedelta(seconds=PATIENCE_S))
        distributed.start(self.world, PATIENCE_S, met)
        self.watch = Watch(replace(self.world, size=1), scratch, PATIENCE_S)  # it watches nobody: the parent does
        self.clock = metrics.Clock(0, 0.0)
        self.runs: dict[int, tuple[Session, Iterator[tuple[Batch, int]]]] = {}
        self.steps_taken = 0

    def prepare(self, key: int, config: Config) -> None:
        """Make a model, its optimizer and one batch, which is used again and again; nothing where it is there."""
        if key in self.runs:
            return
        session = build(config, self.scratch / "run", self.world, None)
        assert session is not None, "nothing is resumed"
        batches = session.loader.batches(0)
        self.runs[key] = session, repeat(next(batches))
        batches.close()

    def forget(self) -> None:
        """Drop all models."""
        self.runs.clear()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def steps(self, key: int, count: int) -> list[float]:
        """Seconds of so many optimizer steps, after one that is not timed."""
        self._step(key)
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            self._step(key)
            seconds.append(time.perf_counter() - begin)
        if self.world.device.type == "cuda":  # several groups share a GPU's memory
            torch.cuda.empty_cache()
        return seconds

    def count(self, key: int) -> tuple[dict[str, float], dict[str, int]]:
        """Bytes sent and collectives of one step, by kind."""
        with Counted(self.world.size) as counted:
            self._step(key)
        assert self.runs[key][0].engine.was_step_applied(), "a loss was not finite"
        return dict(counted.sent), dict(counted.calls)

    def shares(self, key: int, count: int) -> list[tuple[float, float]]:
        """Of each of so many profiled steps: share in which anything was communicated, and in which nothing else was
        done."""
        on_gpu = self.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        found = []
        for _ in range(count):
            with profile(activities=activities) as recorder, record_function(step_profile.STEP):
                self._step(key)
            events = recorder.profiler.kineto_results.events()
            whole = next(e for e in events if e.name() == step_profile.STEP and step_profile.is_annotation(e))
            if on_gpu:
                spans = list(step_profile.gpu_spans(events))
            else:
                spans = list(step_profile.cpu_spans(events, whole.start_thread_id()))
            all_of_it, alone = (
                step_profile.shares(spans, whole.start_ns(), whole.end_ns(), order, "host")["communication"]
                for order in (("communication",), ("compute", "communication"))
            )
            found.append((all_of_it, alone))
        return found

    def all_reduce(self, elements: int, count: int) -> list[float]:
        """Seconds of so many all-reduces of fp32 elements, after one that is not timed."""
        tensor, seconds = torch.zeros(elements, device=self.world.device), []
        for _ in range(count + 1):
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            self._synchronize()
            seconds.append(time.perf_counter() - begin)
        return seconds[1:]

    def _step(self, key: int) -> None:
        session, batches = self.runs[key]
        train.compute(session, batches, self.steps_taken, self.watch, self.clock)
        session.model.after_step(self.steps_taken)
        self.steps_taken += 1
        self._synchronize()

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def serve(pipe: Connection, scratch: Path, group: str, threads: int, environment: dict[str, str], log: Path) -> None:
    """Main function of a rank: answer what comes through the pipe until it closes."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    try:
        worker = Worker(scratch, group, threads)
        pipe.send(None)
        while True:
            method, arguments = pipe.recv()
            pipe.send(getattr(worker, method)(*arguments))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        distributed.leave(0)
    except InputError as error:
        pipe.send(error)
        distributed.leave(2)
    except BaseException:
        traceback.print_exc()
        distributed.leave(1)


# ------------------------------------------------------------------------------------------------ groups


class Rank(NamedTuple):
    """A process of a group, as its parent sees it."""

    name: str
    process: BaseProcess
    pipe: Connection
    log: Path


Group = list[Rank]
"""All ranks of one world."""


@contextmanager
def groups(sizes: Sequence[int], threads: int, scratch: Path) -> Iterator[list[Group]]:
    """A group of each of these sizes, whose ranks have met. None of their processes is left afterwards."""
    how: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")  # CUDA cannot fork
    how.set_forkserver_preload([__name__, "deepspeed.runtime.zero.muon.original_muon"])
    started: list[Group] = []
    try:
        for number, size in enumerate(sizes):
            group: Group = []
            started.append(group)
            for rank in range(size):
                name = f"group-{number}-of-{size}"
                ours, theirs = how.Pipe()
                log = scratch / f"{name}-rank-{rank}.log"
                environment = {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": "29500",  # nobody listens there: they meet at a file
                }  # fmt: skip
                process = how.Process(
                    target=serve, args=(theirs, scratch, name, threads, environment, log), daemon=True
                )
                process.start()
                theirs.close()
                group.append(Rank(f"rank {rank} of {size}", process, ours, log))
        answers(started)
        yield started
        for rank_ in (rank_ for group in started for rank_ in group):
            rank_.pipe.close()
            rank_.process.join(END_S)
    finally:
        for rank_ in (rank_ for group in started for rank_ in group):
            rank_.process.kill()
            rank_.process.join()


def ask(asked: list[Group], method: str, *arguments: Any) -> list[list[Any]]:
    """Let all ranks of these groups do the same at once; what each returns, by group and rank. Raises as `answers`."""
    for rank in (rank for group in asked for rank in group):
        try:
            rank.pipe.send((method, arguments))
        except BrokenPipeError:
            raise _lost(asked) from None
    return answers(asked)


def answers(asked: list[Group]) -> list[list[Any]]:
    """What the ranks of these groups say, by group and rank. Raises InputError where a rank found one, LostRank where
    one is dead, or silent for PATIENCE_S."""
    waiting = {rank.pipe: rank for group in asked for rank in group}
    found: dict[str, Any] = {}
    until = time.monotonic() + PATIENCE_S
    while waiting:
        ready = wait(list(waiting), until - time.monotonic())
        if not ready:
            silent = next(iter(waiting.values()))
            raise LostRank(f"{silent.name} has not answered for {PATIENCE_S:.0f} s; it wrote: {_last(silent)}", [])
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                answer = pipe.recv()
            except (EOFError, ConnectionResetError):
                raise _lost(asked) from None
            if isinstance(answer, InputError):
                raise answer
            found[str(waiting.pop(pipe).log)] = answer
    return [[found[str(rank.log)] for rank in group] for group in asked]


def _lost(asked: list[Group]) -> LostRank:
    """Names a rank that is dead; one that was killed before one that then failed for want of it."""
    ranks = [rank for group in asked for rank in group]
    wait([rank.process.sentinel for rank in ranks], END_S)
    codes = {rank: rank.process.exitcode for rank in ranks if rank.process.exitcode is not None}
    first = min(codes or ranks, key=lambda rank: (codes.get(rank, 0) >= 0, codes.get(rank, 0) == 0))
    code = codes.get(first)
    how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    return LostRank(f"{first.name} {how}; it wrote: {_last(first)}", [])


def _last(rank: Rank) -> str:
    text = rank.log.read_text(errors="replace").strip() if rank.log.exists() else ""
    return text[-LAST_CHARACTERS:] or "nothing"
