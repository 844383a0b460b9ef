"""Named points where a test kills, stops or fails this process. In production a point is one look at an empty list.

    BRAINSCALE_FAULTS="NAME:ACTION[@rank=R][@hit=N]; …"     e.g. "save.renamed:kill@rank=0@hit=2"

NAME may end in * for every point that begins so. Actions: kill (SIGKILL), stop (SIGSTOP), term (SIGTERM, all to this
process), full (the error of a full disk), hang (sleep for ever), slow (sleep SLOW_S). hit: only at the N-th passing,
counted from 1.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass

from brainscale.settings import InputError

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
ACTIONS = (*SIGNALS, "full", "hang", "slow")
SLOW_S = 0.1
"""Long beside a step of a tiny model, so that what is slow is what the others wait for."""


@dataclass
class Fault:
    """One entry of the list; `passed` counts how often its point was reached."""

    name: str
    action: str
    rank: str | None = None
    hit: int = 0
    passed: int = 0


def parse(text: str) -> list[Fault]:
    """The faults of a list in the form of the module's docstring. Raises InputError for any other form."""
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        point, *conditions = entry.split("@")
        name, _, action = point.partition(":")
        given = dict(condition.partition("=")[::2] for condition in conditions)
        counts = all(text.isdigit() for text in given.values()) and given.get("hit") != "0"
        if not name or action not in ACTIONS or not set(given) <= {"rank", "hit"} or not counts:
            raise InputError(
                f"BRAINSCALE_FAULTS: {entry!r} is not NAME:ACTION[@rank=R][@hit=N] with an action of "
                f"{', '.join(ACTIONS)}; it is meant for tests: unset it"
            )
        faults.append(Fault(name, action, given.get("rank"), int(given.get("hit", 0))))
    return faults


ARMED = parse(os.environ.get("BRAINSCALE_FAULTS", ""))


def fault_point(name: str) -> None:
    """Do what the list says for this point, if anything."""
    if ARMED:
        _act(name)


def _act(name: str) -> None:
    for fault in ARMED:
        wanted = name.startswith(fault.name[:-1]) if fault.name.endswith("*") else name == fault.name
        if not wanted or fault.rank not in (None, os.environ.get("RANK", "0")):
            continue
        fault.passed += 1
        if fault.hit not in (0, fault.passed):
            continue
        if fault.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.action])
        elif fault.action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        else:
            time.sleep(SLOW_S if fault.action == "slow" else 1e9)
