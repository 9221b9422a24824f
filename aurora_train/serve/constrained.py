"""Answers that have to be JSON of a schema, or match a regular expression: llguidance says which tokens may follow.

The extra [constrain] brings it. One object is made for a server, and one `Constraint` for each answer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import numpy as np

from aurora_train.errors import MissingExtra
from aurora_train.serve.refusal import Refusal
from aurora_train.serve.requests import ResponseFormat
from aurora_train.serve.speaker import Speaker

# JSON on one line, as models are shown it. With free white space an answer need not end.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LONGEST_SCHEMA = 1 << 18  # characters


class Constraint:
    """Which tokens may follow what was drawn; called by the engine for each token of one answer.

    Attributes:
        fault: why llguidance gave up, if it did; the answer is then ended.
    """

    def __init__(self, matcher, ends: np.ndarray):
        self._matcher, self._ends, self._taken, self.fault = matcher, ends, 0, None

    def __call__(self, drawn: list[int]) -> np.ndarray:
        """bool[vocabulary] after the ids drawn so far."""
        for token in drawn[self._taken :]:
            if not self._matcher.consume_token(token):
                break
        self._taken = len(drawn)
        if self._matcher.is_error():
            self.fault = self._matcher.get_error()
            return self._ends
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) != 0
        return allowed | self._ends if (allowed & self._ends).any() else allowed  # it knows one end of several


class Grammars:
    """The grammars that requests ask for, over the tokens of one model."""

    def __init__(self, speaker: Speaker):
        self._speaker, self._tokenizers, self._lock = speaker, {}, threading.Lock()

    def of(self, form: ResponseFormat | None, ends: frozenset[int]) -> Callable[[], Constraint] | None:
        """What makes the constraint of an answer; None if anything may be answered.

        Raises Refusal for a schema or an expression that is not valid, and without llguidance.
        """
        if form is None or form.type == "text":
            return None
        try:
            from llguidance import LLMatcher
        except ImportError:
            missing = MissingExtra("llguidance", "constrain", "a response_format")
            raise Refusal(f"{missing.what}: {missing.hint}", "response_format", status=501) from None
        grammar = _grammar(form, LLMatcher)
        tokenizer = self._tokenizer(ends)
        if fault := LLMatcher.validate_grammar(grammar, tokenizer):
            raise Refusal(f"this cannot be made a grammar: {' '.join(fault.split())[:500]}", "response_format")
        allowed = np.isin(np.arange(self._speaker.vocabulary), list(ends))
        return lambda: Constraint(LLMatcher(tokenizer, grammar, log_level=0), allowed)

    def _tokenizer(self, ends: frozenset[int]):
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:  # it takes a second for a large vocabulary
            if ends not in self._tokenizers:
                wrapped = TokenizerWrapper(_Tokens(self._speaker, ends))
                self._tokenizers[ends] = LLTokenizer(wrapped, self._speaker.vocabulary, eos_token=min(ends))
            return self._tokenizers[ends]


class _Tokens:
    """A tokenizer as llguidance reads one that is not a file."""

    bos_token_id = None

    def __init__(self, speaker: Speaker, ends: frozenset[int]):
        self._encode, self.eos_token_id = speaker.encoded, min(ends)
        self.special_token_ids = sorted(speaker.controls | ends)
        self.tokens = [speaker.spelled(number) for number in range(speaker.vocabulary)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _grammar(form: ResponseFormat, matcher) -> str:
    if form.type == "regex":
        if not form.pattern:
            raise Refusal("a response_format of type regex has a pattern", "response_format.pattern")
        return matcher.grammar_from_regex(form.pattern)
    if form.type == "json_schema" and form.json_schema is None:
        raise Refusal("a response_format of type json_schema has a json_schema", "response_format.json_schema")
    schema = {"type": "object"} if form.type == "json_object" else form.json_schema.schema_
    text = json.dumps(schema)
    if len(text) > _LONGEST_SCHEMA:
        raise Refusal(f"a schema of {len(text):,} characters; {_LONGEST_SCHEMA:,} are the most", "response_format")
    return matcher.grammar_from_json_schema(text, overrides=_WRITTEN)
