"""The loop. A volume enters by `batches`, the loss is `engine(batch, masks)`; a killed job resumes in session.py."""

import errno
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from brainscale import (
    checkpoint,
    distributed,
    health,
    metrics,
    nonfinite,
    profiling,
    restarts,
    run_folder,
    slurm_job,
    step_profile,
    stopping,
)  # fmt: skip
from brainscale import engine as deep
from brainscale.checkpoint_files import TrainState
from brainscale.config import Config
from brainscale.distributed import World, wait
from brainscale.faults import fault_point
from brainscale.feed import LoaderFailed
from brainscale.loader import Batch
from brainscale.masking import draw_masks
from brainscale.monitor_settings import Checkpoint, profiled_steps
from brainscale.monitoring import evaluate, examine
from brainscale.nonfinite import MicroBatch
from brainscale.out_of_memory import Guard
from brainscale.phases import phase
from brainscale.preflight import check
from brainscale.schedules import due, learning_rate
from brainscale.session import Session, prepare
from brainscale.settings import InputError
from brainscale.stopping import LostRank, NoData, StoppedEarly, TrainingStopped
from brainscale.watch import Watch

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run(config: Config, run_dir: Path, world: World, stop: stopping.Stop, allow_change: tuple[str, ...] = ()) -> None:
    """Train to `train.num_steps`, continuing from the newest checkpoint of the run folder.

    allow_change: keys that a resumed run may change besides those of MAY_CHANGE_ON_RESUME. The process group must
    exist. Raises InputError for settings or data that cannot work, and where memory runs out; TrainingStopped when too
    many steps are not finite, another rank is gone or no batches come; StoppedEarly when `stop` or the time says so
    (the state is saved then) or the disk is full.
    """
    with run_folder.locked(run_dir, world):
        if hopeless := restarts.begin(run_dir, config.health.max_restarts_without_progress, world):
            raise TrainingStopped(hopeless)
        watch = Watch(world, run_dir, config.health.first_timeout_s)
        guard = Guard(config, run_dir, world)
        try:
            check(config, run_dir, world, allow_change)
            session = prepare(config, run_dir, world, allow_change)
            if session is not None:
                guard.start(session.state.step, session.loader.reader.volume_zyx)
                train(session, stop, watch, guard)
        except (TrainingStopped, StoppedEarly):
            raise
        except InputError as error:
            watch.tell(error)
            raise
        except LoaderFailed as error:
            watch.tell(error)
            raise NoData(str(error)) from error
        except Exception as error:
            if spent := guard.explain(error):
                watch.tell(spent)
                raise spent from error
            if blamed := watch.blame(error):
                raise LostRank(blamed, watch.lost_nodes) from error
            raise
        finally:
            watch.close()


def train(session: Session, stop: stopping.Stop, watch: Watch, guard: Guard) -> None:
    """The steps from the session's state to the end. Raises as `run` does."""
    config, state, world, engine = session.config, session.state, session.world, session.engine
    run_dir, voice, volume_zyx = session.run_dir, session.voice, session.loader.reader.volume_zyx
    samples, flops = config.train.global_batch_volumes, session.model.flops()
    meter, clock = metrics.Meter(world, session.model.parts), metrics.Clock(state.step, state.time_s)
    writer = metrics.Writer(run_dir, state.step, config, voice.line) if world.is_first else None
    saver = checkpoint.Saver(engine, run_dir / "checkpoints", world, config.checkpoint)
    deadline = stopping.Deadline(config.train.stop_after_min, slurm_job.job_end_s(voice.line) if writer else None)
    if deadline.reached(0, 0, 0) == stopping.JOB_ENDS:
        voice.line(
            "WARNING: the Slurm job is too short: it ends within a minute, which is kept for saving, so each of its "
            "lives takes one step; ask for a longer --time"
        )
    agreement = distributed.Agreement(world)
    batches = session.loader.batches(state.cursor)
    first, why, evaluate_s, collapse = state.step, agreement.vote(stop.number), 0.0, ""
    meter.resume(state.meter)
    monitor = health.Monitor(config)
    steps = profiled_steps(config.train.profile, config.train.num_steps)
    recorder = profiling.Recorder(steps, run_dir, world, clock, voice.line)
    sampler = step_profile.Sampler(world, clock, voice.line, config.log.profile_every_steps, first)
    if metrics.peak(world, config.train.precision) is None:
        voice.line("the peak rate of this device is not known, so the model's TFLOP/s stand in for its MFU")
    if past := profiling.foretell(steps, first):
        voice.line(past)
    monitor.resume(metrics.read(run_dir / "metrics.jsonl"))
    reader, rows = session.loader.reader, session.loader.order.rows
    probe = health.Probe(reader, rows, config) if config.health.probe_every_steps else None
    online, sharded, patience_s = session.online, state.zero_stage == 3, config.health.first_timeout_s
    if state.step == 0:
        with watch.patience(0, "evaluate", patience_s):
            if probe is not None:
                examine(session, probe, monitor, 0, writer)
            if online is not None:
                online.look(session.model, 0, writer, sharded, voice.line)

    for step in range(first, config.train.num_steps):
        begin, before = time.monotonic(), state
        guard.at(step + 1)
        if step + 1 == steps.stop:  # rank 0 writes what it has recorded, and the others wait
            watch.set_timeout(patience_s)
        lr = learning_rate(config.optim, step, config.train.num_steps)
        deep.set_learning_rate(engine, lr)
        with sampler.around(step + 1, recorder.begin(step + 1)) as profile:
            computed = compute(session, batches, step, watch, clock)
            state = replace(state, step=step + 1, cursor=state.cursor + samples, time_s=clock.total_s())
            if engine.was_step_applied():
                state = replace(state, skipped_in_a_row=0)
                for micro in computed:
                    meter.add(micro.out)
                session.model.after_step(step)
            else:
                state = replace(state, skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
                leave_out(session, before, computed)
        if writer is not None and profile:
            writer.write({"step": state.step, "profile": profile})
        if step == first or step + 1 == steps.stop:
            watch.set_timeout(config.health.timeout_s)

        last = state.step == config.train.num_steps
        gives_up = state.skipped_in_a_row >= config.health.max_skipped_in_a_row
        save_s = saver.copy_s + saver.write_s
        wish = stop.number or deadline.reached(time.monotonic() - begin, save_s, evaluate_s)
        why = agreement.vote(stopping.SAVE_FAILED if saver.failed() else wish)
        if why == stopping.SAVE_FAILED:
            break
        ends = last or gives_up or bool(why)
        planned = due(state.step, config.checkpoint.every_steps) or last

        if due(state.step, config.log.every_steps) or planned or gives_up:
            with phase("log"):
                line: dict[str, Any] = {
                    "step": state.step, **meter.read(), "lr": lr, "grad_norm": deep.grad_norm(engine),
                    "samples": state.step * samples, "skipped_steps": state.skipped, **session.coverage.read(),
                    **clock.read(state.step, samples, volume_zyx, flops, world, config.train.precision),
                }  # fmt: skip
            if spike := monitor.spike(line["grad_norm"]):
                line["warnings"] = {"spike": spike}
                voice.line(f"WARNING, step {state.step}: {spike}")
            if writer is not None:
                writer.write(line)
            voice.step(line)

        first_of_all = bool(why) and not last and not gives_up  # who was told to stop has little time
        if first_of_all:
            state = keep(session, saver, replace(state, meter=meter.total()), True, clock, watch)

        since = time.monotonic()
        if session.holdout is not None and (due(state.step, config.log.holdout_every_steps) or last):
            with clock.span("other_s"), watch.patience(state.step, "evaluate", patience_s):
                evaluate(session, state.step, writer, last)
        if online is not None and (due(state.step, config.probe.every_steps) or last):
            with clock.span("other_s"), watch.patience(state.step, "evaluate", patience_s):
                online.look(session.model, state.step, writer, sharded, voice.line)
        evaluate_s = max(evaluate_s, time.monotonic() - since)

        if probe is not None and (due(state.step, config.health.probe_every_steps) or last):
            with clock.span("other_s"), watch.patience(state.step, "evaluate", patience_s):
                collapse = examine(session, probe, monitor, state.step, writer)
            ends = ends or bool(collapse)

        if (planned or ends) and not gives_up and not first_of_all:
            state = keep(session, saver, replace(state, meter=meter.total()), ends, clock, watch)
        if ends:
            break

    batches.close()
    if writer is not None:
        writer.close()
    with watch.patience(state.step, "end", patience_s):
        save(saver, None, True)
        recorder.close()
        wait(world)
    saver.close()
    if state.skipped_in_a_row >= config.health.max_skipped_in_a_row:
        raise TrainingStopped(
            f"{state.skipped_in_a_row} steps in a row were not finite, up to step {state.step}: "
            f"{nonfinite.folder(run_dir)} names the scans, brainscale replay {run_dir} {state.step} shows their "
            "losses. "
            "Mend the data, lower optim.lr with --allow-change optim.lr, or go past them with a larger "
            "health.max_skipped_in_a_row"
        )
    if collapse:
        raise TrainingStopped(f"after step {state.step}, which is saved, {collapse} (health.stop_on_collapse)")
    if why and state.step < config.train.num_steps:
        raise StoppedEarly(
            f"stopped by {stopping.reason(why)} after step {state.step} of {config.train.num_steps}, which is saved",
            why in stopping.GOES_ON,
        )


def compute(
    session: Session, batches: Iterator[tuple[Batch, int]], step: int, watch: Watch, clock: metrics.Clock
) -> list[MicroBatch]:
    """One optimizer step (number `step`, from 0), or none where it is not finite: then `engine.was_step_applied()` is
    False and nothing has changed on any rank."""
    config, engine, device = session.config, session.engine, session.world.device
    computed = []
    for _ in range(session.accumulation):
        watch.at(step + 1, "data")
        with clock.span("data_s"):
            fault_point("step.data")
            batch, _ = next(batches)
        watch.at(step + 1, "forward")
        with phase("masks"):
            masks = draw_masks(config, batch.sample_index, batch.foreground, session.grid_zyx)
            session.coverage.add(masks, batch.foreground)
        with phase("copy"):
            batch_there, masks_there = batch.to(device), masks.to(device)
        out = engine(batch_there, masks_there, step)
        watch.at(step + 1, "backward")
        fault_point("step.backward")
        with phase("backward"):
            engine.backward(nonfinite.guarded(out.loss))
        with phase("optimizer"):
            engine.step()
        computed.append(MicroBatch(batch.sample_index, batch.row, out._make(part.detach() for part in out)))
    return computed


def leave_out(session: Session, before: TrainState, computed: list[MicroBatch]) -> None:
    """Collective: record a step that was not finite; the state before the first of a row is kept, for `replay`."""
    deep.forget_gradients(session.engine)
    found = nonfinite.record(session.run_dir, before.step + 1, computed, session.store, session.world)
    session.voice.line(nonfinite.sentence(found))
    if before.skipped_in_a_row == 0:
        root = nonfinite.folder(session.run_dir)
        save(checkpoint.Saver(session.engine, root, session.world, Checkpoint()), before, True)


def keep(
    session: Session, saver: checkpoint.Saver, state: TrainState, wait_for_it: bool, clock: metrics.Clock, watch: Watch
) -> TrainState:
    """Collective: save a state and what belongs to it; returns the state."""
    if session.world.is_first:
        session.coverage.save(session.run_dir / "masks.npz", session.grid_zyx)
    with clock.span("checkpoint_s"), watch.patience(state.step, "save", session.config.health.first_timeout_s):
        save(saver, state, wait_for_it)
    return state


def save(saver: checkpoint.Saver, state: TrainState | None, wait_for_it: bool) -> None:
    """Collective: save a state, or (None) wait for the save before. Raises StoppedEarly when the disk is full."""
    try:
        if state is None:
            saver.finish()
        else:
            saver.save(state, wait_for_it)
    except checkpoint.SaveFailed as failed:
        number = failed.error.errno if isinstance(failed.error, OSError) else None
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{saver.root} cannot be written ({failed.error}); allow access to it") from failed
        if number in DISK_FULL:
            raise StoppedEarly(
                f"the disk of {saver.root} is full, so a state could not be saved whole; no older checkpoint was "
                "harmed: make room"
            ) from failed
        raise failed.error from failed
