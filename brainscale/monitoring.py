"""What a run looks at between its steps: held-out volumes, and signs of collapse."""

from brainscale import distributed, health, metrics
from brainscale.distributed import wait
from brainscale.mae import Mae
from brainscale.session import Session


def examine(
    session: Session, probe: health.Probe, monitor: health.Monitor, step: int, writer: metrics.Writer | None
) -> str:
    """Collective: the monitors' numbers and warnings into the metrics. Returns why the run should end, or "". Who
    computes: as in `evaluate`."""
    collapse = ""
    if writer is not None or session.state.zero_stage == 3:
        found = probe.examine(session.model, session.world.device)
        signs, again = monitor.probe(step, found)
        if writer is not None:
            warned = {"warnings": signs, "collapse": sorted(signs)} if signs else {}
            writer.write({"step": step, **found, **warned})
        for sentence in signs.values():
            session.voice.line(f"WARNING, step {step}: {sentence}")
        if session.config.health.stop_on_collapse and again:
            collapse = signs[min(again)]
    return distributed.broadcast(collapse, session.world)


def evaluate(session: Session, step: int, writer: metrics.Writer | None, last: bool) -> None:
    """Collective: held-out losses, and at the end reconstruction errors. Rank 0 computes and writes; with weights that
    are sharded (stage 3) all ranks compute, since each forward pass gathers them."""
    holdout, device = session.holdout, session.world.device
    if holdout is not None and (writer is not None or session.state.zero_stage == 3):
        folder = session.run_dir if writer is not None else None
        scores = holdout.evaluate(session.model, device, step, folder and folder / "holdout")
        if writer is not None:
            writer.write({"step": step, **scores})
        session.voice.line(f"step {step}: held-out loss {scores['holdout_loss']:.4f}")
        if last and isinstance(session.model, Mae):
            errors = holdout.reconstruction_errors(
                session.model, device, step, folder and folder / "reconstruction.json"
            )
            said = ", ".join(f"{name} {value:.4f}" for name, value in errors.items())
            session.voice.line(f"error on held-out masked foreground: {said}")
    wait(session.world)
