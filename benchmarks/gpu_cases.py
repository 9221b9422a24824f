"""What gpu.py trains: shapes, vocabularies and batches, and what follows from them without a device."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from sides import language_config
from torch_peer import Work

from aurora_train.config import load
from aurora_train.files import cache_folder

PRECISION = "bfloat16"


@dataclass(frozen=True)
class Case:
    """`model`: the `model` section of a config. `vocabulary` None is bytes. `tokens`: of a global batch, about."""

    model: dict
    vocabulary: int | None
    tokens: int = 2**16


# 1b and 3b are Llama 3.2's, 8b is Llama 3's. The smaller two have GPT-3's width, depth and vocabulary (up to a multiple
# of 64, which tensor cores want of either side) with Llama's layers and few key heads. Output heads are tied up to 3B.
CASES = {
    "125m": Case({"width": 768, "layers": 12, "heads": 12, "kv_heads": 4, "tied": True}, 50304),
    "350m": Case({"width": 1024, "layers": 24, "heads": 16, "kv_heads": 4, "tied": True}, 50304),
    "1b": Case({"size": "1b", "tied": True}, 128256),
    "3b": Case({"size": "3b", "tied": True}, 128256),
    "8b-lora": Case({"size": "8b", "tied": False, "lora": {"rank": 16}}, 128256),
}
_SMALL = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 128}
TINY = {
    "tiny": Case(_SMALL | {"tied": True}, None, 256),
    "tiny-lora": Case(_SMALL | {"tied": False, "lora": {"rank": 4}}, None, 256),
}


@dataclass(frozen=True)
class Job:
    """A case at one length. Reading it needs no device; `flops_per_token` and `work` prepare the text."""

    case: str
    shape: Case
    sequence: int
    cache: Path = field(default_factory=cache_folder, compare=False)

    @property
    def name(self) -> str:
        return f"{self.case} T {self.sequence}"

    @property
    def batch(self) -> int:
        """Examples of a step."""
        return max(1, self.shape.tokens // self.sequence)

    @property
    def tokens(self) -> int:
        """Of a step: examples x length."""
        return self.batch * self.sequence

    @property
    def config(self) -> dict:
        """What `aurora train` is given; one card of several."""
        return self.config_in(PRECISION)

    def config_in(self, precision: str) -> dict:
        """The same in another precision."""
        rows = {"sequence": self.sequence, "batch": self.batch, "vocabulary": self.shape.vocabulary}
        return language_config(self.shape.model, precision=precision, **rows) | {"mesh": {"data": 1}}

    @cached_property
    def resolved(self):
        """The config as `aurora train` reads it, with all that follows from a size."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.yaml"
            path.write_text(json.dumps(self.config))
            return load(path, [])

    @cached_property
    def recipe(self):
        """With its text prepared, which says how large the vocabulary has become."""
        recipe = self.resolved.recipe_class(self.resolved, self.cache)
        recipe.ready(lambda *_: None)
        return recipe

    @cached_property
    def vocabulary(self) -> int:
        return self.recipe.known["vocabulary"]

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """(trained, frozen)."""
        model, every = self.resolved.model, self.resolved.model.num_parameters(self.vocabulary)
        if model.lora is None:
            return every, 0
        width, inner = model.width, model.hidden_width
        query, shared = model.heads * model.dim_per_head, model.num_kv_heads * model.dim_per_head
        both = {"query": width + query, "key": width + shared, "value": width + shared, "out": query + width,
                "gate": width + inner, "up": width + inner, "down": inner + width}  # fmt: skip
        return model.layers * model.lora.rank * sum(both[name] for name in model.lora.targets), every

    @property
    def flops_per_token(self) -> float:
        """The recipe's count, less the gradients that frozen weights have not."""
        return self.recipe.flops(*self.parameters)

    def work(self, kind: str, microbatch: int, checkpointing: bool) -> Work:
        """The same model and batch for torch."""
        model = self.resolved.model
        shape = {"width": model.width, "layers": model.layers, "heads": model.heads, "kv_heads": model.num_kv_heads,
                 "mlp_width": model.hidden_width, "tied": model.tied}  # fmt: skip
        if model.lora is not None:
            shape["lora"] = {"rank": model.lora.rank, "alpha": model.lora.alpha, "targets": list(model.lora.targets)}
        device = "cpu" if self.case in TINY else "cuda"
        rows = (self.vocabulary, self.sequence, self.batch)
        return Work(shape, *rows, PRECISION, kind, device, microbatch, checkpointing)


def least_bytes(trained: int, frozen: int) -> int:
    """Without any activation: float32 weights, gradients and two moments, and the frozen in bfloat16."""
    return 16 * trained + 2 * frozen
