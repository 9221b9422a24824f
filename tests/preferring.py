"""Small data of preferences, a tiny open model to start from, and configs of `language/prefer`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aurora_train.config import load
from aurora_train.interop.gguf.write import write_gguf
from aurora_train.machine.precision import settled
from aurora_train.train.beginning import Beginning

sys.path.insert(0, str(Path(__file__).parent / "interop"))
from tiny_sources import source_of  # noqa: E402

CONFIG = """
recipe: language/prefer
model: {{from: {start}}}
data: {{source: {data}, sequence: 48, holdout_test: 0.2, holdout_validation: 0.1}}
train: {{steps: {steps}, batch: 8}}
optimizer: {{lr: 3e-3, schedule: {{warmup: 2}}}}
checkpoint: {{every: 6}}
evaluate: {{every: 6, examples: 8, baselines: false}}
samples: {{count: 2, max_tokens: 4}}
"""


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def pairs(count: int = 60) -> list[dict]:
    return [{"prompt": user(f"is {i} a number"), "chosen": assistant(f"yes {i}"), "rejected": assistant(f"no {i % 7}")}
            for i in range(count)]  # fmt: skip


def judged(count: int = 60) -> list[dict]:
    return [{"prompt": user(f"is {i} a number"), "completion": assistant(f"{'yes' if i % 2 else 'no'} {i}"),
             "label": bool(i % 2)} for i in range(count)]  # fmt: skip


def write_start(folder: Path) -> Path:
    """A GGUF file of a tiny Llama with a chat template."""
    path = folder / "tiny.gguf"
    write_gguf(source_of("llama"), path, "bf16", "tiny")
    return path


def write_config(folder: Path, start: Path, rows: list[dict], steps: int = 12, name: str = "prefer") -> Path:
    data, config = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(CONFIG.format(start=start, data=data, steps=steps))
    return config


def prepared(config: Path, *overrides: str):
    """The recipe of a config with its data ready."""
    beginning = Beginning.of(settled(load(config, overrides)))
    beginning.ready(lambda *_: None)
    return beginning.recipe
