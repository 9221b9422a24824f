"""Sampling with a cache gives what the uncached model gives, and draws as asked."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.generate.drawing import Knobs, draw
from aurora_train.generate.sampler import Generator
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig

VOCAB, PROMPT = 41, [3, 1, 4, 1, 5, 9, 2, 6]
SHAPES = {
    "llama": {"kv_heads": 2, "window": 5},
    "gemma": {
        "window": 4, "window_pattern": ["local", "global"], "attention_softcap": 5.0, "logit_softcap": 5.0,
        "post_norm": True,
    },
    "gpt2": {"positions": "learned", "max_length": 40, "norm": "layernorm", "bias": "all", "activation": "gelu"},
}  # fmt: skip


def decoder(mask="causal", **settings):
    config = DecoderConfig(**({"width": 32, "layers": 2, "heads": 4} | settings))

    def make():
        return Decoder(config, VOCAB, "float32", nnx.Rngs(params=jax.random.key(7)), mask)

    graph, _ = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.jit(lambda: nnx.split(make())[1])())


@pytest.fixture(scope="module")
def llama():
    return decoder(**SHAPES["llama"])


LONGROPE = {"kind": "longrope", "factor": 4.0, "original_length": 12, "short_factors": (1.0, 1.1, 1.3, 1.5),
            "long_factors": (2.0, 3.0, 5.0, 8.0)}  # fmt: skip


def test_longrope_turns_a_text_by_its_own_length_when_it_grows_beyond_the_original_one():
    model, prompts = decoder(rope_scaling=LONGROPE), [PROMPT, PROMPT[:3]]
    made = Generator(model, ()).generate_batch(prompts, 16, temperature=0)
    # Each row is one text at one length; the padding has position 0 and is a text of its own.
    texts = [prompt + new[:count] for prompt, new in zip(prompts, made, strict=True) for count in range(16)]
    tokens = np.array([text + [0] * (24 - len(text)) for text in texts], np.int32)
    positions = np.array([[*range(len(text))] + [0] * (24 - len(text)) for text in texts], np.int32)
    logits = nnx.jit(lambda model: model.logits(model(tokens, None, positions)))(model)
    last = logits[np.arange(len(texts)), [len(text) - 1 for text in texts]]
    assert sum(made, []) == last.argmax(-1).tolist()


def test_the_prompt_is_the_prefix_of_a_prefix_language_model():
    model, prompts = decoder("prefix"), [PROMPT, PROMPT[:3]]
    made = Generator(model, ()).generate_batch(prompts, 6, temperature=0)
    for prompt, new in zip(prompts, made, strict=True):
        text, prefix = jnp.asarray([prompt + new], jnp.int32), jnp.arange(len(prompt) + 6)[None] < len(prompt)
        logits = model.logits(model(text, prefix=prefix))[0]
        assert new == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert made != Generator(decoder(), ()).generate_batch(prompts, 6, temperature=0)


def test_prompts_of_unlike_lengths_in_a_batch_get_what_each_gets_alone(llama):
    generator = Generator(llama, ())
    prompts = [PROMPT, PROMPT[:2], PROMPT * 2 + [7]]
    together = generator.generate_batch(prompts, 12, temperature=0)
    assert together == [generator.generate(prompt, 12, temperature=0) for prompt in prompts]


def test_where_memory_is_short_the_stack_is_decoded_as_it_is_with_the_same_tokens(llama, monkeypatch):
    copied = Generator(llama, ()).generate(PROMPT, 12, temperature=0)
    monkeypatch.setattr("aurora_train.generate.weights.host_memory", lambda: SimpleNamespace(usable=0))
    short = Generator(llama, ())
    assert short.generate(PROMPT, 12, temperature=0) == copied
    assert short._decoded.arrays[0] is jax.tree.leaves(short._split[1])[0]


def test_a_seed_decides_the_text_and_another_gives_another(llama):
    generator = Generator(llama, ())
    one, again = (generator.generate(PROMPT, 20, seed=1) for _ in range(2))
    assert one == again and len(one) == 20
    assert generator.generate(PROMPT, 20, seed=2) != one


def test_the_callback_gets_each_token_as_it_is_made_and_the_end_token_stops(llama):
    seen = []
    made = Generator(llama, ()).generate(PROMPT, 20, seed=1, on_token=seen.append)
    assert seen == made
    end = made[6]
    assert Generator(llama, {end}).generate(PROMPT, 20, seed=1) == made[: made.index(end)]


def test_no_new_tokens_are_none(llama):
    assert Generator(llama, ()).generate(PROMPT, 0) == []


def draws(shares, number=4000, temperature=1.0, top_k=None, top_p=1.0):
    """Frequencies of each token when the model's shares are `shares`."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(shares)), (number, len(shares)))
    knobs = Knobs(jnp.float32(temperature), jnp.int32(top_k or len(shares)), jnp.float32(top_p))
    drawn = draw(logits, jax.random.split(jax.random.key(0), number), 0, knobs)
    return np.bincount(drawn, minlength=len(shares)) / number


def test_draws_follow_temperature_top_k_and_top_p():
    shares = np.array([0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(draws(shares), shares, atol=0.03)
    np.testing.assert_allclose(draws(shares, temperature=0.5), shares**2 / (shares**2).sum(), atol=0.03)
    np.testing.assert_allclose(draws(shares, top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(draws(shares, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.03)
    np.testing.assert_allclose(draws(shares, top_p=0.65), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_array_equal(draws(shares, temperature=0), [0, 1, 0, 0])
    np.testing.assert_array_equal(draws(shares, top_p=1e-6), [0, 1, 0, 0])


@pytest.mark.parametrize(
    "settings,where",
    [
        ({"prompt_ids": []}, "prompt"),
        ({"prompt_ids": [VOCAB]}, "prompt"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_a_setting_out_of_range_is_a_users_error(llama, settings, where):
    with pytest.raises(UserError) as caught:
        Generator(llama, ()).generate(**({"prompt_ids": PROMPT, "max_new_tokens": 4} | settings))
    assert caught.value.where == where


def test_a_text_longer_than_the_learned_positions_is_refused_with_the_room_there_is():
    generator = Generator(nnx.eval_shape(lambda: decoder(**SHAPES["gpt2"])), ())
    with pytest.raises(UserError, match="at most 32"):
        generator.generate(PROMPT, 33)


def test_R7_samples_stop_at_the_end_of_learned_positions():
    generator = Generator(decoder(positions="learned", max_length=12, norm="layernorm"), ())
    prompts, length = generator.fitted([PROMPT, PROMPT[:2]], 256)
    assert prompts == [PROMPT, PROMPT[:2]] and length == 4
    assert [len(text) for text in generator.generate_batch(prompts, length, temperature=0)] == [4, 4]
    (cut,), length = generator.fitted([[0, *range(1, 30)]], 256)
    assert length == 1 and cut[0] == 0 and cut[1:] == list(range(20, 30)) and len(cut) == 11
    assert Generator(decoder(), ()).fitted([PROMPT], 256) == ([PROMPT], 256)
