"""`Generator`: sampling with a key-value cache, compiled for a few fixed shapes.

Prompt and cache lengths are rounded up to powers of two or three quarters of them, so that prompts of many lengths
share a compilation. A draw depends on (seed, row, number of the token) alone: a prompt in a batch gets what it would
get by itself only as far as float order allows, and nothing depends on what the other rows do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.machine.memory import host_memory
from aurora_train.nn.stack import stacks
from aurora_train.nn.tracing import form_name


class Knobs(NamedTuple):
    """How the next token is drawn, as arrays, so that a change compiles nothing."""

    temperature: jax.Array  # float32 scalar; 0 takes the likeliest
    top_k: jax.Array  # int32 scalar
    top_p: jax.Array  # float32 scalar


class Generator:
    """Continues prompts with a `Decoder`. Any id of `ends` ends a text and is not returned; () lets
    none end early.

    If the decoder's mask is "prefix", a prompt is the prefix of its row: all of its tokens see each other.
    """

    def __init__(self, model, ends: Collection[int]):
        self.ends = frozenset(ends)
        self.vocab_size = model.vocab_size
        self.max_length = model.config.max_length if model.config.positions == "learned" else None
        # With longrope, a text that grows beyond one of these lengths is turned by other angles from its beginning.
        self._turns = {rope.scaling.original_length for rope in model.config.ropes if rope.scaling.kind == "longrope"}
        self._has_prefix = model.mask == "prefix"
        self._split = nnx.split(model)

    @functools.cached_property
    def _model(self):
        """(graph, state) as it is decoded. On a CPU the units are copied out of their stack, unless that would take
        more than a quarter of the memory: a scan over them would copy each for every token."""
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self._split[1]))
        if form_name() != "cpu" or 4 * held > host_memory().usable:
            return self._split
        model = nnx.merge(*self._split)
        for stack in stacks(model).values():
            stack.cut_into_units()
        return nnx.split(model)

    def generate(
        self,
        prompt_ids: list[int],
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """The new tokens after one prompt. `on_token(token)` is called as soon as each is drawn."""

        def without_row(row, token):
            on_token(token)

        callback = None if on_token is None else without_row
        return self.generate_batch([prompt_ids], max_new_tokens, temperature, top_k, top_p, seed, callback)[0]

    def generate_batch(
        self,
        prompts: list[list[int]],
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """The new tokens after each prompt; lengths may differ. `on_token(row, token)`.

        Raises UserError for an empty prompt, for settings out of range, and if prompt and new tokens exceed the table
        of learned positions.
        """
        self._check(prompts, max_new_tokens, temperature, top_k, top_p)
        tokens, lengths = _padded(prompts)
        knobs = Knobs(
            jnp.float32(temperature),
            jnp.int32(self.vocab_size if top_k is None else top_k),
            jnp.float32(1.0 if top_p is None else top_p),
        )
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(len(prompts)))
        cache_length = _bucket(lengths.max() + max_new_tokens, 64)
        prefix = np.arange(cache_length) < lengths[:, None] if self._has_prefix else None
        graph, state = self._model
        logits, caches = _read_prompt(graph, cache_length, state, tokens, lengths, prefix)

        made: list[list[int]] = [[] for _ in prompts]
        texts = [list(prompt) for prompt in prompts]  # with all that was drawn, also after a row's end
        open_rows = set(range(len(prompts))) if max_new_tokens else set()
        for count in range(max_new_tokens):
            drawn = draw(logits, keys, count, knobs)
            for row, token in enumerate(np.asarray(drawn).tolist()):
                texts[row].append(token)
                if row in open_rows and token in self.ends:
                    open_rows.discard(row)
                elif row in open_rows:
                    made[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
            if not open_rows or count + 1 == max_new_tokens:
                break
            if self._turns.intersection((lengths + count).tolist()):
                tokens, so_far = _padded(texts)
                logits, caches = _read_prompt(graph, cache_length, state, tokens, so_far, prefix)
                continue
            logits, caches = _read_token(graph, state, caches, drawn, lengths + count, prefix)
        return made

    def fitted(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], int]:
        """(prompts, number of new tokens) reduced to fit the table of learned positions. A prompt that leaves no room
        for a new token is cut to its first token and its end."""
        if self.max_length is None:
            return prompts, max_new_tokens
        cut = [[*prompt[:1], *prompt[max(1, len(prompt) - self.max_length + 2) :]] for prompt in prompts]
        return cut, min(max_new_tokens, total_room(self.max_length, cut))

    def _check(self, prompts, max_new_tokens, temperature, top_k, top_p):
        for prompt in prompts:
            if not prompt:
                raise UserError("the prompt is empty", where="prompt", hint="give at least one token to continue")
            if min(prompt) < 0 or max(prompt) >= self.vocab_size:
                raise UserError(f"a prompt token lies outside the vocabulary of {self.vocab_size}", where="prompt")
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {max_new_tokens}", where="max_new_tokens", why="it must be 0 or more")
        if temperature < 0:
            raise UserError(f"temperature is {temperature:g}", where="temperature", why="it must be 0 or more")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}", where="top_k", why="it must be 1 or more")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p:g}", where="top_p", why="it must lie above 0 and at most 1")
        total = max(len(prompt) for prompt in prompts) + max_new_tokens
        if self.max_length is not None and total > self.max_length:
            raise UserError(
                f"prompt and new tokens add up to {total}, but the model has {self.max_length} positions",
                where="max_new_tokens",
                why="its positions are a learned table",
                hint=f"max_new_tokens of at most {max(0, total_room(self.max_length, prompts))}, or a shorter prompt",
            )


def total_room(max_length: int, prompts: list[list[int]]) -> int:
    """How many tokens fit after the longest prompt."""
    return max_length - max(len(prompt) for prompt in prompts)


def _padded(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32[B, P] padded at the end with 0, lengths int32[B])."""
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), _bucket(lengths.max(), 16)), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return tokens, lengths


def _bucket(size, least: int) -> int:
    """The next power of two, or three quarters of it if that is enough; at least `least`, a power of two."""
    power = max(least, 1 << (int(size) - 1).bit_length())
    return 3 * power // 4 if size <= 3 * power // 4 and power > least else power


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_prompt(graph, cache_length, state, tokens, lengths, prefix):
    """Right-padded tokens[B, P] -> (logits after each row's last token, caches).

    Cache entries of the padding are overwritten by the token of their position before any query can attend to them.
    """
    model = nnx.merge(graph, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    real = positions < lengths[:, None]
    empty = model.empty_caches(tokens.shape[0], cache_length)
    hidden, caches = model.extend(tokens, positions, empty, prefix=prefix, real=real)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), caches


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read_token(graph, state, caches, tokens, positions, prefix):
    """One more token for every row, int32[B] at positions int32[B] -> (logits, caches)."""
    model = nnx.merge(graph, state)
    hidden, caches = model.extend(tokens[:, None], positions[:, None], caches, prefix=prefix)
    return model.logits(hidden[:, 0]), caches


@jax.jit
def draw(logits, keys, count, knobs: Knobs):
    """float32[B, V] -> int32[B]: temperature, then the k most likely, then the nucleus (Holtzman et al. 2020).

    At temperature 0 nothing is sorted: on a processor that takes as long as the step of a small model.
    """

    def one(logits, key):
        order = jnp.argsort(-logits)
        ranked = logits[order] / jnp.maximum(knobs.temperature, 1e-6)
        kept = jnp.arange(logits.shape[0]) < knobs.top_k
        shares = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf))
        kept &= jnp.cumsum(shares) - shares < knobs.top_p
        rank = jax.random.categorical(jax.random.fold_in(key, count), jnp.where(kept, ranked, -jnp.inf))
        return order[rank].astype(jnp.int32)

    return jax.lax.cond(
        knobs.temperature == 0, lambda: logits.argmax(-1).astype(jnp.int32), lambda: jax.vmap(one)(logits, keys)
    )
