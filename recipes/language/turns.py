"""The turns of a conversation, from the several ways to write them to one, and the checks of what they hold.

A turn becomes a message with `role` and `content`. What templates read otherwise is made alike: parts of text are
joined, thinking is `reasoning_content` whatever the row calls it, and a call of a tool is
`{"type": "function", "function": {"name": ..., "arguments": {...}}}`. Other keys (`name`, `tool_call_id`) are kept.
"""

from __future__ import annotations

import json

from aurora_train.errors import UserError, nearest

_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
_KNOWN = ("system", "developer", "user", "assistant", "tool")
_NEXT = {  # what may follow a message of a role; None: the beginning
    None: ("system", "developer", "user"), "system": ("developer", "user"), "developer": ("user",),
    "user": ("assistant",), "assistant": ("user",), "tool": ("tool", "assistant"),
}  # fmt: skip
_DEEPEST = 100  # levels of lists and objects in arguments and schemas; templates and JSON fail at some hundreds
_THINKING = ("reasoning_content", "thinking", "reasoning")
_TYPES = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
          type(None): "null"}  # fmt: skip


LEAVE_OUT = "data.damaged=leave_out leaves such rows out and counts them"  # a way out, for hints


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        reason: the fault without the row's content, for counting.
        key: the place in the row, such as `messages[2].role`; "" for the whole row.
        what: the fault in this row.
        always: such a row is refused even where damaged rows are left out.
    """

    def __init__(self, reason: str, key: str, what: str, *, why=None, hint=None, always: bool = False):
        super().__init__(what)
        self.reason, self.key, self.what, self.why, self.hint, self.always = reason, key, what, why, hint, always

    def refusal(self, place: str) -> UserError:
        """The error that refuses the row at this place."""
        way_out = None if self.always else LEAVE_OUT
        hint = "; ".join(filter(None, [self.hint or "correct the row", way_out]))
        return UserError(self.what, where=f"{place}, {self.key}" if self.key else place, why=self.why, hint=hint)


def messages(turns: object, key: str) -> list[tuple[str, dict]]:
    """(place, message) of each turn of the list in the field `key`; JSON text is read as the list that it writes."""
    turns = from_json(turns, key)
    if not isinstance(turns, list):
        raise wrong_type(turns, key, "a list of messages", '[{"role": "user", "content": "Hello"}, ...]')
    if not turns:
        raise BadRow("no message", key, "the list of messages is empty")
    numbered = [(f"{key}[{number}]", turn) for number, turn in enumerate(turns)]
    return [(place, _message(turn, place)) for place, turn in numbered]


def in_order(turns: list[tuple[str, dict]]) -> list[dict]:
    """The messages of (place, message) pairs. BadRow if one may not follow the message before it."""
    before, may_answer = None, False
    for key, message in turns:
        role = message["role"]
        if role not in _NEXT[before] and not (role == "tool" and may_answer):
            allowed = " or ".join(_NEXT[before])
            raise BadRow(
                "roles out of order", f"{key}.role",
                f"the first message is of the role {role}" if before is None else f"{role} follows {before}",
                why=f"a conversation begins with {allowed}" if before is None else f"after {before} comes {allowed}",
                hint="a tool answers an assistant's tool_calls" if role == "tool" else None,
            )  # fmt: skip
        before, may_answer = role, role == "assistant" and "tool_calls" in message
    return [message for _, message in turns]


def text(value: object, key: str) -> str:
    """The text in a field. BadRow if it is of another type, or no text that UTF-8 can write."""
    if not isinstance(value, str):
        raise wrong_type(value, key, "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _not_utf8(error, key) from error
    return value


def _not_utf8(error: UnicodeEncodeError, key: str) -> BadRow:
    """The error for a text that UTF-8 cannot write. A byte that is not UTF-8 was read as one of U+DC80 to U+DCFF."""
    if "\udc80" <= error.object[error.start] <= "\udcff":
        return BadRow("not UTF-8", key, "the text is not UTF-8", hint="write the file in UTF-8; it may be in Latin-1")
    return BadRow("not UTF-8", key, "the text holds half of a surrogate pair")


def answer(value: object, key: str) -> str:
    """The text of an answer. BadRow also if it is blank."""
    if not text(value, key).strip():
        raise BadRow("empty answer", key, "the answer is empty", hint="write the answer, or remove the row")
    return value


def schemas(value: object, key: str) -> list | None:
    """The JSON schemas of tools in a field, None for nothing; JSON text is read as the list that it writes."""
    tools = from_json(value, key) if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong_type(tools, key, "a list of JSON schemas")
    return _json(tools, key)


def from_json(value: object, key: str) -> object:
    """What a text writes in JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow("another type", key, "it holds text that is not JSON", hint="write a list") from error


def type_of(value: object) -> str:
    """What a value is, in words."""
    return _TYPES.get(type(value), f"a {type(value).__name__}")


def wrong_type(value: object, key: str, wanted: str, example: str | None = None) -> BadRow:
    """The error for a value that is not what is `wanted`."""
    why = None
    if type(value) not in _TYPES:
        why = "JSON has no such type; the table was perhaps written by a reader that took texts for dates"
    return BadRow("another type", key, f"it holds {type_of(value)}, not {wanted}", why=why, hint=example)


def _message(turn: object, key: str) -> dict:
    role_name, content_name = _names(turn, key)
    role, content = _role(turn[role_name], f"{key}.{role_name}"), turn.get(content_name)
    call_name = next((name for name in ("tool_calls", "function_call") if turn.get(name)), None)
    calls = turn.get(call_name)
    if turn[role_name] == "function_call":
        calls, call_name, content = content, content_name, None
    text_key, apart = f"{key}.{content_name}", {role_name, content_name, "weight", "tool_calls", "function_call"}
    if content is None and not calls:
        raise _no_content(turn, role, text_key)
    written, thought = _content(content, text_key)
    message = {"role": role} if written is None else {"role": role, "content": written}
    kept = {name: one for name, one in turn.items() if one is not None and name not in apart}
    message |= {name: _json(one, f"{key}.{name}") for name, one in kept.items()}
    if turn.get("weight", 1) not in (1, None):
        raise BadRow("a message of another weight", f"{key}.weight", f"the weight is {turn['weight']}",
                     why="every answer of a conversation is learned alike", hint="weight: 1")  # fmt: skip
    if not isinstance(turn.get("prefix") or False, bool):
        raise wrong_type(turn["prefix"], f"{key}.prefix", "true (an answer that somebody else began) or false")
    if calls:
        message["tool_calls"] = _calls(calls, f"{key}.{call_name}")
    _name_thinking(message, thought, key)
    if role == "assistant" and not calls:
        answer(written, text_key)
    extra = next((name for name in ("tool_calls", "reasoning_content") if name in message), None)
    if role != "assistant" and extra:
        raise BadRow("an answer's key in another message", f"{key}.{extra}", f"a message of the role {role} has it",
                     why="only an assistant thinks and calls tools")  # fmt: skip
    return message


def _names(turn: object, key: str) -> tuple[str, str]:
    """The names under which a turn has its role and its content."""
    if not isinstance(turn, dict):
        raise wrong_type(turn, key, "a message", '{"role": "user", "content": "Hello"}')
    names = [pair for pair in (("role", "content"), ("from", "value")) if turn.get(pair[0]) is not None]
    mixed = [name for name in ("role", "from", "content", "value") if turn.get(name) is not None]
    if len(names) != 1 or len(mixed) > 2:
        raise BadRow(
            "no role", f"{key}.role",
            f"the message has all of {', '.join(mixed)}" if names else "the message has no role",
            why=f"its keys are {', '.join(turn)}" if turn else "it is empty",
            hint="a message has role and content, or from and value",
        )  # fmt: skip
    return names[0]


def _role(role: object, key: str) -> str:
    if not isinstance(role, str):
        raise wrong_type(role, key, "the name of a role")
    if role not in _ROLES:
        raise BadRow("unknown role", key, f"`{role}` is not a role", why=f"the roles are {', '.join(_KNOWN)}",
                     hint=nearest(role.lower(), _ROLES))  # fmt: skip
    return _ROLES[role]


def _no_content(turn: dict, role: str, key: str) -> BadRow:
    """The error for a message without content, that of an answer apart: no answer may be empty."""
    name = key.rpartition(".")[2]
    write = f'"{name}": "..."'
    hint = f"{write}; or remove the row" if role == "assistant" else f'{write} (an empty text is "")'
    near = next((one for one in turn if one != name and nearest(one, [name])), None)
    return BadRow("no content", key, "the message has no content", hint=f"rename `{near}`: `{name}`" if near else hint)


def _content(content: object, key: str) -> tuple[str | None, str]:
    """(the text of a content, the thinking among its parts). None if there is no content."""
    if content is None:
        return None, ""
    if not isinstance(content, list):
        return text(content, key), ""
    written, thought = [], []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "thinking", "reasoning"):
            raise BadRow(
                "a part that is not text", f"{key}[{number}]",
                f"a part of the type `{kind}`" if kind else f"it holds {type_of(part)}, not a part with a type",
                why="a part is text, thinking or reasoning", hint='{"type": "text", "text": "..."}',
            )  # fmt: skip
        name = kind if kind in part else "text"
        (written if kind == "text" else thought).append(text(part.get(name), f"{key}[{number}].{name}"))
    return "".join(written), "".join(thought)


def _name_thinking(message: dict, thought: str, key: str) -> None:
    """Keep a message's thinking, which may also be a `thought` among the parts of its content, under one name."""
    given = [(name, message.pop(name)) for name in _THINKING if name in message]
    thoughts = [(name, text(one, f"{key}.{name}")) for name, one in [("content", thought), *given] if one]
    for name, one in thoughts:
        if one != thoughts[0][1]:
            raise BadRow("thinking in two places", f"{key}.{name}", f"it is other than that in `{thoughts[0][0]}`")
        message["reasoning_content"] = one


def _calls(calls: object, key: str) -> list[dict]:
    """Calls of tools, in OpenAI's form or as a bare name and arguments."""
    calls = from_json(calls, key)
    if not isinstance(calls, list | dict):
        raise wrong_type(calls, key, "a list of calls")
    if isinstance(calls, dict):
        return [_call(calls, key)]
    return [_call(call, f"{key}[{number}]") for number, call in enumerate(calls)]


def _call(call: object, key: str) -> dict:
    if not isinstance(call, dict):
        raise wrong_type(call, key, "a call")
    function, place = (call["function"], f"{key}.function") if "function" in call else (call, key)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise BadRow("a tool call without a name", f"{place}.name", "the call names no function",
                     hint='{"type": "function", "function": {"name": "weather", "arguments": {}}}')  # fmt: skip
    arguments = from_json(function.get("arguments") or {}, f"{place}.arguments")
    if not isinstance(arguments, dict):
        raise wrong_type(arguments, f"{place}.arguments", "an object", '{"city": "Bern"}')
    kept = {} if function is call else {name: one for name, one in call.items() if one is not None}
    inner = {**function, "name": name, "arguments": arguments}
    return _json({**kept, "type": "function", "function": inner}, key)


def _json(value, key: str):
    """The value, if JSON can write it."""
    if not _is_shallow(value, _DEEPEST):
        raise BadRow("nested too deeply", key, f"it is nested more than {_DEEPEST} levels deep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _not_utf8(error, key) from error
    except TypeError as error:
        raise BadRow("another type", key, f"JSON cannot write it: {error}", hint="write it as text") from error
    return value


def _is_shallow(value: object, levels: int) -> bool:
    """Whether lists and objects are nested at most so many levels deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_shallow(one, levels - 1) for one in inner)
