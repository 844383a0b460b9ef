"""From settings to a run that is ready to step. A killed job resumes here: `checkpoint.newest`, `checkpoint.load`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainscale import attention, checkpoint, metrics, nonfinite, plan_recompute, provenance, run_folder, trackers
from brainscale import engine as deep
from brainscale.checkpoint_files import TrainState, read_state, step_of
from brainscale.config import Config
from brainscale.dali_loader import choose_loader
from brainscale.distributed import World
from brainscale.geometry import Zyx
from brainscale.holdout import Holdout
from brainscale.jepa import Jepa
from brainscale.layers import initialise
from brainscale.loader import Loader
from brainscale.masking import Coverage
from brainscale.model_counts import tokens_of
from brainscale.objective import OBJECTIVES, Objective
from brainscale.online_probe import OnlineProbe
from brainscale.ops import choose, refuse
from brainscale.reader import Reader
from brainscale.samplers import make_order
from brainscale.stores import Stores
from brainscale.zero import batch_split, zero_stage


@dataclass
class Session:
    """A run that is ready to step; `state` says where. A step is `accumulation` micro-batches of every rank.
    recomputed: of how many blocks activations are computed again; attention: what was chosen (`attention.Choice`)."""

    config: Config
    run_dir: Path
    world: World
    store: Stores
    loader: Loader
    holdout: Holdout | None
    online: OnlineProbe | None
    accumulation: int
    recomputed: int
    attention: dict[str, Any]
    state: TrainState
    model: Objective
    engine: Any
    voice: metrics.Voice

    coverage: Coverage

    @property
    def grid_zyx(self) -> Zyx:
        """Tokens of a volume along each axis."""
        return self.loader.reader.grid_zyx


def prepare(config: Config, run_dir: Path, world: World, allow_change: tuple[str, ...] = ()) -> Session | None:
    """Collective: open the data, make the model, put the newest checkpoint into it. None when the run is finished.

    The run folder must be held. Raises InputError for settings or data that cannot work.
    """
    trackers.require(config.log.trackers)
    found = checkpoint.newest(run_dir / "checkpoints", world)
    if world.is_first:
        nonfinite.forget_after(run_dir, step_of(found) if found else 0)
    session = build(config, run_dir, world, found, allow_change)
    if session is not None and world.is_first:
        held = session.holdout.rows if session.holdout is not None else np.array([], dtype=int)
        order, loader = session.loader.order, session.loader.name
        computed = session.recomputed, session.attention
        run_folder.describe(run_dir, config, session.store, order, held, world, loader, *computed)
    return session


def build(
    config: Config, run_dir: Path, world: World, found: Path | None, allow_change: tuple[str, ...] = ()
) -> Session | None:
    """Collective: a session that continues the checkpoint `found`, or begins; None when that is the end of the run.

    Writes nothing. Raises InputError for settings or data that cannot work.
    """
    store = run_folder.open_everywhere(config.data, world)
    reader = Reader(store, config.model.patch_voxels_zyx, config.data.crop_voxels_zyx, config.seed)
    tokens = tokens_of(config, reader.volume_zyx)
    train_rows, held_rows = run_folder.split_rows(store, config)
    order = make_order(store, train_rows, config)
    micro, accumulation = batch_split(config, world.size)
    state = TrainState(
        step=0, cursor=0, time_s=0.0, config=config.model_dump(mode="json"), plan_hash=store.plan_hash,
        data_hash=run_folder.data_hash(store, order), volume_zyx=reader.volume_zyx,
        versions=provenance.versions(), world_size=world.size, zero_stage=zero_stage(config, accumulation),
        micro_batch_volumes=micro, accumulation=accumulation,
    )  # fmt: skip
    saved = read_state(found) if found is not None else None
    if saved is not None:
        run_folder.check_resume(saved, state, allow_change)
        if saved.step >= config.train.num_steps:
            if world.is_first:
                print(f"{run_dir}: already done ({saved.step} of {config.train.num_steps} steps)", flush=True)
            return None
        kept = ("step", "cursor", "time_s", "skipped", "skipped_in_a_row", "meter")
        state = replace(state, **{name: getattr(saved, name) for name in kept})
    voice = metrics.Voice(world, config.train.num_steps, state.step)
    kernels = choose(config.kernels, world.device)
    if config.spectral.weight:
        refuse(config.kernels, world.device, config.spectral.scope, config.model.patch_voxels_zyx)
    loader_class, why = choose_loader(config.data.loader, world.device)
    compiled = "blocks" if deep.compiles(config, world) else "off"
    voice.line(
        f"{topology(state)}, on {run_folder.device_name(world)}; kernels: {kernels}; loader: {why}; compile: {compiled}"
    )
    chosen = attention.decide(config, tokens, micro, world, run_dir)
    voice.line(chosen.sentence)
    if world.device.type == "cuda" and (warning := attention.head_width_warning(config)):
        voice.line(f"WARNING: {warning}")
    if any(c > v for c, v in zip(reader.volume_zyx, store.volume_zyx)):
        voice.line(f"crops of {reader.volume_zyx} of volumes of {store.volume_zyx} voxels (z, y, x): padded")
    if state.zero_stage != config.zero.stage:
        voice.line(f"ZeRO stage {state.zero_stage} in place of {config.zero.stage}: bf16 with accumulation needs it")
    online = OnlineProbe(reader, order.rows, held_rows, config, world) if config.probe.every_steps else None
    if online is not None:
        voice.line(online.sentence)
    fused = chosen.backend != "math"
    recomputed, said = plan_recompute.at_start(config, tokens, world, store.dtype.itemsize, kernels, fused)
    if said:
        voice.line(said)
    model = OBJECTIVES[config.objective](config, reader.volume_zyx)
    initialise(model, torch.Generator().manual_seed(config.seed))
    engine = deep.start(model, config, world, recomputed)
    if isinstance(model, Jepa):
        model.average = deep.follow(engine, model.encoder, model.teacher)
    if found is not None and saved is not None:
        checkpoint.load(engine, found)
        before = "" if topology(saved) == topology(state) else f", saved by {topology(saved)}"
        voice.line(f"resumed from {found} at step {state.step}{before}")
    loader = loader_class(reader, order, config, world.rank, world.size, micro, world.device)
    holdout = Holdout(reader, held_rows, order.rows, config) if len(held_rows) else None
    coverage = Coverage(tokens.total)
    return Session(
        config, run_dir, world, store, loader, holdout, online, accumulation, recomputed, chosen.record, state, model,
        engine, voice, coverage,
    )  # fmt: skip


def topology(state: TrainState) -> str:
    """How a state is computed, in words."""
    return (
        f"{state.world_size} rank(s) × {state.micro_batch_volumes} volume(s) × {state.accumulation} accumulated, "
        f"ZeRO stage {state.zero_stage}"
    )
