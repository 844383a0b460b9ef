"""Stopping early, in time to save: signals, `train.stop_after_min`, and the end of the Slurm job.

A signal is kept, not obeyed: the loop looks at it between steps, all ranks agree, save together and leave. Signals are
blocked and taken by one thread, so children (compilers, loaders, data servers), which inherit the blocking, are not
ended by the signal that Slurm and torchrun send to every process. torch must be imported after `Stop` is made.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
TIME_IS_UP, SAVE_FAILED = 64, 65
"""Reasons beside signal numbers, which are lower."""
RESUMABLE = 75
RESERVE_S = 60.0
"""Kept before the end of a Slurm job, besides twice the time of a step and a save, and an evaluation."""
STARTED_S = time.monotonic()
"""When this process began."""


class Stop:
    """Keeps the first of SIGNALS that this process gets. A second Ctrl-C ends it at once, but not a rank of many: they
    get every signal twice, from the terminal or Slurm and from torchrun."""

    def __init__(self) -> None:
        self.number, self.interrupts = 0, 0
        self.alone = not {"RANK", "SLURM_PROCID"} & set(os.environ)
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
        """job_end_s: seconds since 1970, see `slurm_end_s`."""
        self.stop_s = STARTED_S + 60 * stop_after_min if stop_after_min else float("inf")
        self.job_s = float("inf") if job_end_s is None else time.monotonic() + job_end_s - time.time()

    def reached(self, step_s: float, save_s: float, evaluate_s: float) -> bool:
        """Whether to stop now. Seconds that a step, a save and an evaluation took at most."""
        now = time.monotonic()
        return now >= self.stop_s or now >= self.job_s - RESERVE_S - 2 * (step_s + save_s) - evaluate_s


def reason(number: int) -> str:
    """A reason to stop in words."""
    return "the time limit" if number == TIME_IS_UP else signal.Signals(number).name


def job_end_s(say: Callable[[str], None]) -> float | None:
    """`slurm_end_s`, or None, said aloud, when Slurm cannot be asked: only its warning signal stops the run in time."""
    try:
        return slurm_end_s()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        say(f"the end of this Slurm job is not known ({error}); have it signalled: sbatch --signal=USR1@300")
        return None


def slurm_end_s() -> float | None:
    """When this Slurm job ends (seconds since 1970); None outside of a job and where it has no limit.

    Raises ValueError, OSError or subprocess errors when Slurm cannot be asked.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return None
    if "SLURM_JOB_END_TIME" in os.environ:
        return float(os.environ["SLURM_JOB_END_TIME"])
    command = ["squeue", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format", "%L"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    left = time_left_s(done.stdout.strip())
    return None if left is None else time.time() + left


def time_left_s(text: str) -> float | None:
    """Seconds of Slurm's [days-][[hours:]minutes:]seconds; None for a job without limit."""
    if text in ("UNLIMITED", "NOT_SET"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if found is None:
        raise ValueError(f"squeue gave {text!r} as the time left")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
