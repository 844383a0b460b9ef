"""Steps that are not finite: left out on every rank, recorded, and the end of the run when they come in a row.

The decision is DeepSpeed's (`optim.GuardedAdamW`'s at stage 0): the gradient norm over all ranks, which every rank
knows, is not finite. A loss that is not finite on one rank is made to spoil that rank's gradient, so it is seen by the
same test; no rank looks at its loss on the host.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainscale.checkpoint_files import directories, remove, step_of, sweep
from brainscale.distributed import World, gather
from brainscale.objective import Output
from brainscale.provenance import write_text
from brainscale.stores import Stores


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computed at once: sample indices and rows, each (B,), and the losses, which hold no graph."""

    sample_index: np.ndarray
    row: np.ndarray
    out: Output


def guarded(loss: Tensor) -> Tensor:
    """The loss, to be differentiated: times one where it is finite (the same bits), else times NaN, so that no gradient
    of this rank is finite."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def folder(run_dir: Path) -> Path:
    """Where steps that were left out are recorded."""
    return run_dir / "nonfinite"


def forget_after(run_dir: Path, step: int) -> None:
    """Remove what an attempt recorded after `step`, from where this one begins: its steps are made again."""
    root = folder(run_dir)
    sweep(root)
    for file in root.glob("step-*.json"):
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()
    for path in directories(root):
        if step_of(path) > step:
            remove(path)


def record(run_dir: Path, step: int, computed: list[MicroBatch], store: Stores, world: World) -> dict[str, Any]:
    """Collective: write RUN/nonfinite/step-XXXXXXXX.json, who was in the step and whose loss was not finite.

    step: the number that the step would have had. Returns what was written.
    """
    ids = {int(row): str(scan) for row, scan in zip(store.rows, store.column("id"))}
    mine = [
        {
            "sample_index": int(index),
            "row": int(row),
            "id": ids[int(row)],
            "rank": world.rank,
            "micro_batch": number,
            "loss": number_or_name(float(micro.out.loss)),
        }
        for number, micro in enumerate(computed)
        for index, row in zip(micro.sample_index, micro.row)
    ]
    samples = sorted((one for rank in gather(mine, world) for one in rank), key=lambda one: one["sample_index"])
    suspects = [one["id"] for one in samples if isinstance(one["loss"], str)]
    found = {"step": step, "suspects": suspects, "samples": samples}
    if world.is_first:
        folder(run_dir).mkdir(exist_ok=True)
        write_text(folder(run_dir) / f"step-{step:08d}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def sentence(found: dict[str, Any]) -> str:
    """What was recorded, for people."""
    what = f"step {found['step']} left out on all ranks: "
    if found["suspects"]:
        some = ", ".join(found["suspects"][:4]) + (", …" if len(found["suspects"]) > 4 else "")
        return f"{what}the loss of a micro-batch with {some} is not finite"
    return f"{what}every loss is finite, the gradient is not"


def number_or_name(value: float) -> float | str:
    """A finite number, or "nan", "inf", "-inf", which JSON has no numbers for."""
    return value if math.isfinite(value) else str(value)
