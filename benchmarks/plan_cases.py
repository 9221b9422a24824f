"""Real-size cases for the planner's accuracy, fixed before anything was fitted to them.

DEVELOPMENT and FIRST_HELD_OUT may be looked at while the estimate is written; HELD_OUT only after it is finished.
FIRST_HELD_OUT was held out until 2026-11-23 and has been fitted to since; HELD_OUT took its place on 2026-11-25, with
shapes that neither list has, before it was changed again. Each case is a language-model config and the
plan to compile: its save-set is given, so that the model is tested off its own choices.
"""

from __future__ import annotations

from typing import NamedTuple

SHAPES = {
    "gpt2-350m": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096, "norm": "layernorm",
                  "activation": "gelu",
                  "positions": "learned", "bias": "all", "tied": True},
    "llama-1b": {"width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp_width": 8192, "tied": True},
    "llama-3b": {"width": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "mlp_width": 8192, "tied": True},
    "qwen3-4b": {"width": 2560, "layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128, "mlp_width": 9728,
                 "qk_norm": True, "tied": True},
    "llama-8b": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "mlp_width": 14336, "tied": False},
    "llama-13b": {"width": 5120, "layers": 40, "heads": 40, "mlp_width": 13824, "tied": False},
    "qwen3-14b": {"width": 5120, "layers": 40, "heads": 40, "kv_heads": 8, "head_dim": 128, "mlp_width": 17408,
                  "qk_norm": True, "tied": False},
    "smollm2-360m": {"width": 960, "layers": 32, "heads": 15, "kv_heads": 5, "mlp_width": 2560, "tied": True},
    "qwen3-2b": {"width": 2048, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "mlp_width": 6144,
                 "qk_norm": True, "tied": True},
    "qwen3-32b": {"width": 5120, "layers": 64, "heads": 64, "kv_heads": 8, "head_dim": 128, "mlp_width": 25600,
                  "qk_norm": True, "tied": False},
}  # fmt: skip
VOCABULARY = {"gpt2-350m": 50257, "llama-13b": 32000, "qwen3-4b": 151936, "qwen3-14b": 151936, "qwen3-32b": 151936,
              "smollm2-360m": 49152, "qwen3-2b": 151936}  # fmt: skip

# "attn_out" and "attn_stats" stand for whatever the attention kernel in use calls them.
FULL: tuple[str, ...] = ()
PRODUCTS = ("query", "key", "value", "attn_out", "attn_stats", "mlp_gate", "mlp_up")
LIGHT = ("attn_out", "attn_stats", "attn_proj")
TAGS = "all tags"


class Case(NamedTuple):
    """`state`: f32 or bf16 (masters and moments), int8 (bfloat16 masters, 8-bit moments) or lora (float32 adapters)."""

    machine: str
    model: str
    sequence: int
    batch: int
    accumulation: int
    state: str
    save: tuple[str, ...] | str
    cut: float = 0.0  # the last share of the units is a segment of its own that keeps PRODUCTS
    compute: str = "bfloat16"

    @property
    def name(self) -> str:
        keep = self.save if isinstance(self.save, str) else f"{len(self.save)} tags"
        cut = f" cut {self.cut}" if self.cut else ""
        cut += f" {self.compute} compute" if self.compute != "bfloat16" else ""
        return (
            f"{self.machine} {self.model} T{self.sequence} {self.batch}/{self.accumulation} {self.state} {keep}{cut}"
        )


DEVELOPMENT = (
    Case("dgx-spark", "gpt2-350m", 1024, 32, 1, "f32", FULL),
    Case("h200", "gpt2-350m", 1024, 64, 1, "f32", PRODUCTS),
    Case("h200", "gpt2-350m", 1024, 64, 4, "f32", FULL),
    Case("dgx-spark", "llama-1b", 2048, 16, 1, "f32", LIGHT),
    Case("dgx-spark", "llama-1b", 8192, 8, 4, "f32", FULL),
    Case("h200", "llama-1b", 4096, 16, 1, "f32", TAGS),
    Case("h200", "llama-1b", 32768, 1, 1, "f32", FULL),
    Case("dgx-station", "llama-3b", 4096, 16, 1, "f32", PRODUCTS),
    Case("h200", "llama-3b", 4096, 8, 1, "f32", FULL, 0.25),
    Case("h200", "llama-3b", 4096, 16, 4, "f32", LIGHT),
    Case("dgx-station", "llama-8b", 4096, 8, 1, "f32", FULL),
    Case("dgx-station", "llama-8b", 4096, 8, 1, "f32", LIGHT),
    Case("dgx-station", "llama-8b", 4096, 16, 8, "f32", FULL),
    Case("dgx-station", "qwen3-4b", 8192, 8, 1, "f32", LIGHT, 0.5),
    Case("dgx-spark", "llama-8b", 4096, 1, 1, "bf16", FULL),
    Case("h200", "llama-8b", 2048, 16, 1, "bf16", LIGHT),
    Case("dgx-station", "llama-13b", 2048, 16, 2, "bf16", FULL),
    Case("dgx-station", "qwen3-14b", 4096, 8, 1, "int8", FULL),
    Case("h200", "llama-8b", 4096, 8, 1, "lora", FULL),
    Case("dgx-station", "qwen3-32b", 4096, 4, 1, "lora", FULL),
)

FIRST_HELD_OUT = (
    Case("h200", "gpt2-350m", 2048, 32, 1, "f32", LIGHT),
    Case("dgx-spark", "gpt2-350m", 1024, 64, 2, "f32", TAGS),
    Case("dgx-station", "gpt2-350m", 4096, 64, 1, "f32", FULL, 0.5),
    Case("dgx-spark", "llama-1b", 4096, 8, 1, "f32", PRODUCTS),
    Case("h200", "llama-1b", 16384, 4, 2, "f32", LIGHT),
    Case("dgx-station", "llama-1b", 32768, 4, 1, "f32", LIGHT),
    Case("dgx-spark", "llama-3b", 2048, 8, 1, "f32", FULL),
    Case("h200", "llama-3b", 2048, 16, 1, "f32", LIGHT, 0.5),
    Case("dgx-station", "llama-3b", 8192, 16, 4, "f32", PRODUCTS),
    Case("h200", "qwen3-4b", 4096, 8, 1, "f32", FULL),
    Case("dgx-station", "qwen3-4b", 4096, 32, 4, "f32", LIGHT),
    Case("dgx-station", "llama-8b", 2048, 16, 1, "f32", LIGHT, 0.25),
    Case("dgx-station", "llama-8b", 8192, 4, 1, "f32", FULL),
    Case("dgx-station", "llama-8b", 4096, 32, 4, "f32", FULL),
    Case("h200", "llama-8b", 4096, 8, 1, "bf16", FULL),
    Case("dgx-station", "llama-13b", 4096, 8, 1, "bf16", LIGHT),
    Case("h200", "llama-8b", 1024, 16, 1, "int8", PRODUCTS),
    Case("dgx-spark", "qwen3-4b", 4096, 8, 2, "int8", FULL),
    Case("dgx-spark", "llama-8b", 2048, 8, 1, "lora", LIGHT),
    Case("dgx-station", "qwen3-14b", 8192, 4, 2, "lora", FULL),
)

HELD_OUT = (
    Case("h200", "smollm2-360m", 2048, 32, 1, "f32", FULL),
    Case("dgx-spark", "smollm2-360m", 8192, 8, 2, "f32", LIGHT),
    Case("h200", "smollm2-360m", 1024, 64, 1, "f32", TAGS),
    Case("h200", "gpt2-350m", 4096, 16, 1, "f32", LIGHT),
    Case("dgx-station", "gpt2-350m", 2048, 64, 2, "f32", PRODUCTS),
    Case("dgx-spark", "gpt2-350m", 1024, 16, 1, "f32", LIGHT, 0.5),
    Case("h200", "qwen3-2b", 4096, 8, 1, "f32", LIGHT),
    Case("dgx-station", "qwen3-2b", 16384, 8, 2, "f32", FULL),
    Case("dgx-spark", "qwen3-2b", 2048, 16, 1, "f32", FULL, 0.25),
    Case("h200", "llama-1b", 32768, 2, 1, "f32", LIGHT),
    Case("dgx-station", "llama-1b", 16384, 16, 4, "f32", FULL),
    Case("dgx-station", "llama-3b", 32768, 2, 1, "f32", FULL),
    Case("dgx-spark", "llama-3b", 1024, 16, 2, "f32", LIGHT),
    Case("dgx-station", "qwen3-4b", 4096, 16, 1, "f32", PRODUCTS),
    Case("dgx-station", "llama-8b", 16384, 2, 1, "f32", LIGHT),
    Case("dgx-station", "llama-13b", 4096, 4, 2, "bf16", FULL),
    Case("h200", "llama-8b", 4096, 2, 1, "bf16", LIGHT, 0.5),
    Case("dgx-station", "qwen3-14b", 2048, 16, 2, "bf16", FULL),
    Case("h200", "llama-1b", 2048, 8, 1, "f32", FULL, 0.0, "float32"),
    Case("dgx-spark", "llama-3b", 2048, 4, 1, "f32", LIGHT, 0.0, "float32"),
    Case("dgx-station", "qwen3-32b", 2048, 8, 2, "lora", LIGHT),
    Case("h200", "llama-3b", 4096, 8, 1, "lora", PRODUCTS),
    Case("h200", "qwen3-4b", 4096, 4, 1, "int8", LIGHT),
    Case("dgx-station", "llama-8b", 2048, 16, 4, "int8", FULL),
)


def overrides(case: Case) -> dict:
    """The case as a nested dict of config sections."""
    lora = {"lora": {"rank": 16}} if case.state == "lora" else {}
    low = case.state in ("bf16", "int8", "lora")
    moments = {"f32": "float32", "bf16": "bfloat16", "int8": "int8", "lora": "float32"}[case.state]
    optimizer = {"moments": moments} | ({"master": "bfloat16"} if low and case.state != "lora" else {})
    return {
        "recipe": "language_model",
        "model": {**SHAPES[case.model], "max_length": case.sequence, "attention": "auto", **lora},
        "data": {"sequence": case.sequence,
                 "tokenizer": {"kind": "bpe", "vocab": VOCABULARY.get(case.model, 128256)}},
        "train": {"batch": case.batch, "precision": case.compute},
        "optimizer": optimizer,
        "memory": {"accumulation": case.accumulation},
    }  # fmt: skip
