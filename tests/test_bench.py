"""Benchmarks run, and a line says all that the regression gate and the README's table need. No times are asserted."""

import json
import math

from conftest import run_brainscale

from brainscale.bench.record import measure

KEYS = {
    "bench", "case", "variant", "unit", "median", "p20", "p80", "n", "ratio_to", "ratio", "skipped", "machine",
    "versions", "commit", "utc",
}  # fmt: skip


def test_bench_read_writes_whole_lines(tiny_store, tmp_path):
    file = tmp_path / "lines.jsonl"
    done = run_brainscale("bench", "read", tiny_store, "--quick", "--json", file)
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["brainscale (tensorstore)", "zarr-python", "nibabel, NIfTI file"]
    assert all(set(line) == KEYS for line in lines[:2])
    assert lines[1]["ratio"] == 1.0 and lines[0]["median"] > 0
    assert "no --source given" in lines[2]["skipped"] and "skipped: no --source given" in done.stdout


def test_variants_run_in_turn_and_ratios_are_paired():
    calls = []
    lines = measure("b", "c", {"one": lambda: calls.append(1), "two": lambda: calls.append(2)}, "two", n=3, warmup=1)
    assert calls == [1, 2] * 4
    assert all(line["n"] == 3 and math.isfinite(line["ratio"]) for line in lines)
