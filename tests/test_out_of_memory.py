"""Memory runs out: what is taken for it, what is proposed, and a real run in too little of it."""

import json
import resource
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import finish, start_function

from brainscale.config import Config
from brainscale.distributed import World
from brainscale.out_of_memory import (
    EXPANDABLE,
    Change,
    Guard,
    OutOfMemory,
    Usage,
    asked_bytes,
    changes,
    is_about_memory,
    of_host,
    sentence,
)
from brainscale.phases import phase

CPU = World(0, 1, 0, torch.device("cpu"), "single")
GIB = 2**30
VIT_L = {
    "model": {"width": 1024, "depth": 24, "heads": 16},
    "train": {"global_batch_volumes": 512, "micro_batch_volumes": 64, "activation_checkpointing": False},
}


def gpu(ranks: int = 1) -> World:
    """A rank on a GPU, which nothing here asks for anything."""
    return World(0, ranks, 0, torch.device("cuda", 0), "torchrun")


def proposed(world: World, usage: Usage, settings: dict[str, Any] = VIT_L, begun: bool = True) -> list[str]:
    """What is to be changed, in order."""
    volume_zyx = (160, 192, 160) if begun else None
    return [one.what for one in changes(Config.model_validate(settings), world, volume_zyx, usage, "encoder")]


def test_errors_of_torch_and_numpy_are_known_with_what_they_asked_for():
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(10**16, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**53, dtype=np.uint8)
    assert is_about_memory(of_torch.value) and asked_bytes(str(of_torch.value)) == 10**16
    assert is_about_memory(of_numpy.value) and asked_bytes(str(of_numpy.value)) == 2**53
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of …")
    assert is_about_memory(cuda) and asked_bytes(str(cuda)) == 2.5 * GIB
    assert is_about_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert asked_bytes("CUDA error: out of memory") is None
    assert not is_about_memory(RuntimeError("shapes differ")) and not is_about_memory(ValueError("out of memory"))


def test_the_host_s_memory_is_that_of_the_machine():
    usage = of_host("you tried to allocate 4096 bytes")
    assert usage.asked == 4096 and usage.tensors is None
    assert 0 < usage.process < usage.total and 0 < usage.free < usage.total


def test_what_is_proposed_for_a_gpu_fits_by_prediction_and_the_cheapest_comes_first():
    full = Usage(2 * GIB, 80 * GIB, GIB, 77 * GIB, GIB, 78 * GIB)
    found = proposed(gpu(), full)
    assert found[0] == "train.activation_checkpointing=true" and found[-1].endswith("a smaller model")
    assert found[1] == "train.micro_batch_volumes=32"
    every = changes(Config.model_validate(VIT_L), gpu(), (160, 192, 160), full, "")
    assert [one.what for one in every if one.gib is not None and one.gib < 72] == found[:-1]
    assert not any(one.startswith("zero.stage") for one in found), "one rank has nobody to share with"
    assert not any(one.startswith("zero.stage") for one in proposed(gpu(8), full)), "sharding leaves too little room"
    large = {"model": {"width": 4096, "depth": 48, "heads": 32}, "train": {"micro_batch_volumes": 1}}
    assert "zero.stage=3" in proposed(gpu(8), full, large)


def test_memory_that_others_hold_or_that_is_in_pieces_comes_before_all(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    others = proposed(gpu(), Usage(GIB, 80 * GIB, GIB, 50 * GIB, GIB / 2, 51 * GIB))
    assert others[0] == "end what else is on this GPU (28.00 GiB)"
    pieces = Usage(GIB, 80 * GIB, GIB, 50 * GIB, 28 * GIB, 78 * GIB)
    assert proposed(gpu(), pieces)[0] == f"set PYTORCH_CUDA_ALLOC_CONF={EXPANDABLE} in the environment"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", EXPANDABLE)
    assert proposed(gpu(), pieces)[0] == "train.activation_checkpointing=true"


def test_before_the_first_step_no_smaller_batch_is_proposed():
    full = Usage(GIB, 80 * GIB, GIB / 2, 79 * GIB, 0.1 * GIB, 79.5 * GIB)
    assert proposed(gpu(), full, begun=False) == ["zero.offload_optimizer=true", "more ranks, a smaller model"]
    assert proposed(CPU, Usage(GIB, 80 * GIB, GIB, None, None, GIB), begun=False) == ["more ranks, a smaller model"]


def test_the_sentence():
    usage = Usage(2 * GIB, 80 * GIB, 0.05 * GIB, 77.5 * GIB, 1.25 * GIB, 78.75 * GIB)
    tried = [Change("train.micro_batch_volumes=32", 61.23), Change("a smaller model", None)]
    assert sentence("in step 3 (decoder)", "NVIDIA H200", usage, tried) == (
        "out of memory in step 3 (decoder) on NVIDIA H200: 2.00 GiB were asked for, 51.2 MiB of 80.00 GiB are free, "
        "tensors hold 77.50 GiB, torch keeps 1.25 GiB unused; change one of these, the cheapest first: "
        "train.micro_batch_volumes=32 (about 61.2 GiB by `brainscale plan`); or a smaller model"
    )


def test_another_error_is_left_alone(tmp_path):
    assert Guard(Config(), tmp_path, CPU).explain(RuntimeError("shapes differ")) is None
    assert not (tmp_path / "oom").exists()


def in_little_memory(more_bytes: int, arguments: list[str]) -> None:
    """A command that has so much more memory once its first batch is there."""
    from brainscale import cli, train

    draw_masks = train.draw_masks

    def limited(*given: Any) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes,) * 2)
        return draw_masks(*given)

    train.draw_masks = limited
    cli.main(arguments)


@pytest.mark.slow
def test_a_rank_that_runs_out_says_where_and_what_to_change(tiny_store, tiny_config, tmp_path):
    wide = ["mae.decoder_width=512", "model.patch_voxels_zyx=[4,4,4]", "train.global_batch_volumes=128"]
    run = tmp_path / "run"
    arguments = ["pretrain", str(tiny_config), f"data.store={tiny_store}", f"run.dir={run}", *wide]
    arguments += ["train.micro_batch_volumes=64"]
    limits = [partial(in_little_memory, more, arguments) for more in (2**40, 160 * 2**20)]
    first, second = finish(start_function(limits, ranks=2, logs=tmp_path / "logs"), code=None)
    said = next(line for line in second.text.splitlines() if line.startswith("error"))
    assert second.process.exitcode == 2 and "Traceback" not in second.text
    assert said.startswith("error (rank 1): out of memory in step 1 (decoder) on cpu")
    assert "train.activation_checkpointing=true; or train.micro_batch_volumes=32; or " in said
    report = run / "oom" / "rank-0001-step-00000001.txt"
    assert str(report) in said and "Traceback" in report.read_text()
    assert first.process.exitcode == 5 and "rank 1" in first.text and "OutOfMemory: out of memory" in first.text
    assert json.loads((run / "exit.json").read_text())["code"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: its allocator's snapshot is written")
def test_a_gpu_s_memory_is_written_as_it_runs_out(tmp_path):
    guard = Guard(Config(), tmp_path, World(0, 1, 0, torch.device("cuda", 0), "single"))
    guard.start(4, (160, 192, 160))
    guard.at(5)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught, phase("encoder"):
            kept = [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(200)]
            del kept
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.memory._record_memory_history(enabled=None)
    spent = guard.explain(caught.value)
    assert (
        isinstance(spent, OutOfMemory) and "in step 5 (encoder)" in str(spent) and "1.00 GiB were asked" in str(spent)
    )
    assert (tmp_path / "oom" / "rank-0000-step-00000005.pickle").stat().st_size > 1000
