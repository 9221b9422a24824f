"""New special tokens for a model that has none for them: `init.tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.interop.kept import TOKENIZER
from aurora_train.interop.tokenizer_files import tokenizer_json

WHERE = "init.tokens"


class NewRows(NamedTuple):
    """The rows of the embedding, and of the output head, that new tokens take: [first, first + count).

    The source may have more rows than its tokenizer has ids; new tokens take such rows first.
    """

    first: int
    count: int


def with_tokens(facts: Facts, tokens: Sequence[str]) -> tuple[Facts, NewRows]:
    """The facts of a source with `tokens` added to its tokenizer as special tokens, and the rows that they take.

    Text cannot produce a special token: only a chat template writes it. Raises UserError for a token that the tokenizer
    has, for one named twice, and for a source without a tokenizer.
    """
    import tokenizers

    if TOKENIZER not in facts or "vocabulary" not in facts:
        raise UserError("the source has no tokenizer to which tokens could be added", where=WHERE,
                        hint="name a run or an open model as init.from")  # fmt: skip
    backend = tokenizers.Tokenizer.from_str(tokenizer_json(facts))
    first = 1 + max(backend.get_vocab().values())
    for number, token in enumerate(tokens):
        known = backend.token_to_id(token)
        if not token.strip() or token in tokens[:number]:
            raise UserError(f"the token {token!r} is empty or named twice", where=WHERE)
        if known is not None:
            raise UserError(f"the tokenizer has {token!r} already, as id {known}", where=WHERE, hint="leave it out")
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
    given = [backend.token_to_id(token) for token in tokens]
    if given != list(range(first, first + len(tokens))):
        raise UserError(
            f"the new tokens would get the ids {given}, where {first} is the next", where=WHERE,
            why="the ids of the tokenizer have a gap, and another program might fill it",
        )  # fmt: skip
    vocabulary = max(facts["vocabulary"], first + len(tokens))
    return facts | {TOKENIZER: backend.to_str().encode(), "vocabulary": vocabulary}, NewRows(first, len(tokens))
