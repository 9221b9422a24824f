"""Rows of conversations and preferences: every format reads alike from every kind of file, and what cannot be used is
refused by file, row and key, or counted."""

import bz2
import datetime
import gzip
import json
import lzma
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from aurora_train.data.readers import LeftOut
from aurora_train.errors import UserError
from language import conversations
from language.conversations import Conversation, Judged, Pair, check, read, read_judged, read_pairs
from language.settings_tune import ConversationDataConfig, MixedConversationsConfig

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


# ---- formats: (row, what is read of it)

CONVERSATIONS = {
    "messages": (GOOD, [U, A]),
    "a system message": ({"messages": [S, U, A]}, [S, U, A]),
    "a trailing user turn": ({"messages": [U, A, U]}, [U, A, U]),
    "a prefix answer": ({"messages": [U, A | {"prefix": True}]}, [U, A | {"prefix": True}]),
    "tools": ({"messages": [U, CALLS, TOOL, A], "tools": TOOLS}, [U, CALLS, TOOL, A]),
    "JSON text": (
        {"messages": json.dumps([U, CALLS, TOOL, A]), "tools": json.dumps(TOOLS)}, [U, CALLS, TOOL, A],
    ),
    "arguments as text": (
        {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}}]}]}, [U, CALLS],
    ),
    "bare and old calls": (
        {"messages": [U, {"role": "assistant", "content": "", "function_call": {"name": "now"}},
                      {"role": "function", "name": "now", "content": "9"}, A]},
        [U, {"role": "assistant", "content": "",
             "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]},
         {"role": "tool", "name": "now", "content": "9"}, A],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                      {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"},
                                                        {"type": "text", "text": "c"}]}]},
        [user("ab"), said("c") | {"reasoning_content": "hm"}],
    ),
    "thinking": ({"messages": [U, A | {"thinking": "hm"}]}, [U, A | {"reasoning_content": "hm"}]),
    "empty thinking": ({"messages": [U, A | {"reasoning_content": ""}]}, [U, A]),
    "nulls": ({"messages": [U | {"name": None}, A | {"tool_calls": None}], "tools": None}, [U, A]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": U["content"]}, {"from": "gpt", "value": A["content"]}],
         "system": S["content"]}, [S, U, A],
    ),
    "sharegpt with tools": (
        {"conversations": [{"from": "human", "value": U["content"]},
                           {"from": "function_call", "value": json.dumps(CALL["function"])},
                           {"from": "observation", "value": "21"}, {"from": "gpt", "value": A["content"]}]},
        [U, CALLS, {"role": "tool", "content": "21"}, A],
    ),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, [user("Add.\n\n1 2"), said("3")]),
    "alpaca without input": ({"instruction": "Add.", "input": "", "output": "3", "system": "Be brief."},
                             [S, user("Add."), said("3")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_format_becomes_the_same_messages(tmp_path, name):
    row, messages = CONVERSATIONS[name]
    found = one(tmp_path, row)
    assert found == Conversation("line 1 of in.jsonl", messages, TOOLS if "tools" in row and row["tools"] else None)
    assert [list(message)[:2] for message in found.messages if "content" in message] == [
        ["role", "content"] for message in messages if "content" in message
    ]


def test_texts_have_parts_and_a_prompt_of_messages_is_context(tmp_path):
    found = one(tmp_path, {"prompt": "1+2=", "completion": "3"})
    assert found.parts == [("1+2=", False), ("3", True)] and found.messages is None
    assert one(tmp_path, {"prompt": "", "completion": "3"}).parts == [("3", True)]
    assert one(tmp_path, {"text": "2024-01-02"}).parts == [("2024-01-02", True)]
    found = one(tmp_path, {"prompt": [S, U, said("a"), user("b")], "completion": [CALLS, TOOL, A]})
    assert found.messages == [S, U, said("a"), user("b"), CALLS, TOOL, A] and found.context == 4
    assert one(tmp_path, {"prompt": [U], "completion": "a"}).messages == [U, said("a")]


@pytest.mark.parametrize("row", [
    {"prompt": U["content"], "chosen": "a", "rejected": "b", "system": S["content"]},
    {"prompt": [S, U], "chosen": [said("a")], "rejected": [said("b")]},
    {"prompt": U["content"], "chosen": [S, U, said("a")], "rejected": [S, U, said("b")]},
    {"chosen": [S, U, said("a")], "rejected": [S, U, said("b")]},
    {"prompt": [S, U], "chosen": "a", "rejected": "b", "messages": [U, A], "score": 1.5},
])  # fmt: skip
def test_every_form_of_a_preference_is_a_pair(tmp_path, row):
    pair = one(tmp_path, row, read_pairs)
    assert pair == Pair("line 1 of in.jsonl", [S, U], [said("a")], [said("b")])
    chosen, rejected = pair.conversations()
    assert chosen == Conversation(pair.place, [S, U, said("a")], None, None, 2) and rejected.messages[2] == said("b")


def test_a_pair_parts_where_its_answers_part(tmp_path):
    row = {"chosen": [U, A, U, CALLS, TOOL, said("a")], "rejected": [U, A, U, CALLS, TOOL, said("b")], "tools": TOOLS}
    assert one(tmp_path, row, read_pairs)[1:] == ([U, A, U, CALLS, TOOL], [said("a")], [said("b")], TOOLS)


@pytest.mark.parametrize("row", [
    {"prompt": [U, A, U], "completion": [CALLS, TOOL, said("a")], "label": False},
    {"messages": [U, A, U, CALLS, TOOL, said("a")], "label": False},
])  # fmt: skip
def test_a_judged_answer_follows_the_last_user(tmp_path, row):
    found = one(tmp_path, row, read_judged)
    assert found == Judged("line 1 of in.jsonl", [U, A, U], [CALLS, TOOL, said("a")], False)
    assert found.conversation().context == 3 and found.messages == found.prompt + found.answer


# ---- files


def test_every_kind_of_file_reads_alike(tmp_path):
    rows = [{"messages": [S, U, CALLS, TOOL, A], "tools": TOOLS}, GOOD | {"tools": None}]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {"a.jsonl": text, "b.json": json.dumps(rows, indent=1).encode(), "c.jsonl.gz": gzip.compress(text),
             "d.jsonl.xz": lzma.compress(text), "e.jsonl.bz2": bz2.compress(text),
             "f.jsonl.zst": pyarrow.compress(text, "zstd", asbytes=True)}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "g.parquet")
    found = rows_of(tmp_path)
    assert len(found) == 14
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first.messages == [S, U, CALLS, TOOL, A] and first.tools == TOOLS
        assert second.messages == [U, A] and second.tools is None
    assert found[13].place == "row 2 of g.parquet" and found[5].place == "line 2 of c.jsonl.gz"


def test_a_table_of_texts_and_renamed_columns(tmp_path):
    (tmp_path / "in.csv").write_text('question,answer,when\n"a, b",c,2024-01-02\n')
    found = rows_of(tmp_path / "in.csv", fields={"instruction": "question", "output": "answer"})
    assert found[0].messages == [user("a, b"), said("c")]


# From JSON lines whose turns differ, `datasets` makes a column of JSON; from Python lists, structs with nulls for
# absent keys.
SETS = {
    "structs": [{"messages": [S, U, CALLS | {"content": None}, TOOL, A], "tools": TOOLS, "id": 1},
                {"messages": [U, A], "tools": None, "id": 2}],
    "JSON": [{"messages": [U, said("2024-01-02"), {"role": "user", "content": [{"type": "text", "text": "b"}]}, A]},
             {"messages": [U, CALLS, TOOL, A]}],
}  # fmt: skip


def dropped(value):
    """The value without the keys that are null."""
    if isinstance(value, list):
        return [dropped(one) for one in value]
    return {k: dropped(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("form", ["to_parquet", "save_to_disk", "splits", "hub"])
def test_folders_of_datasets_hold_what_datasets_reads(tmp_path, monkeypatch, name, form):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # `online` sets both to 0
        monkeypatch.setenv(variable, "1")
    datasets.disable_progress_bars()
    if name == "JSON":
        source = lines(tmp_path / "in.jsonl", SETS[name])
        made = datasets.load_dataset("json", data_files=source, split="train", cache_dir=str(tmp_path / "cache"))
    else:
        made = datasets.Dataset.from_list(SETS[name])
    assert ("Json" in str(made.features["messages"])) == (name == "JSON")
    folder, settings = tmp_path / "made", {}
    if form in ("to_parquet", "hub"):
        made.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        made.select([0]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
        theirs = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        source = f"hub:{folder}" if form == "hub" else folder
        settings = {"online": True} if form == "hub" else {}
    elif form == "splits":
        datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(folder)
        source, theirs = folder, datasets.load_from_disk(folder)["train"]
    else:
        made.save_to_disk(folder)
        (folder / "cache-1234.arrow").write_bytes((folder / "data-00000-of-00001.arrow").read_bytes())
        source, theirs = folder, datasets.load_from_disk(folder)
    found = rows_of(source, **settings)
    wanted = [dropped(dict(row)) for row in theirs]
    assert [row.tools for row in found] == [row.get("tools") for row in wanted]
    assert len(found) == len(theirs) == 2
    for row, other in zip(found, wanted, strict=True):
        texts = [m if isinstance(m.get("content", ""), str) else m | {"content": m["content"][0]["text"]}
                 for m in other["messages"]]  # fmt: skip
        assert row.messages == texts


def test_a_saved_folder_that_lacks_a_shard_is_refused(tmp_path):
    lines(tmp_path / "data-0.arrow", [])
    named = [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": named}))
    with pytest.raises(UserError, match="lacks data-1.arrow"):
        rows_of(tmp_path)


def test_a_mixture_reads_each_source_in_its_own_format(tmp_path):
    parts = {"b": lines(tmp_path / "b" / "x.jsonl", [GOOD] * 3),
             "a": lines(tmp_path / "a" / "x.jsonl", [{"text": "t"}])}  # fmt: skip
    data = ConversationDataConfig(
        mix={name: MixedConversationsConfig(source=path, max_rows=2) for name, path in parts.items()}
    )
    found = {name: list(read(corpus, data)) for name, corpus in conversations.sources(data).items()}
    assert list(found) == ["a", "b"] and [len(rows) for rows in found.values()] == [1, 2]
    assert found["b"][1].place == "line 2 of b/x.jsonl" and found["a"][0].parts == [("t", True)]


def test_what_was_decided_is_said(tmp_path, caplog):
    source = lines(tmp_path / "in.jsonl", [GOOD])
    data = ConversationDataConfig(source=source)
    list(read(conversations.sources(data)[""], data))
    assert f"{source}: the rows are read as `messages`" in caplog.text
    caplog.clear()
    check(data)
    assert not caplog.text


# ---- what cannot be used


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
    bad(turns(user(None), A), "messages[0].content", "the message has no content"),
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
