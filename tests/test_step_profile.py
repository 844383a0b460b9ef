"""What a step consists of: shares of made-up times and of real profiles. Runs are in test_profiling.py."""

import time
from dataclasses import dataclass

import pytest
import torch
from processes import run_ranks
from torch.profiler import ProfilerActivity, profile

from brainscale import metrics
from brainscale.distributed import World
from brainscale.step_profile import CPU_ORDER, GPU_ORDER, KINDS, Span, covered, gpu_spans, sampling, shares, wanted

CPU = World(0, 1, 0, torch.device("cpu"), "single")


def on_gpu(*spans: tuple[str, float, float], end: float = 10.0) -> dict[str, float]:
    """The shares that are not 0."""
    found = shares([Span(*span) for span in spans], 0.0, end, GPU_ORDER, "host")
    assert tuple(found) == KINDS and sum(found.values()) == pytest.approx(1)
    return {kind: pytest.approx(share) for kind, share in found.items() if share > 1e-12}


def test_a_gap_is_the_host_s():
    assert on_gpu() == {"host": 1.0}
    assert on_gpu(("compute", 1, 3), ("compute", 5, 9)) == {"compute": 0.6, "host": 0.4}


def test_overlapping_and_nested_kernels_count_once():
    assert on_gpu(("compute", 0, 4), ("compute", 2, 6), ("compute", 3, 5)) == {"compute": 0.6, "host": 0.4}


def test_only_communication_that_nothing_hides_is_communication():
    assert on_gpu(("compute", 0, 6), ("communication", 4, 9)) == {"compute": 0.6, "communication": 0.3, "host": 0.1}
    assert on_gpu(("communication", 2, 4), ("compute", 0, 10)) == {"compute": 1.0}


def test_copies_count_where_no_kernel_runs_and_the_wait_for_data_where_the_gpu_idles():
    spans = (("data", 0, 4), ("host_to_device", 3, 7), ("compute", 5, 6), ("communication", 6, 6.5), ("compute", 8, 10))
    assert on_gpu(*spans) == {"data": 0.3, "host_to_device": 0.25, "compute": 0.3, "communication": 0.05, "host": 0.1}


def test_what_reaches_over_the_ends_of_the_step_is_cut():
    assert on_gpu(("compute", -5, 2), ("communication", 9, 30), ("compute", 11, 12), ("something", 3, 4)) == {
        "compute": 0.2, "communication": 0.1, "host": 0.7,
    }  # fmt: skip


def test_on_a_cpu_the_wait_for_data_comes_first_and_the_rest_is_compute():
    spans = [Span("data", 0, 3), Span("communication", 2, 8), Span("compute", 4, 6)]
    found = shares(spans, 0.0, 10.0, CPU_ORDER, "compute")
    wanted = {"data": 0.3, "host_to_device": 0, "compute": 0.4, "communication": 0.3, "host": 0}
    assert found == pytest.approx(wanted)


def test_the_union_of_spans_takes_them_in_any_order():
    assert covered([Span("", 5, 6), Span("", 0, 2), Span("", 1, 3), Span("", 1, 1.5)]) == 4
    assert covered([]) == 0


@dataclass
class Event:
    """What a profile of a GPU holds, which no machine without one can record."""

    named: str
    activity: str
    at: int

    def name(self) -> str:
        return self.named

    def activity_type(self) -> str:
        return self.activity

    def start_ns(self) -> int:
        return self.at

    def end_ns(self) -> int:
        return self.at + 1


def test_events_of_a_gpu_are_told_apart():
    events = [
        Event("ampere_sgemm_128x64", "kernel", 0), Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel", 1),
        Event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 2),
        Event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 3),
        Event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 4), Event("Memset (Device)", "gpu_memset", 5),
        Event("nccl:all_reduce", "gpu_user_annotation", 6), Event("data", "user_annotation", 7),
        Event("data", "gpu_user_annotation", 8), Event("cudaLaunchKernel", "cuda_runtime", 9),
        Event("aten::mm", "cpu_op", 10),
    ]  # fmt: skip
    assert [(span.kind, span.start) for span in gpu_spans(events)] == [
        ("compute", 0), ("communication", 1), ("host_to_device", 2), ("compute", 4), ("compute", 5), ("data", 7),
    ]  # fmt: skip


def test_steps_are_sampled_once_warm_and_then_now_and_then():
    assert [n for n in range(1, 101) if wanted(n, n, 30)] == [20, 30, 60, 90]
    assert [n for n in range(1, 101) if wanted(n + 25, n, 30)] == [20, 35, 65, 95]
    assert not any(wanted(n, n, 0) for n in range(1, 101))


def test_a_sampled_step_is_left_out_of_the_means_of_an_interval():
    begin, clock = time.monotonic(), metrics.Clock(0, 0.0)
    with clock.slowed(), clock.span("data_s"):
        time.sleep(0.2)
    with clock.span("other_s"):
        time.sleep(0.1)
    line = clock.read(2, 1, (1, 1, 1), 1.0, CPU)
    took = time.monotonic() - begin
    assert line["other_s"] >= 0.1 and line["step_s"] <= took - 0.3 and line["data_s"] == pytest.approx(0)
    with clock.slowed(), clock.span("data_s"):
        time.sleep(0.2)
    line = clock.read(3, 1, (1, 1, 1), 1.0, CPU)
    assert 0.2 <= line["data_s"] <= line["step_s"], "the only step of its interval is all there is to tell"
    assert line["data_wait_max_fraction"] == line["data_wait_fraction"] and line["process_steps"] == 3


def test_the_share_of_waiting_is_that_of_a_step():
    clock = metrics.Clock(0, 0.0)
    with clock.span("data_s"):
        torch.randn(400, 400) @ torch.randn(400, 400)
    line = clock.read(4, 1, (1, 1, 1), 1.0, CPU)
    assert 0 < line["data_wait_fraction"] <= 1
    assert line["data_wait_fraction"] == pytest.approx(line["data_s"] / line["step_s"])


def test_a_real_profile_gives_shares():
    clock, said = metrics.Clock(0, 0.0), list[str]()
    with sampling(CPU.device, clock, said.append) as found:
        with clock.span("data_s"):
            time.sleep(0.05)
        torch.randn(200, 200) @ torch.randn(200, 200)
    assert tuple(found) == KINDS and sum(found.values()) == pytest.approx(1) and not said
    assert found["data"] > 0 and found["compute"] > 0 and found["host"] == found["communication"] == 0


def test_another_profiler_goes_on_and_the_sample_is_left_out():
    clock, said = metrics.Clock(0, 0.0), list[str]()
    with profile(activities=[ProfilerActivity.CPU]) as theirs:
        with sampling(CPU.device, clock, said.append) as found:
            torch.randn(20, 20) @ torch.randn(20, 20)
    assert found == {} and len(said) == 1 and "another profiler" in said[0]
    assert any(event.key == "aten::mm" for event in theirs.key_averages())


@pytest.mark.slow
def test_a_rank_that_waits_for_data_is_communication_to_the_others(tiny_store, tiny_config, tmp_path):
    arguments = (f"data.store={tiny_store}", f"run.dir={tmp_path / 'run'}", "log.every_steps=5", "train.num_steps=25")
    run_ranks("pretrain", tiny_config, *arguments, ranks=2, faults="step.data:slow@rank=1", logs=tmp_path / "logs")
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert lines[20]["profile"]["communication"] > lines[20]["profile"]["data"]
    assert all(line["data_wait_max_fraction"] > line["data_wait_fraction"] for line in lines.values())
