"""Messages and files of rows for the tests of conversations, and what is read of them."""

from __future__ import annotations

import json

from language import conversations
from language.conversations import read
from language.settings_tune import ConversationDataConfig

U, A = {"role": "user", "content": "Weather on 2024-01-02?"}, {"role": "assistant", "content": "It is 21 °C."}
S = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "when": "2024-01-02"}}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "21", "name": "weather"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
GOOD = {"messages": [U, A]}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def lines(path, rows) -> str:
    """A file of these rows, each a JSON value or the bytes of a line; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)


def rows_of(source, reader=read, say=lambda _: None, **settings) -> list:
    data = ConversationDataConfig(source=str(source), **settings)
    (corpus,) = conversations.sources(data, say=say).values()
    return list(reader(corpus, data, say=say))


def one(tmp_path, row, reader=read, **settings):
    (found,) = rows_of(lines(tmp_path / "in.jsonl", [row]), reader, **settings)
    return found
