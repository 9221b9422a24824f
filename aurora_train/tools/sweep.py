"""`aurora sweep`: trains every combination of some values, one after another, each as a run of its own.

Every run is `aurora train` in a process of its own, so that runs cannot affect each other and a killed sweep resumes
like a killed run: the same command continues where it stopped and skips finished runs. If a sweep is killed outright
(kill -9), the run that it was training continues to its end, and the next start waits for it. This process does not
import jax.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from aurora_train.check.limits import EXCEEDED
from aurora_train.config import config_hash, load
from aurora_train.errors import UserError
from aurora_train.record.console import plain_console, table_of
from aurora_train.run import Run
from aurora_train.tools.runs import Row, described, is_run, scored
from aurora_train.units import decimal

STOPPED = 75  # equals `train.signals.EXIT_STOPPED`
_OPENING, _CLOSING = "[{(", "]})"
_LAST_WORDS = 40  # last lines of a child's standard error, in which the reason for its end is looked up
_NAME_LENGTH = 80


@dataclass(frozen=True)
class Member:
    """One combination: `values` of the swept keys as written, all `overrides` of the run, and its config."""

    values: dict[str, str]
    overrides: list[str]
    config: object
    folder: Path


@dataclass(frozen=True)
class Result:
    """How a member ended: its row of `aurora runs`, and the reason if it did not finish."""

    member: Member
    row: Row
    why: str = ""


def split_values(text: str) -> list[str]:
    """The parts of `a,b,c`, split at commas outside brackets and quotes: "[1,2],[3]" -> ["[1,2]", "[3]"]."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _OPENING + _CLOSING:
            depth += 1 if letter in _OPENING else -1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def members(config: str, overrides: list[str], folder: str | None = None) -> list[Member]:
    """Every combination with its checked config; the last key changes fastest.

    Raises UserError, before anything starts, for an error in any combination, for a key without values, and for two
    combinations that give the same config.
    """
    swept, fixed = _sorted_out(overrides)
    combinations, faults = [], {}
    for combination in itertools.product(*swept.values()):
        values = dict(zip(swept, combination, strict=True))
        given = [*fixed, *(f"{key}={value}" for key, value in values.items())]
        try:
            loaded = load(config, given)
        except UserError as fault:
            faults.setdefault(str(fault), []).append(_written(values))
            continue
        combinations.append((values, given, loaded))
    if faults:
        raise _faulty(faults, len(combinations) + sum(map(len, faults.values())))
    top = Path(folder) if folder else Path("runs") / f"{combinations[0][2].name}-sweep"
    if is_run(top):
        raise UserError("this is a run", where=str(top), hint="name a folder for the runs of the sweep with --run")
    made = [Member(v, g, c, top / f"{_folder_name(v)}-{config_hash(c)[:8]}") for v, g, c in combinations]
    _refuse_twins(made)
    return made


def _sorted_out(overrides: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(values by swept key, the other overrides)."""
    swept, fixed, named = {}, [], set()
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if key in named:
            raise UserError("this key is given twice", where=key, hint=f"give it once, with all values: {key}=a,b,c")
        named.add(key)
        values = split_values(value)
        if not equals or len(values) == 1:
            fixed.append(text)
        elif "" in values:
            raise UserError(f"there is an empty value in `{text}`", where=key, hint="write null for no value")
        else:
            swept[key] = values
    if not swept:
        raise UserError(
            "nothing to sweep: no key has several values",
            hint="aurora sweep CONFIG optimizer.lr=1e-3,3e-3,1e-2; for one run: aurora train CONFIG KEY=VALUE",
        )
    return swept, fixed


def _faulty(faults: dict[str, list[str]], total: int) -> UserError:
    lines = []
    for message, where in faults.items():
        of = "" if len(where) == total else f"with {'; '.join(where[:3])}{' and others' if len(where) > 3 else ''}: "
        lines.append(f"{of}{message}")
    count = sum(map(len, faults.values()))
    return UserError(f"{count} of {total} combinations cannot start; none was started", why="\n  ".join(lines))


def _refuse_twins(made: list[Member]) -> None:
    for one, other in itertools.combinations(made, 2):
        if one.config == other.config:
            raise UserError(
                f"{_written(one.values)} and {_written(other.values)} are the same config",
                hint="leave one of them out",
            )


def _folder_name(values: dict[str, str]) -> str:
    """`lr=1e-3,batch=8`: the last part of each key, or whole keys if two have the same last part."""
    last = [key.rpartition(".")[2] for key in values]
    names = last if len(set(last)) == len(last) else list(values)
    written = ",".join(f"{name}={value}" for name, value in zip(names, values.values(), strict=True))
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", written)[:_NAME_LENGTH].lstrip(".")


def _written(values: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


# ---- running


class Sweep:
    """Runs the members in turn. `stopped` is the name of the signal that ended it, or None."""

    def __init__(self, config: str, made: list[Member], tell, *, quiet: bool = False, online: bool = False):
        self._config, self._members, self._tell = config, made, tell
        self._options = ["--quiet"] * quiet + ["--online"] * online
        self.stopped: str | None = None
        self._child: subprocess.Popen | None = None

    def run(self) -> list[Result]:
        """Train all unfinished members. Returns the results of all, including those that were not reached."""
        asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._stop) for number in asking}
        try:
            return [self._result(number, member) for number, member in enumerate(self._members, 1)]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number, _frame) -> None:
        """Pass a signal to the child, which saves and ends. The child has its own process group and received none."""
        self.stopped = self.stopped or signal.Signals(number).name
        if self._child is not None:
            self._child.send_signal(number)

    def _result(self, number: int, member: Member) -> Result:
        head, run = f"[{number}/{len(self._members)}] {_written(member.values)}", Run(member.folder)
        if run.finished_at(member.config) is not None:
            self._tell(f"{head}: already finished")
            return Result(member, self._row(member))
        if not self.stopped:
            self._tell(f"{head}: {run.folder}")
            self._await(run)
        if self.stopped:
            return Result(member, self._row(member), "not continued" if run.has_begun() else "not started")
        status, words = self._train(member)
        row = self._row(member)
        # A run that exceeds a limit is finished and scored: another sweep would find it so.
        return Result(member, row, "" if status in (0, EXCEEDED) else _reason(status, words, row))

    def _await(self, run: Run) -> None:
        """Wait while another process trains the run: another sweep, or what a killed sweep has left running."""
        if run.is_held():
            self._tell(f"  {run.holder()} is training it; waiting for that to end")
        while run.is_held() and not self.stopped:
            time.sleep(0.2)

    def _train(self, member: Member) -> tuple[int, list[str]]:
        """(exit status, last lines of its standard error) of the member's `aurora train`."""
        if config_hash(load(self._config, member.overrides)) != config_hash(member.config):
            return 2, [f"{self._config} or its recipe has changed since the sweep began: run the same command again"]
        # -P: files in the current folder must not shadow modules.
        command = [sys.executable, "-P", "-m", "aurora_train", "train", self._config, *member.overrides]
        command += ["--run", str(member.folder), *self._options]
        child = self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", process_group=0,
        )  # fmt: skip
        if self.stopped:  # a signal arrived while the child was being created
            child.send_signal(signal.SIGTERM)
        words: deque[str] = deque(maxlen=_LAST_WORDS)
        for line in child.stderr:
            words.append(line.rstrip("\n"))
            with contextlib.suppress(OSError):  # the reader has closed the pipe; the sweep continues
                print(line, end="", file=sys.stderr, flush=True)
        status, self._child = child.wait(), None
        return status, list(words)

    def _row(self, member: Member) -> Row:
        if not member.folder.is_dir():
            return Row(member.folder.name, str(member.folder.absolute()), "not started")
        return described(member.folder, member.folder.name)[0]


def _reason(status: int, words: list[str], row: Row) -> str:
    """Why a run did not finish, in one line."""
    if status == STOPPED:
        return f"stopped {row.why}".strip()
    errors = [line for line in words if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return next((line.strip() for line in reversed(words) if line.strip()), f"exit status {status}")


# ---- what is shown


def ranked(results: list[Result]) -> tuple[list[Result], str]:
    """(results from the best to the worst, those without a score last; the measure they are sorted by, in words).

    The measure is the score if the recipe declares its direction (`Recipe.metric`), otherwise the validation loss.
    """
    scores = [result.row.score for result in results if result.row.score]
    measures = {(score["name"], score["better"]) for score in scores}
    name, better = next(iter(measures)) if len(measures) == 1 else (None, None)
    if better:
        sign, words = (1 if better == "min" else -1), "less is better" if better == "min" else "more is better"
        measure = f"{name} ({words})"
    else:
        sign, measure = 1, "validation loss (less is better)"

    def place(result: Result):
        value = (result.row.score or {}).get("value") if better else result.row.validation_loss
        known = isinstance(value, (int, float)) and value == value
        return result.row.state != "finished", not known, sign * value if known else 0.0

    return sorted(results, key=place), measure


def document(results: list[Result], stopped: str | None) -> dict:
    """What `aurora sweep --json` prints."""
    best_first, by = ranked(results)
    runs = [
        {"values": r.member.values, "run": r.row.folder, "state": r.row.state, "step": r.row.step,
         "steps": r.row.steps, "score": r.row.score, "validation_loss": r.row.validation_loss, "why": r.why}
        for r in best_first
    ]  # fmt: skip
    return {"sorted_by": by, "stopped_by": stopped, "runs": runs}


def show(results: list[Result]) -> None:
    """Print the table of a sweep, the best first."""
    console, (best_first, by) = plain_console(), ranked(results)
    rows = [
        (*one.member.values.values(), scored(one.row) if one.row.score else "",
         "" if one.row.validation_loss is None else decimal(one.row.validation_loss), one.row.progress,
         one.why or one.row.state, Path(one.row.folder).name)
        for one in best_first
    ]  # fmt: skip
    columns = (*results[0].member.values, "score", "validation loss", "step", "state", "run")
    console.print(table_of(*columns, left=tuple(range(len(columns))), rows=rows))
    console.print(f"sorted by {by}; the runs are in {results[0].member.folder.parent}", soft_wrap=True)
