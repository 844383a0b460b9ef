"""The loop. A volume enters through `batches`, the loss is `engine(batch, masks)`, a killed job resumes at `load`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainscale import checkpoint, metrics, provenance, run_folder
from brainscale import engine as deep
from brainscale.checkpoint import TrainState
from brainscale.config import Config
from brainscale.distributed import World, wait
from brainscale.geometry import token_grid
from brainscale.holdout import Holdout
from brainscale.layers import initialise
from brainscale.loader import Loader, Reader
from brainscale.mae import Mae, mae_flops
from brainscale.masking import draw_masks, masked_count
from brainscale.ops import choose
from brainscale.regularizers import spectral_weight
from brainscale.schedules import due, learning_rate

OBJECTIVES = {"mae": Mae}


class TrainingStopped(RuntimeError):
    """The run stopped itself (exit code 5); the message says why."""


def run(config: Config, run_dir: Path, world: World, allow_change: tuple[str, ...] = ()) -> None:
    """Train to `train.num_steps`, continuing from the newest checkpoint of the run folder.

    allow_change: keys that a resumed run may change besides those of MAY_CHANGE_ON_RESUME. The process group must
    exist. Raises InputError for settings or data that cannot work, TrainingStopped for a non-finite loss.
    """
    with run_folder.locked(run_dir, world):
        store = run_folder.open_everywhere(config.data.store, world)
        reader = Reader(store, config.model.patch_voxels_zyx, config.data.crop_voxels_zyx)
        masked_count(config.mask.fraction, int(np.prod(reader.grid_zyx)))
        train_rows, held_rows = run_folder.split_rows(store, config)
        micro, accumulation = deep.batch_split(config, world.size)
        state = TrainState(
            step=0, updates=0, cursor=0, time_s=0.0, config=config.model_dump(mode="json"), plan_hash=store.plan_hash,
            data_hash=run_folder.data_hash(store, train_rows), volume_zyx=reader.volume_zyx,
            versions=provenance.versions(),
        )  # fmt: skip
        found = checkpoint.newest(run_dir / "checkpoints", world)
        if found is not None:
            saved = checkpoint.read_state(found)
            run_folder.check_resume(saved, state, allow_change)
            if saved.step >= config.train.num_steps:
                if world.is_first:
                    print(f"{run_dir}: already done ({saved.step} of {config.train.num_steps} steps)", flush=True)
                return
            state = replace(state, step=saved.step, cursor=saved.cursor, time_s=saved.time_s)
        voice = metrics.Voice(world, config.train.num_steps, state.step)
        kernels = choose(config.kernels, world.device)
        voice.line(f"{world.size} rank(s) on {run_folder.device_name(world)}; kernels: {kernels}")
        model = OBJECTIVES[config.objective](config, reader.volume_zyx)
        initialise(model, torch.Generator().manual_seed(config.seed))
        engine = deep.start(model, config, world)
        if found is not None:
            checkpoint.load(engine, found)
            voice.line(f"resumed from {found} at step {state.step}")
        if world.is_first:
            run_folder.describe(run_dir, config, store, train_rows, held_rows, world)
        loader = Loader(reader, train_rows, config, world.rank, world.size, micro)
        holdout = Holdout(reader, held_rows, train_rows, config) if len(held_rows) else None
        try:
            train(engine, model, loader, holdout, config, state, world, run_dir, voice, accumulation)
        finally:
            voice.close()


def train(
    engine: Any, model: Mae, loader: Loader, holdout: Holdout | None, config: Config, state: TrainState, world: World,
    run_dir: Path, voice: metrics.Voice, accumulation: int,
) -> None:  # fmt: skip
    """The steps from `state.step` to the end."""
    grid = token_grid(loader.reader.volume_zyx, config.model.patch_voxels_zyx)
    tokens = int(np.prod(grid))
    meter, clock = metrics.Meter(world), metrics.Clock(state.step, state.time_s)
    writer = metrics.Writer(run_dir, state.step) if world.is_first else None
    batches = loader.batches(state.cursor)
    for step in range(state.step, config.train.num_steps):
        lr = learning_rate(
            step, config.optim.lr, config.optim.final_lr_fraction, config.optim.warmup_steps, config.train.num_steps
        )
        deep.set_learning_rate(engine, lr)
        for _ in range(accumulation):
            with clock.span("data_s"):
                batch, cursor = next(batches)
            masks = draw_masks(config.mask, config.seed, batch.sample_index, tokens)
            out = engine(batch.to(world.device), masks.to(world.device), spectral_weight(config.spectral, step))
            engine.backward(out.loss)
            engine.step()
            meter.add(out)
        model.after_step(step)
        state = replace(state, step=step + 1, cursor=cursor, time_s=clock.total_s())
        last = state.step == config.train.num_steps
        saves = due(state.step, config.checkpoint.every_steps) or last

        if due(state.step, config.log.every_steps) or saves:
            means = meter.read()
            samples = config.train.global_batch_volumes
            times = clock.read(state.step, samples, loader.reader.volume_zyx, mae_flops(config, grid), world)
            line = {
                "step": state.step, **means, "lr": lr, "grad_norm": float(engine.get_global_grad_norm()),
                "samples": state.step * samples, "mask_fraction": masks.masked.shape[1] / tokens,
                "skipped_steps": engine.skipped_steps, **times,
            }  # fmt: skip
            if writer is not None:
                writer.write(line)
            voice.step(line)
            if not np.isfinite(line["loss"]):
                raise TrainingStopped(f"the loss at step {state.step} is {line['loss']}; this state is not saved")

        if holdout is not None and (due(state.step, config.log.holdout_every_steps) or last):
            with clock.span("other_s"):
                if writer is not None:
                    scores = holdout.evaluate(model, world.device, state.step, run_dir / "holdout")
                    writer.write({"step": state.step, **scores})
                    voice.line(f"step {state.step}: held-out loss {scores['holdout_loss']:.4f}")
                    if last:
                        errors = holdout.reconstruction_errors(
                            model, world.device, state.step, run_dir / "reconstruction.json"
                        )
                        said = ", ".join(f"{name} {value:.4f}" for name, value in errors.items())
                        voice.line(f"error on held-out masked foreground: {said}")
                wait(world)

        if saves:
            with clock.span("checkpoint_s"):
                root = run_dir / "checkpoints"
                checkpoint.save(engine, state, root, world)
                if world.is_first:
                    checkpoint.prune(root, config.checkpoint.keep_last, config.checkpoint.keep_every_steps)
                wait(world)

    batches.close()
    if writer is not None:
        writer.close()
    wait(world)
