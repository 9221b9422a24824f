"""Rows of conversations and preferences: every format reads alike from every kind of file."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from rows_of_chats import CALL, CALLS, GOOD, TOOL, TOOLS, A, S, U, lines, one, rows_of, said, user

from aurora_train.errors import UserError
from language import conversations
from language.conversations import Conversation, Judged, Pair, check, read, read_judged, read_pairs
from language.settings_tune import ConversationDataConfig, MixedConversationsConfig

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
