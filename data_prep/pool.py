"""Tasks in spawned worker processes: one BLAS thread each, progress, and ends that can be continued from."""

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ENVIRONMENT = {
    **dict.fromkeys(THREADS, "1"),
    # freed arrays stay in the process: asking the kernel for zeroed pages again costs 5 to 10 ms per volume
    **dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(4 << 30)),
    # a worker that is ended leaves numcodecs' lock to Python's tracker, which removes it but would complain
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}
"""Of workers."""
PLAIN_LINE_SECONDS = 10.0
CONTINUES = "what is finished is kept, and the same command continues"

Task = TypeVar("Task")
Result = TypeVar("Result")


class Stopped(RuntimeError):
    """Ended early for a reason outside the data; the same command continues (exit code 75)."""


def run(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    collect: Callable[[Result], int],
    num_volumes: int,
    doing: str = "converting",
) -> None:
    """Run `function` on every task; `collect` takes each result as it comes and returns how many volumes it stands for.

    `doing` stands before the progress. An exception of a worker or of `collect` ends the run. Raises Stopped on Ctrl-C,
    a full disk or a killed worker.
    """
    others = set(multiprocessing.active_children())

    def end_workers() -> None:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()

    with environment(), progress(doing, num_volumes) as advance, _ctrl_c(end_workers) as interrupted:
        pool = ProcessPoolExecutor(min(workers, len(tasks)), multiprocessing.get_context("spawn"), start_worker)
        try:
            pending = {pool.submit(function, task) for task in tasks}
            while pending and not interrupted():
                ready, pending = wait(pending, timeout=PLAIN_LINE_SECONDS, return_when=FIRST_COMPLETED)
                advance(sum(collect(future.result()) for future in ready))
        except BaseException as error:
            end_workers()
            pool.shutdown()
            if (reason := "interrupted" if interrupted() else stop_reason(error)) is None:
                raise
            raise Stopped(f"{reason}; {CONTINUES}") from None
        if pending:
            end_workers()
        pool.shutdown()
        if pending:
            raise Stopped(f"interrupted; {CONTINUES}")


def stop_reason(error: BaseException) -> str | None:
    """Why an error is no fault of the data, in a few words; None when it is another."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, BrokenProcessPool | MemoryError):
        return "a worker ran out of memory or was killed (fewer workers need less)"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({error.strerror})"
    return None


@contextmanager
def _ctrl_c(end_workers: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; it ends the workers, which wakes who waits for them.

    An exception in its stead could strike while `wait` holds the locks of the futures, and nobody would give them back.
    """
    pressed = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        end_workers()

    if threading.current_thread() is not threading.main_thread():  # where Python handles signals
        yield lambda: pressed
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def environment() -> Iterator[None]:
    """Workers inherit the environment when they start, which may be late: it holds while the pool runs."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def progress(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes finished volumes: a bar on a terminal, else a line now and then."""
    done, started = 0, time.monotonic()
    last = started

    def rate() -> str:
        return f"{done / max(time.monotonic() - started, 1e-9):.1f} volumes/s"

    if sys.stderr.isatty():
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            bar = progress.add_task("", total=total, rate="")

            def advance_bar(volumes: int) -> None:
                nonlocal done
                done += volumes
                progress.update(bar, completed=done, rate=rate())

            yield advance_bar
        return

    def advance_lines(volumes: int) -> None:
        nonlocal done, last
        done += volumes
        if time.monotonic() - last >= PLAIN_LINE_SECONDS:
            last = time.monotonic()
            print(f"{doing}: {done} of {total}, {rate()}", file=sys.stderr, flush=True)

    yield advance_lines


def start_worker() -> None:
    """Ctrl-C is the parent's business; a parent that was killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
