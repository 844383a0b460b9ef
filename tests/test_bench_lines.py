"""Lines of benchmarks meet one schema, and the README's table is made from kept ones; what fails is a line too."""

import json
import os
import re
import signal
import subprocess
import sys

import jsonschema
import pytest
from conftest import ROOT, run_brainscale

from brainscale import cli_bench_lines
from brainscale.bench import everything, loader, record, scaling, schema, step, table
from brainscale.bench.schema import Measured
from brainscale.settings import InputError

KEPT = sorted(table.RESULTS.glob("*.jsonl"))
VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema.json_schema()))


def line(**changes):
    """A measured line, made as benchmarks make them."""
    (made, _) = record.sample_lines("read", "a case", "s", {"ours": [1.0, 2.0, 3.0], "peer": [2.0, 2.0, 9.0]}, "peer")
    return {**made, **changes}


def write(path, *lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def test_the_kept_schema_is_that_of_the_models_and_printed():
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    assert schema.KEPT.read_text() == schema.json_schema(), (
        "run `brainscale bench schema > brainscale/bench/lines.schema.json`"
    )
    assert run_brainscale("bench", "schema").stdout == schema.json_schema()


def test_who_reads_what_is_printed_may_leave_before_the_end():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "brainscale", "bench", "schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_another_pipe_that_breaks_is_an_error():
    program = """
from brainscale import cli
@cli.app.command
def broken():
    raise BrokenPipeError(32, "Broken pipe")
cli.main(["broken"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "BrokenPipeError: [Errno 32] Broken pipe" in done.stderr


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_kept_lines_meet_the_schema(file):
    texts = file.read_text().splitlines()
    assert len(schema.read(file)) == len(texts) > 0
    for text in texts:
        VALIDATOR.validate(json.loads(text))


@pytest.mark.parametrize("module", [loader, step, scaling])
def test_keys_of_one_benchmark_are_in_its_model(module):
    assert set(schema.MODELS[module.BENCH].model_fields) - set(Measured.model_fields) == set(module.EXTRA)


def test_a_line_says_its_ratio_round_by_round_and_what_it_is():
    one = line()
    assert one["pairs"] == [2.0, 1.0, 3.0] and one["ratio"] == 2.0
    assert 1.0 < one["ratio_p20"] < 2.0 < one["ratio_p80"] < 3.0
    assert one["kind"] == "timed" and "against" in one["measures"]
    (size, _) = record.compare_sizes("read", "a case", {"ours": [1.0], "peer": [2.0]}, "peer")
    assert size["kind"] == "counted" and size["pairs"] is None and size["ratio_p20"] is None
    for each in (one, size, record.skipped("read", "a case", "peer", "it is not there")):
        assert schema.mistake(each) == ""
        VALIDATOR.validate(each)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"speed": 1.0}, "key 'speed' is not known"),
        ({"launches": 3}, "key 'launches' is not known"),
        ({"median": "1"}, "key 'median' is '1'"),
        ({"machine": {"cpu": "x", "gpu": None, "ram": 1}}, "key 'machine.ram' is not known"),
        ({"kind": "guessed"}, "key 'kind' is 'guessed'"),
        ({"n": 0}, "key 'n' is 0"),
        ({"utc": "yesterday"}, "key 'utc' is 'yesterday'"),
        ({"bench": "loader", "launches": 3}, "key 'launches' is not known"),
        ({"median": None}, "key 'median' is None"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused_by_models_and_schema_alike(wrong, says, tmp_path):
    bad = line(**wrong)
    assert not VALIDATOR.is_valid(bad)
    with pytest.raises(InputError, match=rf"lines\.jsonl, line 2: {re.escape(says)}"):
        schema.read(write(tmp_path / "lines.jsonl", line(), bad))
    with pytest.raises(AssertionError, match=re.escape(says)):
        record.write([bad], None)


def test_what_a_schema_cannot_say_is_refused_too(tmp_path):
    for bad, says in (
        (line(ratio=1.5), "the median of pairs is 2.0"),
        (line(variant="peer", pairs=None), "the reference itself"),
    ):
        with pytest.raises(InputError, match=says):
            schema.read(write(tmp_path / "lines.jsonl", bad))
    (tmp_path / "text").write_text("{\n")
    with pytest.raises(InputError, match="text, line 1 is not JSON"):
        schema.read(tmp_path / "text")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="empty has no lines"):
        schema.read(tmp_path / "empty")


# ------------------------------------------------------------------------------------------- the README's table


def test_the_readme_holds_the_table_of_kept_lines(capsys):
    cli_bench_lines.markdown()
    made = capsys.readouterr().out
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    held = text.partition(table.BEGIN + "\n")[2].partition(table.END)[0]
    assert held == made, "put the output of `brainscale bench markdown` there"
    assert made.count("\n") == len(table.ROWS) + 2, "a row of ROWS has no kept line"


def test_a_row_shows_the_newest_line_with_the_spread_of_its_ratios():
    case = "whole volume of 160×192×160 int16, lz4, chunk 16×16×160, warm, as it is, 1 core"
    samples = {table.STORE: [1e-3] * 4 + [2e-3], "zarr-python": [2e-3, 3e-3, 4e-3, 5e-3, 6e-3]}
    made = []
    for utc, seconds in (("2026-01-02T00:00:00", 1), ("2026-01-01T00:00:00", 7)):
        slower = {name: [seconds * value for value in own] for name, own in samples.items()}
        made += [one | {"utc": utc} for one in record.sample_lines("read", case, "s", slower, "zarr-python")]
    text = table.markdown([schema.model_of(one).model_validate(one) for one in made])
    assert "| warm 1.0 ms (3.0× [2.8, 4.2] zarr-python) | timed |" in text and "2026-01-02 |" in text


def test_ours_to_a_peer_is_turned_round_where_ours_is_the_reference():
    case = f"native voxels, {table.HEAD}, 1 core"
    samples = {"brainscale": [1.0, 1.0, 1.0], "nifti-zarr, one level": [2.0, 4.0, 6.0]}
    made = record.sample_lines("convert", case, "s", samples, "brainscale")
    text = table.markdown([schema.model_of(one).model_validate(one) for one in made])
    assert "1.00 s (4.0× [2.5, 5.0] nifti-zarr)" in text


# ------------------------------------------------------------------------------------------- all of them


def test_a_benchmark_that_fails_is_a_line_and_loses_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(everything, "BENCHES", {"none-such": everything.Bench(1, 2, "what needs one")})
    file = write(tmp_path / "lines.jsonl", line())
    with pytest.raises(SystemExit) as ended:
        cli_bench_lines.everything(quick=True, json=file)
    assert ended.value.code == 1
    before, failed = schema.read(file)
    assert before.variant == "ours" and failed.skipped.startswith("failed with code 2: ")
    printed = capsys.readouterr().out
    assert "[1/1] none-such: about 1 s" in printed and "FAILED, failed with code 2" in printed
    assert "need one, and were not measured:\n  none-such  what needs one" in printed


def test_the_summary_says_what_needs_a_gpu_and_what_is_not_installed():
    made = [line(), line(bench="loader"), record.skipped("read", "c", "monai", "monai is not installed; pip install x")]
    text = everything.summary(
        [schema.model_of(one).model_validate(one) for one in made], {"step": "broke"}, {"read": 20.0, "step": 180.0}
    )
    assert "took 3 min" in text and "read         20 s  1 timed" in text and "step        3 min  FAILED, broke" in text
    assert "kernels    seconds, GB/s" in text and "  monai is not installed; pip install x" in text
    gpu = line(machine={"cpu": "c", "cores": 2, "gpu": "H200", "driver": "1"})
    assert "GPU" not in everything.summary([schema.model_of(gpu).model_validate(gpu)], {}, {})
