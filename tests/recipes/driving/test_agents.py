"""The network that drives: no frame of the world, no future, no padding in what it says; attention by an oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import traffic_batches
from flax import nnx

from driving.agents import Driver, RelativeAttention, Seen
from driving.batches import agents_of, seen_of
from driving.moves import blind
from driving.scenes import HISTORY
from driving.tokens import learn, motions_of, rotated

TOKENS = 32
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def batch():
    return traffic_batches.batch()


@pytest.fixture(scope="module")
def templates(batch):
    return jnp.asarray(learn(motions_of(batch["states"], batch["valid"], HISTORY - 1), TOKENS))


@pytest.fixture(scope="module")
def network():
    made = jax.jit(lambda: nnx.split(Driver(width=16, layers=2, heads=2, relation=4, tokens=TOKENS, dtype="float32",
                                            rngs=nnx.Rngs(params=0))))  # fmt: skip
    graph, state = made()
    return nnx.merge(graph, jax.tree.map(lambda a: 1.5 * a, state))  # larger weights make differences larger


@pytest.fixture(scope="module")
def score(network, templates):
    graph, state = nnx.split(network)

    @jax.jit
    def run(batch):
        seen, _ = seen_of(templates, batch)
        return nnx.merge(graph, state)(agents_of(batch), seen)

    return lambda batch: np.asarray(run(batch))


def at_anchors(batch):
    return batch["valid"][:, :, 4::5]


def turned(batch, angle: float, shift):
    """The same scenes in another frame of the world."""
    changed = dict(batch)
    states = batch["states"].copy()
    states[..., :2] = rotated(np, states[..., :2], np.float32(angle)) + np.float32(shift)
    states[..., 2] += angle
    states[..., 3:] = rotated(np, states[..., 3:], np.float32(angle))
    changed["states"] = np.where(batch["valid"][..., None], states, 0)
    pieces = rotated(np, batch["pieces"], np.float32(angle)) + np.float32(shift)
    changed["pieces"] = np.where(batch["pieces_valid"][..., None, None], pieces, 0)
    return changed


@pytest.mark.parametrize(("angle", "shift"), [(2.5, (0.0, 0.0)), (-0.7, (40.0, -25.0))])
def test_the_frame_of_the_world_does_not_matter(batch, score, angle, shift):
    there = at_anchors(batch)
    before, after = score(batch)[there], score(turned(batch, angle, shift))[there]
    assert np.abs(before).max() > 0.5
    np.testing.assert_allclose(after, before, atol=TOLERANCE)


def test_the_future_changes_nothing_in_the_past(batch, score):
    known = score(blind(batch))[:, :, :10]
    there = at_anchors(batch)[:, :, :10]
    np.testing.assert_array_equal(known[there], score(batch)[:, :, :10][there])


def test_the_past_of_others_and_the_lights_do_change_something(batch, score):
    there = at_anchors(batch)[:, 0, 9]
    before, alone, dark = score(batch), dict(batch), dict(batch)
    alone["valid"] = batch["valid"] & (np.arange(batch["valid"].shape[1]) == 0)[:, None]
    dark["lights"] = np.zeros_like(batch["lights"])
    for changed in (alone, dark):
        assert np.abs(score(changed)[:, 0, 9] - before[:, 0, 9])[there].max() > 1e-3


def test_padding_says_nothing(batch, score):
    filled = {name: array.copy() for name, array in batch.items()}
    filled["states"][~batch["valid"]] = 7.0
    filled["pieces"][~batch["pieces_valid"]] = 3.0
    filled["pieces_about"][~batch["pieces_valid"]] = 9.0
    there = at_anchors(batch)
    assert (~batch["pieces_valid"]).any() and (~there).any()
    np.testing.assert_allclose(score(filled)[there], score(batch)[there], atol=1e-6)


def test_scenes_without_agents_or_without_a_map_have_finite_scores(batch, score):
    empty = {name: np.zeros_like(array) for name, array in batch.items()}
    assert np.isfinite(score(empty)).all()
    unmapped = batch | {"pieces_valid": np.zeros_like(batch["pieces_valid"])}
    assert np.isfinite(score(unmapped)).all() and (score(unmapped) != score(batch)).any()


@pytest.mark.slow
def test_with_a_memory_it_says_the_same_in_parts(batch, network, templates, score):
    graph, state = nnx.split(network)

    @jax.jit
    def run(batch):
        seen, _ = seen_of(templates, batch)
        agents, model = agents_of(batch), nnx.merge(graph, state)
        memory, found = model.empty(agents, 22), []
        for first, last in ((0, 10), (10, 11), (11, 22)):
            part = Seen(*(array[:, :, first:last] for array in seen))
            scores, memory = model.extend(agents, part, memory, first)
            found.append(scores)
        return jnp.concatenate(found, 2)

    there = at_anchors(batch)
    np.testing.assert_allclose(np.asarray(run(batch))[there], score(batch)[there], atol=1e-5)


def test_attention_by_relations_is_that_of_float64(network):
    """out = W [sum_j a_j v_j, sum_j a_j f_j], a = softmax over visible j of q.k / sqrt(d) + u.f, head by head."""
    heads, features, width = 2, 3, 8
    attention = RelativeAttention(width, heads, features, 1.0, nnx.Rngs(params=1))
    rng = np.random.default_rng(2)
    x, source, pairs = rng.normal(size=(5, width)), rng.normal(size=(7, width)), rng.normal(size=(5, 7, features))
    visible = rng.uniform(size=(5, 7)) < 0.5
    visible[3] = False
    weight = {name: np.asarray(getattr(attention, name)[...], np.float64)
              for name in ("query", "key", "value", "pair", "out")}  # fmt: skip
    query, wish = (x @ weight["query"]).reshape(5, heads, -1), (x @ weight["pair"]).reshape(5, heads, -1)
    key, value = ((source @ weight[name]).reshape(7, heads, -1) for name in ("key", "value"))
    expected = np.zeros((5, width))
    for i in range(5):
        read, felt = np.zeros((heads, width // heads)), np.zeros((heads, features))
        for h in range(heads):
            seen = np.flatnonzero(visible[i])
            logits = query[i, h] @ key[seen, h].T / np.sqrt(width / heads) + pairs[i, seen] @ wish[i, h]
            share = np.exp(logits) / np.exp(logits).sum() if len(seen) else []
            for a, j in zip(share, seen, strict=True):
                read[h] += a * value[j, h]
                felt[h] += a * pairs[i, j]
        expected[i] = np.concatenate([read.ravel(), felt.ravel()]) @ weight["out"]
    single = [np.asarray(array, np.float32) for array in (x, source, pairs)]
    found = attention(single[0], *attention.read(single[1]), (single[2], visible))
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5)
    assert not expected[3].any()
