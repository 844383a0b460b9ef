"""`brainscale checkpoint list|verify|prune`: what they print, what they refuse, what is left."""

import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import refusal
from processes import run_ranks, start_ranks

from brainscale import checkpoint_files as files


@pytest.fixture(scope="module")
def whole(tiny_store, tiny_config, tmp_path_factory):
    run = tmp_path_factory.mktemp("command") / "run"
    common = ("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=20")
    run_ranks(*common, "checkpoint.keep_last=5", logs=run.parent / "logs")
    return run


@pytest.fixture
def run(whole, tmp_path):
    """A run with five checkpoints, at steps 4 to 20."""
    return shutil.copytree(whole, tmp_path / "run")


def steps(run):
    return [files.step_of(path) for path in files.directories(run / "checkpoints")]


def command(tmp_path, *arguments, code=0):
    return run_ranks("checkpoint", *arguments, code=code, logs=tmp_path / "logs")[0].text


def test_list_says_what_there_is(run, tmp_path):
    (run / "checkpoints" / "damaged-step-00000002").mkdir()
    (run / "checkpoints" / "step-00000004" / files.STATE).write_text("{")
    lines = command(tmp_path, "list", run).splitlines()
    assert lines[0].split()[:3] == ["step", "samples", "MB"]
    assert [line.split()[0] for line in lines[1:6]] == ["4", "8", "12", "16", "20"]
    assert "unreadable" in lines[1]
    assert lines[2].split()[1] == "32" and "1 rank(s) × 4 × 1, ZeRO stage 1" in lines[2]
    assert [number for number, line in enumerate(lines) if "← latest" in line] == [5]
    assert lines[6].startswith("damaged-step-00000002: found damaged")


def test_verify_names_the_damaged_one_and_ends_with_4(run, tmp_path):
    assert command(tmp_path, "verify", run).count("intact: ") == 5
    file = run / "checkpoints" / "step-00000012" / files.OPTIMIZER
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    (run / "checkpoints" / files.LATEST).unlink()
    text = command(tmp_path, "verify", run, code=4)
    assert text.count("intact: ") == 4 and f"DAMAGED: {file} does not have the hash" in text
    assert "latest does not name a checkpoint" in text


def test_prune_keeps_the_newest_intact_ones(run, tmp_path):
    """The damaged newest does not count, and stays."""
    (run / "checkpoints" / "step-00000020" / files.WEIGHTS).unlink()
    text = command(tmp_path, "prune", run, "--keep-last", "1", "--keep-every-steps", "8", "--dry-run")
    assert "would remove" in text and steps(run) == [4, 8, 12, 16, 20]
    text = command(tmp_path, "prune", run, "--keep-last", "1", "--keep-every-steps", "8")
    assert steps(run) == [8, 16, 20] and "2 intact checkpoint(s) left" in text
    assert command(tmp_path, "prune", run).endswith("2 intact checkpoint(s) left\n"), "the run's own settings"
    assert not list((run / "checkpoints").glob(".tmp*"))


def test_prune_is_refused_while_the_run_goes_on(tiny_store, tiny_config, run, tmp_path):
    common = ("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=30")
    (rank,) = start_ranks(*common, faults="load.found:stop", logs=tmp_path / "logs")
    deadline = time.monotonic() + 60
    while "T (stopped)" not in Path(f"/proc/{rank.pid}/status").read_text():
        assert rank.process.is_alive() and time.monotonic() < deadline, rank.text
        time.sleep(0.01)
    assert "is being written by another process" in refusal(2, "checkpoint", "prune", run)
    rank.process.kill()
    rank.process.join()
    assert steps(run) == [4, 8, 12, 16, 20]


def test_what_is_no_run_is_refused_in_one_sentence(run, tmp_path):
    for name in ("list", "verify", "prune"):
        assert "is no run folder with checkpoints" in refusal(2, "checkpoint", name, tmp_path)
    assert "at least one must stay" in refusal(2, "checkpoint", "prune", run, "--keep-last", "0")


def test_a_checkpoint_of_another_version_is_refused(run, tiny_store, tiny_config, tmp_path):
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    path = run / "checkpoints" / "step-00000016"
    state = json.loads((path / files.STATE).read_text()) | {"format": 99}
    (path / files.STATE).write_text(json.dumps(state))
    manifest = json.loads((path / files.MANIFEST).read_text())
    file = path / files.STATE
    manifest[files.STATE] = {"bytes": file.stat().st_size, "xxh3_128": files.file_hash(file)}
    (path / files.MANIFEST).write_text(json.dumps(manifest, indent=1))
    common = ("pretrain", tiny_config, f"data.store={tiny_store}", f"run.dir={run}", "train.num_steps=20")
    assert "written by another version (format 99, this is 1)" in refusal(2, *common)
