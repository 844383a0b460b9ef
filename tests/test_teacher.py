"""The teacher follows the student's fp32 weights as a float64 average would, at every ZeRO stage; kills change
nothing."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FULL
from processes import finish, start_function

from brainscale import distributed, metrics, session, watch
from brainscale import engine as deep
from brainscale.config import Config
from brainscale.settings import load
from brainscale.train import compute

JEPA = (
    "objective=jepa",
    "jepa.predictor_width=12",
    "jepa.predictor_depth=1",
    "jepa.predictor_heads=1",
    "mask.fraction=0.5",
)
BF16 = ("train.precision=bf16",)


def follow(config_path: Path, overrides: tuple[str, ...], folder: Path, steps: int) -> None:
    """Train for some steps; compare the teacher with a float64 average of the student's masters, seen at every step."""
    world = distributed.find()
    distributed.start(world)
    config = load(Config, config_path, overrides)
    run = session.build(config, folder / "run", world, None)
    assert run is not None
    model, engine = run.model, run.engine
    pairs = list(zip(model.encoder.parameters(), model.teacher.parameters(), strict=True))
    reference = [deep.full(engine, student).double().clone() for student, _ in pairs]
    begin = [value.clone() for value in reference]
    batches, beats, clock = run.loader.batches(0), watch.Watch(world, folder, 600.0), metrics.Clock(0, 0.0)
    for step in range(steps):
        compute(run, batches, step, beats, clock)
        assert engine.was_step_applied()
        model.after_step(step)
        for value, (student, _) in zip(reference, pairs):
            value.lerp_(deep.full(engine, student).double(), 1 - config.jepa.momentum)
    errors, moved, computed = [], [], []
    for value, first, (_, teacher) in zip(reference, begin, pairs):
        held = model.average.full(teacher).double()
        errors.append(float((held - value).norm() / value.norm().clamp(min=1e-30)))
        moved.append(float((value - first).norm() / first.norm().clamp(min=1e-3)))
        with deep.deepspeed.zero.GatheredParameters([teacher], enabled=engine.zero_optimization_stage() == 3):
            computed.append(bool(torch.equal(teacher.detach(), held.to(teacher.dtype))))
    trained = {id(p) for group in deep.torch_optimizer(engine).param_groups for p in group["params"]}
    assert not trained & {id(teacher) for _, teacher in pairs}
    found = {
        "errors": errors,
        "moved": moved,
        "computed": computed,
        "frozen": not any(t.requires_grad for _, t in pairs),
    }
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
    batches.close()
    beats.close()
    distributed.wait(world)


QUICK = [(1, 1, ()), (1, 2, BF16), (2, 3, ()), (3, 3, BF16)]
OTHERS = [
    (0, 1, ()), (0, 2, ()), (1, 1, BF16), (1, 2, ()), (2, 2, ()), (3, 2, ()), (2, 2, BF16), (3, 2, BF16),
    (2, 2, (*BF16, "zero.offload_optimizer=true")), (1, 2, (*BF16, "train.micro_batch_volumes=2")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "ranks", "settings"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_the_teacher_is_a_float64_average(stage, ranks, settings, tiny_store, tiny_config, tmp_path):
    check(stage, ranks, settings, tiny_store, tiny_config, tmp_path, steps=6, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks", "settings"), [(1, 2, BF16), (2, 2, BF16), (3, 2, BF16)])
def test_after_a_thousand_steps_too(stage, ranks, settings, tiny_store, tiny_config, tmp_path):
    steps = 1000 if FULL else 200
    check(stage, ranks, settings, tiny_store, tiny_config, tmp_path, steps=steps, momentum=0.99925)


def check(stage, ranks, settings, tiny_store, tiny_config, tmp_path, steps, momentum):
    overrides = (
        *JEPA, *settings, f"zero.stage={stage}", f"data.store={tiny_store}", f"jepa.momentum={momentum}",
        f"train.global_batch_volumes={12 if ranks == 3 else 4}", f"train.num_steps={steps}",
    )  # fmt: skip
    finish(
        start_function(partial(follow, tiny_config, overrides, tmp_path, steps), ranks=ranks, logs=tmp_path),
        timeout_s=560,
    )
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert max(found["errors"]) <= 1e-5, found["errors"]
        assert min(found["moved"]) > 1e-4, "every weight of the teacher has moved"
        assert all(found["computed"]) and found["frozen"]
