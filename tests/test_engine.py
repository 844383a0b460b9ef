"""DeepSpeed's settings are a pure function of ours; they make the optimizer meant, which moves the bytes meant."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import chosen
from hypothesis import given
from hypothesis import strategies as st
from processes import finish, start_function

from brainscale import zero
from brainscale.bench.scaling_sent import Counted
from brainscale.config import Config
from brainscale.model_counts import trained_sizes
from brainscale.plan_time import message_count
from brainscale.settings import InputError, load
from brainscale.zero import batch_split, bucket_elements, collective_bytes, deepspeed_config, vector_elements

REDUCED = {"overlap_comm": True, "reduce_bucket_size": 14_000_000}
OWNED = {"allgather_bucket_size": 50_000_000, "use_multi_rank_bucket_allreduce": False}
ZERO = {
    0: {"stage": 0},
    1: {"stage": 1, **REDUCED, **OWNED},
    2: {"stage": 2, **REDUCED, **OWNED},
    3: {
        "stage": 3,
        **REDUCED,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 12 * 768**2,
        "stage3_prefetch_bucket_size": 12 * 768**2,
        "stage3_param_persistence_threshold": 16 * 768,
    },
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
CONFIGS = Path(__file__).parent.parent / "configs"
BF16 = {"bf16": {"enabled": True, "check_grad_overflow": True}, "communication_data_type": "fp32"}
ACCUMULATED = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("settings", "world_size", "split", "zero", "others"),
    [
        (('train.precision="fp32"', "zero.stage=0"), 2, (4, 1), ZERO[0], {"gradient_clipping": 0.0}),
        (('train.precision="fp32"', "zero.stage=1"), 2, (4, 1), ZERO[1], {}),
        (('train.precision="fp32"', "zero.stage=2"), 2, (4, 1), ZERO[2], {}),
        (('train.precision="fp32"', "zero.stage=3"), 2, (4, 1), ZERO[3], {}),
        (('train.precision="fp32"', "train.micro_batch_volumes=2"), 1, (2, 4), ZERO[1], {}),
        (("zero.stage=1",), 2, (4, 1), ZERO[1], BF16),
        (("zero.stage=1", "train.micro_batch_volumes=1"), 2, (1, 4), ZERO[2], BF16 | ACCUMULATED),
        (("zero.stage=3", "train.micro_batch_volumes=2"), 4, (2, 1), ZERO[3], BF16),
        (("zero.stage=3", "train.micro_batch_volumes=1"), 4, (1, 2), ZERO[3], BF16 | ACCUMULATED),
        (("zero.stage=2", "zero.offload_optimizer=true"), 2, (4, 1), ZERO[2] | OFFLOAD, BF16),
    ],
)
def test_the_settings_are_these(settings, world_size, split, zero, others):
    """The golden text of all that DeepSpeed is told."""
    config = load(Config, None, ("train.global_batch_volumes=8", "train.grad_clip=0.5", *settings))
    micro, accumulation = split
    assert (
        deepspeed_config(config, world_size)
        == {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.5,
            "steps_per_print": 2**31,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
        }
        | others
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("zero.stage=0",), "bf16 with zero.stage 0 is another optimizer"),
        (("zero.stage=3", "train.compile=true"), "train.compile works with zero.stage 0 to 2"),
        (("zero.stage=0", 'train.precision="fp32"', "zero.offload_optimizer=true"), "needs sharded states"),
        (("zero.stage=4",), "zero.stage = 4"),
    ],
)
def test_combinations_that_mean_something_else_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        load(Config, None, settings)


@pytest.mark.parametrize("preset", ["mae_vit_s", "mae_vit_b", "mae_vit_l", "jepa_vcr_vit_s", "jepa_vcr_vit_l"])
def test_every_preset_has_several_buckets_that_are_worth_a_message(preset):
    """One bucket would be reduced when the backward pass is over, as DeepSpeed's 5e8 elements or a fixed 5e7 are."""
    config = load(Config, CONFIGS / f"{preset}.toml", ())
    sizes, bucket = trained_sizes(config), bucket_elements(config)
    assert 7 <= math.ceil(sum(sizes) / bucket) <= 13 and max(sizes) <= bucket
    assert 4 * bucket >= 20e6, "bytes of a message"


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_split_covers_the_global_batch(share, limit, ranks):
    config = load(Config, None, (f"train.global_batch_volumes={share * ranks}", f"train.micro_batch_volumes={limit}"))
    micro, accumulation = batch_split(config, ranks)
    assert micro * accumulation * ranks == share * ranks
    assert micro <= limit


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(InputError, match="= 8 is no multiple of 3 ranks"):
        batch_split(load(Config, None, ("train.global_batch_volumes=8",)), 3)


# ------------------------------------------------------------------------------------------ collectives, counted

BIG_ENOUGH = (
    "model.width=48", "model.heads=2", "model.depth=40", "mae.decoder_width=48", "mae.decoder_heads=2",
    "train.global_batch_volumes=8", "train.micro_batch_volumes=2", "train.num_steps=8",
)  # fmt: skip
"""So many blocks that what stage 3 gathers ahead is a small part."""
BUCKET_ELEMENTS = 200_000
"""An eighth of them, as in the presets."""
OPTIMIZER = {
    0: "GuardedAdamW",
    1: "DeepSpeedZeroOptimizer",
    2: "DeepSpeedZeroOptimizer",
    3: "DeepSpeedZeroOptimizer_Stage3",
}


OPERATIONS = {
    0: {"allreduce_"},
    1: {"reduce_", "_allgather_base_"},
    2: {"reduce_", "_allgather_base_"},
    3: {"_reduce_scatter_base_", "_allgather_base_"},
}
"""Collectives that carry gradients and weights (flags and norms are a few bytes)."""


def count_a_step(config_path: Path, overrides: tuple[str, ...], run_dir: Path) -> None:
    """In every rank: train three steps as `pretrain` does, count the third."""
    from brainscale import distributed, metrics, session, train
    from brainscale.watch import Watch

    zero.BUCKET_RANGE = (BUCKET_ELEMENTS, BUCKET_ELEMENTS)
    world = distributed.find()
    distributed.start(world)
    config = load(Config, config_path, overrides)
    run = session.build(config, run_dir, world, None)
    assert run is not None
    stage, bf16 = run.state.zero_stage, config.train.precision == "bf16"
    assert type(run.engine.optimizer).__name__ == OPTIMIZER[stage]
    assert run.engine.zero_optimization_stage() == stage
    if stage in (1, 2):
        assert run.engine.optimizer.overlap_comm
        assert run.engine.optimizer.partition_gradients == (stage == 2)
    if stage == 3:
        assert run.engine.zero_overlap_comm()
    batches, clock = run.loader.batches(0), metrics.Clock(0, 0.0)
    watch = Watch(world, run_dir, 600.0)
    counted = Counted(world.size)
    for step in range(3):
        if step == 2:
            counted.__enter__()
        train.compute(run, batches, step, watch, clock)
        run.model.after_step(step)
    counted.__exit__(None, None, None)
    assert run.engine.was_step_applied()
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for parameter in run.model.parameters():
        sizes[parameter.requires_grad].append(getattr(parameter, "ds_numel", parameter.numel()))
    trained, teacher = (
        (sum(of), sum(size for size in of if size < vector_elements(config))) for of in (sizes[True], sizes[False])
    )
    wanted = collective_bytes(*trained, world.size, stage, run.accumulation, bf16, teacher)
    print({kind: counted.sent[kind] / size for kind, size in wanted.items() if size})
    assert counted.sent.keys() <= {kind for kind, size in wanted.items() if size}
    for kind, size in wanted.items():
        assert counted.sent[kind] == pytest.approx(size, rel=0.02), kind
    if stage in (1, 2):
        messages = message_count(config, world.size)
        print("messages", dict(counted.calls), messages)
        assert counted.calls["weights"] == messages["weights"]
        assert counted.calls["gradients"] == pytest.approx(messages["gradients"], rel=0.2)
    all_of_them = sum(counted.operations.values())
    assert {name for name, size in counted.operations.items() if size > 0.01 * all_of_them} == OPERATIONS[stage]
    watch.close()
    distributed.wait(world)


CASES = [
    (ranks, stage, precision, split)
    for ranks in (2, 4)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    for split in ("whole", "accumulated")
    if not (precision == "bf16" and stage == 0)
]
QUICK = [(2, 1, "fp32", "whole"), (2, 2, "bf16", "accumulated")]


@pytest.mark.parametrize(
    ("ranks", "stage", "precision", "split"),
    chosen(QUICK, CASES, 9),
)
def test_a_step_moves_the_bytes_of_the_formula(ranks, stage, precision, split, tiny_store, tiny_config, tmp_path):
    """On gloo; also that the optimizer is the one meant and that communication overlaps."""
    micro = 1 if split == "accumulated" else 4
    overrides = (
        *BIG_ENOUGH, f"data.store={tiny_store}", f"zero.stage={stage}", f'train.precision="{precision}"',
        f"train.micro_batch_volumes={micro}",
    )  # fmt: skip
    finish(start_function(partial(count_a_step, tiny_config, overrides, tmp_path), ranks=ranks, logs=tmp_path / "logs"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("micro", (1, 4))
def test_a_step_with_a_teacher_too(stage, micro, tiny_store, tiny_config, tmp_path):
    overrides = (
        *BIG_ENOUGH, "objective=jepa", "jepa.predictor_width=48", "jepa.predictor_heads=2", "jepa.predictor_depth=2",
        f"data.store={tiny_store}", f"zero.stage={stage}", "train.precision=bf16", f"train.micro_batch_volumes={micro}",
    )  # fmt: skip
    finish(start_function(partial(count_a_step, tiny_config, overrides, tmp_path), ranks=2, logs=tmp_path / "logs"))
