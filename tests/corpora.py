"""Small corpora on disk for the tests of this folder: seeded, Python-like, every document another."""

import random
from pathlib import Path

from language.settings import TextDataConfig, TokenizerConfig

_WORDS = "return self value index for in range if not None import def class name data x y print len é λ".split()


def text(seed: int, lines: int = 20) -> str:
    rng = random.Random(seed)
    return "\n".join(
        "    " * rng.randrange(3) + " ".join(rng.choices(_WORDS, k=rng.randrange(1, 8))) for _ in range(lines)
    ) + f"\n# {seed}\n"


def write_folder(folder: Path, documents: int = 40, lines: int = 20) -> Path:
    for i in range(documents):
        path = folder / f"part{i % 3}" / f"document{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(i, lines), encoding="utf-8")
    return folder


def config(source: Path | str, kind: str = "byte", vocab: int = 300, **settings) -> TextDataConfig:
    settings = {"holdout_test": 0.1, "holdout_validation": 0.1, "sequence": 32} | settings
    return TextDataConfig(source=str(source), tokenizer=TokenizerConfig(kind=kind, vocab=vocab), **settings)
