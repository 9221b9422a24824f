"""Chat templates: a conversation as the text that a model was trained on, by the Jinja template that came with it.

Templates come from strangers, so they run in Jinja's sandbox, with what real ones use and nothing else:
`raise_exception`, `strftime_now`, `tojson`, `{% generation %}`, `{% break %}` and `{% continue %}`. The rendered text
is equal to that of transformers' `apply_chat_template`. The date is an argument and not the clock's, so that a run
renders a conversation alike on every day. The length of the text, products and powers are bounded, and so is the
processor time of loops and macros: their turns look at the clock of the thread, which neither other threads nor a
sleeping machine move. Threads may share a template.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aurora_train.errors import UserError

Message = Mapping[str, Any]  # "role" and "content", and what else a template reads ("tool_calls", "name")
FILE = "chat_template.jinja"
LONGEST = 1 << 26  # characters of a rendered conversation
SECONDS = 10.0  # of processor time for one text; a conversation of 2,000 messages takes a hundredth of it
_LARGEST = 10_000  # bits of an integer
_LOOK = 64  # turns of loops between two looks at the clock, which is a call of the system's
_FENCE, _CLOCK, _TURN = "\0fence", "\0clock", "\0turn"  # names that no template can write


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
        seconds: the processor time that one text may take.

    Raises UserError for a template that is not valid Jinja, naming its line.
    """

    def __init__(self, source: str, marks: Mapping[str, Any], now: datetime, where: str = FILE, *,
                 seconds: float = SECONDS):  # fmt: skip
        self.source, self.where, self._seconds = source, where, seconds
        self._marks = {name: value for name, value in marks.items() if name.endswith("_token") and value is not None}
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters |= {"tojson": _tojson, _TURN: _turn}
        environment.globals |= {
            "raise_exception": _raise, "strftime_now": now.strftime, "namespace": _Namespace, "dict": _dict,
        }  # fmt: skip
        try:
            tree = environment.parse(source)
            _count_turns(tree)
            self._compiled = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"not a valid template: {error.message}", where=f"{where}:{error.lineno}") from error
        # Whether the template says with `{% generation %}` which part of a conversation the model writes.
        self.marks_answers = environment.extensions[_Generation.identifier].used

    def reads(self, name: str) -> bool:
        """Whether the template reads a variable, such as `tools`."""
        return name in find_undeclared_variables(self._compiled.environment.parse(self.source))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: list | None = None,
               documents: list | None = None, **variables) -> Rendered:  # fmt: skip
        """The text of a conversation. With `add_generation_prompt` it ends where the model's next answer begins.

        Args:
            messages: dicts of plain JSON values; a value of None is left out, as transformers does.
            tools: JSON schemas of functions that the model may call.
            documents: texts to which the model may refer.
            variables: what else a template reads, such as `enable_thinking=False`.

        Raises UserError if a message is not a dict with a role, if the template refuses the conversation
        (`raise_exception`), and if it fails, takes too long or reaches for what the sandbox keeps from it.
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
        values = {**values, _FENCE: fence, _CLOCK: _Clock(self._seconds)}
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
            raise UserError(f"the template fails: {error}", where=where, hint="correct the template") from error

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
        """Refuse a product that would fill the memory or take forever: 'a' * 10**10, or 9 ** 9 ** 9."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and numbers:
            if left.bit_length() + right.bit_length() > _LARGEST:
                raise jinja2.TemplateRuntimeError(f"it multiplies to a number of more than {_LARGEST:,} bits")
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > LONGEST:
                    raise jinja2.TemplateRuntimeError(f"it repeats something {times:,} times")
        elif numbers and left.bit_length() * right > _LARGEST:
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
    """`{% generation %}...{% endgeneration %}`: the text inside, between two copies of a text of the rendering's."""

    tags = {"generation"}
    used = False

    def parse(self, parser):
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        fenced = self.call_method("_fenced", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(fenced, [], [], body).set_lineno(line)

    def _fenced(self, context, caller) -> str:
        return f"{context[_FENCE]}{caller()}{context[_FENCE]}"


def _count_turns(tree: jinja2.nodes.Template) -> None:
    """Let every turn of a loop, and every call of what may call itself, begin with `_turn`.

    Only these repeat anything; Jinja has no other loop.
    """
    nodes = jinja2.nodes

    def counting(line: int) -> jinja2.nodes.Filter:
        return nodes.Filter(nodes.Const(True), _TURN, [], [], None, None, lineno=line)

    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
        node.body.insert(0, nodes.ExprStmt(counting(node.lineno), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:  # an element that it leaves out has no turn
            node.test = nodes.And(counting(node.lineno), node.test, lineno=node.lineno)


class _Clock:
    """The processor time that is left to one text."""

    def __init__(self, seconds: float):
        self._seconds, self._deadline, self._turns = seconds, time.thread_time() + seconds, 0

    def turn(self) -> None:
        self._turns += 1
        if self._turns % _LOOK == 0 and time.thread_time() > self._deadline:
            raise jinja2.TemplateRuntimeError(f"its text takes longer than {self._seconds:g} s of processor time")


@jinja2.pass_context
def _turn(context, value):
    """`value`; raises when the text has taken its time."""
    context[_CLOCK].turn()
    return value


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
