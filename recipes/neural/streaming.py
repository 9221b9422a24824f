"""Decodes bins of spikes as they come, for `aurora stream`, by the windows of the score and so to its velocity."""

from __future__ import annotations

import numpy as np

from aurora_train.errors import UserError


class Stream:
    """Answers {"spikes": counts [U]} of the next bin with {"velocity": [D]}, or [n, U] of the next n bins with [n, D].

    It remembers the last bins of its client, as many as the decoder sees. A client that begins anew sends
    {"reset": true}, as at the start of a trial.

    Args:
        predict: spikes uint16[1, T, U] -> standardised velocity [1, T, D].
        window: T.
        unit_ids: the units whose counts are expected, in this order.
        undo: standardised velocity [..., D] -> velocity in its unit.
    """

    def __init__(self, predict, window: int, unit_ids: list[int], undo):
        self.predict, self.window, self.unit_ids, self.undo = predict, window, unit_ids, undo
        self.history = np.zeros((window, len(unit_ids)), np.uint16)
        self.bins = 0
        predict({"spikes": self.history[None]})  # compiles

    def __call__(self, request: dict) -> dict:
        counts = self._counts(request)
        decoded = np.stack([self._next(row) for row in np.atleast_2d(counts)])
        return {"velocity": decoded if counts.ndim == 2 else decoded[0]}

    def _next(self, counts) -> np.ndarray:
        """The first window of a trial fills up from its beginning; each later bin is the last one of its own window."""
        if self.bins == self.window:
            self.history = np.roll(self.history, -1, axis=0)
        else:
            self.bins += 1
        self.history[self.bins - 1] = counts
        decoded = np.asarray(self.predict({"spikes": self.history[None]}))[0, self.bins - 1]
        return self.undo(decoded.astype(np.float64))

    def _counts(self, request: dict) -> np.ndarray:
        """The counts of a request, checked before any of them is remembered."""
        units = len(self.unit_ids)
        expected = f'{{"spikes": [{units} counts of the next bin]}}, of the units {_short(self.unit_ids)} in this order'
        if unknown := [key for key in request if key != "spikes"]:
            raise UserError(f"a request has no {unknown[0]!r}", where="request", hint=expected)
        try:
            counts = np.asarray(request["spikes"], np.float64)
        except KeyError:
            raise UserError("the request has no spikes", where="request", hint=expected) from None
        except (TypeError, ValueError):
            raise UserError("spikes are not an array of numbers", where="request.spikes", hint=expected) from None
        if counts.ndim not in (1, 2) or counts.shape[-1] != units or not counts.size:
            raise UserError(f"spikes have the shape {list(counts.shape)}", where="request.spikes", hint=expected)
        most = np.iinfo(np.uint16).max
        if not np.all((counts >= 0) & (counts <= most) & (counts == np.floor(counts))):  # nan fails them all
            bad = counts[~((counts >= 0) & (counts <= most) & (counts == np.floor(counts)))].flat[0]
            raise UserError(f"{bad:g} is no number of spikes", where="request.spikes",
                            why=f"counts are whole numbers from 0 to {most}", hint=expected)  # fmt: skip
        return counts.astype(np.uint16)


def _short(unit_ids) -> str:
    ids = [str(unit) for unit in unit_ids]
    return ", ".join(ids) if len(ids) <= 8 else f"{', '.join(ids[:4])}, ... {ids[-1]}"
