"""The commands. Every mistake of the user ends in one sentence and exit code 2; see `EXIT_CODES`.

This is the one module that imports inside functions, so that `--help` is quick.
"""

import os
import sys
import traceback
from pathlib import Path

from cyclopts import App, Parameter

from brainscale import __version__
from brainscale.config import Config, InputError, Plan, load, to_toml

EXIT_CODES = """Exit codes: 0 done, or already done. 1 internal error. 2 bad input or settings. 3 more scans refused
than allowed. 4 a check found damage. 5 training stopped itself. 75 stopped early and resumable."""

PATH_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
"""What the system says of a path that cannot be used; it came from the command line or the settings."""

app = App(
    name="brainscale",
    version=__version__,
    help=f"""Pretrain 3D vision transformers on brain MRI by self-supervision.

The way through: `to-zarr` (NIfTI → store), `pretrain` (store → checkpoints), `report` (a page to look at).
`phantom` makes synthetic brains, so that all of it runs without data; `doctor` checks a store.

Example: brainscale phantom data/phantom && brainscale to-zarr data/phantom stores/phantom

Example: brainscale pretrain configs/mae_small_cpu.toml data.store=stores/phantom run.dir=runs/a

{EXIT_CODES}""",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
)

bench = App(
    name="bench",
    help="""Measurements against what you would pick instead; JSON lines with machine and commit.

Example: brainscale bench read stores/brains --source data/bids --json results.jsonl""",
    help_format="markdown",
)
app.command(bench)


@app.command
def phantom(
    dest: Path,
    /,
    *,
    subjects: int = 24,
    seed: int = 0,
    contrasts: str = "T1w",
    spacing_mm: float | None = None,
    head: bool = False,
) -> None:
    """Write a BIDS dataset of synthetic brains (deformed ICBM152 anatomy with known disease labels).

    Example: brainscale phantom data/phantom --subjects 24 --seed 0 --contrasts T1w,FLAIR

    Parameters
    ----------
    dest
        Folder to make; must be absent or empty.
    subjects
        Number of subjects, one session each.
    seed
        The same seed gives the same bytes; a larger cohort begins with the same subjects.
    contrasts
        Comma-separated BIDS suffixes among T1w, T2w, FLAIR, PDw; every subject gets one scan of each.
    spacing_mm
        Isotropic voxel size; by default it varies from scan to scan.
    head
        Add skull, scalp and neck around the brain.
    """
    from brainscale_data_prep.phantom import make

    make(dest, subjects, seed, head=head, spacing_mm=spacing_mm, contrasts=tuple(contrasts.split(",")))


@app.command
def to_zarr(
    source: Path,
    store: Path,
    /,
    *overrides: str,
    prep: Path | None = None,
    workers: int | None = None,
    max_refused: str | None = None,
) -> None:
    """Convert NIfTI volumes into one verified store; an interrupted conversion continues.

    Example: python data_prep/to_zarr.py data/bids stores/brains --prep configs/prep/brain_1mm.toml --workers 8

    Parameters
    ----------
    source
        A BIDS dataset, any folder of .nii / .nii.gz files, or a .csv / .parquet table with a column `path`.
    store
        The store to make or to continue.
    overrides
        Settings of the plan as key=value, e.g. dtype=float32.
    prep
        The preprocessing plan (TOML); default: 1 mm, 160×192×160 voxels.
    workers
        Processes; default: one per core.
    max_refused
        Largest share of scans that may be refused, e.g. 5%; default: no limit, but at least one scan must be taken.
    """
    from brainscale_data_prep.convert import TooManyRefused, convert, report_line
    from brainscale_data_prep.pool import Stopped

    share = None
    if max_refused is not None:
        try:
            share = float(max_refused.removesuffix("%")) / (100 if max_refused.endswith("%") else 1)
        except ValueError:
            raise InputError(f"--max-refused {max_refused!r} is no share; give e.g. 5% or 0.05") from None
    plan = load(Plan, prep, overrides)
    try:
        summary = convert(source, store, plan, workers or os.cpu_count() or 1, share)
    except TooManyRefused as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(75)
    print(report_line(summary))


@app.command
def pretrain(
    config: Path,
    /,
    *overrides: str,
    dry_run: bool = False,
    allow_change: tuple[str, ...] = (),
) -> None:
    """Pretrain on a store; the same command continues a run, a finished run is left alone.

    Example: brainscale pretrain configs/mae_tiny_cpu.toml data.store=stores/brains run.dir=runs/a train.num_steps=300

    Example: torchrun --nproc-per-node 2 -m brainscale pretrain configs/mae_tiny_cpu.toml data.store=stores/brains

    Parameters
    ----------
    config
        Settings of the run (TOML).
    overrides
        Settings as key=value; the value is read as TOML, or as a string where it is none.
    dry_run
        Build the model without memory, print parameters, tokens and FLOPs, and stop.
    allow_change
        A key that a resumed run may change although it changes results; repeatable.
    """
    settings = load(Config, config, overrides)
    if dry_run:
        print(dry_run_text(settings))
        return
    run_dir = Path(settings.run.dir or f"runs/{config.stem}")
    from brainscale import distributed, report, run_folder, train
    from brainscale.store import StoreDamage

    world = distributed.find()
    distributed.start(world)
    code, sentence, ours, alone = 0, "done", True, False
    try:
        train.run(settings, run_dir, world, allow_change)
    except InputError as error:
        code, sentence = 2, str(error)
        ours, alone = not isinstance(error, run_folder.RunBusy), isinstance(error, StoreDamage)
    except PATH_ERRORS as error:
        code, sentence, alone = 2, path_sentence(error), True
    except (train.TrainingStopped, FloatingPointError) as error:
        code, sentence = 5, str(error)
    except KeyboardInterrupt:
        code, sentence = 75, "stopped by Ctrl-C; the same command continues from the newest checkpoint"
    except BaseException as error:
        traceback.print_exc()
        code, sentence, alone = 1, f"{type(error).__name__}: {error}", True
    if code and (world.is_first or alone):
        rank = f" (rank {world.rank})" if world.size > 1 and alone else ""
        print(f"error{rank}: {sentence}", file=sys.stderr)
    if ours and run_dir.is_dir() and (world.is_first or alone):
        run_folder.write_exit(run_dir, code, sentence, world)
    if world.is_first and code in (0, 5):
        print(f"report: {report.write(run_dir)}")
    distributed.leave(code)


@app.command
def report(run: Path, /) -> None:
    """Write RUN/report.html from what a run has recorded so far, and print its path.

    Example: brainscale report runs/a
    """
    from brainscale.report import write

    print(write(run))


@app.command
def doctor(store: Path, /, *, deep: bool = False) -> None:
    """Say in one line each what is wrong with a store; exit code 4 when something is.

    Example: brainscale doctor stores/brains --deep

    Parameters
    ----------
    store
        A store made by to-zarr.
    deep
        Re-hash every file and decode every volume.
    """
    from brainscale.doctor import check_store, describe_store

    problems = check_store(store, deep)
    if problems:
        print("\n".join(problems))
        sys.exit(4)
    print(describe_store(store))


@bench.command
def read(store: Path, /, *, source: Path | None = None, quick: bool = False, json: Path | None = None) -> None:
    """Time reading whole volumes from a store, against zarr-python and nibabel.

    Example: brainscale bench read stores/brains --source data/bids --json results.jsonl

    Parameters
    ----------
    store
        A finished store.
    source
        The folder it was made from, to time nibabel on the same scans.
    quick
        Fewer repetitions.
    json
        File that the lines are appended to.
    """
    from brainscale.bench import read as bench_read
    from brainscale.bench.record import write

    write(bench_read.run(store, source, 10 if quick else 60), json)


def dry_run_text(config: Config) -> str:
    """Parameters, tokens and FLOPs of a config, from a model on the meta device."""
    import torch

    from brainscale.geometry import token_grid
    from brainscale.loader import Reader
    from brainscale.mae import Mae, mae_flops
    from brainscale.masking import masked_count
    from brainscale.store import open_store

    if config.data.store:
        store = open_store(Path(config.data.store))
        volume = Reader(store, config.model.patch_voxels_zyx, config.data.crop_voxels_zyx).volume_zyx
        origin = config.data.store
    elif config.data.crop_voxels_zyx is not None:
        volume, origin = config.data.crop_voxels_zyx, "data.crop_voxels_zyx"
    else:
        volume, origin = (
            (160, 192, 160),
            "the default plan; give data.store=STORE for the real one",
        )
    grid = token_grid(volume, config.model.patch_voxels_zyx)
    tokens = grid[0] * grid[1] * grid[2]
    masked = masked_count(config.mask.fraction, tokens)
    with torch.device("meta"):
        model = Mae(config, volume)
    total = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    flops = mae_flops(config, grid)
    batch, steps = config.train.global_batch_volumes, config.train.num_steps
    return "\n".join(
        (
            to_toml(config),
            f"volume             {volume} voxels z, y, x (from {origin})",
            f"tokens             {tokens} = {grid[0]}×{grid[1]}×{grid[2]}; {masked} masked, {tokens - masked} visible",
            f"parameters         {total:,} ({encoder:,} in the encoder)",
            f"FLOPs per sample   {flops:.3e} forward and backward",
            f"FLOPs of the run   {flops * batch * steps:.3e} ({steps:,} steps of {batch} volumes)",
        )
    )


def path_sentence(error: OSError) -> str:
    """What is wrong with a path that the user gave."""
    return f"{error.filename} cannot be used ({error.strerror}); give another path, or allow access to it"


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; returns by raising SystemExit with one of the documented codes."""
    try:
        app(arguments)
    except (InputError, *PATH_ERRORS) as error:
        if os.environ.get("RANK", "0") == "0":
            sentence = path_sentence(error) if isinstance(error, OSError) else error
            print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
