"""Stopping early, in time to save: signals, `train.stop_after_min`, and the end of the Slurm job.

A signal is kept, not obeyed: the loop looks at it between steps, all ranks agree, save together and leave. Signals are
blocked and taken by one thread, so children (compilers, loaders, data servers), which inherit the blocking, are not
ended by the signal that Slurm and torchrun send to every process. torch must be imported after `Stop` is made.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
TIME_IS_UP, JOB_ENDS, SAVE_FAILED = 64, 65, 66
"""Reasons beside signal numbers, which are lower."""
GOES_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, JOB_ENDS)
"""Reasons for which a Slurm job is queued again: not the user's own time limit, and not Ctrl-C."""
RESUMABLE = 75
RESERVE_S = 60.0
"""Kept before the end of a Slurm job, besides twice the time of a step and a save, and an evaluation."""
STARTED_S = time.monotonic()
"""When this process began."""


class TrainingStopped(RuntimeError):
    """The run stopped itself (exit code 5); the message says why."""


class LostRank(TrainingStopped):
    """Another rank is dead, stopped or failed; the message names it. nodes: where ranks are dead or stopped."""

    def __init__(self, sentence: str, nodes: list[str]) -> None:
        super().__init__(sentence)
        self.nodes = nodes


class NoData(TrainingStopped):
    """This rank gets no batches any more: a process that reads is dead, or the disk hangs; the message says which
    samples were waited for."""


class StoppedEarly(RuntimeError):
    """The run was asked to stop, or its disk is full (exit code 75); the same command continues it. goes_on: a Slurm
    job should do so by itself."""

    def __init__(self, sentence: str, goes_on: bool = False) -> None:
        super().__init__(sentence)
        self.goes_on = goes_on


class Stop:
    """Keeps the first of SIGNALS that this process gets. A second Ctrl-C ends it at once, but not a rank of many: they
    get every signal twice, from the terminal or Slurm and from torchrun."""

    def __init__(self) -> None:
        self.number, self.interrupts = 0, 0
        self.alone = not {"RANK", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID"} & set(os.environ)
        for number in SIGNALS:  # a thread that began before the blocking (BLAS) may still be given one
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self._handle(signal.sigwait(SIGNALS))

    def _handle(self, number: int, frame: FrameType | None = None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1 and self.alone:
            os._exit(RESUMABLE)
        first, self.number = self.number == 0, self.number or number
        if first or (number == signal.SIGINT and self.alone):
            rank = "" if self.alone else f" (rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))})"
            again = "; Ctrl-C again stops at once, unsaved" if number == signal.SIGINT and self.alone else ""
            print(f"{reason(number)}{rank}: stopping after the next step{again}", file=sys.stderr, flush=True)


class Deadline:
    """When the run must end: stop_after_min after its start (0: never), or before its Slurm job does."""

    def __init__(self, stop_after_min: float, job_end_s: float | None) -> None:
        """job_end_s: seconds since 1970, see `slurm_job.end_s`."""
        self.stop_s = STARTED_S + 60 * stop_after_min if stop_after_min else float("inf")
        self.job_s = float("inf") if job_end_s is None else time.monotonic() + job_end_s - time.time()

    def reached(self, step_s: float, save_s: float, evaluate_s: float) -> int:
        """Why to stop now, or 0. Seconds that a step, a save and an evaluation took at most."""
        now = time.monotonic()
        if now >= self.job_s - RESERVE_S - 2 * (step_s + save_s) - evaluate_s:
            return JOB_ENDS
        return TIME_IS_UP if now >= self.stop_s else 0


def reason(number: int) -> str:
    """A reason to stop in words."""
    words = {TIME_IS_UP: "the time limit", JOB_ENDS: "the time limit of the Slurm job"}
    return words.get(number) or signal.Signals(number).name
