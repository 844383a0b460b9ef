"""The commands from NIfTI to a store and back: to-zarr, export-nifti; and doctor, also of runs."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

from brainscale.prep_plan import Plan
from brainscale.settings import InputError, load
from brainscale.store_files import read_plan


def to_zarr(
    source: Path,
    store: Path,
    /,
    *overrides: str,
    prep: Path | None = None,
    workers: int | None = None,
    shard: str = "0/1",
    max_refused: str | None = None,
    plan: bool = False,
    verify: bool = False,
    suffix: str | None = None,
    entity: tuple[str, ...] = (),
    masks: str | None = None,
    follow_links: bool = False,
    participants: str | None = None,
    assume_orientation: str | None = None,
    frame: int | None = None,
    hash_ids: bool = False,
    id_key: Path | None = None,
) -> None:
    """Convert NIfTI volumes into one verified store; an interrupted conversion continues by the same command.

    Example: python data_prep/to_zarr.py data/bids stores/brains --prep configs/prep/brain_1mm.toml --workers 8

    Example: python data_prep/to_zarr.py data/bids stores/brains --plan

    Example: python data_prep/to_zarr.py data/bids stores/brains --suffix T1w,FLAIR --max-refused 5% --hash-ids

    Example: sbatch --array=0-7 slurm/to_zarr.sh data/bids stores/brains

    Parameters
    ----------
    source
        A BIDS dataset (raw or derivative), any folder of .nii / .nii.gz / .hdr files, or a .csv, .tsv or .parquet table
        with a column `path` (optional: id, subject, session, contrast, mask, and participant columns).
    store
        The store to make or to continue.
    overrides
        Settings of the plan as key=value, e.g. dtype=float32 foreground=otsu.
    prep
        The preprocessing plan (TOML); default: 1 mm, 160×192×160 voxels.
    workers
        Processes; default: one per core that this process may use.
    shard
        i/n: do only every n-th shard from the i-th on. The n tasks may run at once, on any machines that see the store;
        whichever ends last finishes it.
    max_refused
        Largest share of scans that may be refused, e.g. 5%; default: no limit, but at least one scan must be taken.
    plan
        Convert a small sample, print volumes, bytes, inodes, hours and memory for these workers, and write nothing.
    verify
        Read every source again and compare it with the finished store; exit code 4 when something differs.
    suffix
        Only these BIDS suffixes, comma-separated; default in a BIDS dataset: T1w,T2w,FLAIR,PDw,inplaneT2.
    entity
        Only scans with this BIDS entity, e.g. --entity space=MNI152NLin2009cAsym; "space=" means without. Repeatable.
    masks
        The derivative pipeline whose brain masks are used (a folder of derivatives/), or "none"; default: the only one.
    follow_links
        Take links that lead out of the source, which are refused otherwise.
    participants
        Columns of participants.tsv, sessions.tsv and scans.tsv that are kept, comma-separated; label_* always are.
        Default: age,sex,gender,group,site,scanner.
    assume_orientation
        Take scans without any orientation as this one, e.g. RAS; default: they are refused.
    frame
        Take this frame (from 0) of 4D scans; default: they are refused.
    hash_ids
        Store keyed hashes in place of ids, subjects, sessions and paths. The key is made beside the store
        (STORE.key): keep it to find a scan again, delete it to make that impossible.
    id_key
        File of the key, for several stores with the same pseudonyms.
    """
    from brainscale import qc
    from brainscale_data_prep import discover, estimate, pseudonyms
    from brainscale_data_prep.convert import TooManyRefused, convert, report_line
    from brainscale_data_prep.pool import Stopped, stop_reason
    from brainscale_data_prep.verify import verify as differences

    if plan and verify:
        raise InputError("--plan and --verify exclude each other; give one")
    options = {
        name: value
        for name, value in (("assume_orientation", assume_orientation), ("frame", frame))
        if value is not None
    }
    overrides = (*overrides, *(f"{name}={value}" for name, value in options.items()))
    settings = load(Plan, prep, overrides)
    find = partial(
        discover.find,
        suffixes=suffix.split(",") if suffix else None,
        entities=dict(pair(text) for text in entity),
        mask_pipeline=masks or ("" if settings.foreground in ("auto", "mask") else "none"),
        follow_links=follow_links,
        participant_columns=participants.split(",") if participants is not None else discover.PARTICIPANT_COLUMNS,
    )
    cores = len(os.sched_getaffinity(0)) if workers is None else workers
    key_file = id_key or store.with_name(f"{store.name}.key")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Slurm sends is a Ctrl-C
    try:
        if plan:
            print(estimate.text(estimate.estimate(source, store, settings, cores, find)))
            return
        key = pseudonyms.read_key(key_file) if hash_ids or id_key else None
        if verify:
            if (prep or overrides) and settings != read_plan(store):
                raise InputError(f"{store} was made with another plan; leave out --prep and settings to use its own")
            report_differences(differences(source, store, cores, find, key), store)
            return
        summary = convert(source, store, settings, cores, share(max_refused), task(shard), find, key)
        if summary.finished:
            page = qc.write(store)
    except TooManyRefused as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except (Stopped, KeyboardInterrupt) as error:
        print(f"stopped: {str(error) or 'interrupted; the same command continues'}", file=sys.stderr)
        sys.exit(75)
    except OSError as error:
        if (reason := stop_reason(error)) is None:
            raise
        print(f"stopped: {reason}; what is finished is kept, and the same command continues", file=sys.stderr)
        sys.exit(75)
    print(report_line(summary))
    if key:
        print(f"  names are hashed with the key in {key_file}: keep it to find a scan again, or delete it")
    if summary.finished:
        print(f"  look at it: {page}")


def report_differences(problems: list[str], store: Path) -> None:
    """Print what --verify found; exit code 4 when it found something."""
    if problems:
        print("\n".join(problems))
        sys.exit(4)
    print(f"{store}: every scan agrees with its source")


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE of --entity."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--entity {text!r} is not NAME=VALUE; give e.g. space=MNI152NLin2009cAsym")
    return name, value


def share(text: str | None, option: str = "--max-refused") -> float | None:
    """A share of 0..1 from "5%" or "0.05"."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"{option} {text!r} is no share; give e.g. 5% or 0.05")
    return value


def task(text: str) -> tuple[int, int]:
    """(i, n) from "i/n"."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise InputError(f"--shard {text!r} is not i/n with 0 <= i < n; give e.g. 0/4 to the first of four tasks")
    return int(i), int(n)


def export_nifti(store: Path, row: int, file: Path | None = None, /) -> None:
    """Write one stored volume as NIfTI, each voxel where the original's lay, and print the file's path.

    Example: brainscale export-nifti stores/brains 0 scan.nii.gz

    Parameters
    ----------
    store
        A finished store.
    row
        Row of the scan (column `row` of scans.parquet).
    file
        A new .nii or .nii.gz file; default: row-ROW.nii.gz.
    """
    from brainscale_data_prep.export import export_nifti as export

    file = file or Path(f"row-{row}.nii.gz")
    export(store, row, file)
    print(file)


def doctor(store_or_run: Path, /, *, deep: bool = False) -> None:
    """Say in one line each what is wrong with a store (exit code 4 when something is), or what a run waits for and
    which setting to change.

    Example: brainscale doctor stores/brains --deep

    Example: brainscale doctor runs/a

    Parameters
    ----------
    store_or_run
        A store made by to-zarr, or a folder that pretrain writes; a run may be looked at while it goes on.
    deep
        Of a store: re-hash every file and decode every volume.
    """
    from brainscale.doctor import check_store, describe_store, is_run

    if is_run(store_or_run):
        if deep:
            raise InputError(
                f"--deep is for stores, and {store_or_run} is a run; leave it out, or use "
                f"`brainscale checkpoint verify {store_or_run}` for its checkpoints"
            )
        from brainscale import report, run_doctor

        run = report.read(store_or_run)
        print(run_doctor.text(str(store_or_run), run_doctor.diagnose(run.metrics, run.config, run.about, run.ending)))
        return
    store = store_or_run
    problems = check_store(store, deep)
    if problems:
        print("\n".join(problems))
        sys.exit(4)
    print(describe_store(store))
