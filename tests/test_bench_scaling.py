"""Scaling over ranks: real ranks send the bytes that a plan predicts, lines are whole, and a dead rank is named."""

import math
import os
import signal

import pytest
import torch

from brainscale import cli_bench_step, plan_time
from brainscale.bench import scaling, schema
from brainscale.bench.scaling_predict import PRESETS, Link, bus_gb_per_s, on_link, planned, preset
from brainscale.bench.scaling_ranks import ask, groups
from brainscale.config import Config
from brainscale.hardware import GPUS, NETWORKS, PEAKS
from brainscale.model_counts import tokens_of
from brainscale.settings import InputError, load
from brainscale.stopping import LostRank

SETTINGS = (*scaling.CPU, *scaling.QUICK)


def test_sizes_without_a_core_are_skipped_unless_asked_for_and_gpus_are_not_shared():
    sizes, skipped = scaling.choose((), 2, on_gpu=False)
    assert sizes == [1, 2] and [line["variant"] for line in skipped] == ["4 ranks", "1 to 8 GPUs"]
    assert "there are 2 cores" in skipped[0]["skipped"] and not schema.mistake(skipped[0])
    sizes, skipped = scaling.choose((4, 2), 2, on_gpu=False)
    assert sizes == [1, 2, 4] and [line["skipped"] for line in skipped] == ["there is no GPU"]
    assert [line["variant"] for line in scaling.choose((), 3, on_gpu=True)[1]] == ["4 ranks", "8 ranks"]
    with pytest.raises(InputError, match="every rank needs a GPU, and there are 3"):
        scaling.choose((4,), 3, on_gpu=True)
    with pytest.raises(InputError, match="at least one rank"):
        scaling.choose((0,), 3, on_gpu=False)


def test_weak_and_strong_give_a_rank_the_same_work_as_one_beside_others():
    config = load(Config, None, (*SETTINGS, "train.global_batch_volumes=8"))
    alone, together = [["a"], ["b"], ["c"], ["d"]], {2: ["e", "f"], 4: ["g", "h", "i", "j"]}
    found = {
        kind: [(v.ranks, len(v.groups), v.batch) for v in scaling.variants_of(kind, config, alone, together)]
        for kind in ("weak", "strong")
    }
    assert found["weak"] == [(1, 1, 8), (2, 1, 16), (2, 2, 8), (4, 1, 32), (4, 4, 8)]
    assert found["strong"] == [(1, 1, 8), (2, 1, 8), (2, 2, 4), (4, 1, 8), (4, 4, 2)]


def test_the_slowest_rank_of_each_step_counts():
    assert scaling.slowest([[[1.0, 5.0, 1.0], [2.0, 1.0, 1.5]]]) == 2.0
    assert scaling.slowest([[[1.0, 5.0, 1.0]], [[2.0, 1.0, 1.5]]]) == 2.0


def test_a_prediction_lies_between_no_waiting_and_no_overlap():
    config = load(Config, None, (*SETTINGS, "train.global_batch_volumes=8", "zero.stage=1"))
    slow = on_link(config, 2, 1.0, Link(0.001, 0.01))
    sent, messages = plan_time.sent_bytes(config, 2), plan_time.message_count(config, 2)
    assert slow.no_overlap_s == pytest.approx(1 + sum(sent.values()) / 1e6 + 0.01 * sum(messages.values()))
    assert slow.step_s == pytest.approx(1 + slow.exposed_s) and 1 < slow.step_s < slow.no_overlap_s
    assert on_link(config, 2, 1.0, Link(1e9, 0.0)).step_s == pytest.approx(1.0)
    assert bus_gb_per_s(4, 1e9, 1.5) == pytest.approx(1.0)


def test_on_gpus_the_prediction_is_the_plan_s():
    config = load(Config, None, ("train.global_batch_volumes=64",))
    tokens, gpu = tokens_of(config, (160, 192, 160)), preset("NVIDIA H200")
    made = plan_time.predict(config, tokens, 1, 8, gpu, NETWORKS["ib-ndr400"])
    found = planned(config, tokens, 8, gpu)
    assert (found.step_s, found.exposed_s) == (made.step_s, made.exposed_s)
    assert found.no_overlap_s > found.step_s
    assert preset("NVIDIA GeForce RTX 4090") is None
    assert set(PRESETS.values()) <= set(GPUS) and set(PRESETS) <= set(PEAKS)


def test_settings_that_cannot_work_are_refused_before_anything_starts():
    with pytest.raises(InputError, match="4 is no multiple of 3 ranks"):
        scaling.run((), False, ranks=(1, 3))
    with pytest.raises(InputError, match="bf16 with zero"):
        scaling.run(('train.precision="bf16"',), False, stages=(0,))
    with pytest.raises(InputError, match="'two' is no whole number"):
        cli_bench_step._numbers("ranks", "1,two")
    assert cli_bench_step._numbers("ranks", "1, 4") == (1, 4) and cli_bench_step._numbers("ranks", "") == ()


def test_a_dead_rank_is_named_and_no_process_is_left(tmp_path):
    with pytest.raises(LostRank, match="rank 1 of 2 was ended by signal 9"):
        with groups([1, 2], 1, tmp_path) as started:
            assert [len(answers) for answers in ask(started, "all_reduce", 4, 2)] == [1, 2]
            os.kill(started[1][1].process.pid, signal.SIGKILL)
            ask(started, "all_reduce", 4, 2)
    assert not any(rank.process.is_alive() for group in started for rank in group)


@pytest.mark.slow
def test_two_ranks_send_what_the_plan_says(tiny_store):
    """Within 2 %, at stage 3 (others: test_engine.py), and the lines are valid and whole."""
    overrides = (*scaling.CPU, *scaling.QUICK, f"data.store={tiny_store}", "model.patch_voxels_zyx=[8,8,8]")
    lines = scaling.run(overrides, True, ranks=(2,), stages=(3,))
    assert not [wrong for line in lines if (wrong := schema.mistake(line))]
    lines = [line for line in lines if not line["skipped"]]
    assert all(set(scaling.EXTRA) <= set(line) for line in lines)
    ranks = [line for line in lines if line["variant"] == "2 ranks" and line["zero_stage"] is not None]
    assert [(line["case"].split()[0], line["zero_stage"]) for line in ranks] == [("weak", 3), ("strong", 3)]
    for line in ranks:
        assert line["sent_bytes"] == pytest.approx(line["predicted_sent_bytes"], rel=0.02)
        assert line["collectives"] == pytest.approx(line["predicted_collectives"], rel=0.2)
        assert 0 < line["exposed_share"] <= line["communication_share"] < 1
        assert line["efficiency"] == pytest.approx(line["ratio"] / (2 if line["case"].startswith("strong") else 1))
        predicted = [line[f"predicted_efficiency{end}"] for end in ("", "_no_overlap")]
        assert all(math.isfinite(value) and value > 0 for value in predicted) and predicted[0] >= predicted[1]
    links = [line for line in lines if line["case"].startswith("all-reduce")]
    assert len(links) == 2 and links[0]["mb_per_s"] > 0
    assert not torch.distributed.is_initialized()
