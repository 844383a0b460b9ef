"""The teacher follows the student's fp32 weights as a float64 average would, at every ZeRO stage; kills change
nothing."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FULL, chosen, losses, write_tiny_store
from processes import finish, run_ranks, start_function
from safetensors.torch import load_file

from brainscale import checkpoint, distributed, metrics, session, watch
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


QUICK = [(1, 2, BF16)]
OTHERS = [
    (3, 3, BF16),
    (1, 1, ()), (2, 3, ()), (0, 1, ()), (0, 2, ()), (1, 1, BF16), (1, 2, ()), (2, 2, ()), (3, 2, ()), (2, 2, BF16),
    (3, 2, BF16), (2, 2, (*BF16, "zero.offload_optimizer=true")), (1, 2, (*BF16, "train.micro_batch_volumes=2")),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "ranks", "settings"), chosen(QUICK, OTHERS, 7))
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


# ------------------------------------------------------------------------------------------- kills and resumes


def pretrain(tiny_store, tiny_config, run, *overrides, ranks=1, faults="", code=0):
    return run_ranks(
        "pretrain", tiny_config, *JEPA, "regularizer.kind=vcr", "jepa.momentum=0.9", f"data.store={tiny_store}",
        f"run.dir={run}", "train.num_steps=12", *overrides, ranks=ranks, faults=faults, logs=run.with_suffix(".logs"),
        code=code,
    )  # fmt: skip


def weights(run, step=12):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


@pytest.mark.parametrize(
    ("stage", "ranks", "settings"),
    [
        (1, 1, ()),
        pytest.param(2, 2, BF16, marks=pytest.mark.slow),
        pytest.param(3, 2, BF16, marks=pytest.mark.slow),
        pytest.param(0, 1, (), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_same_teacher(stage, ranks, settings, tiny_store, tiny_config, tmp_path):
    settings = (*settings, f"zero.stage={stage}")
    pretrain(tiny_store, tiny_config, tmp_path / "unbroken", *settings, ranks=ranks)
    pretrain(
        tiny_store, tiny_config, tmp_path / "killed", *settings, ranks=ranks, faults="step.backward:kill@hit=7", code=-9
    )
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000012").exists()
    pretrain(tiny_store, tiny_config, tmp_path / "killed", *settings, ranks=ranks)
    one, two = weights(tmp_path / "unbroken"), weights(tmp_path / "killed")
    assert one.keys() == two.keys() and any(name.startswith("teacher.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one), "bit for bit"
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "killed")
    assert not any(torch.equal(one[f"teacher.{n}"], one[f"encoder.{n}"]) for n in ("embed.weight", "trunk.norm.weight"))


def reload(config_path: Path, overrides: tuple[str, ...], source: Path, folder: Path) -> None:
    """Load a checkpoint at this number of ranks and stage, and save what was loaded again."""
    world = distributed.find()
    distributed.start(world)
    config = load(Config, config_path, overrides)
    run = session.build(config, folder / "run", world, source)
    assert run is not None
    for teacher in run.model.teacher.parameters():
        held = run.model.average.full(teacher)
        with deep.deepspeed.zero.GatheredParameters([teacher], enabled=run.engine.zero_optimization_stage() == 3):
            assert torch.equal(teacher.detach(), held.to(teacher.dtype)), "it computes with what was loaded"
    saver = checkpoint.Saver(run.engine, folder / "again", world, config.checkpoint)
    saver.save(run.state, wait=True)
    distributed.wait(world)


OTHER = [(3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 3), (1, 2), (1, 4), (3, 4)))]


@pytest.mark.parametrize(("stage", "ranks"), OTHER)
def test_a_teacher_is_the_same_at_another_world_size(stage, ranks, tiny_store, tiny_config, tmp_path):
    batch = ("train.global_batch_volumes=12", "train.micro_batch_volumes=12")
    pretrain(tiny_store, tiny_config, tmp_path / "run", *BF16, *batch, "train.num_steps=8")
    overrides = (
        *JEPA, "regularizer.kind=vcr", "jepa.momentum=0.9", "train.num_steps=8", f"data.store={tiny_store}", *BF16,
        *batch, f"zero.stage={stage}",
    )  # fmt: skip
    source = tmp_path / "run" / "checkpoints" / "step-00000004"
    function = partial(reload, tiny_config, overrides, source, tmp_path)
    finish(start_function(function, ranks=ranks, logs=tmp_path))
    one, two = weights(tmp_path / "run", 4), load_file(tmp_path / "again" / "step-00000004" / "weights.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_another_number_of_volumes_under_the_regularizer_is_refused(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    pretrain(tiny_store, tiny_config, run, "train.num_steps=4")
    text = pretrain(tiny_store, tiny_config, run, "train.micro_batch_volumes=2", code=2)[0].text
    assert "the regularizer looks at 2 volumes at once" in text and "looked at 4" in text
    pretrain(tiny_store, tiny_config, run, "train.micro_batch_volumes=2", "--allow-change", "regularizer")
    assert (run / "checkpoints" / "step-00000012").is_dir()


@pytest.mark.slow
def test_a_step_after_a_checkpoint_is_replayed_with_the_teacher_it_had(tiny_store, tiny_config, tmp_path):
    run = tmp_path / "run"
    pretrain(tiny_store, tiny_config, run)
    text = run_ranks("replay", run, "11", logs=tmp_path)[0].text
    assert "2 step(s) before it done again" in text and "a relative difference of 0.0e+00" in text


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_step_that_is_left_out_does_not_move_the_teacher(stage, ranks, tiny_config, tmp_path):
    def spoil(record):
        if record["row"] == 3:
            record["std"] = 1e-45  # its voxels are not finite when they are normalised

    store, run = write_tiny_store(tmp_path / "store", scans=20, change=spoil), tmp_path / "run"
    more = (
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=100",
        "regularizer.kind=none",
        "data.holdout_fraction=0.0",
        f"zero.stage={stage}",
    )
    pretrain(store, tiny_config, run, *more, ranks=ranks)
    skipped = [step for step, loss in losses(run).items() if loss is None]
    assert skipped and len(skipped) < 6
    for step in range(2, 13):
        one, two = ({n: w for n, w in weights(run, at).items() if n.startswith("teacher.")} for at in (step - 1, step))
        assert all(torch.equal(one[name], two[name]) for name in one) == (step in skipped)


def half_of_the_foreground(config_path: Path, overrides: tuple[str, ...], folder: Path) -> None:
    """Steps on volumes whose foreground is made one end of the grid: half of it is hidden in every one."""
    world = distributed.find()
    distributed.start(world)
    run = session.build(load(Config, config_path, overrides), folder / "run", world, None)
    assert run is not None
    cells = np.zeros((4, 6, 4), np.uint8)
    cells[:2] = 255
    run.store.foreground = lambda rows: np.stack([cells for _ in rows])
    batches, beats, clock = run.loader.batches(0), watch.Watch(world, folder, 600.0), metrics.Clock(0, 0.0)
    for step in range(5):
        compute(run, batches, step, beats, clock)
        assert run.coverage.read()["mask_foreground_fraction"] == 0.5
    batches.close()


def test_training_draws_masks_by_each_volumes_foreground(tiny_store, tiny_config, tmp_path):
    overrides = (*JEPA, f"data.store={tiny_store}", "mask.foreground_aware=true")
    function = partial(half_of_the_foreground, tiny_config, overrides, tmp_path)
    finish(start_function(function, ranks=1, logs=tmp_path))
