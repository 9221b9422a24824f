"""How much of what a trained run writes is Python, and its score beside its rivals.

    aurora train quickstart --run runs/first
    python benchmarks/first_model.py runs/first [--temperature 0.7] [--tokens 64] [--seed 0] [--show]

Each of 20 beginnings of one line is continued once. Of beginning and answer together the last line is dropped, since
the limit of tokens may have cut it. What is left counts if Python's parser takes it and it has three statements or
more, those inside functions and classes included.
"""

from __future__ import annotations

import argparse
import ast
import warnings
from datetime import date

import aurora_train
from aurora_train.files import read_json
from aurora_train.generate.sampler import Generator
from aurora_train.run import Run

PROMPTS = (
    "import os", "import sys", "from collections import", "def main():", "def read(path):", "def __init__(self, name):",
    "class Error(Exception):", "class Reader:", "class TestCase(unittest.TestCase):", "def test_add(self):",
    "for i in range(10):", "while True:", "if __name__ == '__main__':", "try:", "with open(path) as f:", "x = [",
    "def add(a, b):", "@property", "# This module", '"""',
)  # fmt: skip


def statements(text: str) -> int:
    """Statements in a text without its last line, nested ones included; 0 if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text.rpartition("\n")[0])
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return 0
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))


def texts(run: str, tokens: int, temperature: float, seed: int) -> list[str]:
    """The prompts with what the run's model writes after each."""
    from language.tokenizers import Continuation

    trained = aurora_train.load(run)
    begun = [Continuation(trained.recipe.tokenizer, prompt) for prompt in PROMPTS]
    generator = Generator(trained.model, {trained.recipe.tokenizer.eos_id})
    answers = generator.generate_batch([one.start for one in begun], tokens, temperature, seed=seed)
    for one, ids in zip(begun, answers, strict=True):
        one.add(ids)
    return [prompt + one.text for prompt, one in zip(PROMPTS, begun, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the texts too")
    options = parser.parse_args()
    written = texts(options.run, options.tokens, options.temperature, options.seed)
    counts = [statements(text) for text in written]
    if options.show:
        for text, count in zip(written, counts, strict=True):
            print(f"--- {count} statements\n{text}")
    print(f"{date.today()}  {options.run}")
    scores = read_json(Run(options.run).scores, {})
    for name, value in {**scores.get("score", {}), **scores.get("baselines", {})}.items():
        if isinstance(value, float):
            print(f"{name:30}{value:.4f}")
    print(f"{sum(count >= 3 for count in counts)} of {len(counts)} texts are Python with three statements or more")


if __name__ == "__main__":
    main()
