"""Tables of every kind, compressed or not, give the rows that were written; what is none is refused by name."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from corpora import config, text, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.errors import UserError
from aurora_train.sources import readers
from language.corpus import check_data, open_corpus
from language.prepare import prepare

TEXTS = [
    "plain", "two\nlines\r\n", 'a "quote", a comma;\tand a tab', "", " \u00e9\u4e2d\U0001f642 ", "2021-01-02", "17",
    "true",
]  # fmt: skip


def lines(texts) -> bytes:
    records = ({"id": 2**63 + i, "text": t, "more": [i, {}][i % 2]} for i, t in enumerate(texts))
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def array(texts, indent=None) -> bytes:
    return json.dumps([{"text": t, "id": 2**63 + i} for i, t in enumerate(texts)], indent=indent).encode()


def delimited(texts, mark) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=mark).writerows([["id", "text"], *([2**63 + i, t] for i, t in enumerate(texts))])
    return file.getvalue().encode()


def columnar(texts, write) -> bytes:
    file = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": [2**62] * len(texts), "text": pyarrow.array(texts, "string")})
    write(table, file)
    return file.getvalue().to_pybytes()


def ipc(make):
    def write(table, file):
        with make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)

    return write


KINDS = {
    "lines": (".jsonl", lines), "NDJSON": (".NDJSON", lines), "lines in .json": (".json", lines),
    "array": (".Json", array), "array in .jsonl": (".jsonl", array),
    "indented": (".json", lambda t: array(t, indent=2)),
    "objects over lines": (
        ".jsonl", lambda t: b"\n".join(json.dumps({"text": one}, indent=1).encode() for one in t)
    ),
    "csv": (".csv", lambda t: delimited(t, ",")),
    "semicolons": (".CSV", lambda t: b"\xef\xbb\xbf" + delimited(t, ";")),
    "tsv": (".tsv", lambda t: delimited(t, "\t")),
    "parquet": (".parquet", lambda t: columnar(t, pyarrow.parquet.write_table)),
    "arrow file": (".arrow", lambda t: columnar(t, ipc(pyarrow.ipc.new_file))),
    "arrow stream": (".arrow", lambda t: columnar(t, ipc(pyarrow.ipc.new_stream))),
    "feather": (".feather", lambda t: columnar(t, pyarrow.feather.write_feather)),
}  # fmt: skip


def zstd(content: bytes) -> bytes:
    frames = []
    for part in (content[:10], content[10:]):  # as parallel compressors write them
        file = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(file, "zstd") as stream:
            stream.write(part)
        frames.append(file.getvalue().to_pybytes())
    return b"".join(frames)


PACKED = {
    "": bytes, ".gz": lambda c: gzip.compress(c[:10]) + gzip.compress(c[10:]), ".zst": zstd, ".xz": lzma.compress,
    ".bz2": bz2.compress,
}  # fmt: skip


def rows(source, **settings) -> list:
    return [data for _, data in open_corpus(config(source, **settings)).documents()]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_R4_every_kind_of_table_gives_the_rows_that_were_written(tmp_path, kind, packed):
    suffix, write = KINDS[kind]
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACKED[packed](write(TEXTS)))
    check_data(config(path))
    found = list(open_corpus(config(path)).documents())
    assert found == [(f"{path.name}#{i}", t.encode()) for i, t in enumerate(TEXTS)]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
OTHERS = st.recursive(SCALARS, st.lists, max_leaves=4)
ROWS = st.lists(st.tuples(st.text(max_size=20), st.dictionaries(st.sampled_from(["a", "b"]), OTHERS)), max_size=12)


@settings(max_examples=20, deadline=None)
@given(written=ROWS, block=st.integers(1, 40), indent=st.sampled_from([None, 1]))
def test_any_texts_come_back_whatever_the_other_columns_hold(tmp_path_factory, written, block, indent):
    folder, texts = tmp_path_factory.mktemp("any"), [t for t, _ in written]
    records = [{"text": t, **others} for t, others in written]
    lines = [json.dumps(record, ensure_ascii=bool(indent)) for record in records]
    (folder / "a.jsonl").write_bytes("\n".join(lines).encode())
    (folder / "a.json").write_bytes(json.dumps(records, indent=indent).encode())
    for mark, name in ((",", "a.csv"), ("\t", "a.tsv")):
        (folder / name).write_bytes(delimited(texts, mark))
    usual, readers._BLOCK = readers._BLOCK, block  # so that values lie across blocks
    try:
        for path in folder.iterdir():
            kind = path.suffix[1:].removesuffix("l")
            found = list(readers.rows(path, kind, ("text",)))
            assert [cell for _, (cell,) in found] == [t.encode() for t in texts], path
    finally:
        readers._BLOCK = usual


LINES = {
    "a.csv": ('\n\nid,text\n1,"a\nb"\n\n2,c\n5\n3,"never closes\n4,d\n', [4, 7, 8, 9, 10]),
    "a.jsonl": ('\ufeff\n{"text": "a"}\r\n\n{"text": "b"} {"text": "c"}\nnothing\n', [2, 4, 4, 5]),
    "a.json": ('\n\n[\n{"text": "a"},\n\n {\n"text": "b\\n"}, {"text": "c"}\n,3]', [4, 6, 7, 8]),
    "b.json": ('{\n"text": "a"}\n{"text":\n"b"}', [1, 3]),
}  # fmt: skip


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("name", LINES)
def test_a_row_is_named_by_the_line_where_it_begins(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(readers, "_BLOCK", block)
    content, numbers = LINES[name]
    (tmp_path / name).write_text(content, newline="", encoding="utf-8")
    kind = name[2:].removesuffix("l")
    assert [line for line, _ in readers.rows(tmp_path / name, kind, ("text",))] == numbers


def test_several_columns_are_read_at_once_in_the_order_asked_for(tmp_path):
    table = {"a": ["1", "2"], "b": [1, 2], "c": ["x", None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("c;b;a\nx;1;1\n;2;2\n")
    for kind in ("parquet", "csv"):
        cells = [cells for _, cells in readers.rows(tmp_path / f"t.{kind}", kind, ("c", "d", "a"))]
        assert [(one[0], one[2]) for one in cells] == [(b"x", b"1"), (b"", b"2")]
        assert all(sorted(one[1].fields) == ["a", "b", "c"] and {"a", "c"} <= {*one[1].texts} for one in cells)


def test_what_was_read_right_before_is_the_same_store(tmp_path):
    """Fingerprints of the version before there were other kinds of table: runs on such data go on."""
    folder = write_folder(tmp_path / "text", 12)
    (folder / "data.json").write_text('{"a": 1}\n')
    (folder / "image.bin").write_bytes(b"\xff\xd8")
    (tmp_path / "rows").mkdir()
    written = [json.dumps({"n": i, "text": text(i, 4) if i != 3 else None}) for i in range(20)]
    (tmp_path / "rows" / "a.jsonl").write_text("\ufeff" + "\r\n".join([*written, "", '{"n": 1}']), encoding="utf-8")
    (tmp_path / "rows" / "info.json").write_text('{"features": []}')
    made = {name: prepare(config(tmp_path / name), tmp_path / "cache").fingerprint for name in ("text", "rows")}
    assert made == {
        "text": "54a5ae725e2bd1785688376c3398eb4ec67e65f0958380f9f48c83aaf12d3799",
        "rows": "d617ad30d06c2ea7194db39cce36255ea394fc1c61592b68f43a3fb72e48ad64",
    }


def test_a_store_of_files_once_read_as_text_is_not_taken_for_one_of_their_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([text(i) for i in range(9)]))
    assert open_corpus(config(path)).newly_read() == []
    for name in ("a.JSONL", "a.json", "a.jsonl.gz", "a.csv"):
        path = path.rename(tmp_path / name)
        path.write_bytes(b"text\n1\n" if name.endswith("csv") else lines(["1"]))
        assert open_corpus(config(path)).newly_read() == [os.path.splitext(name)[1]]


def test_bytes_of_a_csv_cell_that_are_not_utf8_pass_unchanged(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\ncaf\xe9\n")
    assert [cells for _, cells in readers.rows(tmp_path / "a.csv", "csv", ("text",))] == [(b"caf\xe9",)]


def test_code_beside_json_and_csv_without_the_column_stays_text(tmp_path, caplog):
    folder = write_folder(tmp_path / "code", 6)
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / "broken.json").write_text("// a comment\n{}")
    (folder / "numbers.csv").write_text("a,b\n1,2\n")
    found = [name for name, _ in open_corpus(config(folder)).documents()]
    assert len(found) == 9 and {"package.json", "broken.json", "numbers.csv"} < set(found)
    assert "3 files without a field `text` are read as plain text" in caplog.text


def test_a_table_beside_texts_and_what_describes_it_is_read_alone(tmp_path, caplog):
    (tmp_path / "train.json").write_bytes(array(["one", "two"]))
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "README.md").write_text("about")
    assert rows(tmp_path) == [b"one", b"two"]
    assert "2 other files are not read (data.pattern chooses): README.md, dataset_info.json" in caplog.text


def test_one_object_is_one_row(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.json").write_text(json.dumps({"id": i, "text": f"text {i}"}, indent=i or None))
    assert rows(tmp_path) == [b"text 0", b"text 1", b"text 2"]


CUT = {
    "a.json": (array(TEXTS)[:-30], "not JSON, or cut short"),
    "b.json": (b'[{"text": "a"} {"text": "b"}, nothing]' + b" " * 20, "cannot read"),
    "c.json": (array(TEXTS) + b"{}", "something follows the array"),
    "d.jsonl.gz": (gzip.compress(lines(TEXTS))[:60], "EOFError"),
    "e.jsonl.zst": (zstd(lines(TEXTS))[:-9], "Truncated"),
    "f.jsonl.xz": (lzma.compress(lines(TEXTS))[:90], "EOFError"),
    "g.parquet": (KINDS["parquet"][1](TEXTS)[:200], "as parquet"),
    "h.arrow": (KINDS["arrow file"][1](TEXTS)[:300], "as arrow"),
    "i.arrow": (b"no table at all", "as arrow"),
    "j.csv": (b'text\na\n"b\nc\n', "does not close as CSV"),
    "k.csv": (b"id,body\n1,this is it\n", "its fields are id, body\n  data.text_field=body"),
    "l.json": (b'{"version": 1, "texte": "x"}', "its fields are version, texte\n  data.text_field=texte"),
    "m.jsonl": (b'"a"\n"b"\n', "its rows are not objects with fields"),
    "p.csv": ("id\ttext\n1\tx\n".encode("utf-16"), "it is in UTF-16"),
    "n.xlsx": (b"PK", "of an unsupported kind(?s:.*)convert it"),
    "o.tar.gz": (b"\x1f\x8b", "of an unsupported kind(?s:.*)unpack it"),
}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_will_not_do_is_refused_by_name(tmp_path, name):
    content, message = CUT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        rows(tmp_path)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", [name for name in CUT if name[0] >= "g" and name != "j.csv"])
def test_check_finds_what_the_first_rows_show(tmp_path, name):
    (tmp_path / name).write_bytes(CUT[name][0])
    with pytest.raises(UserError, match=CUT[name][1]):
        check_data(config(tmp_path))


# ---- whole cells: `objects`

CELLS = [  # (type of the column, its values, what a line of JSON would hold)
    (pyarrow.string(), ["2021-01-02", None, ""], ["2021-01-02", None, ""]),
    (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["a", None, "a"], ["a", None, "a"]),
    (pyarrow.binary(), [b"a", None, "é".encode()], ["a", None, "é"]),
    (pyarrow.bool_(), [True, None, False], [True, None, False]),
    (pyarrow.struct({"a": pyarrow.int64(), "b": pyarrow.struct({"c": pyarrow.string()})}),
     [{"a": None, "b": {"c": None}}, None, {"a": 1, "b": None}], [{"b": {}}, None, {"a": 1}]),
    (pyarrow.large_list(pyarrow.struct({"a": pyarrow.string(), "b": pyarrow.list_(pyarrow.float64())})),
     [[{"a": "x", "b": None}], None, [{"a": None, "b": [1.5, None]}]], [[{"a": "x"}], None, [{"b": [1.5, None]}]]),
    (pyarrow.map_(pyarrow.string(), pyarrow.int64()), [[("k", 1), ("n", None)], None, []],
     [{"k": 1, "n": None}, None, {}]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CELLS)))
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_whole_cells_are_plain_json(tmp_path, kind, number):
    of_type, values, plain = CELLS[number]
    table = pyarrow.table({"cell": pyarrow.array(values, of_type), "other": [1, 2, 3]})
    path = tmp_path / f"in.{kind}"
    path.write_bytes(columnar_of(table, kind))
    assert [row for _, row in readers.objects(path, kind, ("cell", "absent"))] == [{"cell": one} for one in plain]
    assert [row for _, row in readers.objects(path, kind, ("absent",))] == [{}, {}, {}]
    assert readers.columns(path, kind) == ["cell", "other"]


def columnar_of(table, kind) -> bytes:
    file = pyarrow.BufferOutputStream()
    write = pyarrow.parquet.write_table if kind == "parquet" else ipc(pyarrow.ipc.new_file)
    write(table, file)
    return file.getvalue().to_pybytes()


def test_json_inside_of_a_column_is_parsed(tmp_path):
    json_type = getattr(pyarrow, "json_", None)
    if json_type is None:
        pytest.skip("this pyarrow has no type for JSON")
    cells = pyarrow.ExtensionArray.from_storage(json_type(), pyarrow.array(['{"a": null}', None, '"2021-01-02"']))
    pyarrow.parquet.write_table(pyarrow.table({"cell": cells}), tmp_path / "in.parquet")
    found = [row["cell"] for _, row in readers.objects(tmp_path / "in.parquet", "parquet", ("cell",))]
    assert found == [{"a": None}, None, "2021-01-02"]


def test_rows_of_json_are_as_written(tmp_path):
    (tmp_path / "in.json").write_bytes(b'{"a": [1, {"b": null}], "c": "2021-01-02"}\n\n[1]\n"x"\n{"a": \n{}\n')
    found = list(readers.objects(tmp_path / "in.json", "json", ("a",)))
    assert found == [(1, {"a": [1, {"b": None}], "c": "2021-01-02"}), (3, [1]), (4, "x"), (5, "not JSON"), (6, {})]
    assert isinstance(found[3][1], readers.LeftOut) and not isinstance(found[2][1], readers.LeftOut)
    assert readers.columns(tmp_path / "in.json", "json") == []
