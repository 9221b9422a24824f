"""The shape of a decoder transformer as a config section; free of jax so that `aurora check` stays fast.

The vocabulary size is not here: it follows from the tokenizer. The fields cover GPT-2, Llama 2 and 3, Mistral,
Qwen 2 and 3 and Gemma 2; `tests/parity` holds each of them against its published implementation.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from aurora_train.config import Section, setting

GATED = ("swiglu", "geglu")
KERNELS = ("query", "key", "value", "out", "gate", "up", "down")
NF4_BLOCK = 64  # inputs of a kernel that share a scale, where it is stored in 4 bits


class RopeScaling(Section):
    """How rotary frequencies stretch beyond the trained length (`linear`: Chen et al. 2023; `llama3`: Llama 3)."""

    kind: Literal["none", "linear", "llama3"] = setting("none", resume="frozen", help="rule of stretching")
    factor: float = setting(1.0, resume="frozen", gt=0, help="how many times longer the context becomes")
    low_freq_factor: float = setting(1.0, resume="frozen", gt=0, help="llama3: waves longer than length/this stretch")
    high_freq_factor: float = setting(4.0, resume="frozen", gt=0, help="llama3: waves shorter than length/this stay")
    original_length: int = setting(8192, resume="frozen", gt=0, help="llama3: context length before stretching")

    @model_validator(mode="after")
    def _bands_apart(self):
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor:g}) must exceed low_freq_factor ({self.low_freq_factor:g})"
            )
        return self


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021). With them, nothing else is trained."""

    rank: int = setting(16, resume="frozen", ge=1, help="inner size r of the adapter of each kernel")
    alpha: float = setting(32.0, resume="frozen", gt=0, help="the adapter's output is multiplied by alpha / rank")
    targets: tuple[Literal["query", "key", "value", "out", "gate", "up", "down"], ...] = setting(
        KERNELS,
        resume="frozen",
        min_length=1,
        strict=False,
        help="kernels of every block that get one; a plain MLP has no gate",
    )
    base: Literal["compute", "nf4"] = setting(
        "compute", resume="frozen",
        help="how the frozen kernels of the blocks are stored: as they are computed with, or in 4 bits (QLoRA)",
    )


class DecoderConfig(Section):
    """A causal transformer. `None` means: follows from the other fields, as the help says."""

    size: str | None = setting(None, resume="frozen", help="one dial: d6, d12, ... or 125m, 350m, 1b, 3b, 8b")
    width: int = setting(384, resume="frozen", ge=1, help="size of the residual stream")
    layers: int = setting(6, resume="frozen", ge=1, help="number of blocks")
    heads: int = setting(6, resume="frozen", ge=1, help="query heads")
    kv_heads: int | None = setting(None, resume="frozen", ge=1, help="key and value heads; none: as many as heads")
    head_dim: int | None = setting(None, resume="frozen", ge=1, help="size of a head; none: width / heads")
    mlp_width: int | None = setting(
        None, resume="frozen", ge=1, help="hidden size of the MLP; none: 4 width, or 8/3 width if gated"
    )
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu"] = setting(
        "swiglu", resume="frozen", help="swiglu and geglu (tanh GELU) are gated"
    )
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", resume="frozen", help="normalisation")
    norm_eps: float = setting(1e-5, resume="frozen", gt=0, help="added to the variance")
    norm_offset: bool = setting(False, resume="frozen", help="multiply by 1 + scale (Gemma) and not by scale")
    qk_norm: bool = setting(False, resume="frozen", help="RMSNorm on each query and key head (Qwen 3)")
    post_norm: bool = setting(False, resume="frozen", help="normalise each block's output too (Gemma 2)")
    parallel: bool = setting(False, resume="frozen", help="attention and MLP read the same normed input (GPT-J)")
    bias: Literal["none", "qkv", "all"] = setting(
        "none", resume="frozen", help="none (Llama), qkv (Qwen 2) or all linear layers (GPT-2)"
    )
    positions: Literal["rope", "learned", "none"] = setting("rope", resume="frozen", help="how order is told")
    max_length: int = setting(1024, resume="frozen", ge=1, help="rows of the table of learned positions")
    rope_theta: float = setting(10_000.0, resume="frozen", gt=0, help="base of the rotary wavelengths")
    rope_scaling: RopeScaling = setting(RopeScaling(), resume="frozen", help="stretching of rotary frequencies")
    window: int | None = setting(None, resume="frozen", ge=1, help="a token sees itself and window - 1 before it")
    window_pattern: tuple[Literal["local", "global"], ...] = setting(
        ("local",),
        resume="frozen",
        min_length=1,
        strict=False,
        help="period of layers: local ones use the window ([local, global]: Gemma 2)",
    )
    attention_scale: float | None = setting(
        None, resume="frozen", gt=0, help="factor on query x key; none: head_dim ** -0.5"
    )
    attention_softcap: float | None = setting(None, resume="frozen", gt=0, help="cap x tanh(scores / cap) (Gemma 2)")
    logit_softcap: float | None = setting(None, resume="frozen", gt=0, help="cap x tanh(logits / cap) (Gemma 2)")
    tied: bool = setting(True, resume="frozen", help="the output head is the embedding transposed")
    embed_scale: bool = setting(False, resume="frozen", help="multiply embeddings by sqrt(width) (Gemma)")
    dropout: float = setting(0.0, resume="frozen", ge=0, lt=1, help="rate on embeddings and on each block's output")
    lora: Lora | None = setting(None, resume="frozen", help="train low-rank adapters and nothing else")
    attention: Literal["auto", "cudnn", "xla", "blocked", "reference"] = setting(
        "auto", resume="elastic", help="kernel; auto takes the fastest that serves and says which"
    )
    loss_chunk: Literal["auto"] | int = setting(
        "auto", resume="elastic", help="tokens whose logits are held at a time; 0 holds all"
    )

    @model_validator(mode="after")
    def _shapes_fit(self):
        if self.head_dim is None and self.width % self.heads:
            near = nearest_divisor(self.width, self.heads)
            hint = f"heads: {near} would, or set head_dim"
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width}); {hint}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            near = nearest_divisor(self.heads, self.kv_heads)
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads}); kv_heads: {near} would")
        if self.positions == "rope" and self.dim_per_head % 2:
            raise ValueError(f"rope turns pairs, so head_dim ({self.dim_per_head}) must be even")
        if self.layers % len(self.window_pattern):
            raise ValueError(
                f"layers ({self.layers}) must be a multiple of the {len(self.window_pattern)} entries of window_pattern"
            )
        if self.window is None and len(set(self.window_pattern)) > 1:
            raise ValueError("window_pattern alternates, but window is not set")
        if self.norm_offset and self.norm == "layernorm":
            raise ValueError("norm_offset belongs to rmsnorm (Gemma); norm is layernorm")
        if self.lora is not None and set(self.lora.targets) == {"gate"} and self.activation not in GATED:
            raise ValueError(f"lora.targets names only the gate, and {self.activation} has none")
        if self.lora is not None and self.lora.base == "nf4":
            inputs = {"width": self.width, "heads x head_dim": self.heads * self.dim_per_head,
                      "mlp_width": self.hidden_width}  # fmt: skip
            for name, size in inputs.items():
                if size % NF4_BLOCK:
                    near = max(round(size / NF4_BLOCK), 1) * NF4_BLOCK
                    raise ValueError(
                        f"lora.base: nf4 needs {name} ({size}) to be a multiple of {NF4_BLOCK}; {near} would be"
                    )
        if isinstance(self.loss_chunk, int) and self.loss_chunk < 0:
            raise ValueError(f"loss_chunk is a number of tokens, 0 for all, or auto; got {self.loss_chunk}")
        return self

    @property
    def dim_per_head(self) -> int:
        return self.head_dim if self.head_dim is not None else self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP. Gated: 8/3 width (Shazeer 2020, equal parameters), up to a multiple of 64."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 192) * 64 if self.activation in GATED else 4 * self.width

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer of one period; None is unlimited."""
        return tuple(self.window if kind == "local" else None for kind in self.window_pattern)

    def num_parameters(self, vocab_size: int) -> int:
        """Exact count of parameters, for budgets and tables; adapters (`lora`) are not counted."""
        query, shared = self.heads * self.dim_per_head, self.num_kv_heads * self.dim_per_head
        norm = self.width * (2 if self.norm == "layernorm" else 1)
        gates = 2 if self.activation in GATED else 1
        layer = self.width * (2 * query + 2 * shared) + (gates + 1) * self.width * self.hidden_width
        layer += norm * (1 if self.parallel else 2) + (2 * norm if self.post_norm else 0)
        layer += 2 * self.dim_per_head if self.qk_norm else 0
        layer += query + 2 * shared if self.bias != "none" else 0
        layer += 2 * self.width + gates * self.hidden_width if self.bias == "all" else 0
        tables = vocab_size * self.width * (1 if self.tied else 2)
        tables += self.max_length * self.width if self.positions == "learned" else 0
        return self.layers * layer + tables + norm


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; the larger of two equally near."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), -d))
