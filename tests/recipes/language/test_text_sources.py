"""Sources: what is found and in which order, and one clear message for everything a user can get wrong."""

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from corpora import config, text, write_folder

from aurora_train.errors import UserError
from language.corpus import check_data, open_corpus
from language.prepare import prepare


def names(settings, base=None):
    return [name for name, _ in open_corpus(settings, base).documents()]


def write_table(path, texts, column="text"):
    rows = pyarrow.table({column: texts, "number": list(range(len(texts)))})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(rows, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, rows.schema) as writer:
            writer.write_table(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))


def test_the_standard_library_is_there_in_a_fixed_order_without_installed_packages():
    corpus = open_corpus(config("python-stdlib"))
    found = [name for name, _ in corpus.files]
    assert found == sorted(found) and "ast.py" in found and "json/decoder.py" in found
    assert not any("site-packages" in name or "__pycache__" in name for name in found)
    assert corpus.licence == "PSF-2.0"


def test_a_small_part_of_the_standard_library_can_be_prepared(tmp_path):
    store = prepare(config("python-stdlib", max_documents=20), tmp_path)
    assert sum(split["documents"] for split in store.manifest["splits"].values()) == 20


def test_a_folder_gives_its_files_by_pattern_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a.py", "in/c.py", "in/deep/d.py", ".git/e.py", "__pycache__/f.py", ".hidden.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(config(tmp_path)) == ["a.py", "b.txt", "in/c.py", "in/deep/d.py"]
    assert names(config(tmp_path, pattern="**/*.py")) == ["a.py", "in/c.py", "in/deep/d.py"]
    assert names(config(tmp_path, pattern="*.py")) == ["a.py"]
    assert names(config(tmp_path, pattern="in/**/*.py")) == ["in/c.py", "in/deep/d.py"]


def test_relative_paths_start_at_the_folder_of_the_config(tmp_path):
    write_folder(tmp_path / "corpus", documents=3)
    assert len(names(config("corpus"), tmp_path)) == 3
    assert names(config("corpus/part0/*.py"), tmp_path) == ["document0.py"]
    assert names(config("corpus/part1/document1.py"), tmp_path) == ["document1.py"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_a_table_gives_one_document_per_row_and_the_same_text(tmp_path, suffix):
    texts = [text(i) for i in range(30)] + [None, ""]
    write_table(tmp_path / f"table{suffix}", texts)
    settings = config(tmp_path / f"table{suffix}")
    assert list(open_corpus(settings).documents()) == [
        (f"table{suffix}#{i}", (written or "").encode()) for i, written in enumerate(texts)
    ]
    store = prepare(settings, tmp_path / "cache")
    assert store.manifest["skipped"]["empty"]["count"] == 2
    for i, document in enumerate(store.documents("train")):
        assert store.text("train", i).decode() == text(int(document.name.rpartition("#")[2]))


def test_a_folder_of_tables_is_read_as_tables_and_says_what_it_leaves(tmp_path, caplog):
    for part in range(2):
        write_table(tmp_path / f"part{part}.parquet", [text(part * 10 + i) for i in range(5)])
    (tmp_path / "README.md").write_text("about this data")
    assert names(config(tmp_path)) == [f"part{part}.parquet#{row}" for part in range(2) for row in range(5)]
    assert "1 other files are not read" in caplog.text


@pytest.mark.slow
def test_reading_a_local_table_looks_up_no_host(tmp_path):
    write_table(tmp_path / "table.parquet", [text(i) for i in range(5)])
    code = (
        "import socket, sys; from pathlib import Path\n"
        "def refuse(*a, **k): raise SystemExit(f'looked up {a}')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from corpora import config\n"
        "from language.prepare import prepare\n"
        "print(prepare(config(sys.argv[1] + '/table.parquet'), Path(sys.argv[1])).manifest['splits'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "'train'" in done.stdout, done.stderr


def damaged_parquet(folder):
    write_table(folder / "bad.parquet", [text(i) for i in range(5)])
    content = (folder / "bad.parquet").read_bytes()
    (folder / "bad.parquet").write_bytes(content[: len(content) // 2])
    return config(folder / "bad.parquet")


def broken_jsonl(folder):
    (folder / "bad.jsonl").write_text('{"text": \n{"text": "on\n')
    return config(folder / "bad.jsonl")


def jsonl_in_latin1(folder):
    (folder / "latin.jsonl").write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1"))
    return config(folder / "latin.jsonl")


def wrong_field(folder):
    write_table(folder / "t.jsonl", ["one", "two", "three"], column="content")
    return config(folder / "t.jsonl")


def numbers_for_text(folder):
    write_table(folder / "t.parquet", ["one", "two", "three"])
    return config(folder / "t.parquet", text_field="number")


def invalid_utf8(folder):
    for i in range(3):
        (folder / f"{i}.txt").write_bytes(b"\xff\xfe" + bytes([200 + i]))
    return config(folder)


def one_document(folder):
    (folder / "only.txt").write_text("all there is")
    return config(folder / "only.txt")


def same_text_five_times(folder):
    for i in range(5):
        (folder / f"{i}.txt").write_text("all there is")
    return config(folder)


def empty_files(folder):
    for i in range(3):
        (folder / f"{i}.txt").write_text("\n")
    return config(folder)


def bad_tokenizer(folder):
    settings = config(write_folder(folder / "text"), kind="file")
    (folder / "t.json").write_text("not json")
    return settings.model_copy(
        update={"tokenizer": settings.tokenizer.model_copy(update={"path": str(folder / "t.json")})}
    )


BAD = {
    "missing file": (lambda folder: config(folder / "nowhere.txt"), "data.source", "no file or folder"),
    "empty folder": (lambda folder: config(folder), "data.source", "holds no files"),
    "pattern without a match": (
        lambda folder: config(write_folder(folder / "text"), pattern="*.rs"), "data.source", r"looked for \*.rs"
    ),
    "glob without a match": (lambda folder: config(f"{folder}/*.rs"), "data.source", "holds no files"),
    "empty files": (empty_files, "data.source", "holds no text"),
    "one document": (one_document, "data.source", "too few to hold any out"),
    "one text five times": (same_text_five_times, "data.source", "4 of 5 documents left out: repeats another document"),
    "invalid UTF-8": (invalid_utf8, "data.source", r"3 of 3 documents left out: not UTF-8 \(0.txt, 1"),
    "unreadable parquet": (damaged_parquet, "data.source", "cannot read .*bad.parquet as parquet"),
    "broken jsonl": (broken_jsonl, "data.source", "cannot read .*bad.jsonl as jsonl"),
    "jsonl in latin-1": (jsonl_in_latin1, "data.source", r"1 of 1 .* left out: not UTF-8 \(latin.jsonl#0\)"),
    "wrong text field": (wrong_field, "data.text_field", "its fields are content, number"),
    "text field of numbers": (numbers_for_text, "data.text_field", "holds int, not text"),
    "hub without online": (lambda folder: config("hub:owner/name"), "data.source", "data.online=true"),
    "all held out": (
        lambda folder: config(write_folder(folder / "text"), holdout_test=0.9), "data.holdout_test", "nothing .* left"
    ),
    "tokenizer without a path": (
        lambda folder: config(write_folder(folder / "text"), kind="file"), "data.tokenizer.path", "needs the path"
    ),
    "tokenizer that is not one": (bad_tokenizer, "data.tokenizer.path", "cannot read .*t.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_user_gets_wrong_is_one_message_that_names_it(tmp_path, case):
    make, where, message = BAD[case]
    folder = tmp_path / "input"
    folder.mkdir()
    with pytest.raises(UserError, match=message) as caught:
        settings = make(folder)
        if case == "all held out":
            settings = settings.model_copy(update={"holdout_validation": 0.1})
        prepare(settings, tmp_path / "cache")
    assert caught.value.where == where
    assert not list((tmp_path / "cache").glob("text-*/"))


def test_what_needs_no_reading_is_refused_by_check(tmp_path):
    for settings in (config(tmp_path / "nowhere"), config("hub:a/b"), config("python-stdlib", kind="file")):
        with pytest.raises(UserError):
            check_data(settings, tmp_path)


def test_three_documents_are_enough_to_hold_two_out(tmp_path):
    store = prepare(config(write_folder(tmp_path / "text", documents=3)), tmp_path / "cache")
    assert {split: counts["documents"] for split, counts in store.manifest["splits"].items()} == {
        "train": 1, "validation": 1, "test": 1,
    }


def test_a_tokenizer_that_loses_text_is_said_out_loud(tmp_path, caplog):
    from tokenizers import normalizers

    from language.tokenizers import train_bpe

    folder = write_folder(tmp_path / "text", documents=10)
    (folder / "Loud.py").write_text("LOUD\n")
    backend = train_bpe([[text(0)]], 300).backend
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "t.json"))
    settings = config(folder, kind="file", holdout_test=0.45, holdout_validation=0.45)
    tokenizer = settings.tokenizer.model_copy(update={"path": "t.json"})
    store = prepare(settings.model_copy(update={"tokenizer": tokenizer}), tmp_path / "cache", tmp_path)
    assert store.manifest["tokenizer"]["lossy_heldout_documents"] >= 1
    assert "does not reproduce" in caplog.text
