"""The commands on a run folder: `checkpoint list|verify|prune` and `replay`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from brainscale.config import Config
from brainscale.settings import InputError, load

if TYPE_CHECKING:
    from brainscale.checkpoint_files import TrainState

checkpoint = App(
    name="checkpoint",
    help="""Look at, check and thin out the checkpoints of a run.

Example: brainscale checkpoint list runs/a

Example: brainscale checkpoint verify runs/a && brainscale checkpoint prune runs/a --keep-last 1""",
    help_format="markdown",
)


@checkpoint.command(name="list")
def list_(run: Path, /) -> None:
    """Print the checkpoints of a run, oldest first: step, samples seen, size, how it was computed. Hashes nothing.

    Example: brainscale checkpoint list runs/a
    """
    from brainscale import checkpoint_files as files

    root = _root(run)
    pointed = files.pointed(root)
    print(f"{'step':>10}{'samples':>12}{'MB':>10}  {'saved (UTC)':<20}  computed by")
    for path in files.directories(root):
        try:
            state = files.read_state(path)
        except (OSError, ValueError, TypeError) as error:
            print(f"{files.step_of(path):>10}  unreadable ({type(error).__name__}); brainscale checkpoint verify {run}")
            continue
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        mark = "  ← latest" if path.name == pointed else ""
        print(f"{state.step:>10}{state.cursor:>12}{size:>10.1f}  {_utc(path):<20}  {_by(state)}{mark}")
    for path in sorted(root.glob("damaged-*")):
        print(f"{path.name}: found damaged by a start, which fell back to the one before; remove it when looked at")


@checkpoint.command
def verify(run: Path, /) -> None:
    """Read every checkpoint of a run and compare its hashes; exit code 4 when one is damaged.

    Example: brainscale checkpoint verify runs/a
    """
    from rich.progress import track

    from brainscale import checkpoint_files as files

    root = _root(run)
    found = files.directories(root)
    problems = {path: files.damage(path) for path in track(found, "verifying", disable=not sys.stderr.isatty())}
    for path, problem in problems.items():
        print(f"DAMAGED: {problem}" if problem else f"intact: {path}")
    if files.pointed(root) not in {path.name for path in found}:
        print(f"{root / files.LATEST} does not name a checkpoint; the next start sets it right")
    if any(problems.values()):
        sys.exit(4)


@checkpoint.command
def prune(
    run: Path, /, *, keep_last: int | None = None, keep_every_steps: int | None = None, dry_run: bool = False
) -> None:
    """Remove checkpoints but the newest intact ones. Refused while the run is going on. Damaged ones stay.

    Example: brainscale checkpoint prune runs/a --keep-last 1 --keep-every-steps 10000

    Parameters
    ----------
    keep_last
        Newest intact checkpoints to keep, at least 1; by default as the run's settings say.
    keep_every_steps
        Keep those at multiples of this too (0: none); by default as the run's settings say.
    dry_run
        Say what would go, and remove nothing.
    """
    import torch

    from brainscale import checkpoint_files as files
    from brainscale import run_folder
    from brainscale.distributed import World

    root = _root(run)
    settings = load(Config, run / "config.toml").checkpoint
    keep_last = settings.keep_last if keep_last is None else keep_last
    keep_every_steps = settings.keep_every_steps if keep_every_steps is None else keep_every_steps
    if keep_last < 1 or keep_every_steps < 0:
        raise InputError(f"got keep_last {keep_last} and keep_every_steps {keep_every_steps}; at least one must stay")
    with run_folder.locked(run, World(0, 1, 0, torch.device("cpu"), "single")):
        intact = [path for path in files.directories(root) if files.damage(path) is None]
        gone = files.expendable(intact, keep_last, keep_every_steps)
        for path in gone:
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            if not dry_run:
                files.remove(path)
            print(f"{'would remove' if dry_run else 'removed'} {path} ({size:.1f} MB)")
        print(f"{len(intact) - len(gone)} intact checkpoint(s) {'would stay' if dry_run else 'left'}")


def replay(run: Path, step: int, /, *overrides: str) -> None:
    """Do one step of a run again and print the loss of every sample in it: what made a step not finite.

    Starts from the newest saved state before the step; writes nothing. Exit code 4 when the outcome is not what the run
    recorded. Under torchrun with as many ranks as the run had, the bits are the same.

    Example: brainscale replay runs/a 1234

    Parameters
    ----------
    step
        Counted from 1, as in metrics.jsonl and in RUN/nonfinite.
    overrides
        Settings as key=value, for example data.store=NEW/PLACE.
    """
    from brainscale import distributed
    from brainscale import replay as again

    world = distributed.find()
    distributed.start(world)
    text, agrees = "", True
    try:
        text, agrees = again.replay(run, step, world, overrides)
    except InputError as error:
        if world.is_first:
            print(f"error: {error}", file=sys.stderr)
        distributed.leave(2)
    if world.is_first:
        print(text)
    distributed.wait(world)
    distributed.leave(0 if agrees else 4)


def _root(run: Path) -> Path:
    root = run / "checkpoints"
    if not (run / "config.toml").is_file() or not root.is_dir():
        raise InputError(f"{run} is no run folder with checkpoints; give the run.dir of a pretraining")
    return root


def _utc(path: Path) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(sep=" ", timespec="seconds")[:19]


def _by(state: "TrainState") -> str:
    split = f"{state.world_size} rank(s) × {state.micro_batch_volumes} × {state.accumulation}"
    return f"{split}, ZeRO stage {state.zero_stage}"
