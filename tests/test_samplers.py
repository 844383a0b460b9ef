"""Which scan a sample is of: once per epoch, exact quotas, subjects in turn; a pure function of seed and index."""

import itertools
import pickle
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from conftest import write_tiny_store
from hypothesis import given, settings
from hypothesis import strategies as st

from brainscale.config import Config
from brainscale.samplers import Order, group, make_order, quotas
from brainscale.sampling import ORDER, words
from brainscale.settings import InputError, load
from brainscale.stores import Stores

SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = st.floats(1e-3, 1e3)
BLOCKS = st.integers(0, 10**9)


def order_of(seed, *groups):
    """An order of groups given as (weight, scans of each unit); rows are three apart."""
    made, begin = [], 0
    for number, (weight, sizes) in enumerate(groups):
        units = np.repeat(np.arange(len(sizes)), sizes)
        rows = 3 * np.arange(begin, begin + len(units))
        begin += len(units)
        made.append(group(str(number), rows, units, Fraction(weight)))
    return Order(seed, made)


def uniform(seed, scans):
    return order_of(seed, (1, [1] * scans))


@st.composite
def mixtures(draw):
    """Orders of two groups or more, of scans or of subjects with several."""
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=12)
    return order_of(draw(SEEDS), *draw(st.lists(st.tuples(WEIGHTS, sizes), min_size=2, max_size=5)))


# ------------------------------------------------------------------------------------------------ one group


@given(SEEDS, st.integers(1, 80), st.integers(1, 6), st.integers(1, 5), BLOCKS, st.data())
@settings(deadline=None)
def test_uniform_is_every_scan_once_per_epoch_over_ranks_and_cuts(seed, scans, ranks, micro, epoch, data):
    """The union of what the ranks take, from an epoch's first sample on, before and after a run is cut anywhere."""
    stride = ranks * micro
    steps = -(-scans // stride) + 1
    cut = data.draw(st.integers(0, steps))
    taken = {}
    for begin, end in ((0, cut), (cut, steps)):
        order = uniform(seed, scans)
        for rank in range(ranks):
            for step in range(begin, end):
                first = epoch * scans + step * stride + rank * micro
                taken |= {index: order.row(index) for index in range(first, first + micro)}
    rows = [taken[epoch * scans + at] for at in range(scans)]
    assert sorted(rows) == uniform(seed, scans).rows.tolist()


@given(SEEDS, st.integers(1, 60), BLOCKS)
@settings(deadline=None)
def test_uniform_is_the_order_that_checkpoints_were_made_with(seed, scans, epoch):
    """The scans sorted by the words of the epoch."""
    by_words = np.argsort(words(seed, ORDER, epoch, scans), kind="stable")
    order = uniform(seed, scans)
    assert [order.row(epoch * scans + at) for at in range(scans)] == (3 * by_words).tolist()


def test_every_stream_is_fixed_for_ever():
    """A checkpoint made with another numpy must find the same order: epochs, slots, and turns of a subject."""
    assert [uniform(0, 8).row(i) for i in range(8)] == [0, 6, 3, 15, 12, 9, 18, 21]
    mixed = order_of(1, (1, [1, 1, 1]), (2, [2, 3]))
    assert [mixed.row(i) for i in range(16)] == [9, 15, 21, 6, 0, 3, 12, 18, 0, 6, 9, 18, 12, 21, 3, 12]


@given(SEEDS, st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(0, 10**6))
@settings(deadline=None)
def test_subjects_once_per_epoch_and_their_scans_in_turn(seed, sizes, rounds):
    """n epochs that begin at a multiple of n hold each of a subject's n scans once."""
    order, subjects = order_of(seed, (1, sizes)), len(sizes)
    subject_of = {3 * at: subject for at, subject in enumerate(np.repeat(np.arange(subjects), sizes).tolist())}
    for subject, size in enumerate(sizes):
        scans = []
        for epoch in range(rounds * size, (rounds + 1) * size):
            rows = [order.row(index) for index in range(epoch * subjects, (epoch + 1) * subjects)]
            assert sorted(subject_of[row] for row in rows) == list(range(subjects))
            scans += [row for row in rows if subject_of[row] == subject]
        assert sorted(scans) == [row for row, of in subject_of.items() if of == subject]


def test_a_subjects_scans_come_in_another_order_each_round():
    order = order_of(0, (1, [8, 8]))
    turns = {0: [], 1: []}
    for index in range(2 * 8 * 2):
        subject, scan = divmod(order.row(index) // 3, 8)
        turns[subject].append(scan)
    found = {tuple(turns[subject][at : at + 8]) for subject in (0, 1) for at in (0, 8)}
    assert len(found) == 4 and all(sorted(one) == list(range(8)) for one in found)


# ------------------------------------------------------------------------------------------------ quotas


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20), st.integers(0, 10**6))
@settings(deadline=None)
def test_quotas_are_exact(weights, more):
    """They add up, lie within one of the exact share unless that is below one, and never contradict the weights."""
    total = len(weights) + more
    shares = [Fraction(weight) for weight in weights]
    found = quotas(shares, total)
    exact = [total * share / sum(shares) for share in shares]
    assert sum(found) == total and min(found) >= 1
    raised = sum(1 for share in exact if share < 1)
    assert all(-1 - raised < quota - share <= 1 for quota, share in zip(found, exact))
    by_share = sorted(zip(exact, found))
    assert all(low <= high for (_, low), (_, high) in itertools.pairwise(by_share))


def test_quotas_of_plain_shares():
    thirds = [Fraction(1), Fraction(1), Fraction(1)]
    assert quotas(thirds, 9) == [3, 3, 3] and quotas(thirds, 10) == [4, 3, 3] and quotas(thirds, 11) == [4, 4, 3]
    assert quotas([Fraction(1), Fraction(3)], 100) == [25, 75]
    assert quotas([Fraction(1), Fraction(10**6)], 10) == [1, 9]
    assert quotas([Fraction(5), Fraction(3), Fraction(2)], 7) == [4, 2, 1]


@given(mixtures(), BLOCKS)
@settings(deadline=None)
def test_every_block_holds_every_groups_quota(order, block):
    group_of = {row: number for number, one in enumerate(order.groups) for row in one.rows.tolist()}
    count = len(order.rows)
    drawn = Counter(group_of[order.row(index)] for index in range(block * count, (block + 1) * count))
    assert drawn == Counter(dict(enumerate(order.quotas)))


@given(mixtures())
@settings(deadline=None, max_examples=50)
def test_a_groups_units_come_once_before_any_comes_twice(order):
    """The stream without the other groups' samples is that of the group's epochs, whatever the blocks."""
    epochs = 3
    blocks = max(-(-epochs * len(one.first) // quota) for one, quota in zip(order.groups, order.quotas))
    rows = [order.row(index) for index in range(blocks * len(order.rows))]
    for one in order.groups:
        units = {row: number for number in range(len(one.first)) for row in one.unit(number).tolist()}
        mine = [units[row] for row in rows if row in units]
        count = len(one.first)
        for epoch in range(epochs):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_places_of_a_block_are_shuffled():
    """Blocks differ, seeds differ, and each group is found at every place."""
    place = {}
    for seed in (0, 1):
        order = order_of(seed, (1, [1] * 4), (1, [1] * 4))
        for block in range(200):
            place[seed, block] = tuple(order.row(block * 8 + at) < 12 for at in range(8))
    assert len(set(place.values())) > 50
    assert 0.35 < np.mean(list(place.values()), axis=0).min() and np.mean(list(place.values()), axis=0).max() < 0.65


@given(mixtures(), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
@settings(deadline=None)
def test_rows_depend_on_the_index_alone(order, indices):
    """In any order, again, after pickling, and in an object that has drawn nothing before."""
    rows = [order.row(index) for index in indices]
    again = pickle.loads(pickle.dumps(order))  # noqa: S301
    assert [again.row(index) for index in reversed(indices)] == rows[::-1]
    assert rows == [Order(order.seed, order.groups).row(index) for index in indices]
    assert set(rows) <= set(order.rows.tolist())
    assert again.quotas == order.quotas and np.array_equal(again.rows, order.rows)


def test_a_group_of_few_scans_leaves_a_large_ones_epoch_in_memory():
    """Every sample of a group of one scan is an epoch; the other group's is still made once."""
    order = order_of(0, (1, [1]), (1, [1] * 999))
    assert order.quotas == (500, 500)
    for index in range(1000):
        order.row(index)
    assert order._epochs[1].cache_info().misses == 1 and order._slots.cache_info().misses == 1


def test_two_million_scans_without_walking():
    """A sample late in the stream costs the words of its block and epoch, and little memory."""
    rows = np.arange(2_000_000)
    order = Order(0, [group("a", rows[::2], rows[::2], Fraction(1)), group("b", rows[1::2], rows[1::2], Fraction(3))])
    drawn = [order.row(10**15 + at) for at in range(1000)]
    assert 650 < sum(row % 2 for row in drawn) < 850 and len(set(drawn)) == 1000
    assert len(pickle.dumps(order)) < 40e6


# ------------------------------------------------------------------------------------------------ settings


def contrasts(record):
    """T1w of every subject; a T2w or a FLAIR beside it."""
    record["contrast"] = "T1w" if record["row"] % 2 == 0 else "FLAIR" if record["row"] % 4 == 1 else "T2w"
    record["participant"] = {"site": "one"} if record["row"] < 8 else {}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return Stores([write_tiny_store(tmp_path_factory.mktemp("stores") / "mixed", scans=12, change=contrasts)])


def order_for(store, *overrides, rows=None):
    return make_order(store, store.rows if rows is None else rows, load(Config, None, overrides))


def test_settings_make_uniform_and_subject_balanced_orders(mixed):
    order = order_for(mixed, "seed=5")
    assert [order.row(i) for i in range(24)] == [uniform(5, 12).row(i) // 3 for i in range(24)]
    order = order_for(mixed, "data.sampler=subject_balanced")
    assert sorted(order.row(i) // 2 for i in range(6)) == list(range(6))
    assert sorted(order.row(i) for i in range(12)) == list(range(12))
    assert order_for(mixed, rows=np.array([1, 4, 7])).rows.tolist() == [1, 4, 7]


def test_weights_give_shares_and_leave_out(mixed):
    order = order_for(mixed, "data.sampler=weighted", "data.weights={T1w=1,FLAIR=3,T2w=0}")
    assert [one.name for one in order.groups] == ["FLAIR", "T1w"] and order.quotas == (7, 2)
    assert order.rows.tolist() == [row for row in range(12) if row % 4 != 3]
    other = order_for(mixed, "data.sampler=weighted", "data.weights={T2w=0,FLAIR=3,T1w=1}")
    assert [order.row(i) for i in range(99)] == [other.row(i) for i in range(99)]


def test_weights_are_about_any_column(mixed):
    site = ("data.sampler=weighted", "data.weight_column=participant_site")
    order = order_for(mixed, *site, 'data.weights={one=1,"n/a"=1}')
    assert order.quotas == (6, 6) and order.groups[0].rows.tolist() == [8, 9, 10, 11]
    order = order_for(mixed, "data.sampler=weighted", "data.weight_column=skull_stripped", "data.weights={True=1}")
    assert order.quotas == (12,)


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ("{T1w=1,FLAIR=1}", ('contrast "T2w" have no weight', '"FLAIR", "T1w"', "0 leaves its scans out")),
        ("{T1w=1,FLAIR=1,T2w=1,t2=1}", ('names "t2"', 'those that occur are "FLAIR", "T1w", "T2w"')),
    ],
)
def test_weights_that_do_not_fit_are_refused(mixed, weights, parts):
    with pytest.raises(InputError) as caught:
        order_for(mixed, "data.sampler=weighted", f"data.weights={weights}")
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_an_unknown_column_is_refused_and_a_long_list_cut(mixed):
    with pytest.raises(InputError, match=r"no column 'contrasts'; its columns are row, id"):
        order_for(mixed, "data.sampler=weighted", "data.weights={T1w=1}", "data.weight_column=contrasts")
    store = Stores([mixed.stores[0].path])
    with pytest.raises(InputError, match=r'"sub-00_ses-0_T1w".* have no weight'):
        order_for(store, "data.sampler=weighted", "data.weights={T1w=1}", "data.weight_column=id")


def test_only_values_of_training_scans_need_a_weight(mixed):
    """T2w is held out altogether: it needs no weight, and cannot have one."""
    rows = np.array([row for row in range(12) if row % 4 != 3])
    order_for(mixed, "data.sampler=weighted", "data.weights={T1w=1,FLAIR=1}", rows=rows)
    with pytest.raises(InputError, match='names "T2w", and no training scan'):
        order_for(mixed, "data.sampler=weighted", "data.weights={T1w=1,FLAIR=1,T2w=1}", rows=rows)


def test_nothing_heavy_is_imported():
    """Reading processes import it by the dozen."""
    code = (
        "import sys, brainscale.samplers, brainscale.stores; print([m for m in ('torch', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
