"""Pure functions of the optimizer step; nothing here has state, so resuming needs no replay."""

import math


def learning_rate(step: int, peak: float, final_fraction: float, warmup_steps: int, num_steps: int) -> float:
    """Linear warm-up to `peak`, then cosine to `peak × final_fraction` at `num_steps`. `step` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def linear_ramp(step: int, warmup_steps: int) -> float:
    """0 → 1 over `warmup_steps`; 1 from then on."""
    return 1.0 if step >= warmup_steps else step / warmup_steps


def due(step: int, every_steps: int) -> bool:
    """Whether something that happens every so many steps happens after `step` finished steps."""
    return every_steps > 0 and step > 0 and step % every_steps == 0
