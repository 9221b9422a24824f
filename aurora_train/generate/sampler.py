"""`Generator`: a batch of prompts continued at once, by an `Engine` with a slot for each.

Prompt and cache lengths are rounded up to powers of two or three quarters of them, so that prompts of many lengths
share a compilation. A draw depends on (seed, row, number of the token) alone: a prompt in a batch gets what it would
get by itself only as far as float order allows, and nothing depends on what the other rows do.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection

from flax import nnx

from aurora_train.generate.engine import Engine, bucket
from aurora_train.generate.requests import Request, Sampling, check, fitted
from aurora_train.generate.weights import decoded

_NO_END = 1 << 30  # positions of a model that has no table of them


class Generator:
    """Continues prompts with a `Decoder`. Any id of `ends` ends a text and is not returned; () lets
    none end early.

    If the decoder's mask is "prefix", a prompt is the prefix of its row: all of its tokens see each other.
    """

    def __init__(self, model, ends: Collection[int]):
        self.ends = frozenset(ends)
        self.vocab_size = model.vocab_size
        self.max_length = model.config.max_length if model.config.positions == "learned" else None
        self._split = nnx.split(model)
        self._engine: Engine | None = None
        self._turn = threading.RLock()  # an engine is advanced by one thread at a time

    @functools.cached_property
    def _decoded(self):
        return decoded(nnx.merge(*self._split))

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

        Raises UserError for an empty prompt, for settings out of range, if prompt and new tokens exceed the table of
        learned positions, and if the model's scores are not finite; and what `on_token` raises.
        """
        drawing = {"temperature": temperature, "top_k": top_k, "top_p": 1.0 if top_p is None else top_p, "seed": seed}
        requests = [
            Request(tuple(prompt), max_new_tokens, Sampling(**drawing, row=row), self.ends)
            for row, prompt in enumerate(prompts)
        ]
        for request in requests:
            check(request, self.vocab_size, self.max_length or _NO_END, "its positions are a learned table")
        made: list[list[int]] = [[] for _ in prompts]

        def listen(row, token, _):
            if token is not None:
                made[row].append(token.id)
                if on_token is not None:
                    on_token(row, token.id)

        with self._turn:
            engine = self._engine_for(len(prompts), max(map(len, prompts)) + max_new_tokens)
            tickets = [engine.submit(request, functools.partial(listen, row)) for row, request in enumerate(requests)]
            try:
                while engine.advance():
                    for ticket in tickets:
                        ticket.check()
            finally:  # of whatever stopped it, nothing is left for the next call
                for ticket in tickets:
                    engine.cancel(ticket)
        return made

    def fitted(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], int]:
        """(prompts, number of new tokens) reduced to fit the table of learned positions. A prompt that leaves no room
        for a new token is cut to its first token and its end."""
        if self.max_length is None:
            return prompts, max_new_tokens
        fit = [fitted(Request(tuple(prompt), max_new_tokens), self.max_length) for prompt in prompts]
        return [list(one.prompt) for one in fit], min(one.max_tokens for one in fit)

    def _engine_for(self, rows: int, total: int) -> Engine:
        length = min(bucket(total, 64), self.max_length or _NO_END)
        engine = self._engine
        if engine is None or (engine.slots, engine.length) != (rows, length):
            self._engine = engine = None  # the old caches go first
            self._engine = engine = Engine(self._decoded, rows, length, together=True)
        return engine
