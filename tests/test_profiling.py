"""`train.profile`: the table of made-up events, and of real runs, beside the trace that it is read from."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses
from processes import run_ranks
from pydantic import ValidationError
from torch.profiler import ProfilerActivity, profile

from brainscale import metrics, phase_table
from brainscale.config import Config
from brainscale.distributed import World
from brainscale.phase_table import BACKWARD_OF, NODE, Event
from brainscale.phases import PHASES, phase, phase_of
from brainscale.profiling import Recorder, foretell
from brainscale.step_profile import KINDS, Sampler

CPU = World(0, 1, 0, torch.device("cpu"), "single")
LOOP, AUTOGRAD, LOADER = 1, 2, 3


def ms(kind: str, name: str, thread: int, start: float, end: float, **others: int) -> Event:
    """An event in ms."""
    return Event(kind, name, thread, round(start * 1e6), round(end * 1e6), **others)


def step_on_a_gpu() -> list[Event]:
    """Step 7, from 100 to 200 ms, and what a profile of it may hold besides."""
    host = (
        ("step 7", 100, 200), ("data", 100, 110), ("encoder", 110, 120), ("teacher", 120, 130), ("gather", 122, 125),
        ("backward", 130, 160), ("optimizer", 160, 165), ("other", 170, 190), ("encoder", 172, 180),
    )  # fmt: skip
    launches = ((111, 1), (123, 2), (126, 3), (141, 4), (151, 5), (161, 6), (175, 7), (95, 8))
    ran = (
        ("gemm", 1, 112, 118), ("gather", 2, 124, 126), ("gemm", 3, 126, 136), ("gemm_back", 4, 142, 150),
        ("ncclDevKernel_ReduceScatter", 5, 152, 158), ("adam", 6, 162, 169), ("gemm", 7, 176, 178),
        ("before the step", 8, 96, 104),
    )  # fmt: skip
    return [
        *(ms("user_annotation", name, LOOP, start, end) for name, start, end in host),
        ms("user_annotation", "data", LOADER, 110, 190), ms("gpu_user_annotation", "encoder", 0, 112, 118),
        ms("cpu_op", "aten::addmm", LOOP, 112, 113, sequence=40),
        ms("cpu_op", "aten::view", LOOP, 111, 112, sequence=40),
        ms("cpu_op", "aten::mul", LOOP, 129.5, 129.6, sequence=50),
        ms("cpu_op", "aten::mm", LOADER, 105, 106, sequence=41),
        ms("cpu_op", NODE + "AddmmBackward0", AUTOGRAD, 140, 145, sequence=40, forward_thread=LOOP),
        ms("cpu_op", "AddmmBackward0", AUTOGRAD, 140, 144, sequence=40, forward_thread=LOOP),
        ms("cpu_op", NODE + "torch::autograd::AccumulateGrad", AUTOGRAD, 150, 153, forward_thread=LOOP),
        ms("cpu_op", NODE + "XBackward0", AUTOGRAD, 154, 155, sequence=41, forward_thread=LOOP),
        *(ms("cuda_runtime", "cudaLaunchKernel", LOOP, at, at + 0.1, correlation=n) for at, n in launches),
        *(ms("kernel", name, 0, start, end, correlation=n) for name, n, start, end in ran),
    ]  # fmt: skip


def test_a_table_of_a_gpu_says_what_ran_for_each_phase_and_where_it_idled():
    table = phase_table.make(step_on_a_gpu())
    rows = {row.phase: (row.calls, row.host_ms, row.device_ms, row.idle_ms) for row in table.rows}
    assert rows == {
        "data": (1, 10, 0, pytest.approx(6)),
        "gather": (1, 3, 2, pytest.approx(2)),
        "encoder": (1, 10, 6, pytest.approx(4)),
        "teacher": (1, 7, 10, pytest.approx(2)),
        "backward": (1, 25, 0, pytest.approx(8)),
        "backward of encoder": (0, 5, 8, pytest.approx(2)),
        "optimizer": (1, 5, 7, pytest.approx(2)),
        "other": (1, 20, 2, pytest.approx(18)),
        "communication": (0, 0, 6, 0),
        "rest": (0, 15, 0, pytest.approx(11)),
    }
    assert table.steps == (7, 7) and table.step_ms == 100
    assert sum(row.host_ms for row in table.rows) == pytest.approx(100)
    assert table.gap == phase_table.Gap(22, 7, "other")


GOLDEN = """\
step 7, 100.00 ms each, of rank 0 on a GPU; all figures are of one step

phase                         calls    host ms   share     GPU ms  GPU idle ms
data                              1     10.000   10.0%      0.000        6.000
gather                            1      3.000    3.0%      2.000        2.000
encoder                           1     10.000   10.0%      6.000        4.000
teacher                           1      7.000    7.0%     10.000        2.000
backward                          1     25.000   25.0%      0.000        8.000
backward of encoder                      5.000    5.0%      8.000        2.000
optimizer                         1      5.000    5.0%      7.000        2.000
other                             1     20.000   20.0%      2.000       18.000
communication                            0.000    0.0%      6.000        0.000
rest                                    15.000   15.0%      0.000       11.000

the GPU idles 55.0% of the time; its longest gap is 22.000 ms, in step 7, while the host is at other
"""


def test_the_text_names_the_longest_gap():
    assert phase_table.text(phase_table.make(step_on_a_gpu()), "rank 0 on a GPU") == GOLDEN


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [("20", "names no steps"), ("steps 5-2", "names no steps"), ("step 0", "names no steps"), ("steps 20-", "names no"),
     ("steps 1-51", "51 steps; record at most 50"), ("steps 90-101", "goes past train.num_steps 100")],
)  # fmt: skip
def test_a_profile_that_cannot_be_recorded_is_refused(asked, wrong):
    with pytest.raises(ValidationError, match=wrong):
        Config.model_validate({"train": {"num_steps": 100, "profile": asked}, "optim": {"warmup_steps": 1}})


def test_the_past_is_foretold():
    assert foretell(range(0), 9) == foretell(range(5, 8), 4) == ""
    assert foretell(range(5, 8), 5).endswith("steps 5 to 7, and the run goes on at step 6: the profile begins there")
    assert foretell(range(5, 8), 7).endswith("the run goes on at step 8: nothing is profiled")


def test_an_error_remembers_the_innermost_phase_that_it_left():
    with pytest.raises(ValueError) as caught, phase("teacher"), phase("gather"):
        raise ValueError
    assert phase_of(caught.value) == "gather" and phase_of(ValueError()) == ""


def record(folder: Path, wanted: range, last: int) -> list[str]:
    """What is said of steps 1 to `last` of a loop that computes a little, and then ends."""
    said: list[str] = []
    recorder = Recorder(wanted, folder, CPU, metrics.Clock(0, 0.0), said.append)
    for step in range(1, last + 1):
        recorder.begin(step)
        with phase("encoder"):
            torch.ones(9, 9) @ torch.ones(9, 9)
    recorder.close()
    return said


def test_a_run_that_ends_in_between_writes_what_it_has(tmp_path):
    said = record(tmp_path, range(3, 9), 4)
    assert len(said) == 1 and said[0].startswith("steps 3 to 4, ")
    names = ["steps-000003-000004.json", "steps-000003-000004.trace.json.gz", "steps-000003-000004.txt"]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names


def test_another_profiler_and_a_folder_that_cannot_be_written_are_said(tmp_path):
    with profile(activities=[ProfilerActivity.CPU]):
        assert record(tmp_path, range(1, 2), 2) == [
            "train.profile: nothing is recorded, since another profiler is active"
        ]
    (tmp_path / "profile").write_text("in the way")
    (sentence,) = record(tmp_path, range(1, 2), 2)
    assert "could not be written" in sentence and "File exists" in sentence


def test_a_sample_that_falls_into_a_profile_is_made_up_for():
    sampler, taken = Sampler(CPU, metrics.Clock(0, 0.0), print, 10, 0), []
    for step in range(1, 45):
        with sampler.around(step, step in range(19, 23) or step == 40) as found:
            torch.ones(3, 3) @ torch.ones(3, 3)
        taken += [step] if found else []
    assert taken == [23, 30, 41]


# ------------------------------------------------------------------------------------------- real runs


def trace_of(run: Path, stem: str) -> list[dict[str, Any]]:
    """The complete events of a trace, as Perfetto reads them."""
    with gzip.open(run / "profile" / f"{stem}.trace.json.gz", "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]


def table_of(run: Path, stem: str) -> dict[str, Any]:
    return json.loads((run / "profile" / f"{stem}.json").read_text())


def inside(event: dict[str, Any], outer: dict[str, Any]) -> bool:
    """Whether an event lies in another, up to the rounding of the file."""
    slack = 0.002
    return (
        event is not outer and outer["ts"] - slack <= event["ts"]
        and event["ts"] + event["dur"] <= outer["ts"] + outer["dur"] + slack
    )  # fmt: skip


def again(events: list[dict[str, Any]]) -> dict[str, float]:
    """Host ms of each phase in a step, from the trace alone and by another way: what a range lasts, less the ranges
    right in it; "backward" with all that is in it."""
    ranges = [e for e in events if e["cat"] == "user_annotation"]
    stepped = [e for e in ranges if e["name"].startswith("step ")]
    named = [e for e in ranges if e["name"] in PHASES and any(inside(e, step) for step in stepped)]
    closed = [e for e in named if e["name"] in ("other", "checkpoint")]
    named = [e for e in named if not any(inside(e, outer) for outer in closed)]
    lasting = dict.fromkeys((e["name"] for e in named), 0.0)
    for event in named:
        within = [other for other in named if inside(other, event)]
        right_in = [one for one in within if not any(inside(one, other) for other in within)]
        lasting[event["name"]] += (event["dur"] - sum(one["dur"] for one in right_in)) / 1e3 / len(stepped)
    return lasting


@pytest.fixture(scope="module")
def recorded(tiny_store, tiny_config, tmp_path_factory) -> Path:
    """A folder with a run of which steps are profiled and sampled, and one of which none is."""
    folder = tmp_path_factory.mktemp("recorded")
    for name, every, asked in (("recorded", 7, "steps 19-22"), ("not", 0, "")):
        arguments = (f"data.store={tiny_store}", f"run.dir={folder / name}", "train.micro_batch_volumes=2")
        asked_for = (f"log.profile_every_steps={every}", f"train.profile={asked}", "checkpoint.every_steps=20")
        rank = run_ranks("pretrain", tiny_config, *arguments, *asked_for, logs=folder / "logs")[0]
        assert "USDT" not in rank.text and "profiler" not in rank.text, rank.text
        (folder / f"{name}.log").write_text(rank.text)
    return folder


def test_a_profile_and_samples_change_no_bit_of_a_run(recorded):
    assert losses(recorded / "recorded") == losses(recorded / "not") and len(losses(recorded / "not")) == 40
    lines = metrics.read(recorded / "recorded" / "metrics.jsonl")
    profiles = {step: line["profile"] for step, line in lines.items() if "profile" in line}
    assert list(profiles) == [23, 28, 35], "20 and 21 were in the profile"
    for found in profiles.values():
        assert tuple(found) == KINDS and sum(found.values()) == pytest.approx(1) and found["compute"] > 0
    assert lines[23]["other_s"] > 0
    assert not (recorded / "not" / "profile").exists()
    assert not any("profile" in line for line in metrics.read(recorded / "not" / "metrics.jsonl").values())


def test_the_trace_holds_every_phase_as_often_as_it_happened(recorded):
    events = trace_of(recorded / "recorded", "steps-000019-000022")
    steps = [e for e in events if e["cat"] == "user_annotation" and e["name"].startswith("step ")]
    assert [e["name"] for e in steps] == ["step 19", "step 20", "step 21", "step 22"]
    often = {name: 2 for name in PHASES[:10]} | {"spectral": 2, "backward": 2, "optimizer": 2, "log": 2}
    absent = ("predictor", "teacher", "prediction_loss", "regularizer", "ema")
    for step in steps:
        names = [e["name"] for e in events if e["cat"] == "user_annotation" and inside(e, step)]
        if step["name"] == "step 20":
            assert names.count("checkpoint") == 1 and names.count("other") == 1
        else:
            found = {name: names.count(name) for name in PHASES if name in names}
            assert found == {name: count for name, count in often.items() if name not in absent}


def test_the_table_is_what_the_trace_gives(recorded):
    run, stem = recorded / "recorded", "steps-000019-000022"
    table, events = table_of(run, stem), trace_of(run, stem)
    rows = {row["phase"]: row for row in table["rows"]}
    assert table["steps"] == [19, 22] and table["ranks"] == 1 and table["gap"] is None
    assert all(row["device_ms"] is row["idle_ms"] is None for row in table["rows"])
    assert sum(row["host_ms"] for row in table["rows"]) == pytest.approx(table["step_ms"])
    backward = sum(row["host_ms"] for name, row in rows.items() if name.startswith("backward"))
    host = {name: row["host_ms"] for name, row in rows.items() if name in PHASES} | {"backward": backward}
    assert host == {name: pytest.approx(value, abs=0.01) for name, value in again(events).items()}
    parts = {name.removeprefix(BACKWARD_OF) for name in rows if name.startswith(BACKWARD_OF)}
    assert parts == {"encoder", "decoder", "pixel_loss", "spectral"}, "what gradients flow through"
    text = (run / "profile" / f"{stem}.txt").read_text()
    assert text.startswith("steps 19 to 22, ") and text in (recorded / "recorded.log").read_text()
    assert [line.split("  ")[0] for line in text.splitlines()[3:]] == list(rows)


def test_progress_says_the_rate_where_there_is_no_peak(recorded, capsys):
    said = (recorded / "not.log").read_text()
    assert "the peak rate of this device is not known" in said and " GFLOP/s  data wait" in said
    line = metrics.read(recorded / "not" / "metrics.jsonl")[40]
    assert line["mfu"] is None and 0 < line["tflops_per_s"] < 1
    assert metrics.rate({"mfu": None, "tflops_per_s": 12.345}) == "12.3 TFLOP/s"
    assert metrics.rate({"mfu": 0.4567, "tflops_per_s": 12.345}) == "MFU 45.7%"


@pytest.mark.slow
def test_two_ranks_of_a_jepa_are_profiled_by_the_first(tiny_store, tiny_config, tmp_path):
    said = {}
    for name, asked in (("profiled", "step 3"), ("not", "")):
        arguments = (f"data.store={tiny_store}", f"run.dir={tmp_path / name}", f"train.profile={asked}")
        sizes = ("jepa.predictor_width=12", "jepa.predictor_depth=1", "jepa.predictor_heads=1", "train.num_steps=4")
        which = ("objective=jepa", "regularizer.kind=vcr")
        said[name] = run_ranks("pretrain", tiny_config, *arguments, *sizes, *which, ranks=2, logs=tmp_path / "logs")
    assert losses(tmp_path / "profiled") == losses(tmp_path / "not")
    assert len(list((tmp_path / "profiled" / "profile").iterdir())) == 3 and "steps" not in said["profiled"][1].text
    rows = {row["phase"]: row for row in table_of(tmp_path / "profiled", "steps-000003-000003")["rows"]}
    assert {"teacher", "predictor", "prediction_loss", "regularizer", "ema"} <= set(rows)
    assert not {"decoder", "pixel_loss", "spectral"} & set(rows) and rows["gather"]["calls"] == 2
    assert {"backward of encoder", "backward of predictor"} <= set(rows) and "backward of teacher" not in rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: what ran on it is read")
def test_a_gpu_s_kernels_belong_to_the_phases_that_launched_them(tmp_path):
    world, said = World(0, 1, 0, torch.device("cuda", 0), "single"), list[str]()
    weight = torch.ones(2048, 2048, device="cuda", requires_grad=True)
    recorder = Recorder(range(2, 4), tmp_path, world, metrics.Clock(0, 0.0), said.append)
    for step in range(1, 5):
        recorder.begin(step)
        with phase("encoder"):
            out = (weight @ weight).sum()
        with phase("backward"):
            out.backward()
        with phase("optimizer"):
            float(weight.grad.sum())
    recorder.close()
    rows = {row["phase"]: row for row in table_of(tmp_path, "steps-000002-000003")["rows"]}
    assert rows["backward of encoder"]["device_ms"] > rows["encoder"]["device_ms"] > rows["optimizer"]["device_ms"] > 0
    assert "longest gap" in said[0]
