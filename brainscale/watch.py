"""Which rank is gone or hangs: every rank beats in a store that all can read, so that whoever waits can name the other.

A collective only says that it timed out or that a connection closed. The beats say who is silent, and where each rank
last was. A rank that finds another silent for the timeout, or itself in one place for that long, writes the stacks of
its threads to RUN/stacks/rank-XXXX.txt and ends with code 5; so all ranks end, whatever the collective's library does.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from brainscale import slurm_job
from brainscale.distributed import World, broadcast, leave, set_timeouts, wait
from brainscale.run_folder import write_exit

BEAT_S = 0.5
STORE_S = 2.0
"""How long the store may take to answer before it is asked anew on another connection."""
SILENT_S = 3.0
"""A rank not heard of for this long is taken for dead once something else has failed."""
SHARE = 0.8
"""Of the timeout: the watch ends first, while the stacks still show who waits for whom."""
SURE_BEATS = 3
"""Beats in a row at which a rank must be found silent: after a job was suspended as a whole, all are for a moment."""
STOPPED_ITSELF = 5
PHASES = ("start", "data", "forward", "backward", "evaluate", "save", "end")


@dataclass
class Peer:
    """What was heard of a rank: node and pid, its last beat and when it came (monotonic seconds), its failure."""

    who: str = "not heard of yet"
    beat: str = ""
    step: int = 0
    phase: str = "start"
    failure: str = ""
    heard_s: float = field(default_factory=time.monotonic)

    @property
    def node(self) -> str:
        """Where it runs, by Slurm's name if it has one."""
        return self.who.partition(",")[0]

    def hear(self, text: str) -> None:
        """Take in what stands in the store."""
        if text != self.beat:
            _, step, self.phase, self.who, self.failure = text.split("|", 4)
            self.beat, self.step, self.heard_s = text, int(step), time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since it was last heard of."""
        return time.monotonic() - self.heard_s


class Watch:
    """Beats, listens and ends a process that waits in vain. With one rank it does nothing."""

    def __init__(self, world: World, run_dir: Path, timeout_s: float) -> None:
        """Collective."""
        self.world, self.run_dir, self.timeout_s = world, run_dir, timeout_s
        self.place: tuple[int, str] = (0, "start")
        self.since = time.monotonic()
        self.peers = {rank: Peer() for rank in range(world.size) if rank != world.rank}
        self.failure, self.beats, self.closed, self.lock = "", 0, threading.Event(), threading.Lock()
        self.lost_nodes: list[str] = []
        self.store: dist.TCPStore | None = None
        if world.size == 1:
            return
        if world.is_first:
            self.server = self.store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        self.port = broadcast(self.store.port if self.store else 0, world)
        self._exchange(ask=False)
        wait(world)
        for loop in (self._listen, self._look):  # apart, since a store that does not answer holds up whoever asks it
            threading.Thread(target=loop, name=f"watch{loop.__name__}", daemon=True).start()

    def at(self, step: int, phase: str) -> None:
        """Note where this rank is."""
        self.place, self.since = (step, phase), time.monotonic()

    @contextmanager
    def patience(self, step: int, phase: str, timeout_s: float) -> Iterator[None]:
        """A part that one rank does alone while the others wait: all may take `timeout_s`."""
        before_s = self.timeout_s
        self.set_timeout(max(before_s, timeout_s))
        self.at(step, phase)
        yield
        self.set_timeout(before_s)

    def set_timeout(self, timeout_s: float) -> None:
        """Let this watch, and every collective begun from now on, give up after so long."""
        self.since, self.timeout_s = time.monotonic(), timeout_s
        set_timeouts(timeout_s)

    def close(self) -> None:
        """Stop watching; to be called before the ranks part."""
        with self.lock:
            self.closed.set()

    def blame(self, error: Exception) -> str:
        """Which other rank an error of this one is due to, in a sentence; "" where all others are alive.

        Collectives fail with a RuntimeError: then it waits until each rank has been heard of again or silent for
        SILENT_S. An error of this rank's own is told to the others. Writes this rank's stacks.
        """
        if self.world.size == 1 or self.closed.is_set():
            return ""
        dump(self.run_dir, self.world, "".join(traceback.format_exception(error)))
        deadline = time.monotonic() + SILENT_S + 4 * BEAT_S
        while isinstance(error, RuntimeError) and time.monotonic() < deadline:
            if found := self._culprits(SILENT_S):
                return found
            time.sleep(BEAT_S / 2)
        self.tell(error)
        return ""

    def tell(self, error: Exception) -> None:
        """Let the others know what failed here, before this rank leaves."""
        if self.world.size > 1:
            self.failure = " ".join(f"{type(error).__name__}: {error}".split())
            time.sleep(3 * BEAT_S)

    def _culprits(self, silent_s: float) -> str:
        heard = self.peers if self.store is not None else {0: self.peers[0]}  # rank 0 keeps the store
        failed = [f"rank {rank} ({p.who}) failed: {p.failure}" for rank, p in self.peers.items() if p.failure]
        silent = [
            f"rank {rank} ({peer.who}) is dead or stopped: not heard of for {peer.silent_s:.0f} s, last in step "
            f"{peer.step} ({peer.phase})"
            for rank, peer in heard.items()
            if peer.silent_s >= silent_s
        ]
        if silent and not failed:
            self.lost_nodes = sorted({peer.node for peer in heard.values() if peer.silent_s >= silent_s})
        return "; ".join(failed or silent)

    def _exchange(self, ask: bool = True) -> None:
        """Beat, and hear what the others have said; a store that does not answer is left and joined anew."""
        self.beats += 1
        step, phase = self.place
        said = f"{self.beats}|{step}|{phase}|{slurm_job.node()}, pid {os.getpid()}|{self.failure}"
        patience = timedelta(seconds=STORE_S)
        try:
            if self.store is None:
                self.store = dist.TCPStore(
                    os.environ["MASTER_ADDR"], self.port, is_master=False, wait_for_workers=False,
                    timeout=timedelta(seconds=60) if self.beats == 1 else patience,
                )  # fmt: skip
            self.store.set_timeout(patience)
            self.store.set(str(self.world.rank), said)
            if ask:
                for peer, text in zip(self.peers.values(), self.store.multi_get([str(rank) for rank in self.peers])):
                    peer.hear(text.decode())
        except RuntimeError:
            if self.beats == 1:
                raise
            self.store = None

    def _listen(self) -> None:
        while not self.closed.wait(BEAT_S):
            self._exchange()

    def _look(self) -> None:
        sure = 0
        while not self.closed.wait(BEAT_S):
            limit_s = SHARE * self.timeout_s - SURE_BEATS * BEAT_S
            late = any(peer.silent_s >= limit_s for peer in self.peers.values())
            sure = sure + 1 if late else 0
            if sure >= SURE_BEATS and (found := self._culprits(limit_s)):
                self._end(found)
            if time.monotonic() - self.since > SHARE * self.timeout_s and not late:
                self._end(self._culprits(max(SILENT_S, limit_s / 2)) or self._hung())

    def _hung(self) -> str:
        """Which ranks are behind the others, when all are alive and none goes on."""
        places = {rank: (peer.step, PHASES.index(peer.phase)) for rank, peer in self.peers.items()}
        places[self.world.rank] = (self.place[0], PHASES.index(self.place[1]))
        behind = sorted(rank for rank, place in places.items() if place == min(places.values()))
        step, phase = min(places.values())
        who, others = f"rank {', '.join(map(str, behind))}", "the others wait"
        if len(behind) == len(places):
            who, others = "every rank", f"the stacks in {self.run_dir / 'stacks'} say where"
        return f"{who}: no progress in step {step} ({PHASES[phase]}) for {SHARE * self.timeout_s:.0f} s; {others}"

    def _end(self, sentence: str) -> None:
        with self.lock:
            if self.closed.is_set():
                return
            print(f"error (rank {self.world.rank}): {sentence}", file=sys.stderr, flush=True)
            try:
                dump(self.run_dir, self.world, sentence)
                write_exit(self.run_dir, STOPPED_ITSELF, sentence, self.world, True, self.lost_nodes)
            except OSError as error:  # a full or lost disk; the process must end all the same
                print(f"error (rank {self.world.rank}): {error}", file=sys.stderr, flush=True)
            leave(STOPPED_ITSELF)


def dump(run_dir: Path, world: World, sentence: str) -> Path:
    """Write the stacks of all threads of this process to RUN/stacks/rank-XXXX.txt, under a sentence."""
    path = run_dir / "stacks" / f"rank-{world.rank:04d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(f"rank {world.rank} of {world.size}, pid {os.getpid()}: {sentence}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    return path
