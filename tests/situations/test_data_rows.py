"""Situations from bug reports of other trainers, as far as they are about data: each row's right answer.

R4 is row 4 of the table of reports, M5 row M5 of what a new user tried. In process: `prepare` is what train, inspect
and evaluate call.
"""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from texts import T, config, document, kept, texts, write_lines

from aurora_train.check.inspection import inspect_batch
from aurora_train.errors import UserError
from language.corpus import check_data, open_corpus
from language.prepare import prepare
from language.rows import TokenSource
from language.settings import MixedSourceConfig, TextDataConfig

# ---- R4: files that are tables by content


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".json", lines), (".json", lambda rows: json.dumps(rows).encode()),
        (".jsonl.gz", lambda rows: gzip.compress(lines(rows))),
    ],
)  # fmt: skip
def test_R4_a_folder_of_tables_gives_a_document_a_row(tmp_path, suffix, write):
    (tmp_path / "in").mkdir()
    for i in range(4):
        rows = [{"text": t, "id": 2**63 + i} for t in T[15 * i : 15 * i + 15]]
        (tmp_path / "in" / f"{'abcd'[i]}{suffix}").write_bytes(write(rows))
    assert texts(tmp_path / "in", tmp_path / "cache") == set(T)


def test_R4_compressed_text_is_text(tmp_path):
    (tmp_path / "in").mkdir()
    for i, t in enumerate(T):
        (tmp_path / "in" / f"{i}.txt.gz").write_bytes(gzip.compress(t.encode()))
    assert texts(tmp_path / "in", tmp_path / "cache") == set(T)


# ---- R5: links


def test_R5_a_linked_folder_is_read_once_and_without_loops(tmp_path, caplog):
    links, real = tmp_path / "links", tmp_path / "real" / "sub"
    links.mkdir(), real.mkdir(parents=True)
    for i, t in enumerate(T):
        ((links if i < 3 else real) / f"d{i:02}.txt").write_text(t)
    for name, target in {"more": real, "again": real.parent, "up": links, "away": tmp_path / "gone"}.items():
        os.symlink(os.path.relpath(target, links), links / name)
    os.symlink("itself", links / "itself")
    store = prepare(config(links), tmp_path / "cache")
    assert set(kept(store).values()) == set(T) and not store.manifest["skipped"]
    assert "away" in caplog.text and "itself" in caplog.text
    by_glob = prepare(config(f"{links}/**/*.txt"), tmp_path / "cache")
    assert kept(by_glob).keys() == kept(store).keys() and not by_glob.manifest["skipped"]


# ---- R6, R21, R26: only the text counts, and it is text


def test_R6_columns_whose_type_changes_do_not_matter(tmp_path):
    rows = [{"text": "lorem ipsum " * 2000, "n": 1, "i": i} for i in range(450)]  # past a reader's first block
    rows += [{"text": t, "n": 1.5} for t in T]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert path.stat().st_size > 10 << 20
    assert len(texts(path, tmp_path / "cache")) == 61


OTHERS = [1, "1", None, 1.5, float("nan"), [1], {"a": {"b": 1}}, 2**63 + 1, -(10**40), True, [], {}]


def test_R26_types_that_differ_between_rows_do_not_matter(tmp_path):
    rows = [{"text": t, "other": OTHERS[i % 12], **({"late": i} if i > 40 else {})} for i, t in enumerate(T)]
    assert texts(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "cache") == set(T)


LOOKS = {
    "dates": [f"2021-01-{i % 28 + 1:02} 10:{i:02}:00" for i in range(60)],
    "numbers": [str(2**63 + i) for i in range(60)],
    "zeros": [f"00{i}" for i in range(60)],
    "words": ["true", "false", "null", "NaN", "None", "inf", *T[:20]],
    "json": [json.dumps({"text": i}) for i in range(60)],
}


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_R21_text_is_text_whatever_it_looks_like(tmp_path, looks, suffix):
    rows, path = LOOKS[looks], tmp_path / f"a.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps([{"text": t} for t in rows]))
    elif suffix == "jsonl":
        write_lines(path, [{"text": t} for t in rows])
    else:
        mark = "," if suffix == "csv" else "\t"
        quoted = ['"' + t.replace('"', '""') + '"' if mark in t or '"' in t else t for t in rows]
        path.write_text("".join(f"{n}{mark}{t}\n" for n, t in [("id", "text"), *enumerate(quoted)]))
    assert texts(path, tmp_path / "cache") == set(rows)


# ---- R11, R16, R22: what is left out


def test_R11_an_empty_shard_has_no_documents(tmp_path):
    write_lines(tmp_path / "in" / "a.jsonl", [{"text": t} for t in T])
    for name in ("b.jsonl", "c.json", "d.csv", "e.parquet", "f.arrow", "g.tsv"):
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "in" / "h.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "in" / "i.csv").write_text("id,text\n")
    (tmp_path / "in" / "j.json").write_text("[]")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "in" / "k.parquet")
    assert texts(tmp_path / "in", tmp_path / "cache") == set(T)


def test_R11_nothing_but_empty_shards_is_one_message(tmp_path):
    for name in ("a.jsonl", "b.parquet", "c.json"):
        write_lines(tmp_path / "in" / name, [])
    with pytest.raises(UserError, match="holds no text"):
        prepare(config(tmp_path / "in"), tmp_path / "cache")


def test_R16_what_is_left_out_is_said_each_time_and_by_inspect(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    for i, t in enumerate(T[:50]):
        (tmp_path / "in" / f"{'l' if i < 20 else 'u'}{i}.txt").write_bytes(t.encode() + (b"\xe9" if i < 20 else b""))
    for _ in ("prepared", "opened"):
        caplog.clear()
        store = prepare(config(tmp_path / "in"), tmp_path / "cache")
        assert "20 of 50 documents left out: not UTF-8 (l0.txt, l1.txt, l10.txt, ...)" in caplog.messages
    facts = inspect_batch(TokenSource(store, "train", 32), "train", 0, 2, 0, 0)
    assert facts["left_out"]["not UTF-8"]["count"] == 20


def test_R16_repeats_are_said_beside_other_reasons(tmp_path, caplog):
    write_lines(tmp_path / "a.jsonl", [{"text": T[min(i, 30)]} for i in range(60)] + [{"text": ""}])
    prepare(config(tmp_path / "a.jsonl"), tmp_path / "cache")
    (said,) = [message for message in caplog.messages if "left out" in message]
    assert said.startswith("30 of 61 documents left out: 29 repeats another document (a.jsonl#31, ")
    assert said.endswith("; 1 empty (a.jsonl#60)")


BAD_ROWS = {
    "a lone surrogate": ('{"text": "half \\ud83d of it"}\n', "not UTF-8"),
    "a line cut short": ('{"text": "cut sh\n', "not JSON"),
    "no JSON": ("nothing at all\n", "not JSON"),
    "no such field": ('{"texts": "x"}\n', "no field `text`"),
    "a number": ('{"text": 5}\n', "`text` holds a number, not text"),
    "a list": ('{"text": ["x"]}\n', "`text` holds list, not text"),
    "null": ('{"text": null}\n', "empty"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("place", [0, 30, 60])
def test_R22_a_bad_row_is_left_out_alone(tmp_path, bad, place):
    row, reason = BAD_ROWS[bad]
    rows = [{"text": t} for t in T]
    store = prepare(config(write_lines(tmp_path / "a.jsonl", [*rows[:place], row, *rows[place:]])), tmp_path / "cache")
    assert set(kept(store).values()) == set(T)
    assert store.manifest["skipped"] == {reason: {"count": 1, "names": [f"a.jsonl#{place}"]}}


def test_R22_bytes_that_are_not_utf8_cost_one_row_of_any_table(tmp_path):
    bad = pyarrow.array([b"ab", b"\xff\xfe"]).cast("binary").view("string")
    (tmp_path / "in").mkdir()
    write_table = pyarrow.parquet.write_table
    write_table(pyarrow.table({"text": pyarrow.chunked_array([T[:20], bad])}), tmp_path / "in" / "a.parquet")
    rows = lines({"text": t} for t in T[20:40])
    (tmp_path / "in" / "b.jsonl").write_bytes(rows + b'{"text": "caf\xe9"}\n')
    (tmp_path / "in" / "c.csv").write_bytes(b"text\ncaf\xe9\n" + "\n".join(T[40:]).encode())
    store = prepare(config(tmp_path / "in"), tmp_path / "cache")
    assert set(kept(store).values()) == {*T, "ab"}
    assert store.manifest["skipped"]["not UTF-8"]["names"] == ["a.parquet#21", "b.jsonl#20", "c.csv#0"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('7,"never closes\n', "not CSV"), ('7,"he said "so",\n', "not CSV"),
        ("7,too,many\n", "other fields than the header's"),
    ],
)  # fmt: skip
def test_R22_a_bad_row_of_a_csv_is_left_out_alone(tmp_path, bad, reason):
    rows = [f'{i},"{t}"\n' for i, t in enumerate(T)]
    path = write_lines(tmp_path / "a.csv", ["id,text\n", *rows[:30], bad, *rows[30:]])
    store = prepare(config(path), tmp_path / "cache")
    assert set(kept(store).values()) == set(T)
    assert store.manifest["skipped"] == {reason: {"count": 1, "names": ["a.csv#30"]}}


# ---- R25, R27, R28: right before, and still


def test_R25_a_huge_record_is_one_document(tmp_path):
    rows = [{"text": "x" * (9 << 20)}, *({"text": t} for t in T)]
    for path, content in ((tmp_path / "a.jsonl", lines(rows)), (tmp_path / "b.json", json.dumps(rows).encode())):
        path.write_bytes(content)
        assert [data.decode() for _, data in open_corpus(config(path)).documents()] == [row["text"] for row in rows]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_R27_every_arrow_type_of_text_is_read(tmp_path, kind):
    column = pyarrow.array([*T, None])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", pyarrow.schema({"text": column.type})) as writer:
        writer.write_table(pyarrow.table({"text": column}))
    assert texts(tmp_path / "a.arrow", tmp_path / "cache") == set(T)


def test_R27_lists_and_columns_of_nothing_are_one_message(tmp_path):
    columns = {"a": (pyarrow.array([["x"]]), "holds list, not text"), "b": (pyarrow.nulls(3), "holds no text")}
    for name, (column, message) in columns.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=message):
            prepare(config(tmp_path / f"{name}.parquet"), tmp_path / "cache")


def test_R28_blank_lines_crlf_bom_and_no_last_newline(tmp_path):
    written = "\ufeff" + "\r\n\r\n  \r\n".join(json.dumps({"text": t}) for t in T)
    path = tmp_path / os.fsdecode(b"na\xefve.jsonl")
    path.write_bytes(written.encode())
    store = prepare(config(tmp_path), tmp_path.with_name("cache28"))
    assert set(kept(store).values()) == set(T) and not store.manifest["skipped"]


# ---- R10: too few documents


def test_R10_the_end_of_one_file_is_held_out_by_default(tmp_path, caplog):
    whole = "".join(f"{document(i, 12)}\n" for i in range(400))
    (tmp_path / "one.txt").write_text(whole)
    settings = TextDataConfig(source=str(tmp_path / "one.txt"), sequence=32)
    store = prepare(settings, tmp_path / "cache")
    parts = [store.text(split, 0).decode() for split in ("train", "validation", "test")]
    assert "".join(parts) == whole and all(part.endswith("\n") for part in parts)
    assert [round(100 * len(part) / len(whole)) for part in parts] == [97, 1, 2]
    assert store.held_out == "ends of documents held out"
    for _ in ("made", "opened"):
        (said,) = [message for message in caplog.messages if "too few to hold whole ones out" in message]
        assert "2 % for test" in said and "1 % for validation" in said
        caplog.clear()
        prepare(settings, tmp_path / "cache")


LONG = {"no blanks": "\u4e2d\u6587" * 3000, "one word": "x" * 5000, "a blank end": "a b " * 1000 + "\n" * 500}


@pytest.mark.parametrize("long", LONG)
def test_R10_a_file_without_lines_is_cut_between_characters(tmp_path, long):
    words = LONG[long]
    (tmp_path / "one.txt").write_text(words, encoding="utf-8")
    store = prepare(config(tmp_path / "one.txt"), tmp_path / "cache")
    parts = [store.text(split, 0).decode() for split in ("train", "validation", "test")]
    assert "".join(parts) == words and all(part.strip() for part in parts)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("make", ["files", "rows", "mixture"])
def test_R10_few_documents_fill_every_split(tmp_path, number, make):
    (tmp_path / "in").mkdir()
    longer = [document(i, 600) for i in range(number)]
    if make == "rows":
        write_lines(tmp_path / "in" / "a.jsonl", [{"text": t} for t in longer])
    for i, t in enumerate(longer if make != "rows" else []):
        (tmp_path / "in" / f"{i}.txt").write_text(t)
    settings = config(tmp_path / "in")
    if make == "mixture":
        settings = config("python-stdlib", mix={"some": MixedSourceConfig(source=str(tmp_path / "in"))})
    store = prepare(settings, tmp_path / "cache")
    assert all(len(TokenSource(store, split, 32)) for split in ("train", "validation", "test"))
    assert sum(len(t) for t in kept(store).values()) == sum(map(len, longer))


def test_R10_too_little_to_cut_is_one_message_whose_hint_leads_out(tmp_path):
    (tmp_path / "one.txt").write_text("hardly anything to read\n")
    with pytest.raises(UserError, match="too few to hold any out") as caught:
        prepare(config(tmp_path / "one.txt"), tmp_path / "cache")
    keys = dict(key.split("=") for key in caught.value.hint.split() if "=" in key)
    assert keys.pop("evaluate.final") == "false"
    settings = {key.removeprefix("data."): float(value) for key, value in keys.items()}
    store = prepare(config(tmp_path / "one.txt", **settings), tmp_path / "cache")
    assert TokenSource(store, "train", 8).num_targets == 24 + 1


# ---- M12: chat data


@pytest.mark.parametrize("field", ["text", "messages"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_M12_chat_data_is_refused_with_a_way_out(tmp_path, field, suffix):
    rows = [{"messages": [{"role": "user", "content": t}]} for t in T]
    path = tmp_path / f"chat.{suffix}"
    if suffix == "jsonl":
        write_lines(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    message = "holds list, not text" if field == "messages" else "has no field `text`"
    with pytest.raises(UserError, match=message) as caught:
        check_data(config(path, text_field=field))
    assert caught.value.where == "data.text_field"
    assert "recipe: language/tune" in caught.value.hint
