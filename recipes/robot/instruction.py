"""Features of an instruction: hashed words and parts of words, which need no model and no vocabulary.

They tell instructions apart, and two that share words have similar features. They know nothing of meaning: "lift" and
"raise" are as far apart as any two words. The instructions themselves are facts of a run.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

SIZE = 64


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


def features_of(batch: dict, tasks: list[str]) -> dict:
    """{"instruction": float32[B, SIZE]} of a batch: as given, or of `tasks[batch["task"]]`; {} if there is one task."""
    if len(tasks) < 2:
        return {}
    if "instruction" in batch:
        return {"instruction": batch["instruction"]}
    import jax.numpy as jnp

    return {"instruction": jnp.asarray(np.stack([features(task) for task in tasks]))[batch["task"]]}
