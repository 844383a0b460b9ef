"""A simulated week of training with a stop a day: what share of it is training that counts, from measured seconds.

Queue waits are left out: a stopped run begins again at once.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

from brainscale.bench.record import sample_lines
from brainscale.monitor_settings import Checkpoint

DAY_S, WEEK_S, INTERVAL_S = 86_400.0, 604_800.0, 22 * 60.0
SEEDS = 100


def week_lines(step_s: float, stall_s: float, write_s: float, start_s: float) -> list[dict[str, Any]]:
    """Lines over simulated weeks, SEEDS of each kind, and over the best interval."""
    default_s, every = Checkpoint().every_steps * step_s, f"every {INTERVAL_S / 60:.0f} min"
    samples = {"undisturbed": [WEEK_S] * SEEDS}
    for name, interval_s, announced, stops in (
        (f"no stop, saved every {Checkpoint().every_steps} steps", default_s, True, False),
        (f"no stop, saved {every}", INTERVAL_S, True, False),
        (f"an announced stop a day, saved {every}", INTERVAL_S, True, True),
        (f"a kill a day, saved {every}", INTERVAL_S, False, True),
    ):
        draws = [daily_moments_s(seed) if stops else [] for seed in range(SEEDS)]
        samples[name] = [
            WEEK_S / training_share(step_s, stall_s, write_s, interval_s, start_s, announced, moments_s)
            for moments_s in draws
        ]
    case = "simulated wall time of a week of training that counts, queues left out"
    found = sample_lines("checkpoint", case, "s", samples, "undisturbed", "simulated")
    case, best = "best interval between saves by Young and Daly, a kill a day", "√(2 · stall · day)"
    best_s = {best: [math.sqrt(2 * stall_s * DAY_S)]}
    return found + sample_lines("checkpoint", case, "s", best_s, best, "derived")


def daily_moments_s(seed: int, days: int = 7) -> list[float]:
    """One random moment of every day, in seconds since the first day began."""
    draw = random.Random(seed)
    return [(day + draw.random()) * DAY_S for day in range(days)]


def training_share(
    step_s: float, stall_s: float, write_s: float, interval_s: float, start_s: float, announced: bool,
    stops_s: Sequence[float], wall_s: float = WEEK_S,
) -> float:  # fmt: skip
    """Share of `wall_s` that is training which counted, when a run is stopped at `stops_s` and goes on at once.

    A process trains from `start_s` after its beginning, and saves after as many steps as fit `interval_s` best. A save
    stalls training for `stall_s`, or as long as it takes for the next one not to wait for it, and is on disk `write_s`
    after it began. An announced stop ends the step in progress (or the first) and a save; a kill loses what is not on
    disk. Pure.
    """
    every = max(1, round(interval_s / step_s))
    hold_s = max(stall_s, write_s - every * step_s)
    cycle_s = every * step_s + hold_s

    def done(training_s: float) -> int:
        cycles, rest_s = divmod(max(0.0, training_s), cycle_s)
        return int(cycles) * every + min(every, int(rest_s / step_s))

    def on_disk(training_s: float) -> int:
        return every * max(0, 1 + math.floor((training_s - every * step_s - write_s) / cycle_s))

    begin_s, steps = 0.0, 0
    for stop_s in sorted(stops_s):
        stop_s = max(stop_s, begin_s)
        if announced:
            count = done(stop_s - begin_s - start_s) + 1
            end_s = begin_s + start_s + count * step_s + (count - 1) // every * hold_s + write_s
            if end_s > wall_s:
                break
            steps, begin_s = steps + count, end_s
        else:
            steps, begin_s = steps + on_disk(stop_s - begin_s - start_s), stop_s
    return (steps + done(wall_s - begin_s - start_s)) * step_s / wall_s
