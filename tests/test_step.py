"""A training step, seen from the host: where it waits for the device, by call site, and what of it is compiled.

The real loop runs on a CPU, where every tensor is at hand: that something reads it shows by the operation and by who
called it. What a GPU would be waited for, and what lies on the CPU anyhow, is told apart by hand, in OURS.
"""

import json
import shutil
import sys
from collections import Counter
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses
from counting import make
from processes import finish, start_function
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brainscale import hardware
from brainscale.config import Config
from brainscale.layers import Block
from brainscale.settings import load

ROOT = Path(__file__).parent.parent
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "bincount",
}  # fmt: skip
"""Operators whose result, or its shape, is known when the device is done."""
METHODS = {"item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__", "__int__", "__index__"}
"""The same as methods of tensors: on a CPU some reach no operator."""
OURS = {
    ("brainscale/masking.py", "Coverage.add"): "masks and foreground, before they go to the device",
    ("brainscale/distributed.py", "Agreement.vote"): "a vote among hosts, by gloo",
    ("kernels/patch_gather.py", "check"): "ids, where they lie on the CPU: `test_the_model_reads_nothing`",
    ("brainscale/optim.py", "GuardedAdamW.step"): "whether the norm is finite, in place of DeepSpeed",
}
"""Call sites of ours that may read, and what."""


def deepspeeds(stage: int, groups: int) -> dict[str, int]:
    """Reads of DeepSpeed 0.19.8 in a step, by function; groups: of parameters (optim.py)."""
    sharded = {"is_invalid_grad_norm": groups + 1}
    return ({}, sharded, sharded, {"is_invalid_grad_norm": 1})[stage]


class HostReads(TorchFunctionMode):
    """What would wait for a GPU, by (file, function, operation), while `counts` is true. A copy to a device counts
    where it is not told to be non_blocking."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.counts, self.operators = Counter[tuple[str, str, str]](), False, Operators(self)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        to_device = name == "to" and any(isinstance(one, torch.device) for one in (*args[1:], *kwargs.values()))
        if name in METHODS or (to_device and not kwargs.get("non_blocking") and not from_torch(sys._getframe(1))):
            self.note(name)
        return function(*args, **kwargs)

    def note(self, operation: str) -> None:
        if self.counts:
            self.found[(*caller(sys._getframe(2)), operation)] += 1

    def __enter__(self) -> "HostReads":
        super().__enter__()
        self.operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.operators.__exit__(*error)
        super().__exit__(*error)


class Operators(TorchDispatchMode):
    """Tells `reads` of the operators."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._opname
        chosen = tree_leaves(args[1]) if name in ("index", "index_put_", "index_put") else ()
        if name in READS or any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in chosen):
            self.reads.note(name)
        return function(*args, **(kwargs or {}))


def from_torch(frame: Any) -> bool:
    return "/site-packages/torch/" in frame.f_code.co_filename


def caller(frame: Any) -> tuple[str, str]:
    """(file, function) of the innermost frame that is neither torch's nor this file's."""
    while from_torch(frame) or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    file = frame.f_code.co_filename.rpartition("/site-packages/")[2].removeprefix(f"{ROOT}/")
    return file, frame.f_code.co_qualname


def train_and_watch(config_path: Path, cases: list[tuple[str, ...]], folder: Path) -> None:
    """In every rank: train by the real loop, once for each case; writes what is read in a step, on average, of all but
    the first two and the last."""
    from brainscale import distributed, stopping, train

    world = distributed.find()
    distributed.start(world)
    compute, told = train.compute, []
    torch.set_float32_matmul_precision("high")

    def watch_one(config: Config, run_dir: Path) -> HostReads:
        reads = HostReads()

        def computed(session: Any, batches: Any, step: int, *others: Any) -> Any:
            reads.counts = 2 <= step < config.train.num_steps - 1
            return compute(session, batches, step, *others)

        train.compute = computed
        with reads:
            train.run(config, run_dir, world, stopping.Stop())
        return reads

    for number, overrides in enumerate(cases):
        config = load(Config, config_path, overrides)
        found = watch_one(config, folder / f"run-{number}").found
        told.append([[*key, count / (config.train.num_steps - 3)] for key, count in sorted(found.items())])
    assert torch.get_float32_matmul_precision() == "highest", "fp32 is fp32"
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(told))
    distributed.wait(world)


FLAG = "_local_scalar_dense"
QUIET = (
    "train.num_steps=5", "log.every_steps=1000", "checkpoint.every_steps=1000", "log.holdout_every_steps=1000",
    "health.probe_every_steps=0",
)  # fmt: skip
MAE = ("objective=mae", "spectral.weight=0.01")
JEPA = (
    "objective=jepa", "jepa.predictor_width=12", "jepa.predictor_depth=1", "jepa.predictor_heads=1",
    "regularizer.kind=vcr", "mask.fraction=0.5",
)  # fmt: skip
SIGREG = (*JEPA, "regularizer.kind=sigreg")
ONE_RANK = [(MAE, 0, 2), (JEPA, 1, 2), (MAE, 2, 2), (JEPA, 3, 2)]
WHOLE = [(objective, stage, 4) for objective in (MAE, JEPA, SIGREG) for stage in (0, 1, 2, 3)]
TWO_RANKS = [(objective, stage, micro) for objective in (MAE, JEPA) for stage, micro in ((1, 2), (2, 1), (3, 2))]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(1, ONE_RANK), pytest.param(1, WHOLE, marks=pytest.mark.slow), pytest.param(2, TWO_RANKS, marks=pytest.mark.slow)],
    ids=["accumulated", "whole", "two ranks"],
)
def test_what_a_step_that_is_not_logged_reads_is_deepspeeds(ranks, cases, tiny_store, tiny_config, tmp_path):
    """(objective, ZeRO stage, volumes of a micro-batch) of 4 a step. A read of ours, or one that a newer DeepSpeed
    adds, is a failure that names the function."""
    settings = [
        (
            *QUIET, f"data.store={tiny_store}", *objective, f"zero.stage={stage}",
            f"train.micro_batch_volumes={micro}", f"train.precision={'bf16' if stage else 'fp32'}",
        )
        for objective, stage, micro in cases
    ]  # fmt: skip
    function = partial(train_and_watch, tiny_config, settings, tmp_path)
    finish(start_function(function, ranks=ranks, logs=tmp_path), timeout_s=300)
    for rank in range(ranks):
        for (objective, stage, _), found in zip(cases, json.loads((tmp_path / f"rank-{rank}.json").read_text())):
            ours = {(file, name) for file, name, _, _ in found if not file.startswith("deepspeed/")}
            assert ours <= OURS.keys(), "a read of ours"
            finite = [
                count for file, _, operation, count in found if (file, operation) == ("brainscale/optim.py", FLAG)
            ]
            assert finite == ([1] if stage == 0 else []), "once a step, at stage 0"
            groups = 2 if objective is MAE else 4
            theirs = {
                name.rpartition(".")[2]: count
                for file, name, operation, count in found
                if file.startswith("deepspeed/") and operation == FLAG
            }
            assert theirs == deepspeeds(stage, groups), stage


@pytest.mark.parametrize("objective", [MAE, (*MAE, "spectral.scope=patch", "mae.normalize_target=true"), JEPA])
def test_the_model_reads_nothing(objective):
    """On the meta device, where there is nothing to read, and a step that does not look at its tensors goes through
    (regularizers are left out: torch's autocast does not know that device)."""
    small = ("model.width=24", "model.heads=2", "model.depth=1", "model.patch_voxels_zyx=[8,8,8]")
    config = load(Config, None, (*small, *objective, "regularizer.kind=none", "kernels=reference"))
    model, batch, masks = make(config, (16, 24, 16), 2, device="meta")
    loss = model(batch, masks, 0).loss
    loss.backward()
    assert loss.is_meta and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


def test_mfu_is_a_share_of_what_the_device_can_do_in_that_precision():
    assert hardware.peak_flops("NVIDIA H200", "bf16") == 788e12, "measured; its data sheet says 989"
    assert hardware.peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert hardware.peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12, "not TF32's 156"
    assert hardware.peak_flops("Tesla V100-SXM2-32GB", "bf16") is None
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None, "a seventh of one"
    for name, peak in hardware.PEAKS.items():
        assert peak.bf16_tflops > 3 * peak.fp32_tflops or name.startswith(("Tesla", "NVIDIA L40")), "dense, not sparse"


# ------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("given", ["a student's", "a teacher's", "with fixed positions", "a last one's"])
def test_a_block_is_one_graph(given):
    block = Block(24, 2).requires_grad_(given != "a teacher's")
    turn = None if given == "with fixed positions" else (torch.ones(2, 1, 10, 6), torch.zeros(2, 1, 10, 6))
    arguments = (torch.randn(2, 10, 24), turn, *((4,) if given == "a last one's" else ()))
    torch._dynamo.reset()
    with torch.set_grad_enabled(given != "a teacher's"):
        found = torch._dynamo.explain(block)(*arguments)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def train_compiled(config_path: Path, cases: list[tuple[str, ...]], folder: Path, backend: str) -> None:
    """In every rank: train plain; the same, compiled from the fourth step on, by the real loop with evaluations. Writes
    dynamo's counts as they are before every step, and at the end."""
    from brainscale import distributed, stopping, train

    world = distributed.find()
    distributed.start(world)
    compute, seen = train.compute, []
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=backend)

    def computed(*arguments: Any) -> Any:
        seen[-1].append(counts())
        return compute(*arguments)

    def run(run_dir: Path, *overrides: str) -> None:
        train.run(load(Config, config_path, overrides), run_dir, world, stopping.Stop())

    for number, overrides in enumerate(cases):
        run(folder / f"plain-{number}", *overrides, "train.compile=false")
        run(folder / f"compiled-{number}", *overrides, "train.compile=false", "train.num_steps=4")
        torch._dynamo.reset()
        counters.clear()
        seen.append([])
        train.compute = computed
        run(folder / f"compiled-{number}", *overrides, "train.compile=true")
        train.compute = compute
        seen[-1].append(counts())
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(seen))
    distributed.wait(world)


def counts() -> dict[str, int]:
    """What dynamo has done since it was reset."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "frames": counters["frames"]["total"],
        "breaks": sum(counters["graph_break"].values()) + sum(counters["unimplemented"].values()),
    }


DEEP = ("model.depth=3", "mae.decoder_depth=3", "jepa.predictor_depth=3", "optim.final_lr_fraction=1.0")
EVALUATED = ("train.num_steps=8", "log.holdout_every_steps=2", "health.probe_every_steps=2")
RECOMPUTED = ("train.activation_checkpointing=true",)
GRAPHS = {MAE: 3, JEPA: 5}
"""Of encoder, decoder, its last block; of a JEPA's teacher and its last block, too."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "backend", "cases"),
    [
        (1, "inductor", [(MAE, 1, RECOMPUTED)]),
        (1, "aot_eager", [(MAE, 2, ()), (JEPA, 1, ()), (JEPA, 0, RECOMPUTED)]),
        (2, "aot_eager", [(MAE, 1, RECOMPUTED), (JEPA, 2, ())]),
    ],
)
def test_compiled_blocks_break_nowhere_and_stay_as_they_are(ranks, backend, cases, tiny_store, tiny_config, tmp_path):
    """Per block under a real engine: every shape is one graph, all are made in the first step, evaluations make none; a
    plain run goes on compiled, on the same path. aot_eager is all of the way but the last part, which makes code."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on a CPU")
    settings = [
        (*objective, *DEEP, *EVALUATED, f"data.store={tiny_store}", f"zero.stage={stage}", *more)
        for objective, stage, more in cases
    ]
    function = partial(train_compiled, tiny_config, settings, tmp_path, backend)
    finish(start_function(function, ranks=ranks, logs=tmp_path), timeout_s=600)
    for rank in range(ranks):
        for (objective, *_), found in zip(cases, json.loads((tmp_path / f"rank-{rank}.json").read_text())):
            before, *after = found
            assert before["graphs"] == 0 and len(after) == 4
            assert all(one == after[0] for one in after), "nothing is compiled after the first step"
            assert (after[0]["graphs"], after[0]["breaks"]) == (GRAPHS[objective], 0)
    for number in range(len(cases)):
        assert losses(tmp_path / f"compiled-{number}") == pytest.approx(losses(tmp_path / f"plain-{number}"), rel=1e-4)
