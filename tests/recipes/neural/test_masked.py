"""The masked transformer: what it may see and what not, its loss, and its score beside the baseline."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from kit import in_process
from small_sessions import BEHAVIOR, session

from aurora_train.config import load
from aurora_train.errors import UserError
from aurora_train.machine.precision import settled
from aurora_train.random import stream
from neural.nwb_write import write_recording

pytest.importorskip("h5py")

SMALL = [
    *("data.simulated_trials=40", "data.simulated_units=16", "data.window=24"),
    *("model.width=16", "model.heads=2", "model.layers=1"),
]


def silent(done, total, what):
    pass


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    config = settled(load("neural/masked", SMALL))
    return config.recipe_class(config, tmp_path_factory.mktemp("cache")).ready(silent)


@pytest.fixture(scope="module")
def model(recipe):
    graph, _ = nnx.split(nnx.eval_shape(lambda: recipe.model(nnx.Rngs(params=stream(0, "init")))))
    made = jax.jit(lambda: nnx.split(recipe.model(nnx.Rngs(params=stream(0, "init"))))[1])()
    return nnx.merge(graph, made)


@pytest.fixture(scope="module")
def predict(recipe, model):
    run = jax.jit(lambda batch: recipe.predict(model, batch))
    return lambda batch: np.asarray(run(batch))


def batch_of(recipe, count=3):
    return recipe.data("train").take(np.arange(count) * 7)


def test_the_rates_do_not_depend_on_the_units_that_are_held_out(recipe, predict):
    batch = batch_of(recipe)
    changed = batch | {"spikes": batch["spikes"].copy()}
    changed["spikes"][..., recipe.known["held_out"]] = 9
    np.testing.assert_array_equal(predict(changed), predict(batch))
    changed["spikes"][..., recipe.known["held_in"][0]] = 9
    assert not np.allclose(predict(changed), predict(batch))
    assert len(recipe.known["held_out"]) == 4 and predict(batch).shape == (3, 24, 16)


def test_the_future_counts_and_padding_does_not(recipe, predict):
    batch = batch_of(recipe)
    late = batch | {"spikes": batch["spikes"].copy()}
    late["spikes"][:, 20:] = 5
    assert not np.allclose(predict(late)[:, :10], predict(batch)[:, :10])
    padded = batch | {"weights": batch["weights"].copy(), "spikes": batch["spikes"].copy()}
    padded["weights"][:, 15:] = 0
    before = predict(padded)[:, :15]
    padded["spikes"][:, 15:] = 7
    np.testing.assert_array_equal(predict(padded)[:, :15], before)


def test_a_masked_bin_is_predicted_without_its_own_spikes(recipe, model):
    batch = batch_of(recipe)
    masked = np.zeros((3, 24), bool)
    masked[:, 11] = True
    rates = jax.jit(lambda batch: recipe._log_rates(model, batch, masked))
    changed = batch | {"spikes": batch["spikes"].copy()}
    changed["spikes"][:, 11] = 9
    np.testing.assert_array_equal(rates(changed), rates(batch))
    changed["spikes"][:, 12] = 9
    assert not np.allclose(rates(changed)[:, 11], rates(batch)[:, 11])


def test_a_masked_unit_is_predicted_without_its_own_spikes(recipe, model):
    batch, own = batch_of(recipe), recipe.known["held_in"][5]
    hidden = np.zeros((3, len(recipe.known["held_in"])), bool)
    hidden[:, 5] = True
    rates = jax.jit(lambda batch: recipe._log_rates(model, batch, hidden=hidden))
    changed = batch | {"spikes": batch["spikes"].copy()}
    changed["spikes"][..., own] = 9
    np.testing.assert_array_equal(rates(changed), rates(batch))
    changed["spikes"][..., recipe.known["held_in"][4]] = 9
    assert not np.allclose(rates(changed)[..., own], rates(batch)[..., own])


def test_the_loss_is_the_likelihood_of_the_units_held_out_and_of_masked_bins(recipe, model):
    batch, known = batch_of(recipe, 4), recipe.known
    batch["weights"][1, 18:] = 0
    loss = recipe.loss(model, batch, None)
    masked = np.broadcast_to(np.arange(24) % 4 == 2, (4, 24))
    log_rates = np.asarray(recipe._log_rates(model, batch, masked), np.float64)
    errors = np.exp(log_rates) - batch["spikes"] * log_rates
    inferred = errors[..., known["held_out"]].sum(-1) * batch["weights"]
    filled = errors[..., known["held_in"]].sum(-1) * batch["weights"] * masked * 4
    assert float(loss.total) == pytest.approx((inferred + filled).sum() / 16, rel=1e-5)
    assert float(loss.weight) == batch["weights"].sum()
    total, weight = loss.metrics["held_out_nll"]
    assert float(total) == pytest.approx(inferred.sum() / 4, rel=1e-5) and float(weight) == float(loss.weight)


@pytest.mark.slow
def test_microbatches_add_up_and_the_weight_does_not_depend_on_the_mask(recipe, model):
    batch, keys = batch_of(recipe, 8), jax.random.split(jax.random.key(0), 8)
    loss = jax.jit(lambda batch, keys: tuple(recipe.loss(model, batch, keys))[:2])
    whole, halves = loss(batch, keys), [
        loss({k: v[s] for k, v in batch.items()}, keys[s]) for s in (slice(4), slice(4, 8))
    ]
    np.testing.assert_allclose(whole[0], sum(half[0] for half in halves), rtol=1e-5)
    other = loss(batch, jax.random.split(jax.random.key(1), 8))
    assert float(whole[1]) == float(other[1]) and float(whole[0]) != float(other[0])
    # Over many masks the loss of masked bins is that of all bins: the share of masked bins is divided out.
    drawn = [float(loss(batch, jax.random.split(jax.random.key(n), 8))[0] / whole[1]) for n in range(30)]
    assert np.mean(drawn) == pytest.approx(float(recipe.loss(model, batch, None).total / whole[1]), rel=0.1)


def test_the_score_is_that_of_the_held_out_units_and_stands_beside_the_baselines(recipe, predict, tmp_path):
    from neural.reach_simulation import true_counts

    windows, expected = recipe.data("test"), true_counts(recipe._path, recipe.data("test").trials)

    def oracle(batch):
        """The true rates of the windows, found by the spikes that are shown."""
        out = np.zeros(batch["spikes"].shape)
        for row, spikes in enumerate(batch["spikes"]):
            index = next(i for i in range(len(windows)) if (windows.take(np.array([i]))["spikes"][0] == spikes).all())
            rows = np.arange(windows.first[index], min(windows.first[index] + 24, windows.end[index]))
            out[row, : len(rows)] = expected[rows]
        return out

    score, rivals = recipe.score(oracle, "test", None, tmp_path, silent), recipe.baselines(tmp_path, silent)
    assert next(iter(score)) == "co_bps" and score["co_bps"] == pytest.approx(rivals["true_rates"], abs=1e-9)
    assert rivals["smoothing"] < rivals["true_rates"] and len(score["plots"]) == 2
    untrained = recipe.score(predict, "test", None, tmp_path, silent)
    assert untrained["co_bps"] < 0.05


def test_a_recording_without_behaviour_is_enough(recipe, tmp_path):
    import h5py

    with h5py.File(recipe._path) as whole, h5py.File(tmp_path / "spikes.nwb", "w") as bare:
        for name in ("units", "intervals", "identifier"):
            whole.copy(name, bare)
    config = settled(load("neural/masked", [*SMALL, f"data.source={tmp_path / 'spikes.nwb'}"]))
    named = config.recipe_class(config, tmp_path).ready(silent)
    assert named.data("train").fingerprint == recipe.data("train").fingerprint
    assert named.baselines(tmp_path, silent).keys() == {"smoothing", "tables"}


def test_a_unit_that_is_silent_in_training_is_no_input_of_thousands(tmp_path):
    recorded = session()
    recorded.spike_times[3] = np.array([0.2, 0.4])  # before the first trial
    write_recording(tmp_path / "session.nwb", recorded, behavior=BEHAVIOR)
    config = settled(load("neural/masked", [*SMALL, f"data.source={tmp_path / 'session.nwb'}"]))
    recipe = config.recipe_class(config, tmp_path).ready(silent)
    held_in = recipe.known["held_in"]
    assert 3 in held_in, "the hash of this recording's units"
    one = np.zeros((1, 24, 6), np.uint16)
    one[0, 5, 3] = 1
    inputs = np.asarray(recipe._inputs(one, np.ones((1, 24), np.float32), None, None))
    assert 1 < inputs[0, 5, held_in.index(3)] <= 100


def test_wrong_settings_are_told_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="use one of these for heads: 1, 2, 4, 8"):
        load("neural/masked", [*SMALL, "model.heads=3"])
    config = settled(load("neural/masked", ["data.simulated_trials=10", "data.simulated_units=2",
                                            "data.held_out_units=0.1"]))  # fmt: skip
    with pytest.raises(UserError, match="0 of 2 units"):
        config.recipe_class(config, tmp_path).ready(silent)


def test_the_recipe_file_imports_no_jax():
    code = "import sys; from aurora_train.config import load; load('neural/masked'); print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.release
@pytest.mark.parametrize("seed", range(3))
def test_the_bundled_config_is_ahead_of_smoothing_on_simulated_sessions(seed, tmp_path, monkeypatch):
    """Minutes for each seed, of the simulation and of the run."""
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    seeds = [f"train.seed={seed}", f"data.simulated_seed={seed}"]
    assert in_process("train", "neural/masked", *seeds, "--run", tmp_path / "run", "--quiet") == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    ours, rivals = scores["score"]["co_bps"], scores["baselines"]
    smoothing, known = rivals["smoothing"], rivals["true_rates"]
    print(f"seed {seed}: co_bps {ours:.4f}, smoothing {smoothing:.4f}, true rates {known:.4f}")
    assert ours >= smoothing + 0.02
