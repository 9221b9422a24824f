"""`aurora inspect`: what it prints is what training reads."""

import json

import numpy as np
import pytest
from corpora import config, write_folder
from rich.console import Console

from aurora_train.check.inspection import inspect_batch, show
from aurora_train.data.batches import read_batch
from language.prepare import prepare
from language.rows import TokenSource


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    return TokenSource(prepare(config(write_folder(folder / "text")), folder / "cache"), "train", 400)


def test_the_facts_are_those_of_the_batch_that_training_reads(source):
    facts = json.loads(json.dumps(inspect_batch(source, "train", 5, 4, 2, rows=3)))
    batch = read_batch(source, 5, 4, 2)
    assert facts["targets"] == batch["weights"].sum() and len(facts["rows"]) == 3
    for i, row in enumerate(facts["rows"]):
        real = batch["segments"][i] > 0
        assert "".join(segment["text"] for segment in row["segments"]) == source.tokenizer.decode(
            batch["tokens"][i][real]
        )
        assert sum(segment["tokens"] for segment in row["segments"]) == real.sum()
    assert facts["bytes_per_token"] == 1.0


def test_the_picture_names_every_document_of_a_row(source, capsys):
    facts = inspect_batch(source, "train", 0, 2, 0, rows=2)
    console = Console(record=True, width=120)
    show(facts, console)
    printed = console.export_text()
    for row in facts["rows"]:
        for segment in row["segments"]:
            assert segment["document"] in printed
    assert "<|endoftext|>" in printed


class Spikes:
    """A source of another objective."""

    fingerprint = "1" * 64

    def __len__(self):
        return 6

    def take(self, chosen):
        return {"rates": np.ones((len(chosen), 3), np.float32)}


def test_a_source_without_text_shows_its_arrays():
    facts = inspect_batch(Spikes(), "train", 0, 4, 1, rows=2)
    console = Console(record=True, width=120)
    show(facts, console)
    assert facts["arrays"]["rates"]["shape"] == [4, 3] and facts["epoch"] == 0
    assert "rates" in console.export_text()
