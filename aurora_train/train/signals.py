"""Asking a run to stop: the first signal ends it after the step in hand, a second one at once."""

from __future__ import annotations

import contextlib
import os
import signal

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, saved, resumable; a supervisor starts it again
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """Raised where nothing is lost by leaving at once: while preparing, compiling, evaluating."""


class StopRequest:
    """Context manager that listens for SIGTERM, SIGINT and SIGHUP; `name` is the first one that came, or None."""

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
        # What is raised in jax's hook of the garbage collector is printed and dropped: then `heed` has to do it.
        if self._interruptible and frame.f_code.co_name != "_xla_gc_callback":
            raise Stopped(self.name)

    @contextlib.contextmanager
    def held(self):
        """Within, a signal is only noted: the caller looks at `name` between steps."""
        self._interruptible = False
        try:
            yield
        finally:
            self._interruptible = True

    @contextlib.contextmanager
    def allowed(self):
        """Inside `held`, a stretch (an evaluation) that a signal may leave at once by `Stopped`."""
        if self.name is not None:
            raise Stopped(self.name)
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def heed(self) -> None:
        """Raise `Stopped` where a signal may and did not: an exception that a callback of C code raised is dropped."""
        if self._interruptible and self.name is not None:
            raise Stopped(self.name)
