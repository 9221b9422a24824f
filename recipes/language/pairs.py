"""Two rows for each example of a preference: chosen and rejected answer, or a judged answer and one to another prompt.

A judged answer stands beside the answer to another prompt, which measures how far the policy has moved at all: the
next answer of its source and split whose prompt differs. Every row begins at position 0 and is padded on its right.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aurora_train.data.order import Part
from aurora_train.errors import UserError
from language.answers import Learned
from language.conversations import Conversation, Judged, Pair, read_judged, read_pairs
from language.pieces import Pieces, shown
from language.prepare_pieces import Encoding, prepare
from language.settings_tune import ConversationDataConfig
from language.windows import laid_out

LAYOUT = 1  # part of the keys of data and reference: raise it when `take` returns other arrays for the same pieces
PAIRS, JUDGED = "pairs", "judged answers"
_LABELS = "labels.npy"

Learn = Callable[[Conversation], list[Learned]]


def prepare_pairs(data: ConversationDataConfig, cache: Path, learn: Learn, decisive: dict, tokenizer, progress):
    """The `Pieces` of pairs, two each: the chosen and the rejected answer, each with its prompt.

    `learn`: `answers.learn` of a conversation; `decisive`: what decides it, plain JSON.
    """

    def encode(pair: Pair) -> list[Learned]:
        both = [_one(learn, each) for each in pair.conversations()]
        if all(both) and np.array_equal(both[0].ids, both[1].ids):
            raise UserError(
                f"{pair.place}: the chosen and the rejected answer are the same tokens", where="data.source",
                why="the template leaves out what tells them apart, such as blanks at the ends", hint="remove the row",
            )  # fmt: skip
        return [one for one in both if one]

    def arrange(folder: Path, lengths: np.ndarray, split: np.ndarray, source: np.ndarray) -> dict:
        return {"rows_are": PAIRS}

    encoding = Encoding(PAIRS, read_pairs, encode, decisive, arrange, is_whole=True, split_by=("prompt",))
    return prepare(encoding, data, cache, tokenizer, progress)


def prepare_judged(data: ConversationDataConfig, cache: Path, learn: Learn, decisive: dict, tokenizer, progress):
    """The `Pieces` of judged answers, one each, and their labels. Arguments as those of `prepare_pairs`."""
    labels: dict[str, bool] = {}  # by place

    def encode(judged: Judged) -> list[Learned]:
        labels[judged.place] = judged.label
        one = _one(learn, judged.conversation())
        return [one] if one else []

    def arrange(folder: Path, lengths: np.ndarray, split: np.ndarray, source: np.ndarray) -> dict:
        places = [json.loads(line) for line in (folder / "places.jsonl").read_text().splitlines()]
        np.save(folder / _LABELS, np.array([labels[place] for place in places], np.float32))
        return {"rows_are": JUDGED}

    encoding = Encoding(JUDGED, read_judged, encode, decisive, arrange, split_by=("prompt",))
    return prepare(encoding, data, cache, tokenizer, progress)


def _one(learn: Learn, conversation: Conversation) -> Learned | None:
    """The tokens of a conversation whose last answer alone is learned; None if nothing of it is."""
    found = learn(conversation)
    if len(found) > 1:
        raise UserError(
            f"{conversation.place}: the answer takes several turns, and the template changes the earlier ones",
            where="data.source", hint="let `chosen` and `rejected` hold one turn of the assistant each",
        )  # fmt: skip
    return found[0] if found else None


class PairSource:
    """The examples of one split. `take` is a pure function of the indices and reads only the tokens it returns.

    Attributes:
        labels: float32[examples], 1 for a desirable answer; None for pairs.
        reference: float32[examples, 2], log-probabilities that `take` returns too; None until `against` is called.
    """

    def __init__(self, pieces: Pieces, split: str, sequence: int, weights: dict[str, float] | None = None):
        self.pieces, self.split, self.sequence, self.reference = pieces, split, sequence, None
        self.is_judged = pieces.manifest["rows_are"] == JUDGED
        self._pieces = pieces.of_split(split).reshape(-1, 1 if self.is_judged else 2)
        self._source = np.asarray(pieces.source)[self._pieces[:, 0]]
        self.labels = np.asarray(pieces.array(_LABELS)[self._pieces[:, 0]]) if self.is_judged else None
        self.weights = None if weights is None else dict(sorted(weights.items()))
        self.mixture = None if weights is None else tuple(self._parts())
        decisive = f"preferences {LAYOUT} {pieces.fingerprint} {split} {sequence} {self.weights}"
        self.fingerprint = hashlib.sha256(decisive.encode()).hexdigest()
        if self.is_judged and len(self):
            self._refuse_alike()

    def _refuse_alike(self) -> None:
        """UserError if nothing could be compared: one prompt, or a score of answers that are all good or all bad."""
        self._other(0)
        if self.split != "train" and len(set(self.labels.tolist())) < 2:
            what = "undesirable" if self.labels[0] else "desirable"
            raise UserError(f"no {what} answer is in the {self.split} split", where=f"data.holdout_{self.split}",
                            why="the score compares desirable answers with undesirable ones",
                            hint="hold more out, or use more rows")  # fmt: skip

    def _parts(self):
        for number, (name, weight) in enumerate(self.weights.items()):
            first, end = np.searchsorted(self._source, [number, number + 1])
            if first == end:
                raise UserError(f"the source {name} has no example to train on", where=f"data.mix.{name}",
                                hint="use more rows, or leave the source out")  # fmt: skip
            yield Part(weight, int(first), int(end - first))

    def against(self, reference: np.ndarray) -> PairSource:
        """The same source with the log-probabilities of a reference, float32[examples, 2]."""
        other = copy.copy(self)
        other.reference = reference
        numbers = hashlib.sha256(np.ascontiguousarray(reference, "<f4").tobytes()).hexdigest()
        other.fingerprint = hashlib.sha256(f"{self.fingerprint} against {numbers}".encode()).hexdigest()
        return other

    def __len__(self) -> int:
        return len(self._pieces)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """int64[B] -> tokens, targets, segments, positions int32[B, 2, T] and weights float32[B, 2, T].

        The weight is 1 for the tokens of the answer and of its end; segment 0 is padding. Beside these `reference`
        float32[B, 2], if there is one, and `desirable` float32[B] of judged answers.
        """
        indices = np.asarray(indices, np.int64)
        rows = [row for index in indices for row in self._rows(int(index))]
        shape, counted = (len(rows), self.sequence), np.concatenate([learned[1:] for _, learned in rows])
        first = np.zeros(len(rows), np.int64)
        flat = laid_out([ids for ids, _ in rows], np.arange(len(rows)), first, counted, shape)
        arrays = {name: array.reshape(-1, 2, self.sequence) for name, array in flat.items()}
        arrays |= {} if self.reference is None else {"reference": self.reference[indices]}
        return arrays | ({"desirable": self.labels[indices]} if self.is_judged else {})

    def _rows(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, learned) of the two rows of an example."""
        rows = [(self.pieces.ids(piece), self.pieces.learned(piece)) for piece in self._pieces[index]]
        if not self.is_judged:
            return rows
        (ids, learned), (other, others) = rows[0], self._answer(self._other(index))
        start = int(learned.argmax())
        mixed = np.concatenate([ids[:start], other]), np.concatenate([np.zeros(start, bool), others])
        return [rows[0], tuple(part[: self.sequence + 1] for part in mixed)]

    def _answer(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        learned = self.pieces.learned(self._pieces[index, 0])
        start = int(learned.argmax())
        return self.pieces.ids(self._pieces[index, 0])[start:], learned[start:]

    def _prompt(self, index: int) -> np.ndarray:
        piece = self._pieces[index, 0]
        return self.pieces.ids(piece)[: int(self.pieces.learned(piece).argmax())]

    def _other(self, index: int) -> int:
        """The next example of the same source whose prompt differs."""
        first, end = np.searchsorted(self._source, self._source[index] + np.arange(2))
        prompt = self._prompt(index)
        for step in range(1, int(end - first)):
            other = int(first + (index - first + step) % (end - first))
            if not np.array_equal(prompt, self._prompt(other)):
                return other
        raise UserError(
            f"the {self.split} split has answers to one prompt only", where="data.source",
            why="KTO measures how far the model has moved by answers to other prompts", hint="use rows of more prompts",
        )  # fmt: skip

    def reading(self, arrays: dict[str, np.ndarray], indices: np.ndarray, rows: int) -> dict:
        """Facts about a batch, and the text of its first `rows` examples, learned and not."""
        padding = 1 - (arrays["segments"] > 0).mean()
        summary = [*self.pieces.summary(), f"{len(self):,} examples in this split; {padding:.2%} padding here"]
        shown = [{"index": int(index), "segments": self._shown(int(index))} for index in indices[:rows]]
        return {"summary": summary, "padding": float(padding), "rows": shown}

    def _shown(self, index: int) -> list[dict]:
        """The rows of an example: what each is, its text, and that in parts, [text, is learned]."""
        names = ("chosen", "rejected")
        if self.is_judged:
            names = ("desirable" if self.labels[index] else "undesirable", "an answer to another prompt")
        place = self.pieces.place(int(self._pieces[index, 0]))
        segments = []
        for name, (ids, learned) in zip(names, self._rows(index), strict=True):
            parts = [list(part) for part in shown(self.pieces.tokenizer, ids, learned)]
            text = "".join(text for text, _ in parts)
            segments.append({"document": f"{name}, {place}", "tokens": len(ids), "text": text, "parts": parts})
        return segments

    def describe(self) -> dict:
        """Provenance: what was prepared, this split and whether a reference is part of it."""
        return self.pieces.describe() | {
            "split": self.split, "sequence": self.sequence, "examples": len(self), "rows_fingerprint": self.fingerprint,
            "learned": self._shown(0), "has_reference": self.reference is not None,
            **({} if self.weights is None else {"weights": self.weights}),
        }  # fmt: skip
