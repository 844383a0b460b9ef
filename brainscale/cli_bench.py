"""The commands of `brainscale bench`."""

from pathlib import Path

from cyclopts import App

from brainscale import cli_bench_lines, cli_bench_step

bench = App(
    name="bench",
    help="""Measurements against what you would pick instead; JSON lines with machine and commit.

Example: brainscale bench all --quick --json before.jsonl

Example: brainscale bench compare before.jsonl after.jsonl

Example: brainscale bench convert data/bids --json results.jsonl

Example: brainscale bench read stores/brains --source data/bids --json results.jsonl

Example: brainscale bench loader stores/brains --json results.jsonl

Example: brainscale bench checkpoint --folder /scratch --json results.jsonl

Example: brainscale bench kernels --json results.jsonl

Example: brainscale bench step --json results.jsonl

Example: brainscale bench scaling --json results.jsonl""",
    help_format="markdown",
)


bench.command(cli_bench_lines.everything, name="all")
bench.command(cli_bench_lines.compare)
bench.command(cli_bench_lines.markdown)
bench.command(cli_bench_lines.schema)
bench.command(cli_bench_step.step)
bench.command(cli_bench_step.scaling)
bench.command(cli_bench_step.roofline)


@bench.default
def bench_alone(*, markdown: bool = False) -> None:
    """Say what can be measured.

    Parameters
    ----------
    markdown
        Print the README's table, as `brainscale bench markdown` does.
    """
    if markdown:
        cli_bench_lines.markdown()
    else:
        bench.help_print()


@bench.command
def convert(*sources: Path, quick: bool = False, json: Path | None = None) -> None:
    """Time conversion on one core against nifti-zarr, nibabel, scipy, SimpleITK and MONAI, and compare the bytes.

    Without and with resampling to 1 mm, on the same files in turn; every variant's output is checked. Peers that are
    not installed are skipped with the command that installs them.

    Example: brainscale bench convert data/stripped data/heads --json results.jsonl

    Parameters
    ----------
    sources
        Folders of scans; skull-stripped scans and whole heads are told apart. None: synthetic brains and heads.
    quick
        Few scans and runs, and a 2 mm grid.
    json
        File that the lines are appended to.
    """
    from brainscale.bench import convert as bench_convert
    from brainscale.bench.record import announce, write

    announce("convert")
    write(bench_convert.run(sources, quick), json)


@bench.command
def read(
    store: Path | None = None, /, *, source: Path | None = None, quick: bool = False, json: Path | None = None
) -> None:
    """Time reading volumes and 96³ crops, by codec, chunk and state of the page cache, against zarr-python and nibabel.

    Example: brainscale bench read stores/brains --source data/bids --json results.jsonl

    Parameters
    ----------
    store
        A finished store, whose volumes are encoded in other ways too. None: one of synthetic brains.
    source
        The folder it was made from, to time nibabel on the same scans.
    quick
        Few volumes, reads and encodings.
    json
        File that the lines are appended to.
    """
    from brainscale.bench import read as bench_read
    from brainscale.bench.record import announce, write

    announce("read")
    write(bench_read.run(store, source, quick), json)


@bench.command
def loader(
    store: Path | None = None,
    /,
    *,
    folder: Path | None = None,
    batch: int = 2,
    quick: bool = False,
    json: Path | None = None,
) -> None:
    """Time batches of volumes from our loaders against MONAI, torchio and nibabel under torch's DataLoader, warm and
    cold, by number of workers; count bytes and CPU time; say what that feeds, and where our own time goes.

    Peers read the same volumes from NIfTI files that already lie on the store's grid, and every value is compared.
    Those that are not installed are skipped with the command that installs them.

    Example: brainscale bench loader stores/brains --json results.jsonl

    Parameters
    ----------
    store
        A finished store. None: one of synthetic brains at 1 mm.
    folder
        Where the peers' files are put for the time being (at 1 mm about 1.5 GB), on the store's disk. None: where
        temporary files lie.
    batch
        Volumes of a batch.
    quick
        Few volumes and passes, one worker.
    json
        File that the lines are appended to.
    """
    from brainscale.bench import loader as bench_loader
    from brainscale.bench.record import announce, write

    announce("loader")
    write(bench_loader.run(store, folder, batch, quick), json)


@bench.command
def checkpoint(
    *overrides: str,
    config: Path | None = None,
    folder: Path | None = None,
    quick: bool = False,
    json: Path | None = None,
) -> None:
    """Time saves, the stall of the steps, loads, hashes and a resumed start against DeepSpeed and torch.save.

    Then simulate a week with one stop a day from these figures: the ratio of its lines is the share of the time that
    is training which counts.

    Example: brainscale bench checkpoint --folder /scratch --json results.jsonl

    Example: brainscale bench checkpoint --config configs/mae_vit_b.toml data.store=stores/brains zero.stage=2

    Parameters
    ----------
    overrides
        Settings as key=value; without data.store, a store of synthetic brains at 2 mm is made.
    config
        Settings of the run that is measured (TOML). None: width 384, depth 12, fp32.
    folder
        The disk to write to. None: where temporary files lie.
    quick
        A small model and few rounds.
    json
        File that the lines are appended to.
    """
    from brainscale.bench import checkpoint as bench_checkpoint
    from brainscale.bench.record import announce, write

    announce("checkpoint")
    write(bench_checkpoint.run(overrides, config, folder, quick), json)


@bench.command
def kernels(*, batch: int = 8, count: bool = False, quick: bool = False, json: Path | None = None) -> None:
    """Time gathers and losses on a GPU against eager, torch.compile, the paper's form, MONAI and Conv3d; without a GPU,
    count the bytes and launches of each for one sample.

    Losses with their backward pass, volumes of 160×192×160 int16, patches of 16³ and 8³, predictions in bf16, 75 %
    masked. Every result is checked. Peers that are not installed are skipped with the command that installs them.

    Example: brainscale bench kernels --json results.jsonl

    Parameters
    ----------
    batch
        Volumes of a call that is timed.
    count
        Count also where there is a GPU.
    quick
        Small volumes, patches of 16³ alone, few calls.
    json
        File that the lines are appended to.
    """
    from brainscale.bench import kernels as bench_kernels
    from brainscale.bench.record import announce, write

    announce("kernels")
    write(bench_kernels.run(quick, batch, count), json)
