"""The memory that a plan predicts is what a step holds: saved activations and DeepSpeed's buffers, counted on a CPU."""

from functools import partial
from pathlib import Path

import pytest
from conftest import chosen
from counting import Live, kept_bytes, make
from processes import finish, start_function
from torch.nn.attention import SDPBackend, sdpa_kernel

from brainscale import plan_memory, zero
from brainscale.config import Config
from brainscale.geometry import Zyx
from brainscale.layers import recompute_first
from brainscale.masking import draw_masks
from brainscale.model_counts import recomputed_or, tokens_of
from brainscale.settings import load
from brainscale_kernels import spectral_volume

SMALL = (
    "model.width=96", "model.heads=4", "model.depth=3", "model.patch_voxels_zyx=[8,8,8]", "mae.decoder_width=48",
    "mae.decoder_heads=2", "mae.decoder_depth=2", "jepa.predictor_width=48", "jepa.predictor_heads=2",
    "jepa.predictor_depth=2",
)  # fmt: skip
VOLUME: Zyx = (32, 48, 32)


# ------------------------------------------------------------------------------------------ activations


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize(
    "settings",
    [
        ("spectral.weight=0",),
        ("spectral.weight=0", 'mae.pixel_loss="l1"', "mae.normalize_target=true", "mask.fraction=0.5"),
        ("spectral.weight=0", 'model.position="sincos"', "train.activation_checkpointing=true"),
        ("spectral.scope=patch",),
        ("spectral.scope=volume",),
        ("objective=jepa", 'regularizer.kind="vcr"'),
        ("objective=jepa", 'model.position="sincos"', "mask.fraction=0.6"),
        ("objective=jepa", "train.activation_checkpointing=true", "mask.fraction=0.5"),
        ("objective=jepa", "mask.shared=true", 'regularizer={kind="vcr", compat="paper"}'),
    ],
)
def test_what_a_forward_pass_keeps(settings, precision):
    """Within 5 %: the plan leaves out ids, a CPU keeps statistics of norms in bf16, hooks do not see tables of
    positions that checkpointing keeps."""
    config = load(
        Config, None, (*SMALL, *settings, f'train.precision="{precision}"', "data.crop_voxels_zyx=[32,48,32]")
    )
    model, batch, masks = make(config, VOLUME, 2)
    recompute_first(model, recomputed_or(config, None))
    tokens = tokens_of(config, VOLUME)
    saved = plan_memory.activations(config, tokens, 2, fused=True)
    units, _ = plan_memory.loss_parts(config, tokens, 2, "reference")
    assert sum(part.bytes for part in (*saved, units)) == pytest.approx(kept_bytes(model, batch, masks), rel=0.05)


@pytest.mark.parametrize("position", ("rope", "sincos"))
def test_what_unfused_attention_keeps(position):
    config = load(Config, None, (*SMALL, f'model.position="{position}"', "spectral.weight=0", 'train.precision="fp32"'))
    model, batch, masks = make(config, VOLUME, 2)
    tokens = tokens_of(config, VOLUME)
    with sdpa_kernel(SDPBackend.MATH):
        counted = kept_bytes(model, batch, masks)
    saved = plan_memory.activations(config, tokens, 2, fused=False)
    units, _ = plan_memory.loss_parts(config, tokens, 2, "reference")
    assert sum(part.bytes for part in (*saved, units)) == pytest.approx(counted, rel=0.05)
    scores = 2 * 4 * (3 * 4 * tokens.visible**2 + 2 * 2 * tokens.total**2)
    assert scores > 0.1 * counted


def test_groups_of_volumes_are_those_of_the_kernel():
    assert plan_memory.SPECTRAL_GROUP_VOXELS == spectral_volume.GROUP_VOXELS


# --------------------------------------------------------------------------------------- a step's peaks

STEP = (
    "model.width=96", "model.heads=4", "model.depth=8", "mae.decoder_width=48", "mae.decoder_heads=2",
    "mae.decoder_depth=2", "jepa.predictor_width=48", "jepa.predictor_heads=2", "jepa.predictor_depth=2",
    "spectral.weight=0", "health.probe_every_steps=0", 'kernels="reference"',
)  # fmt: skip
BUCKET_ELEMENTS = 200_000


def watch_a_step(config_path: Path, overrides: tuple[str, ...], run_dir: Path) -> None:
    """In every rank: the third step as `pretrain` takes it, its most live bytes against the plan's at each moment."""
    from brainscale import distributed, nonfinite, session

    zero.BUCKET_RANGE = (BUCKET_ELEMENTS, BUCKET_ELEMENTS)
    world = distributed.find()
    distributed.start(world)
    config = load(Config, config_path, overrides)
    run = session.build(config, run_dir, world, None)
    assert run is not None
    batches, live = run.loader.batches(0), Live()
    for step in range(3):
        taken = [next(batches)[0] for _ in range(run.accumulation)]
        if step == 2:
            live.know_all()
            live.__enter__()
        for batch in taken:
            masks = draw_masks(config, batch.sample_index, batch.foreground, run.grid_zyx)
            live.phase = "forward"
            out = run.engine(batch, masks, step)
            live.phase = "backward"
            run.engine.backward(nonfinite.guarded(out.loss))
            if config.zero.stage < 3:  # stage 3 keeps the buffer that it reduces in
                live.wait_for_gloo()
            live.phase = "step"
            run.engine.step()
        run.model.after_step(step)
    live.__exit__(None, None, None)
    memory = plan_memory.predict(config, tokens_of(config, run.loader.reader.volume_zyx), world.size, 2, "reference")
    most = {phase: memory.tensor_bytes(phase) for phase in memory.phases}
    wanted = {
        "forward": max(size for phase, size in most.items() if "forward" in phase or phase == "loss"),
        "backward": max(size for phase, size in most.items() if "backward" in phase),
        "step": most["optimizer step"],
    }
    for phase, size in wanted.items():
        print(phase, live.peak[phase], size / live.peak[phase])
    for phase, size in wanted.items():
        assert size == pytest.approx(live.peak[phase], rel=0.1), phase
    distributed.wait(world)


CASES = [
    (stage, precision, micro, objective)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    for micro in (2, 1)
    for objective in ("mae", "jepa")
    if not (precision == "bf16" and stage == 0)
]
QUICK = [(1, "bf16", 2, "mae"), (3, "bf16", 2, "jepa")]


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "objective"),
    chosen(QUICK, CASES, 9),
)
def test_what_two_ranks_hold_during_a_step(stage, precision, micro, objective, tiny_store, tiny_config, tmp_path):
    """Within 10 % at each moment, with buckets that are small beside the model."""
    overrides = (
        *STEP, f"data.store={tiny_store}", f"zero.stage={stage}", f'train.precision="{precision}"',
        f"train.micro_batch_volumes={micro}", f"objective={objective}",
    )  # fmt: skip
    finish(start_function(partial(watch_a_step, tiny_config, overrides, tmp_path), ranks=2, logs=tmp_path / "logs"))
