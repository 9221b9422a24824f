"""The answers of OpenAI's protocol: a chat's and a completion's, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from aurora_train.serve.speaker import Speaker
from aurora_train.serve.written import Piece, Said


class ChatForm:
    """How a chat is answered. `model`: the name that the server goes by."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, model: str, speaker: Speaker, with_logprobs: bool):
        self._model, self._speaker, self._with_logprobs = model, speaker, with_logprobs
        self._id, self._created = self.prefix + secrets.token_hex(12), int(time.time())

    def envelope(self, choices: list[dict], usage: dict | None = None, *, chunk: bool) -> dict[str, Any]:
        """The answer, or a chunk of it, around its choices."""
        kind = self.chunk_object if chunk else self.object
        told = {} if usage is None else {"usage": usage}
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices,
                **told}  # fmt: skip

    def first(self, index: int) -> dict | None:
        """The choice of the first chunk."""
        return self._delta(index, {"role": "assistant", "content": ""}, [], None)

    def more(self, index: int, piece: Piece, reason: str | None = None, calls: list | None = None) -> dict:
        """The choice of a chunk with more text, or with the end."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if calls:
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        return self._delta(index, delta, piece.tokens, reason)

    def whole(self, index: int, piece: Piece, reason: str, calls: list | None = None) -> dict:
        """A choice of an answer that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": piece.text or (None if calls else ""),
                                   "refusal": None}  # fmt: skip
        if calls:
            message["tool_calls"] = calls
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": self._logprobs(piece.tokens)}

    def _delta(self, index: int, delta: dict, tokens: list[Said], reason: str | None) -> dict:
        return {"index": index, "delta": delta, "finish_reason": reason,
                "logprobs": self._logprobs(tokens) if tokens else None}  # fmt: skip

    def _logprobs(self, tokens: list[Said]) -> dict | None:
        if not self._with_logprobs:
            return None
        return {"content": [
            {**self._token(one.token.id, one.token.logprob),
             "top_logprobs": [self._token(number, logprob) for number, logprob in one.token.top]}
            for one in tokens
        ], "refusal": None}  # fmt: skip

    def _token(self, number: int, logprob: float) -> dict:
        spelled = self._speaker.spelled(number)
        return {"token": spelled.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(spelled)}


class TextForm(ChatForm):
    """How a completion is answered, which is older: a text rather than a message, and log-probabilities as columns."""

    object = chunk_object = "text_completion"
    prefix = "cmpl-"

    def first(self, index: int) -> None:
        return None

    def more(self, index: int, piece: Piece, reason: str | None = None, calls: None = None) -> dict:
        return {"index": index, "text": piece.text, "finish_reason": reason, "logprobs": self._logprobs(piece.tokens)}

    whole = more

    def _logprobs(self, tokens: list[Said]) -> dict | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [self._named(one.token.id) for one in tokens],
            "token_logprobs": [finite(one.token.logprob) for one in tokens],
            "top_logprobs": [{self._named(number): finite(logprob) for number, logprob in one.token.top}
                             for one in tokens],
            "text_offset": [one.start for one in tokens],
        }  # fmt: skip

    def _named(self, number: int) -> str:
        """A token's text; one that is part of a character, or has no text, so that two do not share a name."""
        spelled = self._speaker.spelled(number)
        try:
            return spelled.decode() or f"token_id:{number}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold: OpenAI writes -9999 for a token that could not be drawn."""
    return max(float(logprob), -9999.0)


def usage(prompts: Sequence[Sequence[int]], drawn: int) -> dict[str, int]:
    """The tokens of the prompts, each counted once, and those drawn."""
    asked = sum(map(len, prompts))
    return {"prompt_tokens": asked, "completion_tokens": drawn, "total_tokens": asked + drawn}


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces in order as one."""
    return Piece("".join(piece.text for piece in pieces), [one for piece in pieces for one in piece.tokens])
