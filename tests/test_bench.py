"""Benchmarks run, a line says all that the regression gate and the README's table need, and what is timed is right: a
wrong output of any converter stops a run. No times are asserted."""

import math
import sys

import numpy as np
import pytest
from conftest import refusal

from brainscale.bench import convert, converters, read
from brainscale.bench.converters import Job, Written
from brainscale.bench.record import compare_sizes, measure, on_one_core, write
from brainscale.prep_plan import Plan
from brainscale.settings import InputError
from brainscale_data_prep import discover, nifti

KEYS = {
    "bench", "case", "variant", "unit", "median", "p20", "p80", "n", "ratio_to", "ratio", "mb_per_s",
    "bytes_per_volume", "skipped", "machine", "versions", "commit", "utc", "measures", "kind", "ratio_p20", "ratio_p80",
    "pairs",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with one scaled, turned, noisy scan whose halves differ, so that a mirrored copy is noticed."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (27, 30, 24)), indexing="ij")
    blob = 600 * np.exp(-3 * ((x - 0.3) ** 2 + y**2 + (z + 0.2) ** 2)) + 300 * np.exp(-8 * ((x + 0.5) ** 2 + z**2))
    voxels = np.rint(blob + rng.uniform(0, 10, blob.shape)).astype(np.int16)
    affine = np.array([[0.0, -2.5, 0, 30], [2.2, 0, 0, -20], [0, 0, 3.0, -30], [0, 0, 0, 1]])
    nifti.write(folder / "scan.nii.gz", voxels, affine, slope=0.5, inter=3.0)
    return folder


@pytest.fixture(params=["native", "resampled"])
def job(request, source):
    """The scan under a plan that keeps its voxels, and under one that resamples them to 2 mm."""
    (scan,) = discover.find(source).scans
    plan = convert.NATIVE
    if request.param == "resampled":
        plan = Plan(grid_voxels_xyz=(40, 36, 36), spacing_mm_xyz=(2.0, 2.0, 2.0))
    return Job(scan, plan, convert.grid(plan, [scan]))


def table(job):
    everything = converters.native() if job.plan.spacing_mm_xyz == "native" else converters.resampled()
    return {name: converter for name, converter in everything.items() if not converters.missing(converter)}


def written(job, name, converter, out):
    if name == converters.OURS:
        converters.create_ours(job, out)
    converter.convert(job, out)
    return converter.read(job, out)


def test_every_converter_writes_the_right_volume_and_the_check_notices_a_wrong_one(job, tmp_path):
    for name, converter in table(job).items():
        good = written(job, name, converter, tmp_path / name)
        converters.check(job, name, good)
        wrong = good.affine.copy()
        wrong[:3, 3] += 15
        for bad in (good._replace(values=good.values[::-1]), good._replace(affine=wrong)):
            with pytest.raises(AssertionError, match=r"scan\.nii\.gz"):
                converters.check(job, name, bad)


def test_one_wrong_native_voxel_is_noticed(source):
    (scan,) = discover.find(source).scans
    job = Job(scan, convert.NATIVE, convert.grid(convert.NATIVE, [scan]))
    image = converters.nibabel.load(job.path)
    values = image.get_fdata()
    converters.check(job, "a", Written(values, image.affine))
    values[3, 4, 5] += 0.5
    with pytest.raises(AssertionError, match=r"differ by up to 0\.5"):
        converters.check(job, "a", Written(values, image.affine))
    with pytest.raises(AssertionError, match=r"has \(30, 27, 24\) voxels"):
        converters.check(job, "a", Written(values[:-1], image.affine))


def test_absent_peers_are_lines_that_say_how_to_install_them(source, tmp_path, monkeypatch, capsys):
    for name in ("niizarr", "SimpleITK", "monai"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = convert.lines((source,), True, tmp_path)
    skipped = [line["variant"] for line in lines if line["skipped"]]
    assert len(skipped) == 5 and not any("scipy" in name or "nibabel" in name for name in skipped)
    write(lines, None)
    assert "niizarr is not installed; pip install -e '.[peers]'" in capsys.readouterr().out
    measured = [line for line in lines if not line["skipped"]]
    assert all(set(line) == KEYS for line in measured) and list(tmp_path.iterdir()) == []
    times = [line for line in measured if line["unit"] == "s"]
    assert [line["variant"] for line in times] == [
        "brainscale", "nibabel + zarr-python", "brainscale", "nibabel + scipy zoom, order 3 + zarr-python"
    ]  # fmt: skip
    assert all(line["bytes_per_volume"] > 0 and line["mb_per_s"] > 0 for line in times)
    sizes = [line for line in measured if line["unit"] == "B"]
    assert {line["ratio_to"] for line in sizes} == {convert.FLOAT_ZSTD} and len(sizes) == 8
    assert "zarr" in times[0]["versions"] and "scipy" in times[0]["versions"]


def test_a_scan_that_cannot_be_taken_is_a_line_and_a_source_without_any_an_error(source, tmp_path):
    (tmp_path / "empty.nii").write_bytes(b"")
    assert "0 bytes" in refusal(2, "bench", "convert", tmp_path, "--quick")
    (tmp_path / "scan.nii.gz").write_bytes((source / "scan.nii.gz").read_bytes())
    kinds, refused = convert._kinds((tmp_path,), 6, (convert.NATIVE, convert.TWO_MM), tmp_path / "scratch")
    assert [[scan.source for scan in scans] for scans in kinds.values()] == [["scan.nii.gz"]]
    assert [(line["variant"], "0 bytes" in line["skipped"]) for line in refused] == [("empty.nii", True)]


def test_a_store_alone_is_read_by_both_readers_and_a_line_says_what_nibabel_lacks(tiny_store):
    lines = read.lines(tiny_store, None, True, "some cores")
    measured = [line for line in lines if not line["skipped"]]
    assert {line["variant"] for line in measured} == {read.OURS, read.ZARR} and all(
        set(line) == KEYS for line in measured
    )
    assert all(line["ratio"] == 1.0 for line in measured if line["variant"] == read.ZARR)
    assert all(line["median"] > 0 and line["bytes_per_volume"] > 0 for line in measured)
    assert any(line["skipped"] == "no folder of its sources given (--source)" for line in lines)


def test_chunks_divide_the_volume():
    for volume in ((160, 192, 160), (80, 96, 80), (184, 288, 288), (7, 5, 3)):
        shapes = read.chunks(volume)
        assert shapes[0] == volume and len(set(shapes)) == len(shapes)
        assert all(size % part == 0 for shape in shapes for size, part in zip(volume, shape))


def test_what_is_dropped_from_the_page_cache_is_gone_or_said_to_stay(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    dropped = read.drop_from_page_cache(file)
    assert dropped != read.in_page_cache(file)
    assert file.read_bytes() == bytes(1 << 20) and read.in_page_cache(file)


def test_variants_run_in_turn_and_ratios_are_paired():
    calls = []
    variants = {name: (lambda turn, name=name: calls.append((name, turn))) for name in "ab"}
    lines = measure("b", "c", variants, "b", n=3, warmup=1, before=lambda name, turn: calls.append(f"{name}{turn}"))
    assert calls[1::2] == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert calls[::2] == [f"{name}{turn}" for name, turn in calls[1::2]]
    assert all(line["n"] == 3 and math.isfinite(line["ratio"]) for line in lines)
    assert lines[1]["ratio"] == 1.0


def test_a_smaller_volume_has_a_ratio_below_one():
    lines = compare_sizes("b", "c", {"half": [50, 1, 500], "whole": [100, 2, 1000]}, "whole")
    assert lines[0]["ratio"] == 0.5 and lines[0]["bytes_per_volume"] == pytest.approx(551 / 3)


@pytest.mark.slow
def test_one_core_is_one_core_in_every_library():
    seen = on_one_core(threads)
    assert seen == {"affinity": 1, "blas": "1"}


def threads():
    import os

    return {"affinity": len(os.sched_getaffinity(0)), "blas": os.environ["OPENBLAS_NUM_THREADS"]}


def test_another_source_than_the_store_s_is_named_before_anything_is_measured(tiny_store, tmp_path):
    with pytest.raises(InputError, match="give as --source the folder"):
        read.run(tiny_store, tmp_path, quick=True)
