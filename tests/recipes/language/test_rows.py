"""Rows: every token is a target once, segments and positions follow the documents, padding weighs nothing."""

import numpy as np
import pytest
from corpora import config, text, write_folder

from aurora_train.errors import UserError
from language.prepare import prepare
from language.rows import TokenSource


@pytest.fixture(scope="module", params=["byte", "bpe"])
def store(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return prepare(config(write_folder(folder / "text"), request.param), folder / "cache")


def slow_rows(store, split, sequence):
    """The definition, token by token: the independent reference of `take`."""
    stream = np.asarray(store.tokens(split)).tolist()
    eos = store.tokenizer.eos_id
    for start in range(0, len(stream) - 1, sequence):
        row = {name: [] for name in ("tokens", "targets", "segments", "positions", "weights")}
        segment, position = 0, 0
        for place in range(start, start + sequence):
            if place >= len(stream) - 1:
                values = (eos, eos, 0, 0, 0.0)
            else:
                if place == start or stream[place] == eos:
                    segment, position = segment + 1, 0
                values = (stream[place], stream[place + 1], segment, position, 1.0)
                position += 1
            for name, value in zip(row, values, strict=True):
                row[name].append(value)
        yield row


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("sequence", [7, 32, 100])
def test_rows_equal_their_definition_token_by_token(store, split, sequence):
    source = TokenSource(store, split, sequence)
    taken = source.take(np.arange(len(source)))
    expected = list(slow_rows(store, split, sequence))
    assert len(expected) == len(source)
    for name, array in taken.items():
        assert array.dtype == (np.float32 if name == "weights" else np.int32), name
        assert np.array_equal(array, np.array([row[name] for row in expected])), name


def test_the_rows_of_a_split_are_its_documents_text_and_nothing_else(store):
    source = TokenSource(store, "test", 16)
    taken = source.take(np.arange(len(source)))
    real = taken["weights"] > 0
    written = store.tokenizer.decode(taken["tokens"][real])
    separator = store.tokenizer.separator
    originals = [store.text("test", i).decode() for i in range(store.num_documents("test"))]
    assert written == "".join(separator + original for original in originals)
    assert real.sum() == store.manifest["splits"]["test"]["tokens"]


def test_whole_documents_come_back_as_they_were_written(store):
    for split in ("train", "validation", "test"):
        for i, document in enumerate(store.documents(split)):
            number = int(document.name.rpartition("document")[2].removesuffix(".py"))
            assert store.text(split, i).decode() == text(number)
            assert document.num_bytes == len(text(number).encode())
            eos = store.tokenizer.eos_id
            assert document.tokens[0] == document.tokens[-1] == eos
            assert np.array_equal(document.tokens[1:-1], store.tokenizer.encode(text(number)))


def test_the_token_that_ends_a_document_is_a_target_of_that_document_alone(store):
    source = TokenSource(store, "train", 64)
    taken = source.take(np.arange(len(source)))
    ends = (taken["targets"] == store.tokenizer.eos_id) & (taken["weights"] > 0)
    assert ends.sum() == store.num_documents("train")
    rows, columns = np.nonzero(ends[:, :-1])
    assert (taken["segments"][rows, columns + 1] != taken["segments"][rows, columns]).all()


def test_take_is_a_pure_function_of_each_index(store):
    source = TokenSource(store, "train", 32)
    together = source.take(np.array([5, 2, 2, 9]))
    for i, index in enumerate([5, 2, 2, 9]):
        alone = source.take(np.array([index]))
        assert all(np.array_equal(alone[name][0], together[name][i]) for name in alone)


def test_a_row_names_the_documents_it_holds(store):
    source = TokenSource(store, "train", 500)
    for index in range(len(source)):
        assert len(source.documents_of(index)) == source.take(np.array([index]))["segments"].max()


def test_the_fingerprint_follows_split_and_sequence(store):
    made = [TokenSource(store, split, n).fingerprint for split in ("train", "test") for n in (16, 32)]
    assert len(set(made)) == 4
    assert TokenSource(store, "train", 16).fingerprint == made[0]


def test_a_sequence_longer_than_the_training_text_is_one_message(store):
    with pytest.raises(UserError, match="longer than the whole training text") as caught:
        TokenSource(store, "train", 1_000_000)
    assert caught.value.where == "data.sequence"
    assert len(TokenSource(store, "test", 1_000_000)) == 1  # held-out text is padded instead


def test_a_split_that_was_not_held_out_is_one_message(tmp_path):
    made = prepare(config(write_folder(tmp_path / "text", 3), holdout_validation=0), tmp_path / "cache")
    with pytest.raises(UserError, match="the validation split is empty"):
        TokenSource(made, "validation", 8)
