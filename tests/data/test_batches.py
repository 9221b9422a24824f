"""Batches: what step s holds depends on s alone, threads end, and an error in a thread reaches the caller."""

import threading

import numpy as np
import pytest
from corpora import config, write_folder

from aurora_train.data.batches import batches, read_batch
from aurora_train.data.order import indices
from aurora_train.train.evaluate import validation_batches
from language.prepare import prepare
from language.rows import TokenSource


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    return TokenSource(prepare(config(write_folder(folder / "text")), folder / "cache"), "train", 32)


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_steps_come_in_order_and_hold_what_their_number_says(source, prefetch):
    with batches(source, 3, 8, 0, 20, prefetch=prefetch) as feed:
        read = list(feed)
    assert [step for step, _ in read] == list(range(20))
    for step, batch in read:
        assert equal(batch, read_batch(source, 3, 8, step))
        expected = source.take(indices(3, step, 8, len(source)))
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
        assert batch["example"].dtype == np.uint32
        assert batch["example"].tolist() == list(range(step * 8, step * 8 + 8))


def test_starting_later_gives_the_batches_that_would_have_come(source):
    with batches(source, 0, 4, 0, 12) as feed:
        whole = dict(feed)
    with batches(source, 0, 4, 7, 12) as feed:
        for step, batch in feed:
            assert equal(batch, whole[step])


def test_two_hosts_hold_the_two_halves_of_the_batch(source):
    whole = read_batch(source, 0, 6, 5)
    halves = [read_batch(source, 0, 6, 5, rows) for rows in (slice(0, 3), slice(3, 6))]
    assert all(np.array_equal(whole[name], np.concatenate([half[name] for half in halves])) for name in whole)


def test_threads_end_with_the_feed(source):
    before = set(threading.enumerate())  # others, of earlier tests, may end meanwhile
    with batches(source, 0, 4, 0, 10**9) as feed:
        next(feed)
        started = set(threading.enumerate()) - before
        assert started
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)


class Failing:
    """A source that cannot read one example."""

    fingerprint = "0" * 64

    def __len__(self):
        return 100

    def take(self, chosen):
        if 13 in chosen:
            raise OSError("example 13 is on a bad sector")
        return {"x": chosen}


def test_an_error_while_reading_ahead_reaches_the_caller_at_its_step():
    bad = next(step for step in range(100) if 13 in indices(0, step, 4, 100))
    seen = []
    with batches(Failing(), 0, 4, 0, 25) as feed, pytest.raises(OSError, match="bad sector"):
        for step, _ in feed:
            seen.append(step)
    assert seen == list(range(bad))


def test_validation_batches_are_the_same_each_time_and_spread_over_the_split(source):
    once, again = list(validation_batches(source, 7, 21, 1)), list(validation_batches(source, 7, 21, 1))
    assert len(once) == 3 and all(equal(a, b) for a, b in zip(once, again, strict=True))
    chosen = np.concatenate([batch["example"] for batch in once])
    assert len(np.unique(chosen)) == 21 and chosen[-1] > len(source) * 0.9


def test_validation_batches_divide_over_the_devices(source):
    assert {len(batch["example"]) for batch in validation_batches(source, 7, 21, 4)} == {4}
    assert {len(batch["example"]) for batch in validation_batches(source, 2, 2, 8)} == {8}


@pytest.mark.parametrize(("batch", "microbatch", "devices", "part"), [(12, 6, 1, 6), (12, 8, 2, 6), (12, 5, 4, 4)])
def test_a_plan_does_not_decide_what_is_validated_on(batch, microbatch, devices, part, source):
    whole = list(validation_batches(source, batch, 32, devices))
    parts = list(validation_batches(source, batch, 32, devices, microbatch))
    assert {len(one["example"]) for one in parts} == {part}
    chosen, again = (np.concatenate([one["example"] for one in batches]) for batches in (whole, parts))
    assert len(chosen) == 24 and np.array_equal(chosen, again)
