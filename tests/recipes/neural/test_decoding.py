"""The second objective: a causal decoder, an honest score, and baselines that are what their names say."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from aurora_train.config import load
from aurora_train.errors import UserError
from aurora_train.machine.precision import settled
from aurora_train.random import stream
from neural.linear import linear_decoder, ridge
from neural.spikes import Trials
from neural.windows import Standard, Windows

pytest.importorskip("h5py")

SMALL = [
    *("data.simulated_trials=40", "data.simulated_units=16", "data.window=12"),
    *("model.width=16", "model.heads=2", "model.layers=1"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def make(cache, *overrides):
    config = settled(load("neural/decoding", [*SMALL, *overrides]))
    return config.recipe_class(config, cache).ready(silent)


@pytest.fixture(scope="module")
def recipe(cache):
    return make(cache)


@pytest.fixture(scope="module")
def model(recipe):
    return build(recipe)


@pytest.fixture(scope="module")
def module():
    import neural.velocity

    return neural.velocity


def build(recipe):
    graph, _ = nnx.split(nnx.eval_shape(lambda: recipe.model(nnx.Rngs(params=stream(0, "init")))))
    made = jax.jit(lambda: nnx.split(recipe.model(nnx.Rngs(params=stream(0, "init"))))[1])()
    return nnx.merge(graph, made)


def silent(done, total, what):
    pass


def predictor(recipe, model):
    run = jax.jit(lambda batch: recipe.predict(model, batch))
    return lambda batch: np.asarray(run(batch))


@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_spikes_of_the_future_change_nothing_in_the_past(cache, kind):
    recipe = make(cache, f"model.kind={kind}")
    model = build(recipe)
    spikes = recipe.data("train").take(np.arange(3))["spikes"]
    predict = predictor(recipe, model)
    before = predict({"spikes": spikes})
    for now in (0, 5, 10):
        changed = spikes.copy()
        changed[:, now + 1 :] = 9
        after = predict({"spikes": changed})
        np.testing.assert_array_equal(after[:, : now + 1], before[:, : now + 1])
        assert not np.allclose(after[:, now + 1 :], before[:, now + 1 :])


@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_a_few_steps_of_gradient_descent_lower_the_loss(cache, kind):
    recipe = make(cache, f"model.kind={kind}")
    graph, params = nnx.split(build(recipe))
    batch = recipe.data("train").take(np.arange(0, 640, 20))
    keys = jax.random.split(jax.random.key(1), 32)

    @jax.jit
    def step(params):
        def mean(params):
            loss = recipe.loss(nnx.merge(graph, params), batch, keys)
            return loss.total / loss.weight

        value, grads = jax.value_and_grad(mean)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value

    losses = []
    for _ in range(25):
        params, value = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_is_a_sum_over_measured_bins_and_splits_into_microbatches(recipe, model):
    batch = recipe.data("train").take(np.arange(8) * 7)
    batch["weights"][2, 4:] = 0
    keys = jax.random.split(jax.random.key(0), 8)
    loss = jax.jit(lambda batch, keys: tuple(recipe.loss(model, batch, keys))[:2])
    (total, weight), halves = loss(batch, keys), [
        loss({k: v[s] for k, v in batch.items()}, keys[s]) for s in (slice(4), slice(4, 8))
    ]
    assert float(weight) == batch["weights"].sum() == sum(float(half[1]) for half in halves)
    np.testing.assert_allclose(total, sum(half[0] for half in halves), rtol=1e-6)
    # Without keys nothing is dropped: the loss is the weighted squared error of what predict gives.
    error = (predictor(recipe, model)({"spikes": batch["spikes"]}) - batch["velocity"]) ** 2
    np.testing.assert_allclose(loss(batch, None)[0], np.sum(error.mean(axis=-1) * batch["weights"]), rtol=1e-5)


def test_every_held_out_bin_is_decoded_from_its_own_last_window(recipe, model, module):
    """`decode` through windows equals running the model on each bin's own history, one bin at a time."""
    windows = recipe.data("validation")
    trials, size = windows.trials, windows.window
    decoded = module.decode(predictor(recipe, model), windows, silent, batch=32)
    assert decoded.shape == trials.velocity.shape and np.isfinite(decoded).all()
    predict = predictor(recipe, model)
    for trial in range(min(2, len(trials.ids))):
        for row in range(trials.offsets[trial], trials.offsets[trial] + 30):
            history = trials.spikes[max(trials.offsets[trial], row + 1 - size) : row + 1]
            padded = np.zeros((1, size, history.shape[1]), np.uint16)
            padded[0, : len(history)] = history
            alone = windows.standard.undo(predict({"spikes": padded})[0, len(history) - 1])
            np.testing.assert_allclose(decoded[row], alone, rtol=1e-4, atol=1e-4)


def test_streamed_bins_are_decoded_to_the_velocity_of_the_score(recipe, model, module):
    windows = recipe.data("validation")
    trials, predict = windows.trials, predictor(recipe, model)
    decoded = module.decode(predict, windows, silent, batch=32)
    for trial in range(min(2, len(trials.ids))):
        rows = range(trials.offsets[trial], min(trials.offsets[trial + 1], trials.offsets[trial] + 25))
        answer = recipe.responder(predict)  # a new trial begins anew
        first = [answer({"spikes": trials.spikes[row].tolist()})["velocity"] for row in rows[:15]]
        assert first[0].shape == (2,)
        later = answer({"spikes": trials.spikes[rows[15] : rows[-1] + 1]})["velocity"]  # several bins at once
        np.testing.assert_allclose(np.concatenate([first, later]), decoded[list(rows)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("request_", "said"), [
    ({}, "the request has no spikes"),
    ({"counts": [0] * 16}, "a request has no 'counts'"),
    ({"spikes": [0] * 15}, "the shape [15]"),
    ({"spikes": 3}, "the shape []"),
    ({"spikes": [[0] * 16, [0] * 15]}, "not an array of numbers"),
    ({"spikes": "none"}, "not an array of numbers"),
    ({"spikes": [0.5] * 16}, "0.5 is no number of spikes"),
    ({"spikes": [-1] * 16}, "-1 is no number of spikes"),
    ({"spikes": [float("nan")] * 16}, "nan is no number of spikes"),
    ({"spikes": [70000] * 16}, "70000 is no number of spikes"),
])  # fmt: skip
def test_a_bad_bin_is_answered_by_what_was_expected_and_is_not_remembered(recipe, model, request_, said):
    predict = predictor(recipe, model)
    answer, undisturbed = recipe.responder(predict), recipe.responder(predict)
    good = {"spikes": np.arange(16) % 3}
    answer(good), undisturbed(good)
    with pytest.raises(UserError) as error:
        answer(request_)
    assert said in str(error.value) and "16 counts of the next bin" in error.value.hint
    np.testing.assert_array_equal(answer(good)["velocity"], undisturbed(good)["velocity"])


def test_the_score_is_r2_on_test_trials_and_latency_is_a_time(recipe, tmp_path):
    windows = recipe.data("test")

    def oracle(batch):
        """A decoder that knows the answer, found by the spikes it is shown."""
        at = [np.flatnonzero((windows_spikes == spikes).all(axis=(1, 2)))[0] for spikes in batch["spikes"]]
        return everything["velocity"][at]

    everything = windows.take(np.arange(len(windows)))
    windows_spikes = everything["spikes"]
    score = recipe.score(oracle, "test", jax.random.key(0), tmp_path, silent)
    assert next(iter(score)) == "r2" and score["r2"] == pytest.approx(1, abs=1e-6)
    assert 0 < score["latency_ms_p50"] <= score["latency_ms_p99"]
    nothing = recipe.score(lambda b: np.zeros((*b["spikes"].shape[:2], 2)), "test", None, tmp_path, silent)
    assert -0.2 < nothing["r2"] <= 0


def test_ridge_is_the_closed_form_of_its_normal_equations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)), rng.normal(size=(80, 2))
    weights = ridge(x.T @ x, x.T @ y, np.full(6, 3.0))
    stacked, zeros = np.concatenate([x, np.sqrt(3.0) * np.eye(6)]), np.zeros((6, 2))
    np.testing.assert_allclose(weights, np.linalg.lstsq(stacked, np.concatenate([y, zeros]))[0], atol=1e-12)


def test_the_linear_baseline_finds_a_lagged_linear_code_and_no_more():
    """Velocity that is a lagged linear function of counts is decoded perfectly; one lag too few cannot."""
    rng = np.random.default_rng(1)
    ids, length, units = np.arange(60), 50, 5
    spikes = rng.poisson(1.0, (len(ids) * length, units)).astype(np.uint16)
    offsets = np.arange(len(ids) + 1) * length
    kernel = rng.normal(size=(3, units, 2))
    padded = np.concatenate([np.zeros((2, units)), spikes - 1.0])
    velocity = sum(padded[2 - lag : len(padded) - lag] @ kernel[lag] for lag in range(3))
    velocity[[offsets[:-1], offsets[:-1] + 1]] = np.nan  # the first bins of a trial lack their history
    trials = Trials(spikes, velocity, offsets, ids, "synthetic", 0.02, "cm/s")

    def data(split):
        return Windows(trials.split(split, 0.2), 8, Standard.of(trials.split("train", 0.2).velocity))

    full = linear_decoder(data, lags=3, penalties=[1e-6, 1e3])
    assert full["r2"] > 1 - 1e-6 and full["penalty"] == 1e-6
    assert linear_decoder(data, lags=2, penalties=[1e-6])["r2"] < 0.95


def test_the_baselines_are_scored_on_the_same_held_out_trials(recipe, tmp_path):
    rivals = recipe.baselines(tmp_path, silent)
    assert all(0.2 < rivals[name] < 1 for name in ("ridge", "wiener", "kalman"))
    table = rivals["tables"][0]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert [(row["decoder"], row["lags"], row["r2"]) for row in rows] == [
        ("ridge", 12, rivals["ridge"]), ("wiener", 10, rivals["wiener"]), ("kalman", None, rivals["kalman"])
    ]


def test_training_data_holds_no_bin_of_a_held_out_trial(recipe):
    held_out = {int(i) for split in ("validation", "test") for i in recipe.data(split).trials.ids}
    assert held_out.isdisjoint(int(i) for i in recipe.data("train").trials.ids)
    train = recipe.data("train")
    assert train.describe()["trials"] + len(held_out) == 40
    np.testing.assert_allclose(np.nanmean(train.standard.apply(train.trials.velocity), axis=0), 0, atol=1e-9)


def test_a_recording_named_in_the_config_is_read_as_the_simulated_one_is(recipe, cache):
    path = next(cache.glob("*.nwb"))
    named = make(cache, f"data.source={path}")
    assert named.data("train").fingerprint == recipe.data("train").fingerprint


def test_wrong_settings_are_told_before_anything_runs(cache):
    with pytest.raises(UserError, match="use one of these for heads: 1, 2, 4, 8"):
        load("neural/decoding", [*SMALL, "model.heads=3"])
    with pytest.raises(UserError, match="no recording"):
        make(cache, "data.source=nowhere.nwb")
    with pytest.raises(UserError, match="time series: processing/behavior/hand_vel"):
        path = next(cache.glob("*.nwb"))
        make(cache, f"data.source={path}", "data.behavior=cursor_velocity")


def test_the_recipe_file_imports_no_jax(recipe, module):
    code = "import sys; from aurora_train.config import load; load('neural/decoding'); print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_bfloat16_compute_gives_float32_velocities(cache):
    recipe = make(cache, "train.precision=bfloat16")
    model = build(recipe)
    out = predictor(recipe, model)({"spikes": recipe.data("train").take(np.arange(2))["spikes"]})
    assert out.dtype == np.float32 and out.shape == (2, 12, 2)
