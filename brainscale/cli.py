"""The commands. Every mistake of the user ends in one sentence and exit code 2; see `EXIT_CODES`.

The modules of the commands (`cli`, `cli_data`, `cli_bench`) import inside functions, so that `--help` is quick.
"""

import errno
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App, Parameter

from brainscale import __version__, cli_data, cli_evaluate, cli_phantom, cli_plan, cli_runs, cli_slurm, cli_splits
from brainscale.cli_bench import bench
from brainscale.cli_embed import embed
from brainscale.cli_export import export
from brainscale.config import Config
from brainscale.settings import InputError, load, to_toml

if TYPE_CHECKING:
    from brainscale.distributed import World

EXIT_CODES = """Exit codes: 0 done, already done, or queued again by Slurm. 1 internal error. 2 bad input or settings.
3 more scans refused than allowed. 4 a check found damage. 5 training stopped itself. 75 stopped early and resumable."""

PATH_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
"""What the system says of a path that cannot be used; it came from the command line or the settings."""

app = App(
    name="brainscale",
    version=__version__,
    help=f"""Pretrain 3D vision transformers on brain MRI by self-supervision.

The way through: `to-zarr` (NIfTI → store), `pretrain` (store → checkpoints), `report` (a page to look at).
`phantom` makes synthetic brains, so that all of it runs without data; `doctor` checks a store, and says what a run
waits for.

Example: brainscale phantom data/phantom && brainscale to-zarr data/phantom stores/phantom

Example: brainscale pretrain configs/mae_small_cpu.toml data.store=stores/phantom run.dir=runs/a

{EXIT_CODES}""",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
)

app.command(bench)
app.command(embed)
app.command(cli_runs.checkpoint)
app.command(cli_splits.splits)
app.command(cli_plan.plan)
app.command(cli_evaluate.evaluate)
app.command(cli_evaluate.compare)
app.command(export)
app.command(cli_slurm.submit)
app.command(cli_slurm.retry)
app.command(cli_phantom.phantom)
app.command(cli_phantom.plant)
for command in (cli_data.to_zarr, cli_data.export_nifti, cli_data.doctor, cli_runs.replay):
    app.command(command)


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
    from brainscale import stopping

    stop = stopping.Stop()
    from brainscale import distributed, rendezvous, report, run_folder, train
    from brainscale.out_of_memory import OutOfMemory
    from brainscale.store import StoreDamage

    world = distributed.find()
    code, sentence, ours, alone, again, lost_nodes, told = 0, "done", True, False, False, [], ""
    try:
        rendezvous.join(world, settings.health.first_timeout_s)
        try:
            train.run(settings, run_dir, world, stop, allow_change)
        except stopping.StoppedEarly as error:  # in here, since a rank may be lost in this as well
            told, again = once_more(world) if error.goes_on else ("", False)
            code, sentence = 0 if told else 75, f"{error}; {told or 'the same command continues'}"
    except InputError as error:
        code, sentence = 2, str(error)
        ours = not isinstance(error, run_folder.RunBusy | rendezvous.NotMet)
        alone = isinstance(error, StoreDamage | rendezvous.NotJoined | OutOfMemory)
    except PATH_ERRORS as error:
        code, sentence, alone = 2, path_sentence(error), True
    except stopping.LostRank as error:
        code, sentence, alone, again, lost_nodes = 5, str(error), True, bool(error.nodes), error.nodes
    except stopping.NoData as error:
        code, sentence, alone, again = 5, str(error), True, True
    except (stopping.TrainingStopped, FloatingPointError) as error:
        code, sentence = 5, str(error)
    except BaseException as error:
        alone = True
        if isinstance(error, OSError) and error.errno in train.DISK_FULL:
            code, sentence = 75, f"the disk of {run_dir} is full; make room, then the same command continues"
        else:
            traceback.print_exc()
            code, sentence = 1, f"{type(error).__name__}: {error}"
    if code and (world.is_first or alone):
        rank = f" (rank {world.rank})" if world.size > 1 and alone else ""
        print(f"error{rank}: {sentence}" if code != 75 else sentence, file=sys.stderr)
    elif world.is_first and sentence != "done":
        print(sentence, file=sys.stderr)
    if ours and run_dir.is_dir() and (world.is_first or alone):
        try:
            run_folder.write_exit(run_dir, code, sentence, world, again, lost_nodes)
        except OSError as error:
            print(f"exit.json could not be written ({error})", file=sys.stderr)
    if world.is_first and code in (0, 5) and not told:
        print(f"report: {report.write(run_dir)}")
    distributed.leave(code)


@app.command
def report(run_or_store: Path, /, *more_runs: Path, out: Path | None = None) -> None:
    """Write the page of a run (RUN/report.html), of a store (STORE.qc.html) or of scores (scores.html beside the
    scores.json that `evaluate` wrote), or that of several runs side by side (--out), and print its path.

    Example: brainscale report runs/a

    Example: brainscale report runs/a/evaluation/scores.json

    Example: brainscale report runs/mae runs/jepa --out runs/compared.html

    Parameters
    ----------
    more_runs
        Runs to compare with the first.
    out
        Page of the comparison, or of scores, FILE.html.
    """
    from brainscale import qc, report_compare, report_comparison, report_evaluation, score_file
    from brainscale.report import write
    from brainscale.store_files import COMPLETE, PLAN

    if more_runs:
        if out is None:
            raise InputError("several runs make a page of their own; say where with --out FILE.html")
        print(report_compare.write((run_or_store, *more_runs), out))
        return
    if run_or_store.name == report_comparison.NAME or (run_or_store / report_comparison.NAME).is_file():
        print(report_comparison.write(run_or_store, out))
        return
    if run_or_store.suffix == ".json" or (run_or_store / score_file.NAME).is_file():
        print(report_evaluation.write(run_or_store, out))
        return
    if out is not None:
        raise InputError("--out is for several runs; the page of one run is RUN/report.html, of a store STORE.qc.html")
    is_store = any((run_or_store / name).exists() for name in (COMPLETE, PLAN))
    print(qc.write(run_or_store) if is_store else write(run_or_store))


def once_more(world: "World") -> tuple[str, bool]:
    """Collective: have the Slurm job queued again by rank 0, unless that has happened. Returns the sentence to say, or
    "" where that is not done (rank 0 says why within a Slurm job), and whether the job's script should ask again."""
    from brainscale import distributed, slurm_job

    told, again = "", False
    if world.is_first and slurm_job.job_id():
        try:
            told = slurm_job.requeue()
        except slurm_job.NotRequeued as why:
            again = isinstance(why, slurm_job.NoAnswer)
            print(f"not queued again: {why}", file=sys.stderr)
    return distributed.broadcast((told, again), world)


def dry_run_text(config: Config) -> str:
    """Parameters, tokens and FLOPs of a config, by formula."""
    from brainscale import model_counts as counts
    from brainscale.geometry import token_grid
    from brainscale.plan import volume_of

    seen = volume_of(config)
    tokens, grid = counts.tokens_of(config, seen.shape_zyx), token_grid(seen.shape_zyx, config.model.patch_voxels_zyx)
    trained, followed, encoder = (
        sum(sizes)
        for sizes in (counts.trained_sizes(config), counts.teacher_sizes(config), counts.encoder_sizes(config.model))
    )
    flops = counts.model_flops(config, tokens)
    batch, steps = config.train.global_batch_volumes, config.train.num_steps
    return "\n".join(
        (
            to_toml(config),
            f"volume             {seen.shape_zyx} voxels z, y, x (from {seen.origin})",
            f"tokens             {tokens.total} = {grid[0]}×{grid[1]}×{grid[2]}; {tokens.masked} masked, "
            f"{tokens.visible} visible"
            + (f"; {tokens.decoded} of the masked are decoded in training" if tokens.decoded < tokens.masked else ""),
            f"parameters         {trained:,} trained, {encoder:,} of them in the encoder"
            + (f"; {followed:,} in the teacher" if followed else ""),
            f"FLOPs per sample   {flops:.3e} forward and backward",
            f"FLOPs of the run   {flops * batch * steps:.3e} ({steps:,} steps of {batch} volumes)",
        )
    )


def path_sentence(error: OSError) -> str:
    """What is wrong with a path that the user gave."""
    if error.filename is None:
        return f"a path cannot be used: {' '.join(str(error).split())}"
    return f"{error.filename} cannot be used ({error.strerror}); give another path, or allow access to it"


def left_unread() -> bool:
    """Whether nobody reads any more what is printed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told unasked
    return bool(poll.poll(0))


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; returns by raising SystemExit with one of the documented codes. Who reads what is printed may
    leave before the end (`| head`): that ends the command as SIGPIPE would, without a traceback. (A training has an end
    of its own, with code 1.)"""
    try:
        try:
            app(arguments)
        finally:
            sys.stdout.flush()  # here, where a reader that has left can be caught
    except BrokenPipeError:
        if not left_unread():  # another pipe is broken, say that of a process of ours
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed at the exit
        sys.exit(128 + signal.SIGPIPE)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, PATH_ERRORS) and error.errno != errno.EROFS:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on every node, since its files may be at fault
            sentence = path_sentence(error) if isinstance(error, OSError) else error
            print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
