"""Batches that a thread makes ahead of the step, and what is known when none comes."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")

JOIN_S = 10.0
"""How long closing waits for what is under way."""


class LoaderFailed(RuntimeError):
    """Batches cannot be made any more, or come too late; the sentence says which samples were waited for."""


class Feed(Generic[T]):
    """Hands over, in order, what `make(feed)` yields in a thread. What goes wrong there, or is reported by `fail`, is
    raised where a batch is asked for: at once, whatever the thread is stuck in."""

    def __init__(
        self,
        make: Callable[["Feed[T]"], Generator[T, None, None]],
        ahead: int,
        timeout_s: float,
        awaited: Callable[[], str],
    ) -> None:
        """ahead: batches that may lie ready; timeout_s: how long one may take; awaited: says which the next one is."""
        self.timeout_s, self.awaited, self.late = timeout_s, awaited, False
        self._failure: Exception | None = None
        self._ready: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._closed = threading.Event()
        self._made = make(self)
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while self._room.acquire() and not self._closed.is_set():
                self._ready.put(next(self._made))
        except BaseException as error:  # handed on to whoever asks for a batch
            self._ready.put(error)
        finally:
            self._made.close()

    def __next__(self) -> T:
        """Raises what the thread raised, LoaderFailed when no batch comes in time."""
        try:
            item = self._ready.get(timeout=self.timeout_s)
        except queue.Empty:
            self.late = True
            raise LoaderFailed(
                f"no batch within data.timeout_s = {self.timeout_s:g} s; {self.awaited()}; look at the disk of the "
                "store, or raise data.timeout_s"
            ) from None
        if self._failure is not None:
            raise self._failure
        if isinstance(item, BaseException):
            raise item
        self._room.release()
        return item

    def fail(self, error: Exception) -> None:
        """Let the next request raise this, ahead of the batches that are ready; of several, the first."""
        self._failure = self._failure or error
        self._ready.put(error)

    def close(self, within_s: float = JOIN_S) -> bool:
        """End the thread, and return whether it has ended: one that is stuck is left behind, at once if it was late."""
        self._closed.set()
        self._room.release()
        self._thread.join(0.0 if self.late else within_s)
        return not self._thread.is_alive()
