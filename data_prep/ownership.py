"""Who may write which shards of a store: several tasks at once, never two for one shard; freed when a process dies."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from brainscale.settings import InputError

MUTEX, OWNERS = ".lock", ".owners"
MUTEX_TIMEOUT_S = 3600.0
"""Longer than a store of millions of scans takes to finish."""


@contextmanager
def mutex(store: Path) -> Iterator[None]:
    """Held for the short moments that change what all tasks share: beginning, and finishing."""
    lock = FileLock(store / MUTEX)
    try:
        lock.acquire(timeout=MUTEX_TIMEOUT_S)
    except Timeout:
        raise InputError(f"{store} has been locked for an hour by another process; end it, then try again") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def owner(store: Path, task: tuple[int, int]) -> Iterator[None]:
    """Own the shards s with s mod n = i of a store, (i, n) being the task. The last owner leaves no file behind.

    Raises InputError when a living process owns one of them: (i, n) and (j, m) share a shard if i ≡ j mod gcd(n, m).
    """
    i, n = task
    folder = store / OWNERS
    mine = FileLock(folder / f"{i}-of-{n}")
    with mutex(store):
        folder.mkdir(exist_ok=True)
        for file in sorted(folder.glob("*-of-*")):
            j, m = map(int, file.name.split("-of-"))
            if (i - j) % math.gcd(n, m) == 0 and not _remove_if_dead(file):
                raise InputError(
                    f"another process is converting into {store} (task {j}/{m}); wait for it, or give another folder"
                )
        mine.acquire(timeout=0)
    try:
        yield
    finally:
        with mutex(store):
            Path(mine.lock_file).unlink(missing_ok=True)
            mine.release()
            if all([_remove_if_dead(file) for file in folder.glob("*-of-*")]):
                with suppress(OSError):  # a network file system may keep files of its own there a while longer
                    folder.rmdir()
                    (store / MUTEX).unlink()


def _remove_if_dead(file: Path) -> bool:
    """Remove the lock file of a process that has ended; whether it had."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    file.unlink(missing_ok=True)
    lock.release()
    return True
