"""A Modelfile, by which Ollama runs a GGUF file: `ollama create NAME -f Modelfile`.

Ollama has its own template language. A chat template that puts the same marks around every message of a role, which
most do, is written in it; that this renders alike is tested on conversations before it is written. For any other, the
Modelfile says so, and Ollama falls back on what it recognises in the GGUF file.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import NamedTuple

from aurora_train.errors import UserError
from aurora_train.interop.gguf.vocabulary import begins_by_itself
from aurora_train.interop.source import OpenModel
from aurora_train.interop.templates import ChatTemplate

_ROLES = ("system", "user", "assistant")


class Marks(NamedTuple):
    """What a template writes around each message. `default`: the system prompt that it adds to a conversation without
    one, or None."""

    before: dict[str, str]
    after: dict[str, str]
    default: str | None

    def render(self, messages: list[dict]) -> str:
        """A conversation up to where the next answer begins, as Ollama renders it under these marks."""
        if self.default is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        said = [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return "".join(said) + self.before["assistant"]


def modelfile(source: OpenModel, file: str) -> str:
    """The content of a Modelfile for a model written to `file`, which lies beside it."""
    lines = [f"FROM ./{file}"]
    marks = marks_of(source)
    if marks is not None:
        content = "{{ .Content }}"
        turns = [f'if eq .Role "{role}" }}}}{marks.before[role]}{content}{marks.after[role]}' for role in _ROLES]
        whole = "{{ range .Messages }}{{ " + "{{ else ".join(turns) + "{{ end }}{{ end }}" + marks.before["assistant"]
        lines.append(f'TEMPLATE """{whole}"""')
        if marks.default is not None:
            lines.append(f'SYSTEM """{marks.default}"""')
    elif source.chat_template is not None:
        lines.append("# Ollama's language cannot express the chat template; Ollama looks for one in the GGUF file.")
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in _ends(source)]
    return "\n".join(lines) + "\n"


def _ends(source: OpenModel) -> list[str]:
    """The texts of the tokens that end an answer."""
    import tokenizers

    if source.tokenizer is None:
        return []
    backend = tokenizers.Tokenizer.from_str(source.tokenizer)
    return [text for text in map(backend.id_to_token, source.eos_ids) if text]


def marks_of(source: OpenModel) -> Marks | None:
    """The marks around the messages of a conversation; None if there is no template of that kind."""
    if source.chat_template is None:
        return None
    named = {name: value.get("content") if isinstance(value, dict) else value
             for name, value in source.tokenizer_config.items()}  # fmt: skip
    template, later = (ChatTemplate(source.chat_template, named, datetime(2026, 1, day)) for day in (1, 2))

    begin = named.get("bos_token") or "" if begins_by_itself(source) else ""  # which Ollama writes itself

    def rendered(messages: list[dict], *, answer: bool = False) -> str:
        text = template.render(messages, add_generation_prompt=answer).text
        return text.removeprefix(begin)

    try:
        marks = _marks(rendered)
        if marks is None or '"""' in str(marks) or "{{" in str(marks):
            return None
        alike = all(marks.render(messages) == rendered(messages, answer=True) for messages in _CONVERSATIONS)
        alike &= later.render(_CONVERSATIONS[0]).text == template.render(_CONVERSATIONS[0]).text  # it tells no date
    except UserError:  # the template refuses such a conversation
        return None
    return marks if alike else None


def _marks(rendered) -> Marks | None:
    """What each message of a growing conversation adds to its text, cut at the content of the message."""
    before, after, text, messages = {}, {}, "", []
    for role in _ROLES:
        messages.append({"role": role, "content": _CONTENT})
        longer = rendered(messages)
        added = longer.removeprefix(text).split(_CONTENT)
        if not longer.startswith(text) or len(added) != 2:
            return None
        before[role], after[role] = added
        text = longer
    alone, user = rendered(messages[1:2]), before["user"] + _CONTENT + after["user"]
    if alone == user:
        return Marks(before, after, None)
    default = alone.removesuffix(user).removeprefix(before["system"]).removesuffix(after["system"])
    return Marks(before, after, default)


def _conversation(*roles: str) -> list[dict]:
    return [{"role": role, "content": f"{_CONTENT} {number}."} for number, role in enumerate(roles)]


_CONTENT = "Some words"
_CONVERSATIONS = (
    _conversation("user"), _conversation("system", "user"), _conversation("user", "assistant", "user"),
    _conversation("system", "user", "assistant", "user", "assistant", "user"),
)  # fmt: skip
