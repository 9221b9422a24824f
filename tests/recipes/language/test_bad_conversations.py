"""Rows of conversations and preferences that cannot be used: each is refused by file, row and key, or counted."""

import datetime
import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from rows_of_chats import GOOD, TOOL, TOOLS, A, S, U, lines, rows_of, said, user

from aurora_train.errors import UserError
from aurora_train.sources.readers import LeftOut
from language import conversations
from language.conversations import Conversation, check, read, read_judged, read_pairs
from language.settings_tune import ConversationDataConfig, MixedConversationsConfig


def bad(row, where, what, hint="", reader=read, **settings):
    return pytest.param(row, where, what, hint, reader, settings, id=f"{where or 'row'}: {what}"[:70])


def turns(*messages) -> dict:
    return {"messages": list(messages)}


NESTED: dict = {}
for _ in range(100):
    NESTED = {"a": NESTED}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD = [  # the second row of a file whose first is good: (row, key, what is wrong, the nearest thing that works)
    bad(b'{"messages": [', "", "cannot be read: not JSON"),
    bad(b'{"messages": "\xff"}', "", "cannot be read: not UTF-8"),
    bad([U, A], "", "the row is a list, not an object", '{"messages"'),
    bad("text", "", "the row is text, not an object"),
    bad({"mesages": [U, A]}, "messages", "no field `messages`", "data.fields.messages=mesages"),
    bad({"dialogue": [U, A]}, "messages", "no field `messages`", "data.fields.messages=dialogue"),
    bad({"messages": None}, "messages", "the field is null"),
    bad({"messages": 5}, "messages", "it holds a number, not a list of messages", '"role": "user"'),
    bad({"messages": "Hello"}, "messages", "text that is not JSON"),
    bad({"messages": []}, "messages", "the list of messages is empty"),
    bad(turns("Hello", A), "messages[0]", "it holds text, not a message"),
    bad(turns(A), "messages[0].role", "the first message is of the role assistant"),
    bad(turns(U, S, A), "messages[1].role", "system follows user"),
    bad(turns(U, U, A), "messages[1].role", "user follows user"),
    bad(turns(U, A, A), "messages[2].role", "assistant follows assistant"),
    bad(turns(U, TOOL, A), "messages[1].role", "tool follows user", "tool_calls"),
    bad(turns(U, A, TOOL, A), "messages[2].role", "tool follows assistant", "tool_calls"),
    bad(turns(U, {"role": "asistant", "content": "a"}), "messages[1].role", "`asistant` is not a role", "`assistant`"),
    bad(turns(U, {"role": "Assistant", "content": "a"}), "messages[1].role", "`Assistant` is not", "`assistant`"),
    bad(turns(U, {"role": 3, "content": "a"}), "messages[1].role", "it holds a number"),
    bad(turns(U, {"rol": "assistant", "content": "a"}), "messages[1].role", "the message has no role", "role and"),
    bad(turns(U | {"from": "human"}, A), "messages[0].role", "the message has all of role, from, content"),
    bad(turns(U, {"from": "gpt", "value": "a", "content": "b"}), "messages[1].role", "all of from, content, value"),
    bad(turns(U, said("")), "messages[1].content", "the answer is empty", "write the answer"),
    bad(turns(U, said(" \n")), "messages[1].content", "the answer is empty"),
    bad(turns(U, {"role": "assistant"}), "messages[1].content", "the message has no content", '"content"'),
    bad(turns(user(None), A), "messages[0].content", "the message has no content", '(an empty text is "")'),
    bad(turns(U, said(None)), "messages[1].content", "the message has no content", "or remove the row"),
    bad(turns({"role": "user", "contents": "a"}, A), "messages[0].content", "no content", "rename `contents`"),
    bad(PAIR, "", "a chosen and a rejected answer, not an answer and its label", "objective.loss=dpo", read_judged),
    bad({"prompt": "a", "completion": "b", "label": True}, "", "an answer and its label, not a chosen", "loss=kto",
        read_pairs),
    bad(GOOD, "", "lists of role and content, not a chosen and a rejected answer", "language/tune", read_pairs),
    bad({"prompt": 5, "completion": "a"}, "prompt", "it holds a number, not text or a list of messages", '"Hello"',
        format="prompt"),
    bad(turns(user({"a": 1}), A), "messages[0].content", "it holds an object, not text"),
    bad(turns(user(7), A), "messages[0].content", "it holds a number, not text"),
    bad(turns(user([{"type": "image", "url": "x"}]), A), "messages[0].content[0]", "a part of the type `image`"),
    bad(turns(user("\ud800"), A), "messages[0].content", "half of a surrogate pair"),
    bad(turns(U, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}),
        "messages[1].tool_calls[0].function.name", "the call names no function", '"name"'),
    bad(turns(U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}),
        "messages[1].tool_calls[0].arguments", "text that is not JSON"),
    bad(turns(U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}),
        "messages[1].tool_calls[0].arguments", "it holds a list, not an object"),
    bad(turns(U | {"thinking": "hm"}, A), "messages[0].reasoning_content", "a message of the role user has it"),
    bad(turns(U, A | {"thinking": "a", "reasoning": "b"}), "messages[1].reasoning", "it is other than"),
    bad(turns(U, A | {"weight": 0}), "messages[1].weight", "the weight is 0"),
    bad(turns(U, A | {"prefix": "false"}), "messages[1].prefix", "it holds text, not true"),
    bad(GOOD | {"tools": {"name": "f"}}, "tools", "it holds an object, not a list of JSON schemas"),
    bad(GOOD | {"tools": [NESTED]}, "tools", "it is nested more than 100 levels"),
    bad(GOOD | {"system": 3}, "system", "it holds a number, not text"),
    bad(turns(S, U, A) | {"system": "Other."}, "messages[0].role", "system follows system"),
    bad({"instruction": "a", "output": "b"}, "instruction", "but the rows are read as `messages`", "data.mix"),
    bad(GOOD | {"text": "a"}, "messages", "the fields of `messages` and of `text`", "data.mix"),
    bad({"instruction": "a", "output": ""}, "output", "the answer is empty", format="alpaca"),
    bad({"instruction": ["a"], "output": "b"}, "instruction", "it holds a list, not text", format="alpaca"),
    bad({"instruction": "a"}, "output", "no field `output`", format="alpaca"),
    bad({"instruction": "a", "response": "b"}, "output", "no field", "data.fields.output=response", format="alpaca"),
    bad({"prompt": "a", "completion": ""}, "completion", "the answer is empty", format="prompt"),
    bad({"prompt": [U], "completion": [A, U]}, "completion[1].role", "an answer has no message of user", "`prompt`",
        format="prompt"),
    bad({"prompt": "a", "completion": "b", "tools": TOOLS}, "tools", "no place for it", format="prompt"),
    bad({"text": 2}, "text", "it holds a number, not text", format="text"),
    bad({"chosen": "a", "rejected": "b"}, "prompt", "the row has no prompt", reader=read_pairs),
    bad(PAIR | {"rejected": "b"}, "rejected", "it is equal to `chosen`", "remove", reader=read_pairs),
    bad(PAIR | {"rejected": " "}, "rejected", "the answer is empty", reader=read_pairs),
    bad({"prompt": "a", "chosen": "b"}, "rejected", "no field `rejected`", reader=read_pairs),
    bad({"chosen": [U, A], "rejected": [user("b"), A]}, "chosen[0]", "do not answer the same prompt",
        reader=read_pairs),
    bad({"prompt": "x", "chosen": [U, A], "rejected": [U, said("b")]}, "chosen[1]", "do not answer the same prompt",
        reader=read_pairs),
    bad({"chosen": [U, A], "rejected": [U, A, U, A]}, "chosen", "nothing follows", reader=read_pairs),
    bad({"chosen": [U, A, U, A], "rejected": [U, said("b"), U, A]}, "chosen[1]", "do not answer the same prompt",
        reader=read_pairs),
    bad({"messages": [U, A, U], "label": True}, "messages[2]", "no answer follows", reader=read_judged),
    bad({"prompt": "a", "label": True}, "", "no fields of a known format", reader=read_judged),
]  # fmt: skip
FIRST = {"alpaca": {"instruction": "a", "output": "b"}, "prompt": {"prompt": "a", "completion": "b"},
         "text": {"text": "a"}}  # fmt: skip


@pytest.mark.parametrize(("row", "where", "what", "hint", "reader", "settings"), BAD)
def test_a_bad_row_is_refused_by_file_row_and_key_or_counted(tmp_path, row, where, what, hint, reader, settings):
    first = FIRST.get(settings.get("format"), {read: GOOD, read_pairs: PAIR}.get(reader, GOOD | {"label": True}))
    source = lines(tmp_path / "in.jsonl", [first, row, first])
    with pytest.raises(UserError) as caught:
        rows_of(source, reader, **settings)
    error = caught.value
    assert error.where == "line 2 of in.jsonl" + (f", {where}" if where else "") and what in error.what
    assert hint in error.hint and "data.damaged=leave_out" in error.hint
    found = rows_of(source, reader, damaged="leave_out", **settings)
    assert [isinstance(row, LeftOut) for row in found] == [False, True, False] and found[1]


@pytest.mark.parametrize("label", ["yes", 2, 1, None, 0.5])
def test_a_label_of_another_type_is_always_refused(tmp_path, label):
    good = {"prompt": "a", "completion": "b", "label": True}
    source = lines(tmp_path / "in.jsonl", [good, good | {"label": label}])
    for damaged in ("refuse", "leave_out"):
        with pytest.raises(UserError, match="the row has no label|the label is") as caught:
            rows_of(source, read_judged, damaged=damaged)
        assert caught.value.where == "line 2 of in.jsonl, label" and "leave_out" not in caught.value.hint
    source = lines(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "b", "liked": True}])
    with pytest.raises(UserError, match="data.fields.label=liked"):
        rows_of(source, read_judged)


def test_a_broken_line_10001_is_found(tmp_path):
    rows = [GOOD] * 10_000 + [b'{"messages": [{"role": "user"'] + [GOOD] * 5
    source = lines(tmp_path / "in.jsonl", rows)
    check(ConversationDataConfig(source=source))
    with pytest.raises(UserError, match="not JSON") as caught:
        rows_of(source)
    assert caught.value.where == "line 10001 of in.jsonl"
    found = rows_of(source, damaged="leave_out")
    assert Counter(str(row) for row in found if isinstance(row, LeftOut)) == {"not JSON": 1} and len(found) == 10_006


def test_rows_without_anything_to_learn_are_left_out_and_a_set_of_them_is_refused(tmp_path):
    nothing = [{"messages": [S]}, {"messages": [S, U]}, {"messages": [U]}]
    found = rows_of(lines(tmp_path / "in.jsonl", [*nothing, GOOD]))
    assert found[:3] == ["no answer to learn"] * 3 and isinstance(found[3], Conversation)
    with pytest.raises(UserError, match="no row of .* can be learned from") as caught:
        rows_of(lines(tmp_path / "in.jsonl", nothing))
    assert caught.value.why == "3 no answer to learn"
    assert rows_of(lines(tmp_path / "in.jsonl", [{"text": " "}, {"text": "a"}]))[0] == "no text"


@pytest.mark.parametrize(("row", "what", "hint"), [
    ({"instruction": "a", "output": "b", "text": "a b"}, "`alpaca`.* and of `text`", "data.format=alpaca"),
    ({"messages": [U, A], "conversations": []}, "`messages`.* and of `sharegpt`", "data.format=messages"),
    (PAIR, "the fields of `pairs`", "language/prefer"),
    ({"prompt": "a", "completion": "b", "label": False}, "the fields of `judged`", "language/prefer"),
    ({"question": "a", "answer": "b"}, "no fields of a known format", "data.fields.instruction=question"),
    ({"a": 1}, "no fields of a known format", "data.fields names the columns"),
])  # fmt: skip
def test_a_format_that_cannot_be_told_is_refused(tmp_path, row, what, hint):
    source = lines(tmp_path / "in.jsonl", [row, row])
    for damaged in ("refuse", "leave_out"):
        with pytest.raises(UserError, match=what) as caught:
            check(ConversationDataConfig(source=source, damaged=damaged))
        assert caught.value.where == "line 1 of in.jsonl" and hint in caught.value.hint
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in.parquet")
    with pytest.raises(UserError, match=what) as caught:
        rows_of(tmp_path / "in.parquet")
    assert caught.value.where == "row 1 of in.parquet" and hint in caught.value.hint


def test_a_file_that_is_not_utf8_is_said_to_be_none(tmp_path):
    (tmp_path / "in.json").write_bytes(json.dumps([turns(user("naïve"), A)], ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="the text is not UTF-8") as caught:
        rows_of(tmp_path / "in.json")
    assert "Latin-1" in caught.value.hint


def test_tables_that_took_text_for_dates_are_refused(tmp_path):
    when = datetime.datetime(2024, 1, 2)
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"when": when}}]}
    for messages, where in [([user(when), said(when)], "[0].content"), ([U, call], "[1].tool_calls[0]")]:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([turns(*messages)]), tmp_path / "in.parquet")
        with pytest.raises(UserError, match="datetime") as caught:
            rows_of(tmp_path / "in.parquet")
        assert caught.value.where == f"row 1 of in.parquet, messages{where}"


def test_text_that_is_not_utf8_in_a_parquet_file_is_one_row(tmp_path):
    good, wrong = (pyarrow.array([t], pyarrow.binary()).view(pyarrow.string()) for t in (b"a", b"\xff"))
    table = pyarrow.table({"text": pyarrow.chunked_array([good, wrong, good])})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(UserError, match="not UTF-8") as caught:
        rows_of(tmp_path / "in.parquet")
    assert caught.value.where == "row 2 of in.parquet"
    assert rows_of(tmp_path / "in.parquet", damaged="leave_out")[1] == "not UTF-8"


@pytest.mark.parametrize(("settings", "where"), [
    ({"source": "missing.jsonl"}, "data.source"), ({}, "data.source"),
    ({"source": "x", "fields": {"mesages": "a"}}, "data.fields"),
    ({"source": "x", "holdout_test": 0.6, "holdout_validation": 0.4}, "data.holdout_test"),
    ({"source": "x", "mix": {"a": MixedConversationsConfig(source="y")}}, "data.source"),
    ({"format": "text", "mix": {"a": MixedConversationsConfig(source="y")}}, "data.source"),
    ({"source": "hub:a/b"}, "data.source"),
])  # fmt: skip
def test_settings_that_cannot_be_right_are_refused(settings, where):
    with pytest.raises(UserError) as caught:
        conversations.sources(ConversationDataConfig(**settings))
    assert caught.value.where == where


def test_other_files_of_a_folder(tmp_path):
    said_, source = [], tmp_path / "in"
    lines(source / "a.jsonl", [GOOD])
    (source / "photo.bin").write_bytes(b"x")
    assert len(rows_of(source, say=said_.append)) == 1 and "photo.bin" in said_[0]
    (source / "a.jsonl").rename(source / "a.doc")
    with pytest.raises(UserError, match="holds no table"):
        rows_of(source)
    (source / "b.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="holds no rows"):
        rows_of(source)
    (source / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-12])
    with pytest.raises(UserError, match="cannot read .*c.jsonl.gz"):
        rows_of(source)
    with pytest.raises(UserError, match="only conversations have a format"):
        rows_of(source, read_pairs, format="messages")
