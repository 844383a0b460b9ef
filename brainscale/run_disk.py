"""The disk of a run folder: is it one and the same for all ranks, may they write, and is there room for checkpoints?"""

import os
import shutil
import time
import uuid
from pathlib import Path

from brainscale.checkpoint_files import directories, step_of
from brainscale.config import Config
from brainscale.distributed import World, broadcast, gather
from brainscale.objective import Objective, on_meta
from brainscale.rendezvous import named
from brainscale.settings import InputError
from brainscale.stores import Stores, store_paths

SEEN_S = 10.0
"""How long a file may take to be seen on another node: network disks remember what they have looked up."""


def shared(run_dir: Path, world: World, nodes: list[str]) -> None:
    """Collective: each rank writes a file in the run folder; all see rank 0's and rank 0 sees all. They are removed.

    nodes: of each rank. Raises InputError with the same sentence on every rank.
    """
    folder, prefix, problem = run_dir.absolute(), "", ""
    if world.is_first:
        prefix = f".preflight-{uuid.uuid4().hex}"
        for litter in folder.glob(".preflight-*"):
            litter.unlink()
        problem = _write(folder, prefix, world, nodes)
    prefix, above, problem = broadcast((prefix, str(folder), problem), world)
    try:
        if not problem and world.size > 1:
            own = ""
            if not world.is_first:
                if _seen(folder, [f"{prefix}-0"]):
                    own = _write(folder, prefix, world, nodes)
                else:
                    own = _unseen(named([world.rank], nodes), folder, named([0], nodes), Path(above))
            problem = next(filter(None, gather(own, world)), "")
            if not problem and world.is_first:
                missing = _seen_not(folder, [f"{prefix}-{rank}" for rank in range(world.size)])
                if missing:
                    lost = [int(name.rpartition("-")[2]) for name in missing]
                    problem = _unseen(named([0], nodes), folder, named(lost, nodes), folder)
            problem = broadcast(problem, world)
    finally:
        own_file = folder / f"{prefix}-{world.rank}"
        if os.path.exists(own_file):  # False where it may not be looked at, which has been said
            own_file.unlink()
    if problem:
        raise InputError(problem)


def _write(folder: Path, prefix: str, world: World, nodes: list[str]) -> str:
    try:
        (folder / f"{prefix}-{world.rank}").write_text(nodes[world.rank])
    except OSError as error:
        return (
            f"{named([world.rank], nodes)} cannot write in the run folder {folder} ({error.strerror}); allow access to "
            "it, make room, or give another run.dir"
        )
    return ""


def _seen(folder: Path, names: list[str]) -> bool:
    return not _seen_not(folder, names)


def _seen_not(folder: Path, names: list[str]) -> list[str]:
    """Those of the names that do not turn up within SEEN_S. Listing a folder makes a network disk look anew."""
    begin = time.monotonic()
    while True:
        try:
            present = set(os.listdir(folder))
        except OSError:
            present = set()
        missing = [name for name in names if name not in present]
        if not missing or time.monotonic() - begin > SEEN_S:
            return missing
        time.sleep(0.1)


def _unseen(who: str, where: Path, whose: str, there: Path) -> str:
    places = f"{where}" if where == there else f"{where} and {there}"
    return (
        f"{who} does not see what {whose} writes in the run folder ({places}) within {SEEN_S:.0f} s; give run.dir as "
        "an absolute path on a disk that all nodes share"
    )


def state_bytes(model: Objective) -> int:
    """Bytes of a checkpoint: fp32 weights, and two moments of those that are trained."""
    return sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())


def room(config: Config, run_dir: Path) -> tuple[str, str]:
    """(a sentence when the disk cannot take one more state, a warning when not all that are kept at once).

    Existing checkpoints count as states that are there; what a killed save left is swept, so it counts as free. A
    quota is not seen: a file system tells its own free space. Without a store, or for a finished run: ("", "").
    """
    root, keep = run_dir / "checkpoints", config.checkpoint
    found = directories(root)
    finished = bool(found) and step_of(found[-1]) >= config.train.num_steps
    if finished or not store_paths(config.data):
        return "", ""
    try:
        volume_zyx = config.data.crop_voxels_zyx or Stores(store_paths(config.data)).volume_zyx
        state = state_bytes(on_meta(config, volume_zyx))
    except InputError as error:
        return str(error), ""
    litter = sum(file.stat().st_size for file in root.glob(".tmp-*/*"))
    free = shutil.disk_usage(run_dir).free + litter
    forever = config.train.num_steps // keep.keep_every_steps if keep.keep_every_steps else 0
    states = max(keep.keep_last + 1 + forever - len(found), 1)
    place = f"{run_dir.absolute()}: {_gb(free)} are free on its disk"
    if free < state:
        return (
            f"{place}, and one state of this model takes {_gb(state)}; make room, or give a run.dir on another disk",
            "",
        )
    if free < states * state:
        return "", (
            f"WARNING, {place}, and {states} more states of {_gb(state)} each make {_gb(states * state)}: those of "
            "checkpoint.keep_last and keep_every_steps, and the one that is being written; the run will stop where "
            "the room ends"
        )
    return "", ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
