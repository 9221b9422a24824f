"""The shape of a transformer as a config section; free of jax so that `aurora check` stays fast.

The vocabulary size is not here, because it follows from the tokenizer; nor is the mask, which follows from the
objective and is set by the recipe. The layers are the rows of a table (`layer_table`, or `window` and `window_pattern`
as shorthand), repeated as one period. The fields cover the families of `interop/families`; `tests/parity` compares each
of them with its published implementation.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import model_validator

from aurora_train.config import Section, setting
from aurora_train.nn.lora_config import KERNELS, NF4_BLOCK, Lora, refuse_targets, refuse_unfit_blocks  # noqa: F401

GATED = ("swiglu", "geglu")
KINDS = ("full", "window", "cross")  # the built-in kinds of layers with attention
LINEAR = "linear"  # the built-in kind with a state instead of keys (`nn.delta`)


class RopeScaling(Section):
    """How rotary frequencies stretch beyond the trained length.

    `linear`: Chen et al. 2023; `llama3`: Llama 3; `yarn`: Peng et al. 2023; `longrope`: Ding et al. 2024.
    """

    kind: Literal["none", "linear", "llama3", "yarn", "longrope"] = setting(
        "none", resume="frozen", help="rule of stretching"
    )
    factor: float = setting(1.0, resume="frozen", gt=0, help="how many times longer the context becomes")
    low_freq_factor: float = setting(1.0, resume="frozen", gt=0, help="llama3: waves longer than length/this stretch")
    high_freq_factor: float = setting(4.0, resume="frozen", gt=0, help="llama3: waves shorter than length/this stay")
    original_length: int = setting(
        8192, resume="frozen", gt=1, help="llama3, yarn, longrope: context length before stretching"
    )
    beta_fast: float = setting(32.0, resume="frozen", gt=0, help="yarn: waves of more turns than this stay")
    beta_slow: float = setting(1.0, resume="frozen", gt=0, help="yarn: waves of fewer turns than this stretch")
    attention_factor: float | None = setting(
        None, resume="frozen", gt=0, help="yarn, longrope: factor on cosines and sines; none: by the paper's formula"
    )
    short_factors: tuple[float, ...] = setting(
        (), resume="frozen", strict=False, help="longrope: divisors of the frequencies up to original_length"
    )
    long_factors: tuple[float, ...] = setting(
        (), resume="frozen", strict=False, help="longrope: divisors of the frequencies of longer rows"
    )

    @model_validator(mode="after")
    def _bands_apart(self):
        if self.kind == "longrope" and not len(self.short_factors) == len(self.long_factors) > 0:
            raise ValueError("longrope needs short_factors and long_factors, one for each pair of entries that turn")
        if self.kind == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast:g}) must exceed beta_slow ({self.beta_slow:g})")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor:g}) must exceed low_freq_factor ({self.low_freq_factor:g})"
            )
        return self


class Rope(NamedTuple):
    """The rotary positions of a layer: base of the wavelengths, how many of a head's entries turn, stretching."""

    theta: float
    dims: int
    scaling: RopeScaling


class Layer(Section):
    """One row of the table of layers. `None` means the model's own field."""

    kind: str = setting(
        "full", resume="frozen",
        help="attention without bounds (full), in a window, to an encoder's output (cross); linear: Gated DeltaNet",
    )
    window: int | None = setting(None, resume="frozen", ge=1, help="kind window: tokens seen, itself included")
    theta: float | None = setting(None, resume="frozen", gt=0, help="base of the rotary wavelengths; none: rope_theta")
    rotary: float = setting(1.0, resume="frozen", ge=0, le=1, help="share of each head that is turned; 0: NoPE")
    scaling: RopeScaling | None = setting(None, resume="frozen", help="stretching of frequencies; none: rope_scaling")
    mlp: bool = setting(True, resume="frozen", help="whether an MLP follows; false: the next row comes at once")

    @model_validator(mode="after")
    def _window_where_it_is_used(self):
        if self.kind == "window" and self.window is None:
            raise ValueError("a layer of kind window needs its window, such as window: 512")
        if self.kind in ("full", "cross", LINEAR) and self.window is not None:
            raise ValueError(f"a layer of kind {self.kind} has no window; kind: window has")
        return self


class Linear(Section):
    """The heads of layers of kind linear: Gated DeltaNet (Yang et al. 2025)."""

    key_heads: int = setting(resume="frozen", ge=1, help="query and key heads")
    value_heads: int = setting(resume="frozen", ge=1, help="value heads; a multiple of key_heads")
    key_dim: int = setting(resume="frozen", ge=1, help="size of a query or key")
    value_dim: int = setting(resume="frozen", ge=1, help="size of a value")
    taps: int = setting(4, resume="frozen", ge=2, help="tokens over which queries, keys and values are convolved")

    @model_validator(mode="after")
    def _heads_fit(self):
        if self.value_heads % self.key_heads:
            raise ValueError(f"key_heads ({self.key_heads}) must divide value_heads ({self.value_heads})")
        return self


class DecoderConfig(Section):
    """A transformer. `None` means that a value follows from the other fields, as the help says.

    `mixers`: a recipe's own layer kinds by their name in `kind`; a subclass sets it (docs/extend.md).
    """

    mixers: ClassVar[dict[str, Any]] = {}

    size: str | None = setting(None, resume="frozen", help="one dial: d6, d12, ... or 125m, 350m, 1b, 3b, 8b")
    width: int = setting(384, resume="frozen", ge=1, help="size of the residual stream")
    layers: int = setting(6, resume="frozen", ge=1, help="number of blocks")
    heads: int = setting(6, resume="frozen", ge=1, help="query heads")
    kv_heads: int | None = setting(None, resume="frozen", ge=1, help="key and value heads; none: as many as heads")
    head_dim: int | None = setting(None, resume="frozen", ge=1, help="size of a head; none: width / heads")
    mlp_width: int | None = setting(
        None, resume="frozen", ge=1, help="hidden size of the MLP; none: 4 width, or 8/3 width if gated"
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu"] = setting(
        "swiglu", resume="frozen", help="swiglu and geglu (tanh GELU) are gated"
    )
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", resume="frozen", help="normalisation")
    norm_eps: float = setting(1e-5, resume="frozen", gt=0, help="added to the variance")
    norm_offset: bool = setting(False, resume="frozen", help="multiply by 1 + scale (Gemma) and not by scale")
    qk_norm: bool | Literal["head", "projection"] = setting(
        False, resume="frozen",
        help="RMSNorm on each query and key head (true, head: Qwen 3) or on all heads as one (projection: OLMo 2)",
    )
    norm_place: Literal["before", "after", "both", "sum"] = setting(
        "before", resume="frozen",
        help="normalise the input of attention and MLP, their output (OLMo 2), both, or the sum with the residual "
        "stream (Vaswani et al. 2017)",
    )
    post_norm: bool = setting(False, resume="frozen", help="as norm_place: both (Gemma 2)")
    parallel: bool = setting(False, resume="frozen", help="attention and MLP read the same normed input (GPT-J)")
    bias: Literal["none", "qkv", "all"] = setting(
        "none", resume="frozen", help="none (Llama), qkv (Qwen 2) or all linear layers (GPT-2)"
    )
    positions: Literal["rope", "learned", "none"] = setting("rope", resume="frozen", help="how positions are encoded")
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
    layer_table: tuple[Layer, ...] | None = setting(
        None, resume="frozen", strict=False,
        help="period of layers, a row each ([{kind: window, window: 512}, {rotary: 0}]); none: as window_pattern says",
    )
    memory_width: int | None = setting(
        None, resume="frozen", ge=1, help="size of the encoder's output that cross layers read; none: width"
    )
    linear: Linear | None = setting(None, resume="frozen", help="the heads of layers of kind linear (Qwen 3.5)")
    attention_gate: bool = setting(
        False, resume="frozen", help="multiply attention's output by a sigmoid of its input (Qwen 3.5)"
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
        "auto", resume="elastic", help="kernel; auto takes the fastest that works and reports it"
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
        if self.norm_place in ("after", "sum") and self.post_norm:
            raise ValueError(
                f"post_norm means norm_place: both, but norm_place is {self.norm_place}; leave post_norm out"
            )
        if self.norm_place == "sum" and self.parallel:
            raise ValueError("parallel has one sum of attention, MLP and residual stream: norm_place: sum needs two")
        if self.layer_table is not None:
            self._check_table(self.layer_table)
        if self.layers % len(self.window_pattern):
            raise ValueError(
                f"layers ({self.layers}) must be a multiple of the {len(self.window_pattern)} entries of window_pattern"
            )
        if self.window is None and len(set(self.window_pattern)) > 1:
            raise ValueError("window_pattern alternates, but window is not set")
        if self.norm_offset and self.norm == "layernorm":
            raise ValueError("norm_offset belongs to rmsnorm (Gemma), but norm is layernorm")
        if self.lora is not None:
            refuse_targets(self.lora, self.kernels, self.tied)
            if self.lora.base == "nf4":
                refuse_unfit_blocks(self._inputs())
        if isinstance(self.loss_chunk, int) and self.loss_chunk < 0:
            raise ValueError(f"loss_chunk is a number of tokens, 0 for all, or auto; got {self.loss_chunk}")
        return self

    @model_validator(mode="after")
    def _factors_fit(self):
        for rope in self.ropes:
            if rope.scaling.kind == "longrope" and len(rope.scaling.short_factors) != rope.dims // 2:
                raise ValueError(
                    f"longrope has {len(rope.scaling.short_factors)} factors, but {rope.dims // 2} pairs of a head turn"
                )
        return self

    def _check_table(self, table: tuple[Layer, ...]) -> None:
        if self.window is not None or self.window_pattern != ("local",):
            raise ValueError("the rows of layer_table have their own windows: leave window and window_pattern out")
        if not table:
            raise ValueError("layer_table has no row; [{kind: full}] makes every layer alike")
        if self.layers % len(table):
            raise ValueError(f"layers ({self.layers}) must be a multiple of the {len(table)} rows of layer_table")
        for number, row in enumerate(table):
            if row.kind not in (*KINDS, LINEAR, *self.mixers):
                known = ", ".join((*KINDS, LINEAR, *self.mixers))
                raise ValueError(f"row {number} of layer_table is of kind {row.kind!r}; there are {known}")
            if row.kind == LINEAR and self.linear is None:
                raise ValueError(f"row {number} of layer_table is of kind linear, but `linear` names no heads")
            if self.positions != "rope" and (row.theta or row.scaling or row.rotary != 1.0):
                raise ValueError(f"row {number} of layer_table has rotary positions, but positions is {self.positions}")
            if self.positions == "rope" and self.rotary_dims(row) % 2:
                near = 2 * round(self.rotary_dims(row) / 2) / self.dim_per_head
                raise ValueError(
                    f"row {number} of layer_table turns {self.rotary_dims(row)} of a head's {self.dim_per_head} "
                    f"entries, but rope turns pairs: rotary: {near:g} would"
                )

    def _inputs(self) -> dict[str, int]:
        """The inputs of the kernels of the blocks, by the settings they follow from."""
        inputs = {"width": self.width, "heads x head_dim": self.heads * self.dim_per_head,
                  "mlp_width": self.hidden_width}  # fmt: skip
        if self.linear is not None and any(row.kind == LINEAR for row in self.rows):
            inputs["linear.value_heads x value_dim"] = self.linear.value_heads * self.linear.value_dim
        return inputs

    @property
    def kernels(self) -> tuple[str, ...]:
        """All that may get an adapter: `attention.query`, ..., `mlp.down`, `embedding`, and `head` unless it is tied.

        Of a recipe's own layer kinds, those that are named like attention's.
        """
        found = []
        for row in self.rows:
            gated = row.kind == LINEAR or (self.attention_gate and row.kind in KINDS)
            place = "attention" if row.kind in KINDS else row.kind
            found += [f"{place}.{name}" for name in (*KERNELS[:4], *(["out_gate"] if gated else []))]
            if row.mlp:
                found += [f"mlp.{name}" for name in KERNELS[4 if self.activation in GATED else 5 :]]
        return (*dict.fromkeys(found), "embedding", *([] if self.tied else ["head"]))

    @property
    def rows(self) -> tuple[Layer, ...]:
        """The rows of one period of layers."""
        if self.layer_table is not None:
            return self.layer_table
        windows = (self.window if name == "local" else None for name in self.window_pattern)
        return tuple(Layer(kind="window", window=w) if w is not None else Layer() for w in windows)

    def rotary_dims(self, row: Layer) -> int:
        """How many entries of each head a layer turns."""
        turns = self.positions == "rope" and row.kind not in ("cross", LINEAR)
        return int(self.dim_per_head * row.rotary) if turns else 0

    def rope(self, row: Layer) -> Rope | None:
        """The rotary positions of a layer; None if it has none."""
        theta, scaling = row.theta or self.rope_theta, row.scaling or self.rope_scaling
        return Rope(theta, self.rotary_dims(row), scaling) if self.rotary_dims(row) else None

    @property
    def ropes(self) -> list[Rope]:
        """The distinct rotary positions, in the order of the rows."""
        ropes = []
        for row in self.rows:
            if (rope := self.rope(row)) is not None and rope not in ropes:
                ropes.append(rope)
        return ropes

    @property
    def norms(self) -> tuple[bool, bool]:
        """(whether there is a norm before attention and MLP, whether there is one after). Sums have neither."""
        return self.norm_place in ("before", "both"), self.post_norm or self.norm_place in ("after", "both")

    @property
    def dim_per_head(self) -> int:
        return self.head_dim if self.head_dim is not None else self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP. Gated: 8/3 width (Shazeer 2020, equal parameters), rounded up to a multiple of 64."""
        if self.mlp_width is not None:
            return self.mlp_width
        return -(-8 * self.width // 192) * 64 if self.activation in GATED else 4 * self.width

    def num_parameters(self, vocab_size: int) -> int:
        """Exact count of parameters, for budgets and tables. Adapters (`lora`) and a recipe's own layer kinds are not
        counted."""
        norm = self.width * (2 if self.norm == "layernorm" else 1)
        period = sum(self._in_row(row, norm) for row in self.rows if row.kind in (*KINDS, LINEAR))
        tables = vocab_size * self.width * (1 if self.tied else 2)
        tables += self.max_length * self.width if self.positions == "learned" else 0
        return self.layers * period // len(self.rows) + tables + norm

    def _in_row(self, row: Layer, norm: int) -> int:
        query, shared = self.heads * self.dim_per_head, self.num_kv_heads * self.dim_per_head
        source = (self.memory_width or self.width) if row.kind == "cross" else self.width
        gates = 2 if self.activation in GATED else 1
        before, after, summed = *self.norms, self.norm_place == "sum"
        count = self.width * (3 if self.attention_gate else 2) * query + source * 2 * shared
        count += {"projection": query + shared, False: 0}.get(self.qk_norm, 2 * self.dim_per_head)
        count += query + 2 * shared if self.bias != "none" else 0
        count += self.width if self.bias == "all" else 0
        count = self._in_linear() if row.kind == LINEAR else count
        count += norm * (before + after + summed)
        if row.mlp:
            count += (gates + 1) * self.width * self.hidden_width
            count += self.width + gates * self.hidden_width if self.bias == "all" else 0
            count += norm * ((before and not self.parallel) + after + summed)
        return count

    def _in_linear(self) -> int:
        """The parameters of the mixer of a layer of kind linear."""
        shape = self.linear
        keys, values = shape.key_heads * shape.key_dim, shape.value_heads * shape.value_dim
        kernels = self.width * (2 * keys + 3 * values + 2 * shape.value_heads)
        return kernels + shape.taps * (2 * keys + values) + 2 * shape.value_heads + shape.value_dim


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; the larger of two that are equally near."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), -d))
