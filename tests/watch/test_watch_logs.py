"""What the page knows of a log is what is in it, however it grows, is torn, is replaced or is damaged."""

from __future__ import annotations

import json
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.record.metrics import MetricsLog, decode, decode_lines, encode, set_aside
from aurora_train.tools.chart import Axes, Line, chart
from aurora_train.watch import log as logs
from aurora_train.watch.curves import CELLS, Curves, Series
from aurora_train.watch.glance import Glance
from aurora_train.watch.log import Log

FOREVER = math.inf
DEEP = b"[" * 9999 + b"\n"


def write(path, steps, **more):
    with MetricsLog(path) as log:
        for step in steps:
            log.write({"step": step, "loss": 8 / step, **more})
            if step % 10 == 0:
                log.write({"step": step, "evaluation": {"loss": abs(step - 50.0)}})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(
    st.dictionaries(st.sampled_from("ab"), st.floats() | st.sampled_from(["x", "NaN", "'Infinity"])).map(encode),
    st.sampled_from([b"[1]\n", b"\xff\n", b"{\n", b"1, 2\n", b"\n", b'{"a": 1}, {"b": 2}\n', b'{"a": NaN}\n', DEEP]),
)))  # fmt: skip
def test_lines_that_are_read_together_are_read_as_one_by_one(lines):
    found, unreadable = decode_lines(b"".join(lines))
    alone = []
    for line in lines:
        try:
            alone.append(decode(line))
        except (ValueError, RecursionError):
            pass
    assert repr(found) == repr(alone) and unreadable == len(lines) - len(alone)


def test_a_log_is_read_once_as_it_grows_is_torn_and_is_replaced_by_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "BLOCK_BYTES", 100)
    path, seen = tmp_path / "metrics.jsonl", []
    log = Log(path)
    assert not log.is_another() and log.next() is None and not log.behind

    def read_on():
        another = log.is_another()
        while (records := log.next()) is not None:
            seen.extend(record["step"] for record in records)
        return another

    write(path, range(1, 9))
    assert not read_on() and seen == [*range(1, 9)]
    with open(path, "ab") as file:
        file.write(b'{"step": 9, "lo')
    assert not read_on() and seen == [*range(1, 9)] and not log.behind, "a torn line is nothing to wait for"
    with open(path, "ab") as file:
        file.write(b'ss": 1}\n' + b'{"step": 10, "text": "' + b"x" * 900 + b'"}\n')
    assert not read_on() and seen == [*range(1, 11)]
    set_aside(path, 4, tmp_path / "aside.jsonl")
    seen.clear()
    assert read_on() and seen == [1, 2, 3, 4]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"2.0", b"9.0") + content)  # another run of the same name and inode, and longer
    seen.clear()
    assert read_on() and seen == [1, 2, 3, 4] * 2
    path.unlink()
    assert read_on() and not log.behind


def test_curves_are_the_means_and_the_extremes_of_all_that_was_recorded(tmp_path):
    path, draw, steps = tmp_path / "metrics.jsonl", random.Random(1), 3000
    values = [draw.gauss(2, 1) for _ in range(steps)]
    curves = Curves(Log(path))
    with MetricsLog(path) as log:
        for step, value in enumerate(values, 1):
            log.write({"step": step, "loss": math.nan if step == 7 else value, "tokens": 10, "time": 1e9 + 36.0 * step})
            if step % 500 == 250:
                log.write({"step": step, "evaluation": {"loss": value, "deep": {"er": 1}}})
                assert curves.read(FOREVER)
    assert curves.read(FOREVER) and curves.share == 1.0
    loss, cell = curves.known("loss"), 8
    x, mean, low, high = loss.points()
    assert len(x) == steps // cell + 1 <= CELLS and loss.not_finite == 1
    first = [value for step, value in enumerate(values, 1) if step < cell and step != 7]
    np.testing.assert_allclose([x[0], mean[0], low[0], high[0]],
                               [(21 / 6), np.mean(first), min(first), max(first)])  # fmt: skip
    np.testing.assert_allclose(mean[5], np.mean(values[39:47]))
    best = min((value, step) for step, value in enumerate(values, 1) if step != 7)
    assert loss.lowest == (best[1], best[0]) and loss.last == (steps, values[-1])
    assert high.max() == max(values), "a spike of one step is seen"
    assert curves.known("evaluation/deep/er").last == (2750, 1.0) and curves.known("nothing") is None
    np.testing.assert_allclose(curves.placed(np.array([101.0]), "hours"), [1.0], atol=0.05)
    np.testing.assert_allclose(curves.placed(np.array([3000.0]), "targets"), [30000])
    assert curves.placed(np.array([5.0]), "step") == [5.0]


def test_a_series_of_any_length_has_a_bounded_number_of_cells():
    series = Series()
    for begin in (0, 10**6, 2**52):
        series.add(np.arange(begin, begin + 1000, dtype=float), np.ones(1000))
    x, mean, *_ = series.points()
    assert len(x) <= CELLS and set(mean) == {1.0} and x[-1] > 2**51


def test_a_glance_finds_the_end_the_best_evaluation_and_a_sketch_without_reading_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5001), note="x" * 400)
    read = []
    real = Log.pieces

    def counted(self, begins, size):
        read.append(len(begins) * size)
        return real(self, begins, size)

    monkeypatch.setattr(Log, "pieces", counted)
    glance = Glance(Log(path))
    glance.look(0.0)  # no time at all
    assert glance.last["loss"] == 8 / 5000 and glance.behind and glance.best is None
    assert len(glance.sketch) == 41 and glance.sketch[0] > glance.sketch[20] > glance.sketch[-1]
    assert sum(read) < path.stat().st_size / 5, "and most of the log was not read for it"
    glance.look(FOREVER)
    assert glance.best == (50, 0.0) and glance.evaluation == {"loss": 4950.0} and not glance.behind
    read.clear()
    with open(path, "ab") as file:
        file.write(encode({"step": 5001, "loss": 0.25, "time": 1.0}) + encode({"step": 5003, "loss": 0.5, "time": 9.0}))
        file.write(b'{"step": 5004, "evalu')
    glance.look(FOREVER)
    assert glance.last["loss"] == 0.5 and glance.seconds_a_step == 4.0 and not glance.behind
    assert sum(read) < 1 << 18
    path.write_bytes(encode({"step": 1, "loss": 3.0}))
    glance.look(FOREVER)
    assert glance.last == {"step": 1, "loss": 3.0} and glance.best is None and len(glance.sketch) <= 2


def test_a_block_that_takes_too_long_ends_the_reading_and_the_next_request_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "BLOCK_BYTES", 1000)
    path, curves = tmp_path / "metrics.jsonl", Curves(Log(tmp_path / "metrics.jsonl"))
    write(path, range(1, 300))
    assert not curves.read(time.monotonic() - 1) and curves.share == 0.0
    while not curves.read(time.monotonic() + 1e-4):
        assert 0 < curves.share < 1
    assert curves.known("loss").last == (299, 8 / 299)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [3.0, math.nan, 3.0], [-1e-9, 1e-9], [1e99, -1e99], [1, 1e12],
                                    [5e-324, 1.0], [0.1, 0.3]])  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn_and_ticks_are_within_the_chart(values, log):
    x = np.arange(1.0, len(values) + 1)
    drawn = chart("t<i>", [Line("a&b", x, np.array(values))] * 2, Axes("step", log_x=log, log_y=log))
    assert "nan" not in drawn.lower() and "inf" not in drawn.lower() and "t&lt;i&gt;" in drawn and "a&amp;b" in drawn
    tops = [float(part.partition("%")[0]) for part in drawn.split('class="y" style="top:')[1:]]
    assert tops and all(-0.1 <= top <= 100.1 for top in tops) or log and min(values) <= 0


def test_what_is_not_positive_has_no_place_on_a_logarithmic_axis_and_nothing_to_draw_is_said():
    drawn = chart("t", [Line("", np.array([1.0, 2.0]), np.array([0.0, -1.0]))], Axes(log_y=True))
    assert "nothing to draw yet" in drawn
    drawn = chart("t", [Line("", np.arange(5.0), np.array([1.0, 0.0, 10.0, 100.0, math.nan]))], Axes(log_y=True))
    assert json.dumps(drawn).count("h0") == 3
