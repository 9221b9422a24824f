"""Features of an instruction: hashed words, which need no model, or the hidden states of a language model.

Hashed words and parts of words tell instructions apart, and two that share words have similar features. They know
nothing of meaning: "lift" and "raise" are as far apart as any two words. What a language model says of the instructions
is computed once and kept, as the instructions are, among the facts of a run, which then needs that model no more.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from aurora_train.errors import UserError

SIZE = 64
OTHER_WORDS = 'The instruction "{}." in other words is: "'


def features(text: str) -> np.ndarray:
    """float32[SIZE] of length 1, or zeros for a text without letters and digits.

    Each word, each pair of neighbours and each run of three letters adds 1 or -1 to one entry (Weinberger et al. 2009).
    """
    words = re.findall(r"\w+", text.lower())
    pairs = [f"{first} {second}" for first, second in zip(words[:-1], words[1:], strict=True)]
    parts = [f"<{word}>"[i : i + 3] for word in words for i in range(len(word))]
    found = np.zeros(SIZE)
    for piece in [*words, *pairs, *parts]:
        digest = hashlib.sha256(piece.encode()).digest()
        found[int.from_bytes(digest[:4], "little") % SIZE] += 1 if digest[4] % 2 else -1
    return (found / max(np.linalg.norm(found), 1e-12)).astype(np.float32)


def encoded(source: str, tasks: list[str]) -> np.ndarray:
    """float32[len(tasks), width]: the final hidden state of a language model that is about to say each in other words.

    A causal model so describes a text better than by the mean of its states (PromptEOL: Jiang et al. 2023). What all
    states share is taken away, since those of any two texts point in almost one direction (Ethayarajh 2019), and the
    rest is scaled to a mean square of 1. `source`: a run or an open model. UserError for another model.
    """
    import jax.numpy as jnp

    from aurora_train.loading import load
    from aurora_train.nn.transformer import Transformer

    read = load(source, by="facts")
    if read.tokenizer is None or not isinstance(read.model, Transformer):
        raise UserError(f"{source} is no language model", where="data.language",
                        hint="an open model, a run of language_model, or none: hashed words")  # fmt: skip
    rows = [jnp.asarray(read.tokenizer.encode(OTHER_WORDS.format(task)), jnp.int32)[None] for task in tasks]
    states = np.stack([np.asarray(read.model(row)[0, -1].astype(jnp.float32)) for row in rows])
    apart = states - states.mean(0)
    return (apart / max(float(np.sqrt((apart**2).mean())), 1e-6)).astype(np.float32)


def features_of(batch: dict, facts: dict) -> dict:
    """{"instruction": float32[B, F]} of a batch: as given, or those of `batch["task"]`; {} if there is one task."""
    if len(facts["tasks"]) < 2:
        return {}
    if "instruction" in batch:
        return {"instruction": batch["instruction"]}
    import jax.numpy as jnp

    known = facts.get("instructions")
    known = np.stack([features(task) for task in facts["tasks"]]) if known is None else np.asarray(known, np.float32)
    return {"instruction": jnp.asarray(known)[batch["task"]]}
