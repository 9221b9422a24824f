"""The error of a save that could not be written, and the recognition of system errors in the writers' exceptions."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from aurora_train.errors import UserError

_WHOLE = "earlier checkpoints are intact, and `aurora resume RUN` continues from the newest"


class SaveFailed(UserError):
    """A save could not be written. `needed`: its size in bytes; `no_space`: whether more free space would help."""

    def __init__(self, step: int, reason: str, folder: Path, *, needed: int = 0, no_space: bool = False, why=None):
        remedy = "free some space" if no_space else "make the disk writable again"
        super().__init__(f"cannot save step {step}: {reason}", where=str(folder), why=why, hint=f"{remedy}; {_WHOLE}")
        self.reason, self.needed, self.no_space = reason, needed, no_space


def system_error(text: str) -> str | None:
    """The system error that the text of an exception names, or None."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
    return next((os.strerror(code) for code in codes if os.strerror(code) in text), None)


def silence_closed_loops() -> None:
    """After a failed save, its other writers each print a traceback about the closed event loop. Suppress these."""
    previous = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
