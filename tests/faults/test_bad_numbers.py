"""Numbers that stay bad: the run goes back, leaves the data out, and in the end says what is wrong and where."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import Aurora, events, final_hash, losses

from aurora_train import load as load_run
from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.run import Run
from aurora_train.tools.runs import listing
from aurora_train.train import outliers
from aurora_train.train.bad_numbers import BadNumbers, Streak, Window, where_it_begins
from aurora_train.train.session import open_session

BAD_ROW = 17
# Fifty rows and batches of eight: the bad row comes once in about six steps. Saved often, so that some of each stays.
OPTIONS = [f"data.bad={BAD_ROW}", "train.rewind_after=1", "train.rewinds=9", "checkpoint.every=3", "--quiet"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shared_cache):
    """A run that went back for the bad row and reached its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    aurora, config = Aurora(folder, shared_cache), toy.write(folder)
    aurora.good("train", config, "--run", folder / "run", *OPTIONS)
    return folder / "run"


def test_the_bad_batch_is_left_out_and_the_steps_are_whole(undisturbed):
    went_back = events(undisturbed, "rewind")
    assert len(went_back) >= 2 and all(f"y of example {BAD_ROW}" in event["fault"] for event in went_back)
    told = losses(undisturbed)
    assert [step for step, _ in told] == list(range(1, 31)) and np.isfinite([loss for _, loss in told]).all()
    records = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert not any(record.get("skipped") for record in records)
    read = [record.get("data_step", record["step"] - 1) for record in records if "loss" in record]
    assert read == sorted(set(read)), "no batch is trained on twice"
    left_out = {step for event in went_back for step in range(event["data_first"], event["data_step"])}
    assert left_out and left_out.isdisjoint(read)
    params = load_run(undisturbed).state.params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("after", ["rewind", pytest.param("save", marks=pytest.mark.release)])
def test_a_run_that_is_killed_around_a_return_ends_with_the_same_bits(undisturbed, tmp_path, after, shared_cache):
    aurora, config = Aurora(tmp_path, shared_cache), toy.write(tmp_path)
    slow = {"TOY_SIGNAL": "take:9999:HANG"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = aurora.forked("train", config, "--run", "run", *OPTIONS, environment=slow, **pipes)
    log, until = tmp_path / "run" / "events.jsonl", time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        text = log.read_text() if log.exists() else ""
        if '"event": "rewind"' in text and (after == "rewind" or '"event": "save"' in text.split('"rewind"')[-1]):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    aurora.good("resume", "run", "--quiet")
    assert final_hash(tmp_path / "run") == final_hash(undisturbed) and losses(tmp_path / "run") == losses(undisturbed)


def test_after_as_many_returns_as_allowed_it_stops_and_names_the_batch_and_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, returns = str(toy.write(tmp_path)), ["train.rewind_after=1", "train.rewinds=1"]
    assert main(["train", config, f"data.bad={BAD_ROW}", *returns, "--run", "run"]) == 2
    err = capsys.readouterr().err
    assert f"y of example {BAD_ROW}" in err and "after 1 returns to step 0" in err and "Traceback" not in err
    (event,) = events(tmp_path / "run", "rewind")
    (row,), (fail,) = listing(tmp_path / "run"), events(tmp_path / "run", "fail")
    assert row.state == "failed" and row.why == fail["why"] and "was skipped, after 1 returns to step 0" in fail["why"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    assert last["skipped"] == 1 and last["data_step"] == last["step"] - 1 + event["data_step"]
    assert main(["inspect-batch", "run", str(last["step"]), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["data_step"] == last["data_step"] and facts["not_finite"] == {"y": [BAD_ROW]}
    assert BAD_ROW in facts["indices"]
    assert main(["inspect-batch", "run", "29"]) == 2
    assert "has not taken step 29" in capsys.readouterr().err


def test_a_single_bad_step_is_skipped_and_no_more_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(toy.write(tmp_path)), f"data.bad={BAD_ROW}", "--run", "run", "--quiet"]) == 0
    assert events(tmp_path / "run", "skip") and not events(tmp_path / "run", "rewind")


def test_a_streak_is_of_steps_in_a_row_and_knows_its_data():
    streak = Streak(3, lag=4)
    for step, skipped in ((1, True), (2, True), (3, False), (4, True), (5, True)):
        streak.count(step, skipped)
    with pytest.raises(BadNumbers) as caught:
        streak.count(6, True)
    assert caught.value.window == Window(4, 6, data_first=7) and caught.value.window.data_after == 10
    endless = Streak(None, lag=0)
    for step in range(1, 100):
        endless.count(step, True)


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = open_session(load(toy.write(tmp_path)), Run(tmp_path / "run"), lambda *_: None)
    yield opened
    opened.store.close()


def harmed(state, unit: int, value: float):
    """Weights of one kernel of a unit set to a value, as bits that flipped in memory would."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(state.params)
    place = next(i for i, (path, leaf) in enumerate(leaves) if "segments" in str(path) and leaf.ndim == 3)
    values = [leaf for _, leaf in leaves]
    values[place] = values[place].at[unit].set(value)
    return state._replace(params=jax.tree.unflatten(tree, values))


def test_a_weight_that_is_no_number_is_named_with_its_unit(session):
    told = where_it_begins(session, harmed(session.fresh(), 1, jnp.nan), Window(1, 1, 0))
    assert told.startswith("the parameter stack.units.0001.")


def test_a_flipped_exponent_is_found_at_the_unit_whose_output_overflows(session):
    told = where_it_begins(session, harmed(session.fresh(), 1, 3e38), Window(1, 1, 0))
    assert told == "the output of unit 1 of stack"
    assert "every unit is finite" in where_it_begins(session, session.fresh(), Window(1, 1, 0))


# ---- outliers


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100), st.integers(0, 2**31), st.floats(2, 50), st.floats(0.1, 1000))
def test_an_outlier_is_one_by_the_robust_z_score_of_the_last_good_steps(steps, seed, limit, factor):
    draw, recent = np.random.default_rng(seed), outliers.empty()
    told = draw.lognormal(size=(steps, 2)).astype(np.float32)
    for loss, norm in told:
        values = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}
        recent = _remembered(recent, values, jnp.bool_(True))
    recent = _remembered(recent, {"loss": jnp.float32(jnp.nan), "grad_norm": jnp.float32(1)}, jnp.bool_(False))
    value = np.float32(factor)
    values = {"loss": jnp.float32(1.0), "grad_norm": jnp.float32(value)}
    found = bool(_is_outlier(recent, values, limit))
    if steps < outliers.FEWEST:
        assert not found
        return
    held = told[-outliers.MEMORY :].astype(np.float64)
    far = []
    for number, x in ((0, 1.0), (1, float(value))):
        middle = np.median(held[:, number])
        spread = max(1.4826 * np.median(np.abs(held[:, number] - middle)), 0.01 * middle)
        far.append((x - middle) / spread - limit)
    if min(map(abs, far)) > 1e-3:  # elsewhere float32 may round to the other side
        assert found == (max(far) > 0)


_remembered, _is_outlier = jax.jit(outliers.remembered), jax.jit(outliers.is_outlier)


@pytest.mark.slow
def test_a_loud_row_is_skipped_and_a_stop_in_between_changes_no_bit(tmp_path, shared_cache):
    aurora, config = Aurora(tmp_path, shared_cache), toy.write(tmp_path)
    options = ["data.loud=17", "train.steps=60", "train.spike=20", "--quiet"]
    aurora.good("train", config, "--run", "whole", *options)
    skips = events(tmp_path / "whole", "skip")
    assert skips and all(event["step"] > outliers.FEWEST and np.isfinite(event["loss"]) for event in skips)
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    told = {r["step"]: r["loss"] for r in records if "loss" in r}
    loud = {event["step"] for event in skips}
    later = [loss for step, loss in told.items() if step > outliers.FEWEST and step not in loud]
    assert min(told[step] for step in loud) > 100 * max(later)
    stopped = aurora("train", config, "--run", "cut", *options, environment={"TOY_SIGNAL": "take:33:SIGTERM"})
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    aurora.good("resume", "cut", "--quiet")
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")
