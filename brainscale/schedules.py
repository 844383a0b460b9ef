"""Pure functions of the optimizer step; nothing here has state, so resuming needs no replay."""

import math

from brainscale.config import Optim


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up to `optim.lr`, then to `lr × final_lr_fraction` at
    `num_steps`, along a cosine or (schedule "cooldown") constant and linear in the last `cooldown_steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    final = optim.final_lr_fraction
    if optim.schedule == "cooldown":
        left = (num_steps - step) / max(1, optim.cooldown_steps)
        return optim.lr * (final + (1 - final) * max(0.0, min(1.0, left)))
    progress = min(1.0, (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps))
    return optim.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def linear(step: int, start: float, end: float, num_steps: int) -> float:
    """From `start` at step 0 to `end` at the last of `num_steps` steps, and `end` from then on."""
    return start + (end - start) * min(1.0, step / max(1, num_steps - 1))


def linear_ramp(step: int, warmup_steps: int) -> float:
    """0 → 1 over `warmup_steps`; 1 from then on."""
    return 1.0 if step >= warmup_steps else step / warmup_steps


def due(step: int, every_steps: int) -> bool:
    """Whether something that happens every so many steps happens after `step` finished steps."""
    return every_steps > 0 and step > 0 and step % every_steps == 0
