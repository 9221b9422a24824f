"""Text for HTML. Whatever was not written by this package passes through `escape`, because it may contain markup."""

from __future__ import annotations

from html import escape as _escape
from typing import Any


def escape(text: Any) -> str:
    """Text for HTML. Control characters that HTML forbids become their visible symbols (U+2400 and on)."""
    visible = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(text))
    return _escape(visible.encode("utf-8", "replace").decode())
