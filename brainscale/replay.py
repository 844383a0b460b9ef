"""Do one step of a run again, on the state it had then: whose loss was not finite, and which gradients.

The state is the newest intact one before the step, of RUN/checkpoints or of RUN/nonfinite (kept when a step was left
out); the steps between are done again too. Nothing is written. On the same number of ranks the bits are the same.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from brainscale import checkpoint_files as files
from brainscale import engine as deep
from brainscale import metrics, nonfinite, session
from brainscale.config import Config
from brainscale.distributed import World, broadcast, gather
from brainscale.loader import read_batch
from brainscale.masking import draw_masks
from brainscale.schedules import learning_rate
from brainscale.settings import InputError, load
from brainscale.train import compute
from brainscale.watch import Watch

OTHERWISE = "; settings, data or versions changed since, or it began from a state before such a change"
TOLERANCE = 1e-3
"""Relative difference of two losses of one step that other numbers of ranks may cause."""


@dataclass(frozen=True)
class Found:
    """What a replayed step was. samples: index, row, id, loss of each; parameters: names with a gradient that is not
    finite on some rank; loss: mean over the step."""

    applied: bool
    loss: float
    grad_norm: float | None
    samples: list[dict[str, Any]]
    parameters: list[str]


def replay(run_dir: Path, step: int, world: World, overrides: tuple[str, ...] = ()) -> tuple[str, bool]:
    """Collective: (what happened in step `step`, counted from 1; whether that is what the run recorded).

    overrides: settings, say the store's new place. Raises InputError when there is no such step to do again.
    """
    settings = run_dir / "config.toml"
    if not settings.is_file():
        raise InputError(f"{run_dir} is no run folder (it has no config.toml); give the run.dir of a pretraining")
    config = load(Config, settings, overrides)
    if not 1 <= step <= config.train.num_steps:
        raise InputError(f"got step {step}; the run has steps 1 to {config.train.num_steps}")
    start = broadcast(state_before(run_dir, step), world)
    run = session.build(config, run_dir, world, start)
    assert run is not None
    begun, watch = run.state.step, Watch(world, run_dir, config.health.first_timeout_s)
    batches, clock = run.loader.batches(run.state.cursor), metrics.Clock(begun, 0.0)
    spoiled: set[str] = set()
    trained = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        parameter.register_hook(_note(name, spoiled))
    for number in range(begun, step):
        spoiled.clear()
        first = run.state.cursor + (number - begun) * config.train.global_batch_volumes
        mine = losses(run, first, number) if number == step - 1 else []
        deep.set_learning_rate(run.engine, learning_rate(config.optim, number, config.train.num_steps))
        computed = compute(run, batches, number, watch, clock)
        if run.engine.was_step_applied():
            run.model.after_step(number)
        else:
            deep.forget_gradients(run.engine)
    batches.close()
    means = gather(sum(float(micro.out.loss) for micro in computed) / len(computed), world)
    found = Found(
        run.engine.was_step_applied(), sum(means) / len(means), deep.grad_norm(run.engine),
        sorted((one for part in gather(mine, world) for one in part), key=lambda one: one["sample_index"]),
        sorted(set().union(*gather(spoiled, world))),
    )  # fmt: skip
    watch.close()
    run.voice.close()
    words, agrees = compare(run_dir, step, found)
    origin = f"{start} ({step - 1 - begun} step(s) before it done again)" if start else "the beginning"
    return "\n".join((f"step {step} of {run_dir}, from {origin}", *describe(found, len(trained)), words)), agrees


def state_before(run_dir: Path, step: int) -> Path | None:
    """The newest intact state in which fewer than `step` steps are finished; None where only the beginning is left."""
    roots = (run_dir / "checkpoints", nonfinite.folder(run_dir))
    states = [path for root in roots for path in files.directories(root) if files.step_of(path) < step]
    return next((p for p in sorted(states, key=files.step_of, reverse=True) if files.damage(p) is None), None)


@torch.no_grad()
def losses(run: session.Session, first: int, step: int) -> list[dict[str, Any]]:
    """This rank's samples of a step and the loss of each alone, without a regularizer, which takes several. first: the
    step's first global sample index."""
    config, reader = run.config, run.loader.reader
    asked = step if config.regularizer.kind == "none" else None
    stride = run.loader.micro_batch * run.world.size
    found = []
    for number in range(run.accumulation):
        for drawn in run.loader.draws(first + number * stride):
            batch = read_batch(reader, [drawn])
            masks = draw_masks(config, batch.sample_index, batch.foreground, run.grid_zyx)
            device = run.world.device
            out = run.model(batch.to(device), masks.to(device), asked)
            scan = str(run.store.column("id")[reader.at(drawn.row)])
            found.append({"sample_index": drawn.index, "row": drawn.row, "id": scan, "loss": float(out.loss)})
    return found


def describe(found: Found, parameters: int) -> list[str]:
    """Lines about a replayed step. parameters: how many there are."""
    lines = [f"{'sample':>10}{'row':>8}  {'loss':>12}  scan"]
    for one in found.samples:
        mark = "" if math.isfinite(one["loss"]) else "   ← not finite"
        lines.append(f"{one['sample_index']:>10}{one['row']:>8}  {one['loss']:>12.6g}  {one['id']}{mark}")
    if found.applied:
        return [*lines, f"the step is finite: loss {found.loss:.9g}, gradient norm {found.grad_norm:.6g}"]
    where = f" ({found.parameters[0]}, …)" if found.parameters else ""
    return [*lines, f"the step is left out: {len(found.parameters)} of {parameters} gradients are not finite{where}"]


def compare(run_dir: Path, step: int, found: Found) -> tuple[str, bool]:
    """A sentence on whether the step is what the run recorded, and the answer."""
    record = nonfinite.folder(run_dir) / f"step-{step:08d}.json"
    if record.is_file():
        suspects = set(json.loads(record.read_text())["suspects"])
        bad = {one["id"] for one in found.samples if not math.isfinite(one["loss"])}
        agrees = not found.applied and bad <= suspects and bool(bad) == bool(suspects)
        return (
            "reproduced: the run left it out too" if agrees else f"NOT REPRODUCED: the run left it out{OTHERWISE}",
            agrees,
        )
    if not found.applied:
        return "NOT REPRODUCED: the run did not record this step as left out", False
    lines = metrics.read(run_dir / "metrics.jsonl")
    recorded = lines.get(step, {}).get("loss")
    if recorded is None or (step > 1 and "loss" not in lines.get(step - 1, {})):
        return "the run recorded no loss of this step alone", True
    difference = abs(found.loss - recorded) / max(abs(recorded), 1e-12)
    agrees = difference <= TOLERANCE
    what = f"the run recorded loss {recorded:.9g}, a relative difference of {difference:.1e}"
    return f"reproduced: {what}" if agrees else f"NOT REPRODUCED: {what}{OTHERWISE}", agrees


def _note(name: str, spoiled: set[str]) -> Any:
    def look(gradient: torch.Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            spoiled.add(name)

    return look
