"""Chat templates: a conversation as the text that a model was trained on, by the Jinja template that came with it.

Templates come from strangers, so they run in Jinja's sandbox, with what real ones use and nothing else:
`raise_exception`, `strftime_now`, `tojson`, `{% generation %}`, `{% break %}` and `{% continue %}`. The rendered text
is equal to that of transformers' `apply_chat_template`. The date is an argument and not the clock's, so that a run
renders a conversation alike on every day. The length of the text, products and powers are bounded; the time that loops
take is not.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aurora_train.errors import UserError

Message = Mapping[str, Any]  # "role" and "content", and what else a template reads ("tool_calls", "name")
FILE = "chat_template.jinja"
LONGEST = 1 << 26  # characters of a rendered conversation
_LARGEST_POWER = 10_000  # bits of an integer


class Rendered(NamedTuple):
    """`text`, and `answers`: the character ranges [start, end) within `{% generation %}`, in order."""

    text: str
    answers: list[tuple[int, int]]


class ChatTemplate:
    """A compiled template.

    Args:
        source: the Jinja text.
        marks: `bos_token`, `eos_token` and others, by the names of tokenizer_config.json.
        now: what `strftime_now` tells: the date on which the run began.
        where: names the template in messages.

    Raises UserError for a template that is not valid Jinja, naming its line.
    """

    def __init__(self, source: str, marks: Mapping[str, Any], now: datetime, where: str = FILE):
        self.source, self.where = source, where
        self._marks = {name: value for name, value in marks.items() if name.endswith("_token") and value is not None}
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise, "strftime_now": now.strftime, "namespace": _Namespace, "dict": _dict,
        }  # fmt: skip
        self._fence = environment.extensions[_Generation.identifier]
        try:
            self._compiled = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"not a valid template: {error.message}", where=f"{where}:{error.lineno}") from error

    @property
    def marks_answers(self) -> bool:
        """Whether the template says with `{% generation %}` which part of a conversation the model writes."""
        return self._fence.used

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list | None = None,
               documents: list | None = None, **variables) -> Rendered:  # fmt: skip
        """The text of a conversation. With `add_generation_prompt` it ends where the model's next answer begins.

        Args:
            messages: dicts of plain JSON values; a value of None is left out, as transformers does.
            tools: JSON schemas of functions that the model may call.
            documents: texts to which the model may refer.
            variables: what else a template reads, such as `enable_thinking=False`.

        Raises UserError if a message is not a dict with a role, if the template refuses the conversation
        (`raise_exception`), and if it fails or reaches for what the sandbox keeps from it.
        """
        values = {
            **self._marks, "messages": [_plain(message, number) for number, message in enumerate(messages)],
            "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt, **variables,
        }  # fmt: skip
        text = self._rendered(values, "")
        if not self.marks_answers:
            return Rendered(text, [])
        fence = f"\ue000{secrets.token_hex(8)}\ue001"
        pieces = self._rendered(values, fence).split(fence)
        if len(pieces) % 2 == 0 or "".join(pieces) != text:
            raise UserError(
                "cannot tell which part of the text the model writes", where=self.where,
                why="the template changes text after its {% generation %} block", hint="write such text as it is there",
            )  # fmt: skip
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece))
        return Rendered(text, [(ends[n], ends[n + 1]) for n in range(1, len(pieces), 2)])

    def _rendered(self, values: dict, fence: str) -> str:
        self._fence.text = fence
        try:
            return self._bounded(self._compiled.generate(**values))
        except _Refused as refused:
            raise UserError(f"the template refuses this conversation: {refused}", where=self.where) from refused
        except jinja2.exceptions.SecurityError as error:
            why = "a template may not read attributes that begin with an underscore, nor change what it is given"
            raise UserError(f"the template is not safe: {error}", where=self.where, why=why) from error
        except Exception as error:  # a template is code of a stranger and may fail in any way
            line = _line_of(error)
            where = f"{self.where}:{line}" if line else self.where
            raise UserError(f"the template fails: {error}", where=where) from error

    def _bounded(self, pieces: Iterable[str]) -> str:
        """The pieces of a rendered text as one."""
        kept, length = [], 0
        for piece in pieces:
            kept.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise jinja2.TemplateRuntimeError(f"its text is longer than {LONGEST:,} characters")
        return "".join(kept)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator, left, right):
        """Refuse a product that would fill the memory: 'a' * 10**10, or 9 ** 9 ** 9."""
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > LONGEST:
                    raise jinja2.TemplateRuntimeError(f"it repeats something {times:,} times")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _LARGEST_POWER:
            raise jinja2.TemplateRuntimeError(f"it raises a number to the power {right:,}")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj, attribute):
        """Raise at once; Jinja's own would show as an empty text wherever it is only printed."""
        raise jinja2.exceptions.SecurityError(f"it reads {attribute!r} of a {type(obj).__name__}")


class _Refused(jinja2.TemplateError):
    """A template's own `raise_exception`."""


def _raise(message):
    raise _Refused(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is; Jinja's own filter escapes what HTML would read as markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args, **kwargs) -> dict:
    return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args, **kwargs):
        self, *args = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the name {name!r} in a namespace")
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the text inside, between two copies of `text`."""

    tags = {"generation"}
    text, used = "", False

    def parse(self, parser):
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_fenced"), [], [], body).set_lineno(line)

    def _fenced(self, caller) -> str:
        return f"{self.text}{caller()}{self.text}"


def _plain(message: Message, number: int) -> dict:
    """A message as the template sees it."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError("a message is a dict with a role and a content", where=f"messages[{number}]",
                        hint='{"role": "user", "content": "Hello"}')  # fmt: skip
    return {name: value for name, value in message.items() if value is not None}


def _line_of(error: Exception) -> int | None:
    """The line of the template in which an error was raised, as Jinja rewrites tracebacks."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    return line
