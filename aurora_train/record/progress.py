"""Shows progress: one live line on a terminal, plain lines in a log file, nothing if quiet.

Training calls `step` with every record it logs; `step` only remembers it. The live line is drawn a few times a
second by rich's own thread, and a plain line is printed at most every few seconds, so watching costs no speed.
Everything goes to stderr: stdout is for results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from aurora_train.record.throughput import TimeLeft
from aurora_train.units import count, decimal, duration, energy, percent, size

_BAR_CELLS = 16
_REFRESH_PER_SECOND = 4
_WORTH_SHOWING = 1_000_000_000  # bytes; below this it is mostly Python and its libraries


class _OutlivedConsole(Console):
    def on_broken_pipe(self) -> None:
        # rich would close stdout and exit; instead the display catches this error and becomes quiet.
        raise BrokenPipeError


def stderr_console() -> Console:
    """The default console for progress."""
    return _OutlivedConsole(stderr=True, highlight=False, soft_wrap=True)


class _Display:
    """One changing line on a terminal, plain lines elsewhere. Subclasses provide the line."""

    def __init__(self, console: Console | None, quiet: bool, plain_every_s: float):
        self.console = console or stderr_console()
        self.quiet, self._plain_every_s = quiet, plain_every_s
        self._last_plain = self._shown = None
        self._live = None
        self._cells = "━╌" if "utf" in (self.console.encoding or "").lower() else "#-"
        if self.console.is_terminal and not quiet:
            self._live = Live(
                console=self.console,
                get_renderable=self._renderable,
                refresh_per_second=_REFRESH_PER_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            with self._outliving_its_watcher():
                self._live.start()

    def line(self) -> str:
        raise NotImplementedError

    def _renderable(self) -> Text:
        return Text(self.line(), no_wrap=True, overflow="ellipsis")

    def event(self, text: str) -> None:
        """Print a permanent line, such as "saved step 100"."""
        if not self.quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        self._shown = text
        encoding = self.console.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        with self._outliving_its_watcher():
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _outliving_its_watcher(self):
        """If the terminal or pipe is closed, become quiet: a run of days must not end because of it."""
        try:
            yield
        except OSError:
            self.quiet, self._live = True, None

    def _print_plain(self, every_s: float) -> None:
        """Off a terminal, print the line unless one was printed less than `every_s` ago."""
        if self._live is not None or self.quiet:
            return
        now = time.monotonic()
        if self._last_plain is None or now - self._last_plain >= every_s:
            self._last_plain = now
            self._print(self.line())

    def _bar(self, share: float) -> str:
        filled = round(_BAR_CELLS * min(max(share, 0.0), 1.0))
        return self._cells[0] * filled + self._cells[1] * (_BAR_CELLS - filled)

    def close(self) -> None:
        """Remove the live line and print the last state as a plain line."""
        if self._live is not None:
            with self._outliving_its_watcher():
                self._live.stop()
            self._live = None
            if (last := self.line()) and not self.quiet:
                self._print(last)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class Progress(_Display):
    """Progress of training.

    Args:
        total_steps: the step at which the run ends.
        console: the output; stderr by default.
        quiet: show nothing; callers still print errors themselves.
        unit: the name of targets in the rate ("tok", "bins"); see `Recipe.unit`.
        plain_every_s: off a terminal, seconds between lines (a fifth of that for log steps).
    """

    def __init__(
        self,
        total_steps: int,
        console: Console | None = None,
        *,
        quiet: bool = False,
        unit: str = "targets",
        plain_every_s: float = 10.0,
    ):
        self._total_steps, self._unit = total_steps, unit
        self._left = TimeLeft(total_steps)
        self._record: dict = {}
        self._doing: tuple[str, float] | None = None
        self._alarm: str | None = None
        super().__init__(console, quiet, plain_every_s)

    def status(self, what: str, seconds: float | None = None) -> None:
        """Show an activity other than a step ("compiling"); with `seconds`, that it has ended and how long it took.

        The status is shown, with a running count of seconds, until the next `step` or `status`.
        """
        if seconds is None:
            self._doing = (what, time.monotonic())
            if self._live is None:
                self.event(f"{what} ...")
        else:
            self._doing = None
            self.event(f"{what}: {duration(seconds)}")

    def step(self, record: dict) -> None:
        """Show a record of metrics.jsonl. Fields that only log steps have keep their last value until the next one."""
        self._doing = None
        self._record = {**self._record, **record}
        if "step" not in record:
            return
        self._left.update(record["step"])
        if record["step"] >= self._total_steps:
            self._print_plain(0.0)
        else:
            self._print_plain(self._plain_every_s / 5 if "tokens_per_s" in record else self._plain_every_s)

    def alarm(self, text: str | None) -> None:
        """Show this text in every line from now on; None removes it."""
        self._alarm = text

    def skip(self) -> None:
        """Exclude the time since the last step, spent on something else, from the estimate of the time left."""
        self._left.skip()

    def line(self) -> str:
        record = self._record
        step = record.get("step")
        if self._doing:
            what, since = self._doing
            return f"{what} {duration(time.monotonic() - since)}"
        if step is None:
            return ""
        parts = [f"step {step}/{self._total_steps}"]
        if self._live is not None:
            parts[0] = f"{self._bar(step / self._total_steps)} {parts[0]}"
        if record.get("loss") is not None:
            parts.append(f"loss {decimal(record['loss'])}")
        if record.get("tokens_per_s") is not None:
            parts.append(f"{count(record['tokens_per_s'])} {self._unit}/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {percent(record['mfu'])}")
        if record.get("data_wait") is not None:
            parts.append(f"data wait {percent(record['data_wait'])}")
        if record.get("joules_per_step") is not None:
            parts.append(f"{count(record['joules_per_step'])} J/step")
            parts.append(f"{count(record['tokens_per_joule'])} {self._unit}/J")
        if record.get("total_joules") is not None:
            parts.append(energy(record["total_joules"]))
        if record.get("cost") is not None:
            parts.append(f"cost {record['cost']:.3g}")
        if record.get("co2_g") is not None:
            parts.append(f"{count(record['co2_g'])}g CO2")
        if (record.get("memory_bytes") or 0) >= _WORTH_SHOWING:
            parts.append(size(record["memory_bytes"]))
        if step < self._total_steps and self._left.seconds() is not None:
            parts.append(f"{duration(self._left.seconds())} left")
        return "  ".join(parts + ([self._alarm] if self._alarm else []))


class _Preparation(_Display):
    def __init__(self, console, quiet, plain_every_s):
        self._what, self._done, self._total = "", 0, None
        self._left = TimeLeft(None)
        super().__init__(console, quiet, plain_every_s)

    def __call__(self, done: int, total: int | None, what: str) -> None:
        if what != self._what:
            self._left = TimeLeft(total)
            if self._what and self._live is None:
                self._last_plain = None
        self._what, self._done, self._total = what, done, total
        self._left.total = total
        self._left.update(done)
        finished = total is not None and done >= total
        self._print_plain(0.0 if finished and self._shown != self.line() else self._plain_every_s)

    def line(self) -> str:
        if not self._what:
            return ""
        if not self._total:
            return f"{self._what}  {count(self._done)}"
        parts = [self._what, f"{count(self._done)}/{count(self._total)}", percent(self._done / self._total)]
        if self._live is not None:
            parts.insert(0, self._bar(self._done / self._total))
        if self._done < self._total and self._left.seconds() is not None:
            parts.append(f"{duration(self._left.seconds())} left")
        return "  ".join(parts)


@contextmanager
def preparation(console: Console | None = None, *, quiet: bool = False, plain_every_s: float = 5.0):
    """`with preparation() as progress: recipe.prepare(progress)`: yields `progress(done, total | None, what)`.

    The callback may be called at any rate; off a terminal it prints when a new `what` begins, every `plain_every_s`
    seconds, and when the total is reached.
    """
    display = _Preparation(console, quiet, plain_every_s)
    try:
        yield display
    finally:
        display.close()


def silent(done: int, total: int | None, what: str) -> None:
    """A progress callback that shows nothing."""


ProgressCallback = Callable[[int, int | None, str], None]
