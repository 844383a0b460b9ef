"""Before step 1: are all ranks alike? Each failure is one sentence, the same on every rank.

All ranks give what they have, and each compares it, so that none waits for another that has left. What is wrong with
ports is said before that, by rendezvous.py; with the disk, by run_disk.py. One rank alone looks at its disk only.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash

from brainscale import provenance, slurm_job
from brainscale.config import Config
from brainscale.distributed import World, broadcast, gather, wait
from brainscale.rendezvous import named
from brainscale.run_disk import room, shared
from brainscale.settings import InputError, changed_keys
from brainscale.store_files import COMPLETE, PLAN
from brainscale.stores import store_paths

CLOCK_S = 60.0
"""How far the clocks of two ranks may be apart: the time that is kept for saving before a job's end, which one rank
reads from its clock; and exit.json of one rank is compared with the start of another."""
SHOWN = 4
"""Differences that a sentence lists."""


@dataclass(frozen=True)
class Facts:
    """What a rank has, of plain types. clock_s: seconds since 1970; stores: by path, a hash, or ("", why not)."""

    node: str
    clock_s: float
    settings: dict[str, Any]
    versions: dict[str, Any]
    stores: dict[str, tuple[str, str]]


def check(config: Config, run_dir: Path, world: World, allow_change: tuple[str, ...] = ()) -> None:
    """Collective, before anything is built: refuse what would fail, or give other results, later on.

    Rank 0 must hold the run folder. Little room is said on rank 0. Raises InputError with the same sentence on every
    rank: settings, versions or stores that differ, clocks more than CLOCK_S apart, a run folder that is not the same
    on every rank or cannot be written, no room for one state.
    """
    nodes = [slurm_job.node()]
    if world.size > 1:
        wait(world)
        every = gather(facts(config, allow_change, now_s()), world)
        nodes = [one.node for one in every]
        if problem := different(every) or clocks_apart(every) or different_stores(every):
            raise InputError(problem)
    shared(run_dir, world, nodes)
    problem, warning = room(config, run_dir) if world.is_first else ("", "")
    if problem := broadcast(problem, world):
        raise InputError(problem)
    if warning:
        print(warning, flush=True)


def now_s() -> float:
    """The clock, in seconds since 1970."""
    return time.time()


def facts(config: Config, allow_change: tuple[str, ...], clock_s: float) -> Facts:
    """What this rank has. Python counts without its patch level, which changes no result."""
    versions = {**provenance.versions(), "python": ".".join(platform.python_version_tuple()[:2])}
    return Facts(
        slurm_job.node(),
        clock_s,
        {**config.model_dump(mode="json"), "--allow-change": sorted(allow_change)},
        {**versions, "brainscale's files": code_hash()},
        {path: store_hash(Path(path)) for path in store_paths(config.data)},
    )


def code_hash() -> str:
    """xxh3_64 of this package's modules and its kernels, changes that are in no commit included."""
    digest = xxhash.xxh3_64()
    for package in ("brainscale", "brainscale_kernels"):
        spec = find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for path in sorted(Path(folder).glob("*.py")):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def store_hash(path: Path) -> tuple[str, str]:
    """(xxh3_64 of the plan and of the list of all files with their hashes, ""), or ("", why they cannot be read)."""
    try:
        return xxhash.xxh3_64_hexdigest((path / COMPLETE).read_bytes() + (path / PLAN).read_bytes()), ""
    except OSError as error:
        return "", f"{error.filename}: {error.strerror}"


def different(every: list[Facts]) -> str:
    """A sentence when settings or versions differ: which, with the values of two ranks; else ""."""
    for what, value, remedy in (
        ("settings", _settings, "start every rank with the same config file and overrides"),
        ("versions", _versions, "give every node the same environment and the same code"),
    ):
        first, odd = value(every[0]), _unlike_first(every, value)
        if odd:
            changes = changed_keys(first, value(every[odd[0]]))
            listed = "; ".join(
                f"{key}: {other!r} on rank {odd[0]}, {own!r} on rank 0" for key, own, other in changes[:SHOWN]
            )
            more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            return f"{_named(every, odd)} and {_named(every, [0])} have different {what} ({listed}{more}); {remedy}"
    return ""


def _settings(one: Facts) -> dict[str, Any]:
    return one.settings


def _versions(one: Facts) -> dict[str, Any]:
    return one.versions


def clocks_apart(every: list[Facts]) -> str:
    """A sentence when a clock is more than CLOCK_S from rank 0's; else ""."""
    apart_s = [one.clock_s - every[0].clock_s for one in every]
    worst = max(range(len(every)), key=lambda rank: abs(apart_s[rank]))
    if abs(apart_s[worst]) <= CLOCK_S:
        return ""
    return (
        f"the clock of {_named(every, [worst])} is {abs(apart_s[worst]):.0f} s "
        f"{'ahead of' if apart_s[worst] > 0 else 'behind'} that of {_named(every, [0])}, and {CLOCK_S:.0f} s are "
        "allowed, since the end of the job and exit.json are judged by them; set both (chronyc tracking, timedatectl)"
    )


def different_stores(every: list[Facts]) -> str:
    """A sentence when a rank sees no store or another one; else "". One that no rank sees is left to who opens it."""
    for path in every[0].stores:
        blind = [rank for rank, one in enumerate(every) if not one.stores[path][0]]
        if blind and len(blind) < len(every):
            return (
                f"{_named(every, blind)} cannot read the store {path}, which the others can "
                f"({every[blind[0]].stores[path][1]}); give it as an absolute path on a disk that all nodes share, or "
                "copy it to every node"
            )
        if odd := _unlike_first(every, lambda one, path=path: one.stores[path][0]):  # type: ignore[misc]
            there, here = every[odd[0]].stores[path][0], every[0].stores[path][0]
            return (
                f"{_named(every, odd)} and {_named(every, [0])} see different stores at {path} (hash of {COMPLETE} and "
                f"{PLAN}: {there} on rank {odd[0]}, {here} on rank 0); copy the same store to every node"
            )
    return ""


def _unlike_first(every: list[Facts], value: Callable[[Facts], Any]) -> list[int]:
    """Ranks that have another value than rank 0."""
    return [rank for rank, one in enumerate(every) if value(one) != value(every[0])]


def _named(every: list[Facts], ranks: list[int]) -> str:
    return named(ranks, [one.node for one in every])
