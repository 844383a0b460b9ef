"""What `brainscale bench loader` times is right: every loader gives the stored volumes, a pass is what it says it is,
and its arithmetic holds. No times are asserted."""

import dataclasses
import gc
import math
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_store

from brainscale.bench import loader as bench
from brainscale.bench import loader_consumers as consumers
from brainscale.bench import loader_passes, loader_peers, loader_stages
from brainscale.bench.loader_passes import NotCold, Pass, Variant, in_turn, take
from brainscale.bench.read import drop_from_page_cache, in_page_cache
from brainscale.bench.record import sample_lines, write
from brainscale.config import Config
from brainscale.settings import InputError, load
from brainscale.store import Store, StoreDamage


@pytest.fixture(scope="module")
def scaled_store(tmp_path_factory):
    """A store whose integers are not its values."""

    def change(record):
        record.update(scale=0.25 * (1 + record["row"]), offset=-3.0)

    return write_tiny_store(tmp_path_factory.mktemp("stores") / "scaled", change=change)


@pytest.fixture(scope="module")
def work(scaled_store, tmp_path_factory):
    """Passes of 2 + 6 + 2 batches of one volume."""
    return bench.make_work(scaled_store, tmp_path_factory.mktemp("work"), 1, 1, True)


def every_batch(variant, count):
    batches = variant.batches()
    try:
        return [next(batches).clone() for _ in range(count)]
    finally:
        batches.close()


@pytest.mark.parametrize("name", loader_peers.PEERS)
def test_every_peer_gives_the_stored_volumes_and_the_check_notices_wrong_ones(work, name):
    peer = loader_peers.PEERS[name]
    if reason := loader_peers.missing(peer.needs):
        pytest.skip(reason)
    two = dataclasses.replace(work, batch=2)
    variant = loader_peers.open_peer(peer, two, 0 if name != loader_peers.PERSISTENT_THREADS else 2)
    for number, batch in enumerate(every_batch(variant, 5)):
        loader_peers.check(two, name, variant, 2 * number, batch)
    wrong = batch.clone()
    wrong[1, 0, 3, 4, 5] += 1
    for bad in (wrong, batch.flip(0), batch.flip(4), batch.float() * 1.00001 + 0.01):
        with pytest.raises(AssertionError, match=r"differ"):
            loader_peers.check(two, name, variant, 8, bad)
    with pytest.raises(AssertionError, match="shape"):
        loader_peers.check(two, name, variant, 8, batch.transpose(2, 3))


def test_our_loader_gives_the_stored_volumes_in_the_same_order(work):
    variant = bench.open_ours(*(bench.OURS[bench.TORCH][0], work, bench.settings(2)))
    for number, batch in enumerate(every_batch(variant, 10)):
        loader_peers.check(work, bench.TORCH, variant, number, batch)


def test_no_volume_comes_twice_in_what_is_read_cold(work):
    read = work.sequence[: work.fill + work.timed]
    assert len(set(read)) == len(read) == 8 and set(work.sequence) == set(work.rows) == set(work.files)
    assert all(file.exists() for file in bench.open_ours(bench.OURS[bench.TORCH][0], work, bench.settings(1)).files)


def counting(taken, closed, files=(), batch=None):
    def batches():
        try:
            while True:
                taken.append(len(taken))
                yield batch
        finally:
            closed.append(len(taken))

    return Variant(batches, files)


def test_a_pass_fills_the_pipeline_then_times_and_ends(work):
    taken, closed, consumed = [], [], []
    one = take(work, counting(taken, closed), lambda: consumed.append(len(taken)))
    assert closed == [8] and consumed == [3, 4, 5, 6, 7, 8]
    assert 0 < one.waited_s < one.seconds and one.cpu_s > 0


def test_passes_run_in_turn_with_files_read_or_dropped(work, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    seen = []

    def variant(name):
        def batches():
            seen.append((name, in_page_cache(file)))
            while True:
                yield torch.zeros(1)

        return Variant(batches, (file,))

    in_turn(work, {name: variant(name) for name in "ab"}, 2, cold=False)
    assert seen == [("a", True), ("b", True), ("b", True), ("a", True)]
    seen.clear()
    if not drop_from_page_cache(file):
        with pytest.raises(NotCold):
            in_turn(work, {"a": variant("a")}, 1, cold=True)
        return
    in_turn(work, {name: variant(name) for name in "ab"}, 2, cold=True)
    assert seen == [("a", False), ("b", False), ("b", False), ("a", False)]


def burn(done):
    while sum(os.times()[:2]) < 0.3:
        math.factorial(2000)
    done.send(sum(os.times()[:2]))
    done.recv()


def test_cpu_seconds_count_other_processes_and_all_threads():
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=burn, args=(there,))
    process.start()
    try:
        own_s = here.recv()
        assert own_s >= 0.3 and loader_passes.cpu_clock_s(process.pid) == pytest.approx(own_s, abs=0.1)
    finally:
        process.kill()
        process.join()
    assert loader_passes.cpu_clock_s(os.getpid()) == pytest.approx(sum(os.times()[:2]), abs=0.1)


# --------------------------------------------------------------------------------------------- arithmetic


def test_what_a_pace_feeds():
    assert consumers.fed(1000.0, 0.394e12) == (pytest.approx(394.0), pytest.approx(1.0))
    assert consumers.fed(10.0, 2e12).gpu_share == pytest.approx(20 / 394)


def test_lines_of_models_that_are_fed():
    (line,) = sample_lines("loader", "whole", "s", {"a": [0.01]}, "a")
    line |= {"skipped": None, "volumes_per_s": 100.0}
    found = consumers.feed_lines([line], (160, 192, 160))
    assert [x["case"].split()[1] for x in found] == ["ViT-S/16", "ViT-B/16", "ViT-L/16"]
    large = found[2]
    assert large["flops_per_sample"] == pytest.approx(0.84e12, rel=0.02)  # 3 × (193 + 89 GFLOP), counted elsewhere
    assert large["starved_tflops"] == pytest.approx(large["flops_per_sample"] / 1e10)
    assert large["median"] == 0.01 and large["gpu_share"] == pytest.approx(large["starved_tflops"] / 394)
    assert all("does not divide" in x["skipped"] for x in consumers.feed_lines([line], (16, 24, 16)))


def test_training_takes_batches_that_stay_and_batches_of_the_loader_in_turn(work, tiny_config):
    """As on a GPU, on the CPU with a small model."""
    settings = load(Config, tiny_config, ())
    loader = bench.make_loader(bench.OURS[bench.TORCH][0], dataclasses.replace(work, batch=2), settings)
    again, fresh = consumers.training_seconds(loader, settings, 1, 2, 3)
    assert len(again) == len(fresh) == 3 and min(again + fresh) > 0
    (line,) = consumers.training_lines("how", work, {}, 1, 1) if work.device.type != "cuda" else [{"skipped": "GPU"}]
    assert "GPU" in line["skipped"]


def test_the_idle_share_is_that_of_all_passes():
    assert consumers.idle_share([Pass(1.0, 0.5, 0.0), Pass(3.0, 0.5, 0.0)]) == 0.25


def test_stages_are_differences_row_by_row():
    samples = {
        "encoded": [1.0, 2.0], "volumes": [5.0, 7.0], "foreground": [0.5, 0.5], "sample": [6.0, 8.0],
        "moved": [10.0, 10.0], "altered": [7.0, 9.5], "copy": [1.0, 1.5],
    }  # fmt: skip
    parts = loader_stages.stage_seconds(samples)
    assert parts[loader_stages.WHOLE] == [7.0, 9.5] and parts["decode"] == [4.0, 5.0]
    assert parts["augment: rotate and scale"] == [4.0, 2.0] and "copy to the device" not in parts
    parts = loader_stages.stage_seconds({**samples, "to the device": [1.0, 1.0]})
    assert parts[loader_stages.WHOLE] == [8.0, 10.5] and parts["copy to the device"] == [1.0, 1.0]


def test_the_bytes_of_a_row_are_all_of_its_bytes_and_no_others(tmp_path):
    store = write_tiny_store(tmp_path / "store")
    file = Path(Store(store).file_of(5))
    rows = range(4, 8)
    ranges = {row: loader_stages.chunk_ranges(store, row) for row in rows}
    lengths = [length for row in rows for _, length in ranges[row]]
    assert sum(lengths) + 16 * len(lengths) + 4 == file.stat().st_size
    assert loader_stages.read_encoded(file, ranges[5]) == sum(length for _, length in ranges[5])
    content = bytearray(file.read_bytes())
    offset, length = ranges[5][-1]
    content[offset + length // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(StoreDamage):
        Store(store).volumes([5])
    Store(store).volumes([4, 6, 7])


# --------------------------------------------------------------------------------------------- the whole


def test_missing_loaders_are_lines_that_say_how_to_install_them(work, monkeypatch, capsys):
    for name in ("monai", "torchio", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = bench.skipped_lines("how")
    assert [line["variant"] for line in lines] == [
        bench.DALI, loader_peers.PERSISTENT, loader_peers.PERSISTENT_THREADS, loader_peers.CACHE, loader_peers.TORCHIO
    ]  # fmt: skip
    write(lines, None)
    printed = capsys.readouterr().out
    assert "torchio is not installed; pip install -e '.[peers]'" in printed
    assert "nvidia.dali is not installed; pip install 'brainscale-mri[dali]'" in printed


@pytest.mark.slow
def test_loaders_with_processes_give_the_stored_volumes_and_leave_none_behind(work):
    before = set(multiprocessing.active_children())
    variants, starts = bench.open_all(work, 2)
    assert set(variants) == set(starts) and bench.TORCH in variants
    assert set(multiprocessing.active_children()) > before  # peers' workers wait for their next pass
    del variants
    gc.collect()
    assert set(multiprocessing.active_children()) <= before


def test_what_cannot_be_measured_is_refused(tiny_store, tmp_path):
    with pytest.raises(InputError, match="--batch is 0"):
        bench.run(tiny_store, tmp_path, 0, True)
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tiny_store.stat().st_dev:
        pytest.skip("there is no other disk")
    with pytest.raises(InputError, match="on another disk"):
        bench.run(tiny_store, elsewhere, 2, True)
    assert not list(elsewhere.glob("brainscale-bench-*"))
