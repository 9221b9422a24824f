"""What happens to a run, said once: a line for the user on the display, and a record in events.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from aurora_train.errors import Stopped
from aurora_train.machine.processes import Ended
from aurora_train.record.metrics import EventLog
from aurora_train.record.progress import Progress


class Voice:
    """`voice(text)` shows a permanent line; `voice(text, "save", step, ...)` records an event as well."""

    def __init__(self, events: EventLog, progress: Progress):
        self._events, self._progress = events, progress

    def __call__(self, text: str, event: str | None = None, step: int | None = None, /, **details: Any) -> None:
        if event is not None:
            self.record(event, step, **details)
        self._progress.event(text)

    def record(self, event: str, step: int | None = None, /, **details: Any) -> None:
        """Record an event of which nothing is shown."""
        self._events.event(event, step, **details)


@contextlib.contextmanager
def failure_recorded(events: EventLog, saved: Callable[[], int]):
    """Record the error that leaves this context, with the newest saved step; a stop that was asked for is none."""
    try:
        yield
    except (Stopped, Ended):
        raise
    except Exception as error:
        events.event("fail", saved(), why=(str(error) or type(error).__name__).splitlines()[0])
        raise
