"""Stops a run on request: the first signal ends it after the current step, a second one at once."""

from __future__ import annotations

import contextlib
import os
import signal

from aurora_train.errors import Stopped

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, saved, resumable; a supervisor starts it again
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Context manager that listens for SIGTERM, SIGINT and SIGHUP; `name` is the first one received, or None."""

    def __init__(self):
        self.name: str | None = None
        self._interruptible = False
        self._before = {}

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in _ASKING}
        return self

    def __exit__(self, *exc):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        # An exception raised in jax's garbage-collector hook is printed and dropped: then `heed` has to raise it.
        if self._interruptible and frame.f_code.co_name != "_xla_gc_callback":
            raise Stopped(self.name)

    @contextlib.contextmanager
    def held(self):
        """In this context, a signal is only noted: the caller checks `name` between steps."""
        self._interruptible = False
        try:
            yield
        finally:
            self._interruptible = True

    @contextlib.contextmanager
    def allowed(self):
        """Inside `held`, a stretch (an evaluation) that a signal may leave at once by raising `Stopped`."""
        if self.name is not None:
            raise Stopped(self.name)
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def heed(self) -> None:
        """Raise `Stopped` if a signal is allowed to but could not: C code drops the exceptions of its callbacks."""
        if self._interruptible and self.name is not None:
            raise Stopped(self.name)

    def heeding(self, progress):
        """A progress callback that also heeds a signal that arrived while nothing could be raised."""

        def heed_and_show(*arguments):
            self.heed()
            progress(*arguments)

        return heed_and_show
