"""The processes that read for a loader, looked after from outside the library that started them."""

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from brainscale.feed import JOIN_S, Feed, LoaderFailed

STOP_S = 5.0
"""How long processes may take to leave when they are told to."""


class Workers:
    """One that dies is reported to the feed at once; all are ended at the end."""

    def __init__(self, awaited: Callable[[], str], damage: Callable[[int, str], Exception]) -> None:
        """awaited: names the samples that the run waits for; damage: what to raise for a sample that cannot be read."""
        self.awaited, self.damage = awaited, damage
        self._folder = tempfile.TemporaryDirectory(prefix="brainscale-loader-")
        self.report = f"{self._folder.name}/report"
        """A named pipe that takes a line "INDEX SENTENCE" of each sample that cannot be read."""
        os.mkfifo(self.report)
        self._reports = os.open(self.report, os.O_RDWR | os.O_NONBLOCK)
        self.processes: list[Any] = []
        self.leaving = threading.Event()
        """Set when the processes are about to be ended."""
        self._told: Exception | None = None
        self._lock = threading.Lock()
        self._closing, self._wake = multiprocessing.Pipe(duplex=False)

    def started_by(self, start: Callable[[], list[Any]]) -> list[Any]:
        """Call something that starts processes, and take those in."""
        before = multiprocessing.active_children()
        try:
            started = start()
        except RuntimeError as error:
            os.close(self._reports)
            self._folder.cleanup()
            raise LoaderFailed(
                f"the processes that read for the loader could not be started ({error}); perhaps one was killed for "
                "want of memory: lower data.workers"
            ) from error
        self.processes = [p for p in multiprocessing.active_children() if p not in before]
        return started

    def watch(self, feed: Feed[Any]) -> None:
        """Look after the processes until `close`."""
        self._thread = threading.Thread(target=self._look, args=(feed,), name="workers", daemon=True)
        self._thread.start()

    def _look(self, feed: Feed[Any]) -> None:
        connection.wait([*(p.sentinel for p in self.processes), self._reports, self._closing])
        if found := self._reported() or self.death():
            feed.fail(found)

    def _reported(self) -> Exception | None:
        """What was reported first."""
        with self._lock:
            if self._told is None and connection.wait([self._reports], 0.0):
                line = os.read(self._reports, 1 << 16).partition(b"\n")[0]  # several may have been written by now
                index, _, sentence = line.decode(errors="replace").partition(" ")
                self._told = self.damage(int(index), sentence)
            return self._told

    def reason(self, error: Exception) -> Exception:
        """What an error of the library that started the processes is due to: damage, a death, or itself."""
        return self._reported() or self.death() or error

    def death(self) -> LoaderFailed | None:
        """What to say of a process that has ended without being told to."""
        if self.leaving.is_set():
            return None
        ended = set(connection.wait([p.sentinel for p in self.processes], 0.0))
        for process in self.processes:
            if process.sentinel in ended:
                return LoaderFailed(
                    f"process {process.pid}, which reads for the loader, died (killed, perhaps for want of memory, or "
                    f"crashed); {self.awaited()}; the same command continues from the last checkpoint"
                )
        return None

    def close(self, feed: Feed[Any]) -> None:
        """End the feed and its processes. After a death DALI may hang for ever: its thread is left behind then."""
        died = self.death() is not None
        self.leaving.set()
        self._wake.send(None)
        self._thread.join()
        closed = feed.close(0.0 if died else JOIN_S)
        deadline = time.monotonic() + (STOP_S if closed and not died else 0.0)
        for p in self.processes:
            p.join(max(0.0, deadline - time.monotonic()))
        for p in self.processes:
            p.kill()
            p.join(STOP_S)
        self._wake.close()
        self._closing.close()
        os.close(self._reports)
        self._folder.cleanup()
