"""Readers that die, data that are damaged and reads that hang end a run within 10 s, with the scans and the file; the
readers pass over the signals of a job, and end when the run does, however that ends."""

import shutil
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import FULL, losses
from loading import NO_DALI, make_loader
from processes import finish, start_function, start_ranks

from brainscale import checkpoint_files, reader
from brainscale.stores import open_stores

pytestmark = pytest.mark.slow
dali = pytest.mark.skipif(bool(NO_DALI), reason=NO_DALI)
KINDS = ["torch", pytest.param("dali", marks=dali)]
WITHIN_S = 10
KILLS = 50 if FULL else 3


@pytest.fixture
def store(tiny_store, tmp_path):
    """A store that may be harmed."""
    return shutil.copytree(tiny_store, tmp_path / "store")


def start(kind, store, config, run, ranks=1, *more):
    """A run that would go on for long, once it has done some steps."""
    started = start_ranks(
        "pretrain", config, f"data.store={store}", f"run.dir={run}", f"data.loader={kind}", "train.num_steps=100000",
        "log.holdout_every_steps=100000", "checkpoint.every_steps=100000", *more, ranks=ranks, logs=run.parent,
    )  # fmt: skip
    wait_until(lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) >= 5, started)
    return started


def wait_until(condition, started=(), within_s=120.0):
    """Poll, as long as all of a run is alive."""
    deadline = time.monotonic() + within_s
    while not condition():
        for rank in started:
            assert rank.process.exitcode is None, rank.text
        assert time.monotonic() < deadline, "\n".join(rank.text for rank in started)
        time.sleep(0.05)


def readers(rank):
    """Processes that read for a rank."""
    children = psutil.Process(rank.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def gone(processes):
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@dali
def test_a_reader_that_is_killed_ends_the_run(store, tiny_config, tmp_path):
    """Killed at any moment, `KILLS` times: exit code 5, the scans that were waited for, no process left."""
    for number in range(KILLS):
        run = tmp_path / f"run-{number}"
        (rank,) = start("dali", store, tiny_config, run)
        processes = readers(rank)
        assert len(processes) == 1  # data.workers
        processes[0].kill()
        assert rank.wait(WITHIN_S) == 5, rank.text
        assert f"process {processes[0].pid}, which reads for the loader, died" in rank.text
        assert "waiting for samples" in rank.text and "(sub-" in rank.text and "volumes/c/" in rank.text
        assert "Traceback" not in rank.text
        wait_until(lambda left=processes: gone(left), within_s=WITHIN_S)


@dali
def test_a_reader_that_is_killed_ends_every_rank(store, tiny_config, tmp_path):
    started = start("dali", store, tiny_config, tmp_path / "run", 2, "data.workers=2")
    every = [p for rank in started for p in readers(rank)]
    assert len(every) == 4
    readers(started[1])[1].kill()
    assert [rank.wait(WITHIN_S) for rank in started] == [5, 5], [rank.text for rank in started]
    assert "which reads for the loader, died" in started[1].text
    assert "which reads for the loader, died" in started[0].text  # who waits is told why
    wait_until(lambda: gone(every), within_s=WITHIN_S)


@pytest.mark.parametrize("harm", ["delete", "flip"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_harmed_under_a_run_ends_it(kind, harm, store, tiny_config, tmp_path):
    (rank,) = start(kind, store, tiny_config, tmp_path / "run")
    processes = readers(rank)
    shards = sorted({open_stores([store]).file_of(row) for row in range(8)})
    assert len(shards) == 2  # of training rows; the third shard may hold none
    for shard in map(Path, shards):
        if harm == "delete":
            shard.unlink()
        else:
            data = bytearray(shard.read_bytes())
            data[len(data) // 3] ^= 1
            shard.write_bytes(data)
    code = rank.wait(WITHIN_S)
    last = rank.text.splitlines()[-1]
    assert code == 2 and last.startswith("error: sample "), rank.text
    assert "(row " in last and "sub-" in last and any(shard in last for shard in shards)
    assert "Traceback" not in rank.text
    wait_until(lambda: gone(processes), within_s=WITHIN_S)


@dali
def test_readers_pass_over_the_signals_of_a_job(store, tiny_config, tmp_path):
    """As Slurm sends them, to every process: the run saves and ends with 75, and so do its readers."""
    run = tmp_path / "run"
    (rank,) = start("dali", store, tiny_config, run, 1, "data.workers=2")
    processes, before = readers(rank), len(losses(run))
    for process in processes:
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)  # a blocked signal would not end it either
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            assert ignored >> (number - 1) & 1
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
    wait_until(lambda: len(losses(run)) > before + 50, [rank])  # far beyond what was read ahead
    for process in [*processes, psutil.Process(rank.pid)]:
        process.send_signal(signal.SIGTERM)
    assert rank.wait(60) == 75, rank.text
    assert checkpoint_files.directories(run / "checkpoints")
    wait_until(lambda: gone(processes), within_s=WITHIN_S)


@dali
def test_readers_end_with_a_run_that_is_killed(store, tiny_config, tmp_path):
    (rank,) = start("dali", store, tiny_config, tmp_path / "run", 1, "data.workers=2")
    processes = readers(rank)
    rank.signal(signal.SIGKILL)
    rank.wait(WITHIN_S)
    wait_until(lambda: gone(processes), within_s=WITHIN_S)


@dali
def test_a_reader_that_hangs_ends_the_run(store, tiny_config, tmp_path):
    (rank,) = start("dali", store, tiny_config, tmp_path / "run", 1, "data.timeout_s=1")
    (process,) = readers(rank)
    process.send_signal(signal.SIGSTOP)
    assert rank.wait(60) == 5, rank.text
    assert "no batch within data.timeout_s = 1 s; waiting for samples" in rank.text
    wait_until(lambda: gone([process]), within_s=WITHIN_S)


def read_from_a_disk_that_hangs(store):
    """Reads of row 3 do not come back."""
    import threading

    read = reader.Reader.piece

    def piece(self, d):
        if d.row == 3:
            threading.Event().wait()
        return read(self, d)

    reader.Reader.piece = piece
    for batch, _ in make_loader("torch", store, "data.timeout_s=1").batches(0):
        print(batch.row)


def test_a_thread_that_hangs_is_left_behind(tiny_store, tmp_path):
    """Closing does not wait for it; the process must not either (the command leaves by `os._exit`)."""
    (rank,) = start_function(partial(read_from_a_disk_that_hangs, tiny_store), ranks=1, logs=tmp_path)
    finish([rank], code=1, timeout_s=60)
    assert "LoaderFailed: no batch within data.timeout_s = 1 s" in rank.text and "row 3 (sub-01" in rank.text
