"""`bench compare` finds what became slower, and nothing where nothing did: with real work that is timed, and with noise
whose truth is known."""

import hashlib
import json
import math

import numpy as np
import pytest
from conftest import run_brainscale
from hypothesis import given, settings
from hypothesis import strategies as st

from brainscale import cli_bench_lines
from brainscale.bench import gate, record, schema
from brainscale.bench.gate import judge
from brainscale.settings import InputError

OURS, PEER = "brainscale", "peer"


def models(lines):
    return [schema.model_of(line).model_validate(line) for line in lines]


TEMPLATE = models(record.sample_lines("read", "c", "s", {OURS: [1.0, 1.0], PEER: [1.0, 1.0]}, PEER))[0]


def noisy(rng, times=1.0, lines=1, rounds=30, run_sd=0.0, pair_sd=0.05):
    """Lines of one run whose true time against the peer is `times`: rounds vary with heavy tails, runs by `run_sd`."""
    made = []
    for number in range(lines):
        pace = times * math.exp(run_sd * rng.standard_normal())
        pairs = np.exp(pair_sd * rng.standard_t(3, rounds)) / pace
        update = {"case": f"case {number}", "pairs": pairs.tolist(), "ratio": float(np.median(pairs)), "n": rounds}
        made.append(TEMPLATE.model_copy(update=update))
    return made


def several(count, rng, *arguments, **options):
    """Lines of several runs."""
    return [line for _ in range(count) for line in noisy(rng, *arguments, **options)]


def timed(own, peer):
    return models(record.sample_lines("read", "c", "s", {OURS: list(own), PEER: list(peer)}, PEER))


def verdicts(judged):
    return {one.verdict for one in judged}


# ------------------------------------------------------------------------------------------- real work


BLOCK = np.random.default_rng(0).bytes(1 << 16)


def hash_blocks(count):
    for _ in range(count):
        hashlib.sha256(BLOCK).digest()


def hashed(blocks):
    """A run: ours hashes so many blocks, the peer ten. Short calls, which the scheduler seldom cuts in two."""
    variants = {OURS: lambda turn: hash_blocks(blocks), PEER: lambda turn: hash_blocks(10)}
    return models(record.measure("planted", "hash blocks", variants, PEER, n=100))


@pytest.mark.slow
def test_a_planted_slow_down_of_a_fifth_is_caught_and_identical_runs_raise_no_alarm():
    """As long as it cannot tell, another run is added on either side, as it says."""
    before, after = hashed(10), hashed(12)
    (one,) = judge(before, after, 0.1)
    while one.verdict == "cannot tell" and len(before) < 40:
        before, after = before + hashed(10), after + hashed(12)
        (one,) = judge(before, after, 0.1)
    assert one.failed and one.low < 0.2 < one.high, one
    alarms = [judge(before, hashed(10), 0.1)[0] for _ in range(20)]
    assert not any(one.failed or one.verdict == "faster" for one in alarms), alarms


# ------------------------------------------------------------------------------------------- noise


def test_identical_runs_raise_no_alarm_and_intervals_hold_together():
    """400 comparisons of 12 lines: none is called slower, and in at least 95 % (less three deviations of that share)
    every interval holds the truth, although runs vary by more than their rounds show."""
    rng, families, held = np.random.default_rng(0), 400, 0
    for _ in range(families):
        judged = judge(*(noisy(rng, lines=12, run_sd=gate.RUN_TO_RUN) for _ in "ab"), 0.1)
        assert len(judged) == 12 and not verdicts(judged) & {"slower", "faster"}
        held += all(one.low <= 0 <= one.high for one in judged)
    assert held / families >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / families)


def test_a_change_as_large_as_the_threshold_is_not_beyond_doubt_and_twice_as_large_is():
    rng, alarms, caught = np.random.default_rng(1), 0, 0
    for _ in range(100):
        before = noisy(rng, lines=5, run_sd=gate.RUN_TO_RUN)
        alarms += any(one.failed for one in judge(before, noisy(rng, 1.1, 5, run_sd=gate.RUN_TO_RUN), 0.1))
        caught += all(one.failed for one in judge(before, noisy(rng, 1.2, 5, 60, run_sd=gate.RUN_TO_RUN), 0.1))
    assert alarms <= 5 + 3 * math.sqrt(100 * 0.05 * 0.95) and caught >= 80


def test_variance_between_runs_is_estimated_from_files_that_hold_several():
    """Runs that differ by 8 % look different beyond doubt one by one, and do not once there are several."""
    rng = np.random.default_rng(2)

    def alarms(runs):
        sides = ((several(runs, rng, run_sd=0.08, rounds=200) for _ in "ab") for _ in range(60))
        return sum(judge(*side, 0.02)[0].failed for side in sides)

    assert alarms(1) > 6 > 2 >= alarms(4)


def test_as_many_runs_as_it_asks_for_decide():
    rng = np.random.default_rng(3)
    for times, wanted in ((1.0, "same"), (1.2, "slower")):
        before, after = (noisy(rng, factor, rounds=8, pair_sd=0.1) for factor in (1.0, times))
        (one,) = judge(before, after, 0.1)
        assert one.verdict == "cannot tell", one
        rounds, runs = (int(word) for word in one.why.split() if word.isdecimal())
        assert rounds == 8 * runs
        more = 2 * runs - 1
        before += several(more, rng, rounds=8, pair_sd=0.1)
        after += several(more, rng, times, rounds=8, pair_sd=0.1)
        assert judge(before, after, 0.1)[0].verdict == wanted


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 100), st.floats(0.7, 1.4), st.integers(gate.MIN_ROUNDS, 40))
def test_pace_cancels_and_swapped_files_give_the_opposite(seed, pace, times, rounds):
    """Another machine's pace changes nothing; the other way round, slower is faster and the interval is its mirror."""
    rng = np.random.default_rng(seed)
    peers = np.exp(0.1 * rng.standard_normal((2, rounds)))
    own = peers * np.exp(0.05 * rng.standard_t(3, (2, rounds))) * [[1.0], [times]]
    before, after, slower_machine = (
        timed(own[0], peers[0]),
        timed(own[1], peers[1]),
        timed(pace * own[1], pace * peers[1]),
    )
    (one,), (mirror,), (other,) = (
        judge(*two, 0.1) for two in ((before, after), (after, before), (before, slower_machine))
    )
    assert other.verdict == one.verdict and other.change == pytest.approx(one.change, abs=1e-4)
    opposite = {"slower": "faster", "faster": "slower"}
    assert mirror.verdict == opposite.get(one.verdict, one.verdict)
    for value, mirrored in ((one.change, mirror.change), (one.low, mirror.high), (one.high, mirror.low)):
        assert (1 + value) * (1 + mirrored) == pytest.approx(1)


def test_one_disturbed_round_in_ten_does_not_move_the_change():
    rng = np.random.default_rng(4)
    quiet = rng.normal(1, 0.01, 40)
    disturbed = np.where(np.arange(40) % 10 == 3, 30.0, quiet)
    assert abs(judge(*(timed(own, [1.0] * 40) for own in (quiet, disturbed)), 0.1)[0].change) < 0.01


# ------------------------------------------------------------------------------------------- what is judged


def lines_of(own, peer, reference=PEER, unit="s", **more):
    made = record.sample_lines("read", "c", unit, {OURS: own, PEER: peer, "other peer": peer}, reference)
    return models([line | more for line in made])


def test_ours_is_judged_whichever_the_reference_and_peers_are_not():
    slow, steady = [2.0, 2.01, 2.02] * 10, [1.0, 1.01, 0.99] * 10
    for reference, failing, quiet in ((PEER, {OURS}, {"other peer"}), (OURS, {PEER, "other peer"}, set())):
        judged = judge(lines_of(steady, steady, reference), lines_of(slow, steady, reference), 0.1)
        assert {one.key[2] for one in judged if one.failed} == failing
        assert {one.key[2] for one in judged if one.verdict == "not judged"} == quiet
    assert judge(lines_of(steady, steady), lines_of(steady, slow), 0.1)[0].verdict == "faster"
    assert verdicts(judge(lines_of(steady, steady), lines_of(slow, steady, kind="simulated"), 0.1)) == {"not judged"}
    assert judge(lines_of(steady, steady), lines_of(slow, steady, OURS), 0.1)[0].verdict == "not judged"


def test_what_was_counted_is_compared_exactly():
    def one(before, after):
        return judge(*(lines_of([each], [5e6], unit="B") for each in (before, after)), 0.1)[0]

    assert one(1e6, 1e6).verdict == "same" and one(1e6, 999_999).verdict == "fewer"
    assert one(1e6, 1_000_001).verdict == "more" and not one(1e6, 1_000_001).failed and one(1e6, 1.2e6).failed


def test_few_wild_rounds_say_nothing():
    rng = np.random.default_rng(7)
    for rounds in (2, 5):
        before, after = (noisy(rng, lines=100, rounds=rounds, pair_sd=2.0) for _ in "ab")
        judged = judge(before, after, 0.1)
        assert verdicts(judged) == {"cannot tell"} and all(one.why for one in judged)


def test_lines_without_pairs_are_judged_by_their_spread_which_is_wider():
    rng = np.random.default_rng(8)
    drift = np.exp(0.1 * rng.standard_normal((2, 40)))
    sides = [timed(times * pace * rng.normal(1, 0.02, 40), pace) for times, pace in zip((1.0, 1.5), drift)]
    (sharp,) = judge(*sides, 0.1)
    (wide,) = judge(*([line.model_copy(update={"pairs": None}) for line in side] for side in sides), 0.1)
    assert sharp.failed and wide.failed and wide.low < sharp.low < 0.5 < sharp.high < wide.high


def test_differences_of_no_sign_are_not_guessed_at():
    steady = [1.0, 1.01, 0.99] * 10
    other = lines_of([-1.0, 1.0, 2.0] * 10, [1.0] * 30)
    assert judge(lines_of(steady, steady), other, 0.1)[0].verdict == "cannot tell"


def test_the_command_says_what_differs_and_exits_4_for_a_regression(tmp_path, capsys):
    rng = np.random.default_rng(5)
    before, same, slower = (tmp_path / name for name in ("before.jsonl", "same.jsonl", "slower.jsonl"))
    for file, times, cpu in ((before, 1.0, "x"), (same, 1.0, "x"), (slower, 1.5, "y")):
        made = [one.model_dump() for one in noisy(rng, times, 2)]
        for one in made:
            one["machine"]["cpu"], one["versions"] = cpu, {"numpy": cpu}
        alone = made[0] | {"case": f"only {file.stem}"}
        file.write_text("".join(json.dumps(one) + "\n" for one in (*made, alone)))
    cli_bench_lines.compare(before, same)
    said = capsys.readouterr().out
    assert "2 lines: 2 same" in said and "regression" not in said and "another" not in said
    done = run_brainscale("bench", "compare", before, slower, "--threshold", "0.1", code=4)
    for words in (
        "another cpu: x → y", "another numpy: x → y", "2 lines: 2 slower", "regression: read; case 1; brainscale: +",
        "only in", "read; only before; brainscale", "read; only slower; brainscale",
    ):  # fmt: skip
        assert words in done.stdout, words


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    made = [one.model_dump() for one in noisy(np.random.default_rng(6))]
    file.write_text("".join(json.dumps(one) + "\n" for one in made))
    other.write_text("".join(json.dumps(one | {"case": "another"}) + "\n" for one in made))
    with pytest.raises(InputError, match="have no measured line in common"):
        cli_bench_lines.compare(file, other)
    for threshold in ("much", "0", "-1%"):
        with pytest.raises(InputError, match="--threshold"):
            cli_bench_lines.compare(file, file, threshold=threshold)
