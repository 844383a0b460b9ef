"""The bench of the kernels: the bytes it counts are right, ours stay within their limits, and its lines are whole."""

import math
import os
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from test_bench import KEYS
from torch._inductor import config

from brainscale.bench import kernels
from brainscale.bench.kernel_bytes import Counting, Traffic, count
from brainscale.bench.kernel_peers import make_inputs
from brainscale.bench.kernel_works import COMPILED, OURS, PUBLISHED, RFFTN, WHOLE, WORKS, Variant
from brainscale.bench.record import in_fresh_process, surroundings, write
from brainscale.settings import InputError
from brainscale_kernels.launch import launch

COUNT_KEYS = {
    "minimum_bytes", "ratios", "launches", "forward_bytes", "sector_bytes", "held_for_backward_bytes", "bytes_of"
}  # fmt: skip
TIME_KEYS = {"minimum_bytes", "ratios", "gb_per_s", "copy_gb_per_s", "share_of_copy", "peak_bytes"}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="on a machine with a GPU, kernels of this process are compiled"
)
TINY = (32, 32, 16)


@pytest.fixture(scope="module", params=[16, 8], ids=["16", "8"])
def counted(request):
    """{(work, variant): line} of everything but compiled peers, on a small volume."""
    arguments = kernels.count_lines, (32, 48, 32), (request.param,) * 3, WORKS, False
    lines = arguments[0](*arguments[1:]) if INTERPRETED else in_fresh_process(
        kernels.INTERPRETED, os.sched_getaffinity(0), *arguments
    )  # fmt: skip
    names = {kernels.case_name(work, *arguments[1:3], 1): work.name for work in WORKS}
    return {(names[line["case"]], line["variant"]): line for line in lines}


def test_the_gather_moves_what_it_must_and_nothing_else(counted):
    line = counted["gather", OURS]
    assert line["median"] == line["minimum_bytes"] + 4 * 4  # scale, offset, low, high
    assert line["median"] <= 1.5 * line["minimum_bytes"] and line["launches"] == 1
    assert line["median"] <= counted["gather", WHOLE]["median"] / 10


def voxels(line):
    return 16**3 if "16×16×16" in line["case"] else 8**3


def test_sectors_of_the_gather_are_those_of_its_rows(counted):
    """A row of 16 voxels of int16 is a sector; one of 8 is half of one, whose other half is another patch's."""
    line = counted["gather", OURS]
    low, high = (1.0, 1.02) if voxels(line) == 16**3 else (1.2, 1.52)
    assert low * line["minimum_bytes"] <= line["sector_bytes"] <= high * line["minimum_bytes"]


def test_the_spectral_loss_of_volumes_moves_a_quarter_of_eager(counted):
    ours = counted["spectral loss, volume", OURS]
    assert ours["median"] <= counted["spectral loss, volume", PUBLISHED]["median"] / 4, ours["bytes_of"]
    assert ours["median"] <= counted["spectral loss, volume", RFFTN]["median"] / 4, ours["bytes_of"]


def test_the_spectral_loss_of_volumes_reads_and_writes_everything_once(counted):
    """Volumes and predictions for the moments and for the z-scores, which are written; three transforms; both spectra,
    and G over one of them; the inverse transform and predictions, and the gradient."""
    moved = counted["spectral loss, volume", OURS]["bytes_of"]
    volume, spectrum, gradient = 32 * 48 * 32, 32 * 48 * 17 * 8, gradient_bytes()
    kernels_ = 2 * (2 * volume + gradient) + 2 * 4 * volume + 3 * spectrum + (2 + 1 + 1) * gradient
    assert kernels_ < sum(count for name, count in moved.items() if name.endswith("_kernel")) < 1.01 * kernels_, moved
    transforms = [moved.get(name, 0) for name in ("_fft_r2c", "_fft_c2r", "_fft_c2c", "clone")]
    assert transforms == [2 * 3 * (4 * volume + spectrum), 3 * (4 * volume + spectrum), 0, 0], moved


@pytest.mark.parametrize("work", ["pixel loss", "spectral loss, patch"])
def test_losses_of_patches_move_their_inputs_and_gradient_once(counted, work):
    """In the forward pass; the backward pass multiplies the gradient by that of the loss, which reads and writes it."""
    line = counted[work, OURS]
    assert line["forward_bytes"] <= 1.2 * line["minimum_bytes"], line["bytes_of"]
    assert line["median"] - line["forward_bytes"] <= 2 * gradient_bytes() + 64, line["bytes_of"]


@pytest.mark.parametrize("work", ["pixel loss", "spectral loss, volume", "spectral loss, patch"])
def test_losses_keep_their_gradient_for_the_backward_pass_and_nothing_else(counted, work):
    assert counted[work, OURS]["held_for_backward_bytes"] == gradient_bytes()


def gradient_bytes():
    """Of predictions in bfloat16 for three quarters of 32×48×32 voxels."""
    return 32 * 48 * 32 * 3 // 4 * 2


def test_lines_of_counts_are_whole(counted, capsys):
    skipped = {key: line for key, line in counted.items() if line["skipped"]}
    assert all("pip install" in line["skipped"] for line in skipped.values()), skipped
    whole = {key: line for key, line in counted.items() if key not in skipped}
    assert all(set(line) == KEYS | COUNT_KEYS for line in whole.values())
    assert all(line["unit"] == "B" and line["n"] == 1 for line in whole.values())
    ours = whole["spectral loss, volume", OURS]
    assert set(ours["ratios"]) == {name for work, name in whole if work == "spectral loss, volume"} - {OURS}
    assert ours["ratio"] == ours["ratios"][PUBLISHED] < 0.25
    write(list(counted.values()), None)
    assert "× the bytes of the paper's form" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("call", "numbers", "launches"),
    [
        (lambda x: x + 1, 200, 1),
        (lambda x: x.view(10, 10).t()[2:], 0, 0),
        (lambda x: x.mul_(2), 200, 1),
        (lambda x: x.zero_(), 100, 1),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x[:1].expand(100) + x, 201, 1),
        (lambda x: x.clone().sum(), 301, 2),
    ],
    ids=["pointwise", "view", "in place", "overwrite", "nothing written", "expanded", "two"],
)
def test_operators_are_counted_by_what_they_read_and_write(call, numbers, launches):
    x = torch.ones(100)
    with Counting(traffic := Traffic()):
        call(x)
    assert (traffic.bytes, traffic.launches) == (numbers * 4, launches)


def test_a_look_at_ids_is_not_counted():
    ids = torch.arange(100)
    with Counting(traffic := Traffic()):
        assert 0 <= ids.min() <= ids.max() < 100
    assert traffic == Traffic()


def test_a_gather_is_counted_by_what_it_selects():
    x, index = torch.ones(1000, 4), torch.tensor([[1], [3]])
    with Counting(traffic := Traffic()):
        x.gather(0, index.expand(2, 4))
    assert traffic.bytes == 2 * 8 + 2 * 8 * 4


def test_a_transform_passes_once_for_every_axis_that_has_a_length():
    x = torch.ones(1, 10, 10)
    with Counting(traffic := Traffic()):
        torch.fft.rfftn(x, dim=(0, 1, 2))
    assert traffic.bytes == 2 * (100 * 4 + 60 * 8) and traffic.launches == 2


@triton.jit
def _copy_kernel(source, target, count, READS: tl.constexpr, STRIDE: tl.constexpr):
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    for _ in tl.static_range(READS):
        values = tl.load(source + at * STRIDE, mask=at < count)
    tl.store(target + at, values, mask=at < count)


@interpreted
@pytest.mark.parametrize(("reads", "stride"), [(1, 1), (2, 1), (1, 8)])
def test_kernels_are_counted_by_every_load_and_store_under_the_mask(reads, stride):
    source, target = torch.ones(8192), torch.zeros(100)
    mode = Counting(traffic := Traffic())
    with mode, mode.kernels():
        launch(_copy_kernel, (2,), source, target, 100, READS=reads, STRIDE=stride)
    assert torch.equal(target, source[:100])
    assert traffic.bytes_of == {"_copy_kernel": (reads + 1) * 100 * 4} and traffic.launches == 1
    lines = math.ceil(100 / 8)
    assert traffic.sectors_of["_copy_kernel"] == (reads * lines if stride == 1 else 100) + lines


@interpreted
def test_a_small_argument_is_counted_once_however_often_it_is_loaded():
    """16 KB, not a byte more: what a kernel reads twice must not be missed."""
    for size, times in ((4096, 1), (4097, 2)):
        mode = Counting(traffic := Traffic())
        with mode, mode.kernels():
            launch(_copy_kernel, (2,), torch.ones(size), torch.zeros(100), 100, READS=2, STRIDE=1)
        assert traffic.bytes_of["_copy_kernel"] == (times + 1) * 100 * 4


@interpreted
def test_a_variant_that_gives_something_else_stops_the_run():
    work = WORKS[0]
    wrong = replace(work.variants[WHOLE], forward=lambda inputs, patch: inputs.prediction[:, :1] * 0)
    with pytest.raises(AssertionError, match=r"eager, whole volume: differs from the reference"):
        kernels.count_lines(TINY, (16, 16, 16), [replace(work, variants={WHOLE: wrong})], compiled=False)


@interpreted
def test_an_absent_peer_is_a_line_that_says_how_to_install_it():
    work = WORKS[0]
    absent = Variant(work.variants[WHOLE].forward, None, needs="no_such_module")
    works = [replace(work, variants={WHOLE: work.variants[WHOLE], "peer": absent})]
    measured, skipped = sorted(kernels.count_lines(TINY, (16, 16, 16), works, False), key=lambda line: line["variant"])
    assert skipped["skipped"] == "no_such_module is not installed; pip install -e '.[peers]'"
    assert measured["variant"] == WHOLE and not measured["skipped"]


@interpreted
def test_what_cannot_be_compiled_here_is_a_line_that_says_why():
    work = WORKS[0]
    works = [replace(work, variants={name: work.variants[name] for name in (WHOLE, COMPILED + "whole volume")})]
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        skipped = [line for line in kernels.count_lines(TINY, (16, 16, 16), works) if line["skipped"]]
    assert [line["variant"] for line in skipped] == [COMPILED + "whole volume"]
    assert skipped[0]["skipped"].startswith("torch.compile needs g++ and failed: ")


@pytest.mark.slow
def test_compiled_code_is_counted_with_the_operators_it_calls():
    work = next(work for work in WORKS if work.name == "spectral loss, volume")
    inputs = make_inputs((32, 48, 32), (16, 16, 16), 1, 0, torch.device("cpu"))
    eager, compiled = (
        count(work, kernels.bind(work.variants[RFFTN], (16, 16, 16)), inputs, compiled) for compiled in (False, True)
    )
    assert compiled.traffic.bytes_of["_fft_r2c"] == eager.traffic.bytes_of["_fft_r2c"] > 0
    assert 0 < compiled.traffic.bytes_of["generated"] < compiled.traffic.bytes < eager.traffic.bytes
    assert torch.allclose(compiled.output, eager.output) and compiled.held_bytes <= eager.held_bytes


# ------------------------------------------------------------------------------------------- command


def test_a_batch_below_one_is_refused():
    with pytest.raises(InputError, match="--batch is 0"):
        kernels.run(True, 0, False)


@interpreted
@pytest.mark.slow
def test_lines_of_times_are_whole(capsys):
    lines = kernels.time_lines(TINY, (16, 16, 16), 1, 2, torch.device("cpu"), compiled=False)
    assert {line["variant"] for line in lines if not line["skipped"]} >= {OURS, WHOLE, PUBLISHED, RFFTN}
    check_times(lines, rounds=2)
    write(lines, None)
    assert "% of a copy" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: times are of the device")
def test_every_variant_is_timed_on_a_gpu():
    lines = kernels.time_lines((64, 96, 64), (16, 16, 16), 2, 5, torch.device("cuda"))
    check_times(lines, rounds=5)
    measured = [line for line in lines if not line["skipped"]]
    assert all(line["machine"]["gpu"] and line["peak_bytes"] > 0 for line in measured)


def check_times(lines, rounds):
    for line in lines:
        if line["skipped"]:
            assert "not installed" in line["skipped"]
            continue
        assert set(line) == KEYS | TIME_KEYS and line["unit"] == "s" and line["n"] <= rounds
        assert line["median"] > 0 and line["share_of_copy"] > 0 and line["copy_gb_per_s"] > 0


def test_every_call_takes_the_next_of_the_inputs_and_slow_variants_run_less():
    class Clock(kernels.Clock):
        def seconds(self, begin, end):
            return kernels.BUDGET_S  # each call takes all of the budget

    given = []
    steps = dict.fromkeys("ab", given.append)
    seconds = kernels.measure_in_turn(steps, [10, 20, 30], 50, Clock(torch.device("cpu")))
    assert given == [10, 20, 30] * (len(given) // 3)
    assert {name: len(own) for name, own in seconds.items()} == dict.fromkeys("ab", kernels.LEAST_ROUNDS)


def test_a_line_names_the_gpu_where_there_is_one(monkeypatch):
    if not torch.cuda.is_available():
        assert surroundings()["machine"]["gpu"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    assert surroundings()["machine"]["gpu"] == "some GPU"
