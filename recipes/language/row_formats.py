"""The formats in which rows of conversations are kept: by which fields each is known, and what it says.

A format's `parse` makes of a `Row` the fields of a `Conversation`, a `Pair` or a `Judged`, or LeftOut where there is
nothing to learn; it raises `BadRow` for a row that cannot be used.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

from aurora_train.sources.readers import LeftOut
from language.turns import BadRow, answer, in_order, messages, schemas, text, wrong_type

Placed = list[tuple[str, dict]]  # messages, each with its place in the row
FIELDS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "chosen",
          "rejected", "label", "tools", "system")  # fmt: skip
# Names that other tables give to these fields, for hints alone.
_ALSO = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"), "conversations": (),
    "instruction": ("question", "query"), "output": ("response", "answer"), "prompt": ("question", "query"),
    "completion": ("response", "answer", "output"), "text": ("content", "document"),
    "chosen": ("preferred", "accepted", "chosen_response"), "rejected": ("dispreferred", "rejected_response"),
    "label": ("liked", "thumbs_up", "good"),
}  # fmt: skip


class Row:
    """The values of a row. `columns`: the names of its columns by the usual names, where they differ."""

    def __init__(self, values: dict, columns: dict[str, str]):
        self.values, self._columns = values, columns

    def key(self, name: str) -> str:
        """The name of the column for the field `name`."""
        return self._columns.get(name, name)

    def get(self, name: str) -> object:
        """The value of the field `name`; None if there is none."""
        return self.values.get(self.key(name))

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.get(name) is not None


class Format(NamedTuple):
    """`needs`: the fields of a row of this format, in one or several ways; `means`: the format in words."""

    needs: tuple[tuple[str, ...], ...]
    means: str
    parse: Callable[[Row], dict | LeftOut]

    def fits(self, row: Row) -> bool:
        """Whether a row has the fields."""
        return any(all(row.has(field) for field in fields) for fields in self.needs)


def fitting(row: Row) -> list[str]:
    """The names of the formats that a row may have. Of judged answers one must have the label true or false."""
    found = [name for name, one in FORMATS.items() if one.fits(row)]
    if "judged" in found and isinstance(row.get("label"), bool):
        return [name for name in found if name != "prompt"]
    return [name for name in found if name != "judged"]


def missing_field(row: Row, formats: tuple[str, ...], names: list[str], key: str) -> BadRow:
    """The error for a row without the fields of any of the `formats`. `names`: all columns of its table; `key`: the
    section of the config that names the source."""
    ways = [fields for name in formats for fields in FORMATS[name].needs]
    likely = ([(field, _like(field, row, names)) for field in fields] for fields in ways)
    renamed = next((found for found in likely if all(column for _, column in found)), [])
    hint = " ".join(f"{key}.fields.{field}={column}" for field, column in renamed if column != row.key(field))
    if len(ways) == 1:
        absent = next(row.key(field) for field in ways[0] if not row.has(field))
        what = "the field is null" if absent in row.values else f"the row has no field `{absent}`"
    else:
        absent, what = "", f"no fields of a known format ({'; '.join(map(', '.join, ways))})"
    named = ", ".join(f"{name} (null)" if row.values.get(name, "") is None else name for name in names)
    return BadRow("no such field", absent, what, why=f"its fields are {named}" if names else "it is empty",
                  hint=hint or f"{key}.fields names the columns")  # fmt: skip


def _like(field: str, row: Row, names: list[str]) -> str | None:
    """The column that probably is the field."""
    if row.has(field):
        return row.key(field)
    near = difflib.get_close_matches(field, names, 1)
    return next((name for name in names if name in _ALSO[field]), near[0] if near else None)


# ---- conversations


def _of_turns(name: str) -> Callable[[Row], dict | LeftOut]:
    def parse(row: Row) -> dict | LeftOut:
        found = in_order(_begun(row, messages(row.get(name), row.key(name))))
        if all(message["role"] != "assistant" for message in found):
            return LeftOut("no answer to learn")
        return {"messages": found, "tools": _tools(row)}

    return parse


def _alpaca(row: Row) -> dict:
    """The input stands below the instruction, after an empty line."""
    asked = text(row.get("instruction"), row.key("instruction"))
    given = text(row.get("input"), row.key("input")) if row.has("input") else ""
    user = {"role": "user", "content": f"{asked}\n\n{given}" if given.strip() else asked}
    said = {"role": "assistant", "content": answer(row.get("output"), row.key("output"))}
    turns = _begun(row, [(row.key("instruction"), user), (row.key("output"), said)])
    return {"messages": in_order(turns), "tools": _tools(row)}


def _prompt(row: Row) -> dict:
    """Two texts are read without a template, as they are."""
    if not (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)):
        asked, said = _asked_and_said(row)
        return {"messages": asked + said, "tools": _tools(row), "context": len(asked)}
    for name in ("system", "tools"):
        if row.get(name):
            raise BadRow("fields of several formats", row.key(name), "a prompt of text has no place for it",
                         hint='"prompt": [{"role": "user", "content": "..."}]')  # fmt: skip
    prompt, said = text(row.get("prompt"), row.key("prompt")), answer(row.get("completion"), row.key("completion"))
    return {"parts": [part for part in ((prompt, False), (said, True)) if part[0]]}


def _text(row: Row) -> dict | LeftOut:
    written = text(row.get("text"), row.key("text"))
    return {"parts": [(written, True)]} if written.strip() else LeftOut("no text")


# ---- preferences


def _pair(row: Row) -> dict:
    """Answers are texts, messages, or whole conversations; what both begin with belongs to the prompt."""
    prompt = _turns(row, "prompt", "user") if row.has("prompt") else []
    chosen, rejected = _turns(row, "chosen", "assistant"), _turns(row, "rejected", "assistant")
    if _messages(chosen) == _messages(rejected):
        raise BadRow("equal answers", row.key("rejected"), f"it is equal to `{row.key('chosen')}`",
                     why="nothing is preferred", hint="remove the row")  # fmt: skip
    pairs = zip(_messages(chosen), _messages(rejected), strict=False)
    shared = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    is_whole = [turns[0][1]["role"] not in ("assistant", "tool") for turns in (chosen, rejected)]
    if any(is_whole):
        begun = _messages(chosen[:shared])
        starts = (begun[n : n + len(prompt)] for n in range(len(begun) + 1))
        if not all(is_whole) or _messages(prompt) not in starts:
            raise _not_shared(row, chosen, shared)
        prompt = []
    elif not prompt:
        raise BadRow("no prompt", row.key("prompt"), "the row has no prompt, and its answers do not begin with one")
    prompt, answers = _begun(row, prompt + chosen[:shared]), {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    for name, turns in answers.items():
        if not turns:
            raise BadRow("empty answer", row.key(name), "nothing follows what both answers begin with")
        in_order(prompt + turns)
        if any(message["role"] not in ("assistant", "tool") for _, message in turns):
            raise _not_shared(row, chosen, shared)
    return {"prompt": _messages(prompt), "tools": _tools(row)} | {n: _messages(turns) for n, turns in answers.items()}


def _not_shared(row: Row, chosen: Placed, shared: int) -> BadRow:
    key = chosen[min(shared, len(chosen) - 1)][0]
    return BadRow(
        "a prompt that the answers do not share", key,
        f"`{row.key('chosen')}` and `{row.key('rejected')}` do not answer the same prompt",
        why="both have to be equal up to the last message of the user"
        + (f", and `{row.key('prompt')}` has to be there in both" if row.has("prompt") else ""),
    )  # fmt: skip


def _judged(row: Row) -> dict:
    label, key, near = row.get("label"), row.key("label"), _like("label", row, list(row.values))
    if not isinstance(label, bool):
        raise BadRow(
            "no label" if label is None else "a label of another type", key,
            "the row has no label" if label is None else f"the label is {label!r}",
            why="true is a good answer, false a bad one", always=True,
            hint="write true or false, without quotes" if row.has("label") else f"data.fields.label={near}" if near
            else "write true or false into each row; recipe: language/tune learns from rows without",
        )  # fmt: skip
    if row.has("completion"):
        asked, said = _asked_and_said(row)
        return {"prompt": asked, "answer": said, "label": label, "tools": _tools(row)}
    name = "messages" if row.has("messages") else "conversations"
    turns = _begun(row, messages(row.get(name), row.key(name)))
    found = in_order(turns)
    last = max((n for n, message in enumerate(found) if message["role"] == "user"), default=len(found) - 1)
    if last == len(found) - 1:
        raise BadRow("no answer", turns[-1][0], "no answer follows the last message of the user")
    return {"prompt": found[: last + 1], "answer": found[last + 1 :], "label": label, "tools": _tools(row)}


# ---- what they share


def _turns(row: Row, name: str, role: str) -> Placed:
    """The messages of a field; a text is one message of this role."""
    value, key = row.get(name), row.key(name)
    if isinstance(value, str):
        return [(key, {"role": role, "content": (answer if role == "assistant" else text)(value, key)})]
    if not isinstance(value, list):
        raise wrong_type(value, key, "text or a list of messages", '"Hello", or [{"role": "user", "content": "Hello"}]')
    return messages(value, key)


def _asked_and_said(row: Row) -> tuple[list[dict], list[dict]]:
    """The messages of the prompt and of the completion."""
    prompt, said = _begun(row, _turns(row, "prompt", "user")), _turns(row, "completion", "assistant")
    for key, message in said:
        if message["role"] not in ("assistant", "tool"):
            raise BadRow("another role in an answer", f"{key}.role", f"an answer has no message of {message['role']}",
                         hint=f"move it to `{row.key('prompt')}`")  # fmt: skip
    found = in_order(prompt + said)
    return found[: len(prompt)], found[len(prompt) :]


def _begun(row: Row, turns: Placed) -> Placed:
    """The messages with the row's own `system` text before them."""
    key, system = row.key("system"), text(row.get("system") or "", row.key("system"))
    first = {"role": "system", "content": system}
    if not system.strip() or turns[0][1] == first:
        return turns
    return [(key, first), *turns]


def _tools(row: Row) -> list | None:
    return schemas(row.get("tools"), row.key("tools"))


def _messages(turns: Placed) -> list[dict]:
    return [message for _, message in turns]


FORMATS = {
    "messages": Format((("messages",),), "lists of role and content", _of_turns("messages")),
    "sharegpt": Format((("conversations",),), "lists of from and value", _of_turns("conversations")),
    "alpaca": Format((("instruction", "output"),), "instruction, input and output", _alpaca),
    "prompt": Format((("prompt", "completion"),), "a prompt and its completion", _prompt),
    "text": Format((("text",),), "raw text, all of it learned", _text),
    "pairs": Format((("chosen", "rejected"),), "a chosen and a rejected answer", _pair),
    "judged": Format(
        (("prompt", "completion"), ("messages",), ("conversations",)), "an answer and its label", _judged
    ),
}  # fmt: skip
TUNED = ("messages", "sharegpt", "alpaca", "prompt", "text")
