"""Small texts, and stores prepared of them in this process, for the tests of data."""

import json
import random

from language.corpus import check_data
from language.prepare import prepare
from language.settings import TextDataConfig

WORDS = "the of and to in is that for on are with his they be this have from one had by word but not what all".split()


def document(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


T = [document(i) for i in range(60)]


def config(source, **settings) -> TextDataConfig:
    settings = {"sequence": 32, "holdout_test": 0.1, "holdout_validation": 0.1} | settings
    return TextDataConfig(source=str(source), **settings)


def kept(store) -> dict[str, str]:
    """Name -> text of every document of a store."""
    splits = ("train", "validation", "test")
    return {n: store.text(split, i).decode() for split in splits for i, n in enumerate(store.names(split))}


def texts(source, cache, **settings) -> set[str]:
    check_data(config(source, **settings))
    return set(kept(prepare(config(source, **settings), cache)).values())


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path
