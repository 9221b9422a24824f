"""Scores of the learned tokens of held-out conversations, read in their packed rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from aurora_train.evals.intervals import Measure
from language.packing import PackedRows


def sums(rows: PackedRows, predict: Callable[[dict], tuple], batch: int, progress: Callable) -> dict[str, np.ndarray]:
    """What each conversation of the rows comes to, in their order in the data; arrays [conversations].

    Args:
        predict: a batch -> (-log p of each target in nats, whether it is the likeliest token), [B, T] each.
        batch: rows at a time. The last batch is filled up with its last row, so that one shape is compiled.

    Returns `conversation` (its number in the store), `source` (the number of its source), `nats` float64, `learned` and
    `right` (tokens), and `bytes` of the answers' text in UTF-8, without control tokens.
    """
    pieces = rows.store.of_split(rows.split)
    totals = {name: np.zeros(pieces.max() + 1) for name in ("nats", "learned", "right")}
    for start in range(0, len(rows), batch):
        progress(start, len(rows), "scoring held-out conversations")
        indices = np.arange(start, start + batch)
        arrays = rows.take(np.minimum(indices, len(rows) - 1))
        nats, right = predict(arrays)
        counted = (arrays["weights"] > 0) & (indices < len(rows))[:, None]
        held = [rows.pieces_of(min(index, len(rows) - 1)) for index in indices]
        piece = np.concatenate([each[number] for each, number in zip(held, _numbers(arrays, counted), strict=True)])
        for name, values in (("nats", nats), ("learned", counted), ("right", right)):
            totals[name] += np.bincount(piece, np.asarray(values, np.float64)[counted], len(totals[name]))
    progress(len(rows), len(rows), "scoring held-out conversations")
    sizes = np.array([rows.store.answer_bytes(piece) for piece in pieces])
    numbers, first, owner = np.unique(rows.store.conversation[pieces], return_index=True, return_inverse=True)
    by_piece = {name: total[pieces] for name, total in totals.items()} | {"bytes": sizes}
    found = {name: np.bincount(owner, values, len(numbers)) for name, values in by_piece.items()}
    return {"conversation": numbers, "source": rows.store.source[pieces[first]], **found}


def _numbers(arrays: dict, counted: np.ndarray) -> list[np.ndarray]:
    """For each row, the place in it of the piece of every counted target."""
    return [segments[here] - 1 for segments, here in zip(arrays["segments"], counted, strict=True)]


def numbers(found: dict[str, np.ndarray]) -> dict[str, float]:
    """The headline numbers of `sums`: nats per learned token, bits per byte of the answers, share of right tokens.

    The end of an answer is a learned token, so its bits count; its text has no bytes.
    """
    nats, learned, right, size = (float(found[name].sum()) for name in ("nats", "learned", "right", "bytes"))
    return {
        "answer_loss": nats / learned,
        "bits_per_byte": nats / np.log(2) / max(size, 1.0),
        "token_accuracy": right / learned,
        "conversations": len(found["conversation"]),
        "learned_tokens": int(learned),
        "bytes": int(size),
    }


def by_source(found: dict[str, np.ndarray], names: list[str]) -> dict[str, float]:
    """Loss and bits per byte of each source of a mixture that has held-out conversations. `names`: of all, in order."""
    made = {}
    for source, name in enumerate(names if len(names) > 1 else ()):
        here = found["source"] == source
        if here.any():
            of_it = numbers({what: values[here] for what, values in found.items()})
            made |= {f"{what}_{name}": of_it[what] for what in ("answer_loss", "bits_per_byte")}
    return made


def measures(workdir: Path) -> dict[str, Measure]:
    """The numbers of a score by conversation, from what it left in its work folder; `exact_match` if it was scored."""
    with np.load(workdir / "answers.npz") as found:
        rows, nats, learned = found["conversation"], found["nats"], found["learned"]
        made = {
            "answer_loss": Measure(rows, nats, learned),
            "bits_per_byte": Measure(rows, nats / np.log(2), found["bytes"]),
            "token_accuracy": Measure(rows, found["right"], learned),
        }
    if not (workdir / "exact.npz").exists():
        return made
    with np.load(workdir / "exact.npz") as found:
        return {"exact_match": Measure.share(found["piece"], found["exact"]), **made}
