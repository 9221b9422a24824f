"""Bundled tasks to learn from conversations: made here, always the same, with one right answer to each question.

`task:calendar`: a note in plain words, such as "Lunch with Ana Lopez on the 3rd of March at half past 5 pm", becomes a
line of a calendar, `03-03 17:30 Lopez`. The format is stated in every conversation, so a model that follows
instructions could do it untuned; small ones mostly cannot. `task:calendar-pairs` and `task:calendar-judged` have
right answers beside wrong ones that are nearly right, of other notes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from aurora_train.errors import UserError, nearest
from aurora_train.files import cache_folder, make_folder, write_atomically

PREFIX = "task:"
ROWS = 3000  # of each task

_SYSTEM = "Write each note as MM-DD HH:MM SURNAME."
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")  # fmt: skip
_FIRST = ("Ana", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Kate", "Leo", "Maria",
          "Nora", "Oscar", "Paula", "Rosa", "Simon", "Tara", "Victor")  # fmt: skip
_LAST = ("Adams", "Baker", "Cooper", "Diaz", "Evans", "Fischer", "Garcia", "Hill", "Ito", "Jones", "Keller", "Lopez",
         "Meyer", "Novak", "Olsen", "Parker", "Quinn", "Rossi", "Smith", "Turner", "Usman", "Vega", "Weber", "Young",
         "Zhang")  # fmt: skip
_EVENTS = ("Lunch", "Call", "Meeting", "Dinner", "Interview", "Walk", "Coffee", "Lesson", "Talk", "Tennis")
_FORMS = (
    "{event} with {first} {last} on {date} at {time}.", "On {date} at {time}: {event} with {first} {last}.",
    "{first} {last} confirmed: {event} on {date}, {time}.", "{event}, {date}, {time}, {first} {last}",
)  # fmt: skip


class _Draw:
    """Independent draws from a name, the same on every machine and in every version of Python."""

    def __init__(self, name: str):
        self._name, self._count = name, 0

    def below(self, number: int) -> int:
        self._count += 1
        return int.from_bytes(hashlib.sha256(f"{self._name} {self._count}".encode()).digest()[:8]) % number

    def of(self, options):
        return options[self.below(len(options))]


def rows(name: str, where: str = "data.source") -> list[dict]:
    """The rows of a task as a table of conversations has them. UserError, at the key `where`, for an unknown name."""
    if name not in _TASKS:
        raise UserError(f"there is no bundled task {name!r}", where=where, why=f"the tasks are {', '.join(_TASKS)}",
                        hint=nearest(name, _TASKS, form=f"{where}={PREFIX}{{}}"))  # fmt: skip
    return list(_TASKS[name]())


def table(name: str, where: str = "data.source") -> Path:
    """The rows of a task as a file of JSON lines in the cache, whose name says its content. UserError as for `rows`."""
    text = "".join(json.dumps(row) + "\n" for row in rows(name, where)).encode()
    path = cache_folder() / "tasks" / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    if not path.exists():
        make_folder(path.parent)
        write_atomically(path, text)
    return path


def _notes(of: str) -> Iterator[tuple[str, str, str]]:
    """(note, right answer, an answer that is nearly right) of `ROWS` different notes."""
    seen, number = set(), 0
    while len(seen) < ROWS:
        number += 1
        draw = _Draw(f"{of} {number}")
        month, day, hour, minute = draw.below(12), 1 + draw.below(28), 7 + draw.below(14), 15 * draw.below(4)
        first, last = draw.of(_FIRST), draw.of(_LAST)
        words = {"event": draw.of(_EVENTS), "first": first, "last": last}
        note = draw.of(_FORMS).format(date=_date(draw, month, day), time=_time(draw, hour, minute), **words)
        if note not in seen:
            seen.add(note)
            yield note, _line(month, day, hour, minute, last), _near_miss(draw, month, day, hour, minute, first, last)


def _line(month: int, day: int, hour: int, minute: int, name: str) -> str:
    return f"{month + 1:02}-{day:02} {hour:02}:{minute:02} {name}"


def _date(draw: _Draw, month: int, day: int) -> str:
    ending = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    name = _MONTHS[month]
    return draw.of((f"{day} {name}", f"{name} {day}", f"the {day}{ending} of {name}"))


def _time(draw: _Draw, hour: int, minute: int) -> str:
    half, twelve = "am" if hour < 12 else "pm", (hour - 1) % 12 + 1
    following = hour % 12 + 1
    said = {0: f"{twelve} {half}", 15: f"quarter past {twelve} {half}", 30: f"half past {twelve} {half}",
            45: f"quarter to {following} {'am' if hour + 1 < 12 else 'pm'}"}[minute]  # fmt: skip
    return draw.of((f"{hour}:{minute:02}", f"{twelve}:{minute:02} {half}", said))


def _near_miss(draw: _Draw, month: int, day: int, hour: int, minute: int, first: str, last: str) -> str:
    """The line with one mistake that is easily made: half a day, an hour, a month or a day off, or the first name."""
    other = draw.of((
        (month, day, (hour + 12) % 24, minute, last), (month, day, hour - 1, minute, last),
        ((month + 1) % 12, day, hour, minute, last), (month, day % 28 + 1, hour, minute, last),
        (month, day, hour, minute, first),
    ))  # fmt: skip
    return _line(*other)


def _asked(note: str) -> list[dict]:
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": note}]


def _said(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": answer}]


def _calendar() -> Iterator[dict]:
    for note, right, _ in _notes("calendar"):
        yield {"messages": _asked(note) + _said(right)}


def _calendar_pairs() -> Iterator[dict]:
    for note, right, wrong in _notes("calendar-pairs"):
        yield {"prompt": _asked(note), "chosen": _said(right), "rejected": _said(wrong)}


def _calendar_judged() -> Iterator[dict]:
    for number, (note, right, wrong) in enumerate(_notes("calendar-judged")):
        label = number % 2 == 0
        yield {"prompt": _asked(note), "completion": _said(right if label else wrong), "label": label}


_TASKS: dict[str, Callable[[], Iterator[dict]]] = {
    "calendar": _calendar, "calendar-pairs": _calendar_pairs, "calendar-judged": _calendar_judged,
}  # fmt: skip
