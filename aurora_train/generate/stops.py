"""Stop strings: a text ends before the first of some texts that appears in it, however it was cut into tokens.

This works on text of whole characters, as a recipe's detokeniser gives it, so no character is ever cut.
"""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Passes a growing text on until one of `stops` appears. What may yet become one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None  # the one that appeared

    def add(self, text: str) -> str:
        """Take more text; return what may be shown of it, and of what was held back."""
        if self.found is not None:
            return ""
        whole = self._held + text
        # Of several, the one that is complete first, or else it would matter how the text is cut.
        found = min(((whole.find(s) + len(s), whole.find(s), s) for s in self._stops if s in whole), default=None)
        if found is not None:
            _, start, self.found = found
            self._held = ""
            return whole[:start]
        begun = max((_begun(whole, stop) for stop in self._stops), default=0)
        self._held = whole[len(whole) - begun :]
        return whole[: len(whole) - begun]

    def rest(self) -> str:
        """What was held back, once the text has ended without a stop."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
