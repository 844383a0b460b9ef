"""A feed hands on what a thread makes, or at once what went wrong, whatever the thread is stuck in."""

import itertools
import threading

import pytest

from brainscale.feed import Feed, LoaderFailed


def numbers(made, gate=None, stuck_at=None, error=None, ended=None):
    try:
        for number in itertools.count():
            if number == stuck_at:
                if error is not None:
                    raise error
                gate.wait(30)
            made.append(number)
            yield number
    finally:
        if ended is not None:
            ended.set()


def test_items_come_in_order_and_no_more_are_made_than_may_lie_ready():
    made = []
    feed = Feed(lambda _: numbers(made), 2, 5.0, lambda: "")
    assert [next(feed) for _ in range(50)] == list(range(50))
    assert len(made) <= 52
    assert feed.close()


def test_what_the_thread_raises_is_raised_after_what_was_ready():
    feed = Feed(lambda _: numbers([], stuck_at=2, error=OSError("disk")), 4, 5.0, lambda: "")
    assert [next(feed), next(feed)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(feed)
    assert feed.close()


def test_an_item_that_does_not_come_is_named():
    gate, ended = threading.Event(), threading.Event()
    feed = Feed(lambda _: numbers([], gate, 1, ended=ended), 1, 0.05, lambda: "waiting for sample 7")
    assert next(feed) == 0
    with pytest.raises(LoaderFailed, match=r"no batch within data\.timeout_s = 0\.05 s; waiting for sample 7"):
        next(feed)
    assert not feed.close(0.05)  # the thread is stuck, and left behind
    gate.set()
    assert ended.wait(10)


def test_a_failure_from_outside_does_not_wait_for_the_thread():
    gate = threading.Event()
    feed = Feed(lambda _: numbers([], gate, 0), 1, 60.0, lambda: "")
    feed.fail(LoaderFailed("a process died"))
    with pytest.raises(LoaderFailed, match="a process died"):
        next(feed)
    gate.set()
    assert feed.close()


def test_a_failure_overtakes_what_is_ready():
    gate = threading.Event()

    def make(_):
        yield from range(2)
        gate.set()  # two lie ready
        yield 2

    feed = Feed(make, 3, 5.0, lambda: "")
    assert gate.wait(10)
    feed.fail(LoaderFailed("sample 9 is damaged"))
    with pytest.raises(LoaderFailed, match="sample 9"):
        next(feed)
    assert feed.close()


def test_closing_ends_the_generator():
    ended = threading.Event()
    feed = Feed(lambda _: numbers([], ended=ended), 3, 5.0, lambda: "")
    next(feed)
    assert feed.close() and ended.is_set()
