"""The objectives, and what a run asks of one.

An objective is a module that is made with (config, volume_zyx) and has
- `parts`: names of what `forward` returns, "loss" first;
- `forward(batch, masks, step)`: the loss of a batch in optimizer step `step` (from 0; None: in an evaluation) and its
  parts, a named tuple of () tensors; a part that was not computed is NaN;
- `encoder`: what is kept of it in the end; `embed(batch, ids)`: the encoder's tokens;
- `compare(batch, masks)`: (prediction, target) of hidden tokens, for the monitors of `health.py`;
- `after_step(step)`: what follows an optimizer step that was applied; `flops()`: of one sample, forward and backward.
"""

import torch

from brainscale.config import Config
from brainscale.geometry import Zyx
from brainscale.jepa import Jepa, JepaOutput
from brainscale.mae import Mae, MaeOutput

Objective = Mae | Jepa
Output = MaeOutput | JepaOutput
OBJECTIVES: dict[str, type[Mae] | type[Jepa]] = {"mae": Mae, "jepa": Jepa}


def on_meta(config: Config, volume_zyx: Zyx) -> Objective:
    """The objective of a run without memory, to count what it has."""
    with torch.device("meta"):
        return OBJECTIVES[config.objective](config, volume_zyx)
