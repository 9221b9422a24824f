"""Text classification: what of a table is refused and where, how it is split, its scores, and a run from end to end."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import aurora_train
from aurora_train.cli.main import main
from aurora_train.errors import UserError
from language import class_scores, labelled

RNG = np.random.default_rng(0)
SUBJECTS = ("the pump", "our valve", "a motor", "that fan", "one belt", "this gear")
STATES = {"fine": ("runs well", "is quiet", "turns freely"), "worn": ("grinds a lot", "squeaks badly", "slips often"),
          "hot": ("burns hands", "smells of smoke", "glows red")}  # fmt: skip
ROWS = [(f"{who} {what} {when}", state) for state, words in STATES.items() for who in SUBJECTS for what in words
        for when in ("today", "at night", "again")]  # fmt: skip


def write(path, rows, names=("text", "label")):
    """A table of (text, label) rows, of the kind that its name says."""
    dicts = [dict(zip(names, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(dicts), path)
    elif path.suffix == ".csv":
        quoted = [",".join('"' + str(value).replace('"', '""') + '"' for value in row) for row in (names, *rows)]
        path.write_text("\n".join(quoted) + "\n")
    else:
        lines = "".join(json.dumps(row) + "\n" for row in dicts).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def read(source, classes=(), needed=(), **settings):
    return labelled.read(labelled.Table(source, **{"text_field": "text", "label_field": "label"} | settings),
                         list(classes), needed=needed)  # fmt: skip


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_every_kind_of_table_gives_the_same_rows(name, tmp_path, caplog):
    rows, left_out = read(write(tmp_path / name, [*ROWS, ROWS[0], ("", "fine"), (ROWS[1][0], "another")]))
    assert [(row.text, row.label) for row in rows] == ROWS
    place = {"a.csv": "line 4", "a.parquet": "row 3"}.get(name, "line 3")  # a CSV's first line has the names
    assert rows[2].place == f"{place} of {name}"
    assert left_out == {"repeats an earlier text": 1, "no text": 1, "repeats an earlier text under another label": 1}
    assert "3 of " in caplog.text and "1 repeats an earlier text under another label" in caplog.text


@pytest.mark.parametrize("name,values,labels", [
    ("a.jsonl", (1, 0), ("1", "0")), ("a.parquet", (1, 0), ("1", "0")), ("a.jsonl", (True, 0.5), ("true", "0.5")),
    ("a.csv", (1, " 0 "), ("1", "0")),
    ("a.jsonl", (1234567890123456789, 1234567890123456790), ("1234567890123456789", "1234567890123456790")),
])  # fmt: skip
def test_a_label_may_be_a_number_or_a_truth_value(name, values, labels, tmp_path):
    rows, _ = read(write(tmp_path / name, [(f"text {i}", value) for i, value in enumerate(values)]))
    assert tuple(row.label for row in rows) == labels


REFUSED = {
    "no label": ([*ROWS[:4], ("more", "")], {}, "line 5 of a.jsonl has no label"),
    "null": ([*ROWS[:4], ("more", None)], {}, "line 5 of a.jsonl has no label"),
    "not a number": ([*ROWS[:4], ("more", float("nan"))], {},
                     "line 5 of a.jsonl has no label: its number is NaN\\n  NaN stands for a missing number"),
    "infinite": ([*ROWS[:4], ("more", float("inf"))], {}, "line 5 of a.jsonl has no label: its number is Infinity"),
    "a list": ([*ROWS[:4], ("more", ["fine"])], {}, "the label of line 5 of a.jsonl is list"),
    "unknown": ([*ROWS[:2], ("more", "fien")], {"classes": ["fine", "hot"]},
                "line 3 of a.jsonl is labelled `fien`, which is none of the 2 classes"),
    "one class": (ROWS[:5], {}, "all 5 rows of .*a.jsonl are labelled `fine`, from line 1 of a.jsonl on"),
    "no column": (ROWS, {"label_field": "lable"}, "line 1 of a.jsonl has no field `lable`"),
    "no text column": (ROWS, {"text_field": "txt"}, "has no field `txt`"),
    "a class without rows": (ROWS, {"classes": ["fine", "hot", "worn", "wrn"], "needed": ["hot", "wrn"]},
                             "no row of .*a.jsonl is labelled `wrn`(?s:.*)occur are fine, hot, worn"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_label_is_refused_by_file_and_row(case, tmp_path):
    rows, settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path / "a.jsonl", rows), **settings)
    assert caught.value.where.startswith("data.")
    if case in ("unknown", "no column"):
        assert {"unknown": "`fine`", "no column": "data.label_field=label"}[case] in caught.value.hint


DAMAGED = {
    "a short row": (b"alone\n", "other fields than the header's"),
    "a quote that does not close": (b'"alone,fine\n', "not CSV"),
    "not UTF-8": (b"caf\xe9,fine\n", "not UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_row_that_cannot_be_read_is_refused_by_line_or_left_out_as_asked(case, tmp_path, caplog):
    line, reason = DAMAGED[case]
    lines = Path(write(tmp_path / "a.csv", ROWS)).read_bytes().splitlines(keepends=True)
    (tmp_path / "a.csv").write_bytes(b"".join([*lines[:7], line, *lines[7:]]))
    with pytest.raises(UserError, match=f"line 8 of a.csv cannot be read: {reason}") as caught:
        read(str(tmp_path / "a.csv"))
    assert caught.value.where == "data.source" and "data.damaged=leave_out" in caught.value.hint
    rows, left_out = read(str(tmp_path / "a.csv"), damaged="leave_out")
    assert [(row.text, row.label) for row in rows] == ROWS and left_out == {reason: 1}
    assert f"1 of {len(ROWS) + 1} rows left out: 1 {reason}" in caplog.text


def test_a_class_that_is_too_small_to_be_in_every_split_is_refused_by_row(tmp_path):
    rows, _ = read(write(tmp_path / "a.csv", [*ROWS, ("alone", "rare"), ("alone, too", "rare")]))
    with pytest.raises(UserError, match=f"`rare` has 2 rows, the first of them line {len(ROWS) + 2} of a.csv"):
        labelled.split(rows, 0.2, 0.1)


def test_every_class_keeps_its_share_in_every_split_whatever_the_order(tmp_path):
    rows = [labelled.Labelled(f"text {i}", label, "") for label, n in (("a", 400), ("b", 100), ("c", 20))
            for i in range(n * 1000, n * 1001)]  # fmt: skip
    chosen = labelled.split(rows, 0.2, 0.1)
    counts = {name: Counter(rows[i].label for i in numbers) for name, numbers in chosen.items()}
    assert counts["test"] == {"a": 80, "b": 20, "c": 4} and counts["validation"] == {"a": 40, "b": 10, "c": 2}
    assert sorted(i for numbers in chosen.values() for i in numbers) == list(range(len(rows)))
    order = RNG.permutation(len(rows))
    again = labelled.split([rows[i] for i in order], 0.2, 0.1)
    for name, numbers in chosen.items():
        assert {rows[i] for i in numbers} == {rows[order[i]] for i in again[name]}


def test_the_scores_are_their_definitions():
    counts = class_scores.confusion(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0]), 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert class_scores.accuracy(counts) == pytest.approx(4 / 6)
    # Precision and recall of the classes: (2/3, 2/3), (2/3, 1), none read rightly; the last does not occur.
    np.testing.assert_allclose(class_scores.f1(counts), [2 / 3, 4 / 5, 0, 0])
    assert class_scores.macro_f1(counts) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


def test_naive_bayes_counts_words():
    texts, labels = ["red red hot", "cold blue", "blue ice"], np.array([0, 1, 1])
    assert class_scores.naive_bayes(texts, labels, ["red", "ice blue", "unheard"], 2).tolist() == [0, 1, 1]
    # p(hot | class) by hand: (1 + 1) / (3 + 5) against (0 + 1) / (4 + 5), beside priors of 1 + 1 and 2 + 1.
    assert class_scores.naive_bayes(texts, labels, ["hot"], 2).tolist() == [int(2 * 2 / 8 < 3 * 1 / 9)]


def test_the_bundled_task_has_several_packages_of_enough_functions():
    rows, _ = read("python-stdlib")
    counts = Counter(row.label for row in rows)
    assert len(counts) >= 8 and min(counts.values()) >= 100
    assert all(row.text.lstrip().startswith(("def ", "async def ")) for row in rows)


CONFIG = """
recipe: language/classify
model: {width: 32, layers: 1, heads: 2}
data: {source: machines.csv, text_field: report, label_field: state, sequence: 40}
train: {steps: 60, batch: 16}
optimizer: {lr: 1e-2, schedule: {warmup: 5}}
evaluate: {every: 30, examples: 12}
checkpoint: {every: 30}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, the run in it) of a small table in words that tell the classes apart."""
    folder = tmp_path_factory.mktemp("classify")
    write(folder / "machines.csv", ROWS, ("report", "state"))
    (folder / "machines.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AURORA_CACHE", str(folder / "cache"))
        assert main(["train", "machines.yaml", "--run", "run", "--quiet"]) == 0
        yield folder, folder / "run"


def test_a_run_is_scored_beside_its_rivals_and_shows_its_mistakes(trained):
    scores = json.loads((trained[1] / "scores.json").read_text())
    assert scores["headline"] == "accuracy" and scores["score"]["texts"] == 33
    assert scores["score"]["accuracy"] > 0.9 > 0.5 > scores["baselines"]["commonest_class"]
    assert scores["score"]["macro_f1"] > 0.9 and scores["baselines"]["naive_bayes"] > 0.9
    table, mistakes = scores["tables"]
    assert table["columns"] == ["class", "fine", "hot", "worn", "F1"]
    counts = np.array([row[1:-1] for row in table["rows"]])
    assert counts.sum(1).tolist() == [11, 11, 11]  # the same share of every class
    assert len(mistakes["rows"]) == counts.sum() - np.trace(counts)
    assert "How often each class was taken for which" in (trained[1] / "report.html").read_text()


@pytest.mark.parametrize("setting,said", [
    ("data.text_field=reports", "data.text_field: {folder}/machines.csv has no field `reports`"),
    ("data.label_field=stat", "data.label_field: line 2 of machines.csv has no field `stat`"),
])  # fmt: skip
def test_check_reads_the_first_rows_and_names_a_column_that_is_not_there(setting, said, trained, capsys):
    assert main(["check", "machines.yaml", setting]) == 2
    err = capsys.readouterr().err
    assert said.format(folder=trained[0]) in err and "its fields are report, state" in err


def test_check_compares_the_parameters_with_those_of_the_run_that_init_names(trained, capsys):
    assert main(["check", "machines.yaml", "init.from=run", "model.width=16"]) == 2
    err = capsys.readouterr().err
    assert "the checkpoint does not fit this model" in err and "params.encoder.embedding" in err
    assert main(["check", "machines.yaml", "init.from=run", "--prepare"]) == 0
    assert "# rehearsed: the data" in capsys.readouterr().out


def test_inspect_shows_the_texts_of_a_batch_with_their_lines_and_labels(trained, capsys):
    assert main(["inspect", "machines.yaml", "--rows", "3"]) == 0
    out = capsys.readouterr().out
    lines = (trained[0] / "machines.csv").read_text().splitlines()
    shown = re.findall(r"line (\d+) of machines.csv, labelled `(\w+)`: (\d+) tokens\]\n(.*)\n", out)
    assert len(shown) == 3
    for line, label, tokens, text in shown:
        assert lines[int(line) - 1].startswith(f'"{text}') and lines[int(line) - 1].endswith(f'"{label}"')
        assert int(tokens) == min(len(text) + 1, 40)
    assert "of 114 texts fill all 40 tokens" in out


def test_beside_adapters_the_head_is_trained_as_a_whole(trained, capsys):
    from aurora_train.config import load
    from aurora_train.train.rehearsal import rehearse

    config = load("machines.yaml", ["model.lora.rank=2", "data.labels=[fine, worn, hot]", "train.precision=float32"])
    recipe = config.recipe_class(config, Path())
    recipe.known = recipe.expected_facts()
    program = rehearse(config, recipe)
    state = program.blueprint(program.simplest_plan()).state
    assert state.params.keys() == {"encoder", "head", "head_bias"} and state.frozen.keys() == {"encoder"}
    assert main(["check", "machines.yaml", "model.lora.targets=[head, query]", "model.tied=false"]) == 2
    assert "model.lora.targets: the head of a classifier begins at random" in capsys.readouterr().err


@pytest.mark.slow
def test_new_texts_are_classified_where_the_table_is_not(trained, capsys):
    folder, run = trained
    (folder / "machines.csv").rename(folder / "gone.csv")
    try:
        loaded = aurora_train.load(run)
        batch = loaded.recipe.encode(["the motor burns hands again", "the belt is quiet"])
        shares = loaded.predict(batch)
        assert [loaded.recipe.known["labels"][i] for i in shares.argmax(1)] == ["hot", "fine"]
        np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
        capsys.readouterr()
        assert main(["generate", str(run), "--prompt", "a gear squeaks badly"]) == 0
        assert capsys.readouterr().out.startswith("a gear squeaks badly\nworn ")
        assert main(["generate", str(run)]) == 2
        assert "--prompt: there is no text to classify" in capsys.readouterr().err
    finally:
        (folder / "gone.csv").rename(folder / "machines.csv")


def test_another_table_is_scored_and_a_label_it_does_not_know_is_refused_by_row(trained, capsys):
    folder, run = trained
    other = [("one fan glows red", "hot"), ("a pump smells of smoke", "hot"), ("this motor glows red", "hto")]
    write(folder / "other.jsonl", other, ("report", "state"))
    assert main(["evaluate", str(run), "--on", "other.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "line 3 of other.jsonl is labelled `hto`" in said and "did you mean `hot`?" in said
    assert "Traceback" not in said
    write(folder / "other.jsonl", other[:2], ("report", "state"))
    assert main(["evaluate", str(run), "--on", "other.jsonl"]) == 0
    (scores,) = (json.loads(path.read_text()) for path in (run / "scores-on").glob("*.json"))
    assert scores["score"]["accuracy"] == 1.0 and scores["score"]["texts"] == 2
