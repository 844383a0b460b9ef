"""`brainscale bench convert`: from NIfTI files to volumes on disk, against what a user would convert them with instead.

One core, one thread for everything (linear algebra, codecs, tensorstore, ITK, torch), sources in the page cache, output
into folders that are removed between runs, on the disk of the temporary folder (TMPDIR moves it). Ours writes a shard
of one volume and its journal record and waits for the disk (fsync); the peers do not wait. Ours makes the empty store
once, before the clock; the peers' array metadata are made per volume and stay in their time.
"""

import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
from numcodecs import Blosc, Zstd

from brainscale.bench import converters
from brainscale.bench.converters import OURS, Job
from brainscale.bench.record import compare_sizes, measure, on_one_core, skipped
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale_data_prep import discover
from brainscale_data_prep.convert import TooManyRefused, grid
from brainscale_data_prep.discover import ScanFile
from brainscale_data_prep.phantom import make

NATIVE = Plan(grid_voxels_xyz="largest", spacing_mm_xyz="native", crop="centre", max_cropped_fraction=0.0)
"""As configs/prep/identity.toml; the grid holds one scan, since the volumes are measured one by one."""
ONE_MM = Plan()
"""As configs/prep/brain_1mm.toml."""
TWO_MM = Plan(grid_voxels_xyz=(80, 96, 80), spacing_mm_xyz=(2.0, 2.0, 2.0))
PHANTOM_SUBJECTS = 3
FLOAT_ZSTD = "float32, blosc zstd level 8, byte shuffle"


def run(sources: tuple[Path, ...], quick: bool) -> list[dict[str, Any]]:
    """Lines over time and bytes per volume, without and with resampling, by kind of scan; of phantoms without sources.

    quick: one scan of each kind, a 2 mm grid and two runs instead of up to six scans, 1 mm and 24 runs. Raises
    InputError when no scan can be converted.
    """
    with TemporaryDirectory(prefix="brainscale-bench-") as folder:
        scratch = Path(folder)
        if not sources:
            sources = (scratch / "phantom-stripped", scratch / "phantom-heads")
            for path, head in zip(sources, (False, True)):
                subjects, spacing_mm = (1, 4.0) if quick else (PHANTOM_SUBJECTS, 1.2)
                make(path, subjects, seed=0, head=head, spacing_mm=spacing_mm)
        return on_one_core(lines, sources, quick, scratch)


def lines(sources: tuple[Path, ...], quick: bool, scratch: Path) -> list[dict[str, Any]]:
    """What `run` returns, in this process; `scratch` is an empty folder on the disk to write to."""
    rounds, scans_each = (2, 1) if quick else (24, 6)
    resampling = TWO_MM if quick else ONE_MM
    kinds, found = _kinds(sources, scans_each, (NATIVE, resampling), scratch)
    for plan, table in ((NATIVE, converters.native()), (resampling, converters.resampled())):
        for kind, scans in kinds.items():
            jobs = [Job(scan, plan, grid(plan, [scan])) for scan in scans]
            found += _times(f"{_what(plan)}, {kind}", jobs, table, rounds, scratch)
            found += _sizes(f"{_what(plan)}, {kind}", jobs, scratch)
    return found


def _what(plan: Plan) -> str:
    if plan.spacing_mm_xyz == "native":
        return "native voxels"
    return f"resampled to {plan.spacing_mm_xyz[0]:g} mm, {'×'.join(map(str, plan.grid_voxels_xyz))}"


def _kinds(
    sources: tuple[Path, ...], scans_each: int, plans: tuple[Plan, ...], scratch: Path
) -> tuple[dict[str, list[ScanFile]], list[dict[str, Any]]]:
    """Up to `scans_each` scans of every kind, evenly chosen, and a line for each chosen one that a plan refuses.

    A kind has one source and one contrast, and is skull-stripped or not, as the store's records say.
    """
    kinds: dict[str, list[ScanFile]] = defaultdict(list)
    refused = []
    out = scratch / "kind"
    for source in sources:
        contrasts: dict[str, list[ScanFile]] = defaultdict(list)
        for scan in discover.find(Path(source)).scans:
            contrasts[scan.contrast].append(scan)
        for contrast, scans in contrasts.items():
            for scan in scans[:: -(-len(scans) // scans_each)]:
                try:
                    for plan in plans:
                        job = Job(scan, plan, grid(plan, [scan]))
                        _clear(OURS, job, out)
                        stripped = converters.convert_ours(job, out)["skull_stripped"]
                except (InputError, TooManyRefused) as error:
                    refused.append(skipped("convert", f"scans of {Path(source).name}", scan.source, str(error)))
                    continue
                what = f"{'skull-stripped' if stripped else 'whole head'} {contrast}".rstrip()
                kinds[f"{what} of {Path(source).name}"].append(scan)
    _remove(out)
    if not kinds:
        raise InputError(
            f"no scan of {', '.join(map(str, sources))} can be measured; the first: {refused[0]['skipped']}"
        )
    return kinds, refused


def _times(
    case: str, jobs: list[Job], table: dict[str, converters.Converter], rounds: int, scratch: Path
) -> list[dict[str, Any]]:
    case += f", {len(jobs)} {'scan' if len(jobs) == 1 else 'scans'} {_shapes(jobs)}, 1 core"
    absent = {name: reason for name, converter in table.items() if (reason := converters.missing(converter))}
    present = {name: converter for name, converter in table.items() if name not in absent}
    out = scratch / "out"
    sizes: dict[str, float] = {}
    for name, converter in present.items():
        each = []
        for job in jobs:
            _clear(name, job, out)
            converter.convert(job, out)
            each.append(_num_bytes(out))
            converters.check(job, name, converter.read(job, out))
        sizes[name] = sum(each) / len(each)

    def job_of(turn: int) -> Job:
        return jobs[turn % len(jobs)]

    def variant(converter: converters.Converter) -> Callable[[int], Any]:
        return lambda turn: converter.convert(job_of(turn), out)

    variants = {name: variant(converter) for name, converter in present.items()}
    lines = measure(
        "convert", case, variants, OURS, rounds, 0,
        before=lambda name, turn: _clear(name, job_of(turn), out),
        megabytes=lambda turn: _source_bytes(job_of(turn)) / 1e6,
        bytes_per_volume=sizes,
    )  # fmt: skip
    _remove(out)
    return lines + [skipped("convert", case, name, reason) for name, reason in absent.items()]


def _clear(name: str, job: Job, out: Path) -> None:
    """An absent folder for a peer, an empty store for us."""
    _remove(out)
    if name == OURS:
        converters.create_ours(job, out)


def _remove(out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _source_bytes(job: Job) -> int:
    """Uncompressed bytes of the source's voxels, what MB/s counts."""
    image = nibabel.load(job.path)
    return int(np.prod(image.shape)) * image.get_data_dtype().itemsize


def _shapes(jobs: list[Job]) -> str:
    kinds = {f"{'×'.join(map(str, image.shape))} {image.get_data_dtype()}" for image in map(_load, jobs)}
    return " or ".join(sorted(kinds)[:2]) + (" or others" if len(kinds) > 2 else "")


def _load(job: Job) -> Any:
    return nibabel.load(job.path)


def _sizes(case: str, jobs: list[Job], scratch: Path) -> list[dict[str, Any]]:
    """Bytes per volume of everything we write for it, against the same prepared volume as float32, unrounded."""
    sizes: dict[str, list[float]] = defaultdict(list)
    out = scratch / "sizes"
    for job, codec in itertools.product(jobs, ("lz4", "zstd")):
        one = Job(job.scan, job.plan.model_copy(update={"codec": codec}), job.grid_xyz)
        _clear(OURS, one, out)
        converters.convert_ours(one, out)
        sizes[f"brainscale, {job.plan.dtype}, {codec}"].append(_num_bytes(out))
    for job in jobs:
        exact = Job(job.scan, job.plan.model_copy(update={"dtype": "float32"}), job.grid_xyz)
        _clear(OURS, exact, out)
        converters.convert_ours(exact, out)
        values = np.ascontiguousarray(converters.read_ours(exact, out).values.T.astype(np.float32))
        sizes[FLOAT_ZSTD].append(len(Blosc("zstd", clevel=8, shuffle=Blosc.SHUFFLE).encode(values)))
        sizes["float32, zstd level 8"].append(len(Zstd(level=8).encode(values)))
    _remove(out)
    return compare_sizes("convert", f"{case}, bytes per volume", sizes, FLOAT_ZSTD)
