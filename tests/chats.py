"""Conversations for tests: small made ones with a template for bytes, and functions of Python's own library."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path

# For the byte tokenizer, whose one control token ends each answer.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

# Dropout, accumulation, EMA and packing: what a resume has to get right. Formatted with `folder`.
TUNE = """
recipe: language/tune
model: {{width: 32, layers: 2, heads: 2, dropout: 0.1}}
data: {{source: {folder}/chats.jsonl, template: {folder}/chat.jinja, sequence: 160, holdout_test: 0.1,
  holdout_validation: 0.1}}
train: {{steps: 40, batch: 4}}
optimizer: {{name: muon, lr: 1e-2, ema: 0.9, schedule: {{warmup: 5}}}}
memory: {{accumulation: 2}}
checkpoint: {{every: 10}}
evaluate: {{every: 20, examples: 8, baselines: false}}
samples: {{count: 2, max_tokens: 8}}
"""


def chat(number: int) -> list[dict]:
    """Two turns about sums; their lengths differ from one conversation to the next."""
    first, second = number * 7 % 90 + 1, number * 13 % 400 + 1
    return [
        {"role": "user", "content": f"What is {first} + {second}?{' Please.' * (number % 5)}"},
        {"role": "assistant", "content": f"{first + second}"},
        {"role": "user", "content": f"And {number} more?"},
        {"role": "assistant", "content": f"{first + second + number}{'!' * (number % 7)}"},
    ]


def write_chats(folder: Path, count: int = 120) -> Path:
    """A folder with `chats.jsonl` and its `chat.jinja`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat(n)}) + "\n" for n in range(count)))
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder


def functions(*modules: str) -> list[str]:
    """The source text of every function of some modules of the interpreter's own library."""
    found = []
    for module in modules:
        text = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text()
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        lines = text.splitlines()
        found += ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
    return found
