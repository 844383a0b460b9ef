"""The commands of `brainscale bench`."""

from pathlib import Path

from cyclopts import App

bench = App(
    name="bench",
    help="""Measurements against what you would pick instead; JSON lines with machine and commit.

Example: brainscale bench read stores/brains --source data/bids --json results.jsonl""",
    help_format="markdown",
)


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
