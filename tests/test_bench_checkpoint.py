"""The simulated week is right in cases done by hand and in its properties, and the command measures what it says. No
times are asserted."""

import math
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_bench import KEYS

from brainscale.bench import checkpoint
from brainscale.bench.week import DAY_S, SEEDS, WEEK_S, daily_moments_s, training_share, week_lines
from brainscale.settings import InputError

SECONDS = st.floats(0.01, 4000, allow_nan=False)
STOPS = st.lists(st.floats(0, WEEK_S, exclude_max=True), max_size=14)


def share(**changes):
    """Steps of 1 s; a save every 10 s stalls 2 s and is on disk 4 s after it began; starts of 5 s; 100 s in all."""
    settings = {
        "step_s": 1.0, "stall_s": 2.0, "write_s": 4.0, "interval_s": 10.0, "start_s": 5.0, "announced": False,
        "stops_s": (), "wall_s": 100.0,
    }  # fmt: skip
    return training_share(**{**settings, **changes})


def life(step_s, stall_s, write_s, every, begin_s, wall_s):
    """Of a process that is not stopped: when each step ends, and when the state of which step is on disk."""
    now_s, ends_s, on_disk = begin_s, [], [(begin_s, 0)]
    while now_s < wall_s:
        now_s += step_s
        ends_s.append(now_s)
        if len(ends_s) % every == 0:
            on_disk.append((now_s + write_s, len(ends_s)))
            now_s += stall_s
    return ends_s, on_disk


@given(
    st.integers(1, 5), st.integers(0, 9), st.integers(0, 30), st.integers(1, 8), st.integers(0, 20), st.booleans(),
    st.lists(st.integers(0, 299), max_size=5), st.integers(1, 300),
)  # fmt: skip
def test_the_share_equals_that_of_a_walk_step_by_step(
    step_s, stall_s, write_s, every, start_s, announced, stops_s, wall_s
):
    """Where saves do not wait for each other."""
    write_s = min(write_s, every * step_s + stall_s)
    begin_s, steps = 0, 0
    for stop_s in sorted(stop_s for stop_s in stops_s if stop_s < wall_s):
        ends_s, on_disk = life(step_s, stall_s, write_s, every, begin_s + start_s, 10_000)
        stop_s = max(begin_s, stop_s)
        if announced:
            count = next(i for i, end_s in enumerate(ends_s) if end_s > stop_s) + 1
            if ends_s[count - 1] + write_s > wall_s:
                break
            begin_s, steps = ends_s[count - 1] + write_s, steps + count
        else:
            begin_s, steps = stop_s, steps + max([step for at_s, step in on_disk if at_s <= stop_s], default=0)
    ends_s, _ = life(step_s, stall_s, write_s, every, begin_s + start_s, wall_s)
    steps += sum(end_s <= wall_s for end_s in ends_s)
    stops_s = [float(stop_s) for stop_s in stops_s if stop_s < wall_s]
    found = share(
        step_s=float(step_s), stall_s=float(stall_s), write_s=float(write_s), interval_s=float(every * step_s),
        start_s=float(start_s), announced=announced, stops_s=stops_s, wall_s=float(wall_s),
    )  # fmt: skip
    assert found == steps * step_s / wall_s


@pytest.mark.parametrize("announced", (False, True))
@given(SECONDS, SECONDS, SECONDS, st.floats(0.01, 1e6), SECONDS, STOPS)
def test_a_share_is_a_share(announced, step_s, stall_s, write_s, interval_s, start_s, stops_s):
    assert 0 <= training_share(step_s, stall_s, write_s, interval_s, start_s, announced, stops_s) <= 1 + 1e-9


@given(st.integers(1, 50), st.integers(0, 20), st.integers(1, 40), st.integers(1, 30))
def test_without_stops_the_share_is_that_of_steps_among_steps_and_stalls(step_s, stall_s, every, cycles):
    cycle_s = every * step_s + stall_s
    found = training_share(step_s, stall_s, 0.0, every * step_s, 0.0, False, (), wall_s=float(cycles * cycle_s))
    assert found == pytest.approx(every * step_s / cycle_s)


@given(st.integers(1, 20), st.integers(1, 100), st.integers(2, 10), st.integers(0, 600), STOPS)
def test_shorter_intervals_lose_less_to_kills_where_saves_are_free(step_s, every, factor, start_s, stops_s):
    def at(steps):
        return training_share(step_s, 0.0, 0.0, steps * step_s, start_s, False, stops_s)

    assert at(every) >= at(every * factor)


@given(st.integers(1, 20), st.integers(1, 50), st.integers(1, 100), st.integers(1, 100), st.integers(0, 600))
def test_shorter_intervals_lose_more_to_stalls_without_kills(step_s, stall_s, every, more, start_s):
    def at(steps):
        return training_share(step_s, stall_s, stall_s, steps * step_s, start_s, False, ())

    assert at(every) <= at(every + more)


@given(st.integers(1, 20), st.integers(1, 100), st.integers(0, 600), st.lists(st.integers(0, 6), unique=True))
def test_a_stop_that_is_announced_costs_no_more_than_a_kill(step_s, every, start_s, days):
    """One stop a day at most, so that no stop falls into the end of another; saves are free."""
    stops_s = [day * DAY_S + 40_000 for day in days]

    def at(announced):
        return training_share(step_s, 0.0, 0.0, every * step_s, start_s, announced, stops_s)

    assert at(True) >= at(False)


@given(STOPS, st.integers(0, 600))
def test_a_kill_that_loses_nothing_costs_a_start(stops_s, start_s):
    """A save after every step of 1 s that is free: of each life but the last, whole seconds after its start count."""
    assume(len(set(stops_s)) == len(stops_s))
    ends = [*sorted(stops_s), WEEK_S]
    lives = [end - begin for begin, end in zip([0.0, *ends], ends)]
    expected = sum(math.floor(max(0.0, life - start_s)) for life in lives) / WEEK_S
    assert training_share(1.0, 0.0, 0.0, 1.0, start_s, False, stops_s) == pytest.approx(
        expected, abs=len(lives) / WEEK_S
    )


def test_small_cases_by_hand():
    assert share() == 0.8  # 5 start, 7 × (10 + 2) = 84, then 10 steps and 1 s of a stall
    # Killed at 40: saves began at 15, 27 and 39, the last is not on disk: 20 steps. Then 45..100: 4 × 12, 7 steps.
    assert share(stops_s=(40.0,)) == 0.67
    # At 43 the third save is there: 30 steps. Then 48..100: 4 × 12 and 4 steps.
    assert share(stops_s=(43.0,)) == 0.74
    # Announced at 40 in a stall: the 31st step from 41 to 42, a save to 46. Then 51..100: 4 × 12, one step.
    assert share(stops_s=(40.0,), announced=True) == 0.72
    # Announced while it starts: the first step from 5 to 6, a save to 10. Then 15..100: 7 × 12, one step.
    assert share(stops_s=(2.0,), announced=True) == 0.72
    # Killed while it starts, twice: nothing from 0 to 4. Then 9..100: 7 × 12, 7 steps.
    assert share(stops_s=(4.0, 2.0)) == 0.77
    # Announced so late that the end comes first: as if it had not been.
    assert share(stops_s=(98.0,), announced=True) == share()
    # A save that takes longer than its interval holds the next one: cycles of 15 from 5: 6 × 15 and 5 steps.
    assert share(write_s=15.0) == 0.65


def test_moments_fall_one_into_every_day_and_a_seed_gives_the_same():
    moments = daily_moments_s(3)
    assert moments == daily_moments_s(3) != daily_moments_s(4)
    assert [int(moment // DAY_S) for moment in moments] == list(range(7))


def test_lines_of_the_week_give_the_share_as_ratio():
    lines = week_lines(0.5, 0.25, 2.0, 10.0)
    assert all(set(line) == KEYS and line["unit"] == "s" for line in lines)
    by_name = {line["variant"]: line for line in lines}
    seldom, often = by_name["no stop, saved every 1000 steps"], by_name["no stop, saved every 22 min"]
    assert seldom["ratio"] == pytest.approx(500 / 500.25, abs=1e-4) and often["ratio"] == pytest.approx(1, abs=1e-3)
    announced, killed = (by_name[f"{kind} a day, saved every 22 min"] for kind in ("an announced stop", "a kill"))
    assert killed["ratio"] < announced["ratio"] < often["ratio"] and killed["n"] == SEEDS
    assert lines[-1]["median"] == math.sqrt(2 * 0.25 * DAY_S)


def test_the_week_needs_no_torch():
    code = "import sys, brainscale.bench.week; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_what_cannot_be_measured_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="no such config file"):
        checkpoint.run((), tmp_path / "none.toml", None, True)
    with pytest.raises(FileNotFoundError):
        checkpoint.run((), None, tmp_path / "none", True)
