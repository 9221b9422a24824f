"""What is asked of the engine and what it gives: requests, how tokens are drawn, tokens, and tickets.

Nothing here computes on a device; a request is checked in one place, whoever asks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from aurora_train.errors import UserError

MOST_ALTERNATIVES = 20  # that a request may ask for beside each token
Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: the penalty first, then temperature, top-k, top-p and min-p, each of what remains.

    A draw depends on (seed, row, number of the token in its answer) and the logits alone.
    """

    temperature: float = 1.0  # 0 takes the likeliest
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # Keskar et al. 2019, eq. 4; of all tokens of the prompt and of the answer so far
    seed: int = 0
    row: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt to continue by at most `max_tokens` tokens, until one of `ends` is drawn.

    `logprobs`: how many alternatives to give beside each token's own log-probability; -1 gives neither. Both are of the
    model itself, before temperature, penalty or constraint. `allow(drawn)`: bool[vocabulary], which tokens may follow
    those drawn so far.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    ends: frozenset[int] = frozenset()
    logprobs: int = -1
    allow: Callable[[list[int]], np.ndarray] | None = None


class Token(NamedTuple):
    """A drawn token. `logprob`: in nats, if asked for; `top`: the likeliest (id, log-probability), likeliest first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


# `listener(token, None)` for each token but an end, then once `listener(None, reason)`.
Listener = Callable[[Token | None, Reason | None], None]
_numbers = itertools.count()


@dataclass(eq=False)
class Ticket:
    """A request that was taken, as it may be cancelled. `cut`: how many tokens its prompt lost."""

    request: Request
    listener: Listener
    cut: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    drawn: list[int] = field(default_factory=list)  # what was read so far, an end too
    reason: Reason | None = None  # why it ended; None while it has not

    def give(self, token: Token) -> None:
        """Take note of a drawn token, and end the answer where it ends."""
        self.drawn.append(token.id)
        if token.id in self.request.ends:
            self.finish("stop")
            return
        self.listener(token, None)
        if len(self.drawn) >= self.request.max_tokens:
            self.finish("length")

    def finish(self, reason: Reason) -> None:
        """End the answer, unless it has ended."""
        if self.reason is None:
            self.reason = reason
            self.listener(None, reason)


def fitted(request: Request, length: int) -> Request:
    """The request reduced to `length` positions. A prompt that leaves no room for a token of an answer is cut to its
    first token and its end."""
    prompt = request.prompt
    if len(prompt) >= length:
        prompt = (*prompt[:1], *prompt[max(1, len(prompt) - length + 2) :])
    return replace(request, prompt=prompt, max_tokens=min(request.max_tokens, length - len(prompt)))


def check(request: Request, vocabulary: int, length: int, why: str) -> None:
    """UserError for a request that is out of range or does not fit `length` positions, which are so few for `why`."""
    prompt, drawing = request.prompt, request.sampling
    if not prompt:
        raise UserError("the prompt is empty", where="prompt", hint="give at least one token to continue")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise UserError(f"a prompt token lies outside the vocabulary of {vocabulary}", where="prompt")
    if request.max_tokens < 0:
        raise UserError(f"max_new_tokens is {request.max_tokens}", where="max_new_tokens", why="it must be 0 or more")
    if request.logprobs > MOST_ALTERNATIVES:
        raise UserError(
            f"{request.logprobs} alternatives were asked for", where="logprobs",
            why=f"there are at most {MOST_ALTERNATIVES}",
        )  # fmt: skip
    _check_drawing(drawing)
    total = len(prompt) + request.max_tokens
    if total > length:
        raise UserError(
            f"prompt and new tokens add up to {total}, but the model has {length} positions",
            where="max_new_tokens", why=why,
            hint=f"max_new_tokens of at most {max(0, length - len(prompt))}, or a shorter prompt",
        )  # fmt: skip


def _check_drawing(drawing: Sampling) -> None:
    rules = [
        ("temperature", drawing.temperature >= 0, "it must be 0 or more"),
        ("top_k", drawing.top_k is None or drawing.top_k >= 1, "it must be 1 or more"),
        ("top_p", 0 < drawing.top_p <= 1, "it must lie above 0 and at most 1"),
        ("min_p", 0 <= drawing.min_p <= 1, "it must lie between 0 and 1"),
        ("repetition_penalty", drawing.repetition_penalty > 0, "it must lie above 0"),
    ]
    for name, holds, why in rules:
        if not holds:
            raise UserError(f"{name} is {getattr(drawing, name):g}", where=name, why=why)
