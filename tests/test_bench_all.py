"""`brainscale bench all --quick` run once: every line meets the schema, every benchmark has the lines it should, and
nothing is left behind. No times are asserted."""

import itertools
import json
import math
import os
import subprocess
import sys

import jsonschema
import pytest
import torch
from conftest import ROOT

from brainscale.bench import everything, loader, loader_consumers, loader_peers, loader_stages, read, schema, table
from brainscale.bench.kernel_works import WORKS
from brainscale.bench.record import MEASURES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SIZE = "80×96×80"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(what it printed, what it said meanwhile, lines by benchmark, the folder of temporary files)."""
    folder = tmp_path_factory.mktemp("temporary")
    file = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "brainscale", "bench", "all", "--quick", "--json", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.returncode == 0, f"exit {ran.returncode}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    lines = {name: [] for name in everything.BENCHES}
    validator = jsonschema.Draft202012Validator(json.loads(schema.KEPT.read_text()))
    for text in file.read_text().splitlines():
        line = json.loads(text)
        validator.validate(line)
        lines[line["bench"]].append(line)
    return ran.stdout, ran.stderr, lines, folder


def measured(done, name):
    return [line for line in done[2][name] if not line["skipped"]]


def by_case(lines, end="\n"):
    """{case up to `end`, or whole: {variant: line}}."""
    cases = {}
    for line in lines:
        cases.setdefault(line["case"].partition(end)[0], {})[line["variant"]] = line
    return cases


def test_every_benchmark_says_what_it_measures_and_the_summary_what_it_could_not(done):
    printed, said, lines, folder = done
    assert list(lines) == list(MEASURES) and all(lines.values())
    for number, name in enumerate(MEASURES, 1):
        assert f"[{number}/7] {name}: " in printed and f"bench {name}: {MEASURES[name]}" in said
        assert all(line["measures"] == MEASURES[name] and line["kind"] for line in measured(done, name)), name
        assert all(math.isfinite(line["median"]) for line in measured(done, name))
    if not torch.cuda.is_available():
        told = printed.partition("there is no GPU; these need one")[2]
        assert all(f"  {name:<11}{one.needs_gpu}" in told for name, one in everything.BENCHES.items() if one.needs_gpu)
    # torch keeps compiled code for the next process in a folder of the user's, by design
    assert [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")] == []


def test_timed_lines_have_the_ratio_of_every_round(done):
    for line in itertools.chain.from_iterable(measured(done, name) for name in MEASURES):
        if line["kind"] == "timed":
            assert 1 <= len(line["pairs"]) <= line["n"], line


def test_convert_measures_both_kinds_of_phantoms(done):
    cases = set(by_case(measured(done, "convert")))
    for what, kind in itertools.product(
        ("native voxels", "resampled to 2 mm"), ("skull-stripped T1w", "whole head T1w")
    ):
        assert any(case.startswith(f"{what}, ") and f" {kind} of phantom" in case for case in cases), cases


def test_read_measures_store_and_source_warm_and_cold(done):
    lines = measured(done, "read")
    assert {line["variant"] for line in lines} == {read.OURS, read.ZARR, read.NIBABEL}
    assert all(line["ratio"] == 1.0 for line in lines if line["variant"] == read.ZARR)
    assert all(line["median"] > 0 for line in lines)
    assert all(line["bytes_per_volume"] > 0 for line in lines if line["variant"] != read.NIBABEL)
    cases = {line["case"] for line in done[2]["read"]}
    for part in ("lz4, chunk 16×16×80, warm, as it is, 1 core", "encoded again, 1 core", "crop", "cold", "as it is, "):
        assert any(part in case for case in cases), (part, cases)


def test_loader_measures_everyone(done):
    lines = measured(done, "loader")
    assert all(set(loader.EXTRA) <= set(line) for line in lines)
    cases = by_case(lines, ", 1 worker")
    own = {name for name, (_, needs) in loader.OURS.items() if not loader_peers.missing(needs)}
    everyone = own | {name for name, peer in loader_peers.PEERS.items() if not loader_peers.missing(peer.needs)}
    assert set(cases["whole volumes, warm"]) == set(cases["start-up until the first batch"]) == everyone
    for case in (f"crops of {SIZE}, warm", f"crops of {SIZE}, {loader.CHANGED}, warm"):
        assert set(cases[case]) == own
    assert cases["whole volumes, warm"][loader.TORCH]["cpu_s_per_volume"] > 0
    idle = next(own for case, own in cases.items() if case.startswith("consumer busy"))
    assert set(idle) == everyone and all(0 < line["idle_share"] < 1 for line in idle.values())
    stages = cases[f"stages of a volume of {SIZE}, warm, one core"]
    assert stages[loader_stages.WHOLE]["share"] == 1.0 and len(stages) == 7
    fed = [line for line in lines if line["case"].startswith("feeds ViT-L/16")]
    assert fed and all(line["kind"] == "derived" and line["gpu_share"] > 0 for line in fed)
    if loader_peers.PERSISTENT in everyone:
        sizes = cases["bytes per volume on disk"]
        assert cases["whole volumes, warm"][loader.TORCH]["ratio_to_persistent"] > 0
        assert sizes[loader_peers.PERSISTENT]["bytes_per_volume"] > 4 * 80 * 96 * 80
        assert sizes[f"{loader_peers.CACHE}: in memory"]["bytes_per_volume"] == 4 * 80 * 96 * 80
    reasons = {line["variant"]: line["skipped"] for line in done[2]["loader"] if line["skipped"]}
    assert torch.cuda.is_available() or "no GPU" in reasons[loader_consumers.RESIDENT]


def test_kernels_count_every_variant_where_there_is_no_gpu(done):
    lines = done[2]["kernels"]
    assert {line["variant"] for line in lines} == {name for work in WORKS for name in work.variants}
    kind = "timed" if torch.cuda.is_available() else "counted"
    assert all(line["kind"] == kind and line["minimum_bytes"] > 0 for line in measured(done, "kernels"))


def test_step_and_scaling_measure_what_they_can_here(done):
    assert any(line["kind"] == "timed" and line["flops_per_sample"] > 0 for line in measured(done, "step"))
    assert torch.cuda.is_available() or any("GPU" in (line["skipped"] or "") for line in done[2]["step"])
    assert any(line["ranks"] == 2 and line["sent_bytes"] for line in measured(done, "scaling"))


def test_checkpoint_measures_saves_loads_starts_and_the_week(done):
    lines = done[2]["checkpoint"]
    assert all(line["unit"] == "s" and line["median"] > 0 and line["ratio"] > 0 for line in lines)
    assert all(line["mb_per_s"] > 0 for line in lines if line["case"].startswith(("hash", "load")))
    counts = {}
    for line in lines:
        counts.setdefault(line["case"].split()[0].strip(","), []).append(line["variant"])
    assert {case: len(names) for case, names in counts.items()} == {
        "save": 4, "loop": 4, "step": 5, "stall": 4, "load": 3, "hash": 2, "start": 2, "simulated": 5, "best": 1
    }  # fmt: skip


def test_a_table_can_be_made_of_the_lines(done):
    text = table.markdown([schema.model_of(line).model_validate(line) for line in itertools.chain(*done[2].values())])
    assert "an announced stop a day" in text and "simulated" in text
