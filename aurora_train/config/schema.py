"""The core sections of every config, which the trainer owns. A recipe adds its own (`model`, `data`, ...).

A field exists only if a user has a reason to set it. Its help states the unit; its resume class states what a change
does to a run. `conflicts` of a section yields what its keys exclude in the whole config.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticKnownError

from aurora_train.config.energy import Energy
from aurora_train.config.fields import Section, parse_bytes, setting
from aurora_train.config.gates import Gates
from aurora_train.errors import UserError

UNSETTLED = ("auto", "native")  # values of `train.precision` that the device decides


class Train(Section):
    """Length, batch size, seed and number format of the training."""

    steps: int = setting(1000, resume="warned", ge=1, help="optimizer steps of the whole run")
    batch: int = setting(32, ge=1, help="examples per optimizer step, over all devices and microbatches")
    seed: int = setting(0, ge=0, lt=2**63, help="root of every random stream and of the data order")
    precision: Literal["auto", "native", "float32", "bfloat16", "fp8"] = setting(
        "auto",
        help="number format of the compute; auto = bfloat16 on an accelerator that has it, else float32, resolved when "
        "the run starts; native = the same, and bfloat16 also on a processor with instructions for it (avx512_bf16); "
        "fp8 = bfloat16 with the products of the blocks in 8 bits while training; parameters are "
        "stored in the format of optimizer.master",
    )
    bf16_ends: int = setting(0, ge=0, help="with fp8: blocks (units of a stack) at either end that stay in bfloat16")
    stop_after_minutes: float | None = setting(
        None, resume="free", gt=0, help="save and stop after this many minutes of this process; null = never"
    )
    spike: float | None = setting(
        None, gt=0,
        help="skip a step whose loss or gradient norm lies this many robust standard deviations above the median of "
        "the last 64; null = never",
    )
    rewind_after: int | None = setting(
        5, resume="warned", ge=1,
        help="skipped steps in a row after which the run goes back and leaves out their data; null = never",
    )
    rewinds: int = setting(3, resume="free", ge=0, help="returns to the same checkpoint before the run stops")
    watchdog: Literal["auto", "off"] | Annotated[float, Field(gt=0)] = setting(
        "auto", resume="free",
        help="end a process that makes no progress: after minutes learned from the run, after this many, or never",
    )
    forms: Literal["auto", "plain"] = setting(
        "auto", resume="elastic",
        help="how operations are written: auto = as the platform needs them, plain = as their formulas read",
    )

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of activations, for a recipe to pass to its model. The linear layers apply fp8 themselves."""
        assert self.precision not in UNSETTLED, "machine/precision.py settles it before a model is built"
        return "bfloat16" if self.precision == "fp8" else self.precision

    def conflicts(self, config) -> Iterator[UserError]:
        model = getattr(config, "model", None)
        layers, lora = getattr(model, "layers", None), getattr(model, "lora", None)
        if self.precision == "fp8" and getattr(lora, "base", None) == "nf4":
            yield UserError(
                "a base of 4-bit codes is not multiplied in fp8", where="train.precision",
                why="its kernels are decoded to bfloat16", hint="train.precision=bfloat16, or model.lora.base=compute",
            )  # fmt: skip
        if self.bf16_ends and self.precision != "fp8":
            yield UserError(
                "train.bf16_ends applies to fp8 only: in any other precision all blocks have the same format",
                where="train.bf16_ends", hint="train.precision=fp8, or train.bf16_ends=0",
            )  # fmt: skip
        elif self.bf16_ends and isinstance(layers, int) and layers <= 2 * self.bf16_ends:
            yield UserError(
                f"nothing is left for fp8: {self.bf16_ends} at either end of {layers} layers stay in bfloat16",
                where="train.bf16_ends", hint=f"train.bf16_ends={max(layers - 1, 0) // 2} at most",
            )  # fmt: skip


class Schedule(Section):
    """The learning rate over the run, as a share of `optimizer.lr`."""

    name: Literal["constant", "cosine", "linear", "wsd"] = setting(
        "cosine", resume="warned", help="shape after the warm-up; wsd = warm up, stay, decay at the end"
    )
    warmup: int = setting(0, resume="warned", ge=0, help="steps of linear rise from zero")
    decay: float = setting(0.2, resume="warned", ge=0, le=1, help="wsd only: share of the steps spent decaying")
    final: float = setting(0.1, resume="warned", ge=0, le=1, help="share of lr left at the last step")
    extend: int | None = setting(
        None, resume="warned", ge=1,
        help="length in steps of the run that this one extends: the rate follows that run's schedule to its end and "
        "stays at its final value; null = the schedule is as long as the run",
    )


class Optimizer(Section):
    """The update rule."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = setting("adamw", help="the update rule")
    lr: float = setting(1e-3, resume="warned", gt=0, help="peak learning rate")
    weight_decay: float = setting(0.1, resume="warned", ge=0, help="decoupled decay of matrices, times the rate")
    beta1: float = setting(0.9, ge=0, lt=1, help="decay of the first moment, per step")
    beta2: float = setting(0.95, ge=0, lt=1, help="decay of the second moment, per step")
    eps: float = setting(1e-8, gt=0, help="added to the root of the second moment")
    momentum: float = setting(0.95, ge=0, lt=1, help="muon only: decay of its momentum, per step")
    adam_lr: float | None = setting(
        None, resume="warned", gt=0,
        help="muon only: peak rate of what AdamW updates (embeddings, norms, head); null = derived from lr",
    )
    clip: float | None = setting(1.0, resume="warned", gt=0, help="largest global gradient norm; null = no clipping")
    ema: float | None = setting(None, gt=0, lt=1, help="decay per step of a parameter average; null = none kept")
    moments: Literal["float32", "bfloat16", "int8"] = setting(
        "float32", help="format of the moments; int8 = 8-bit codes in blocks of 256, tables and vectors in float32"
    )
    master: Literal["float32", "bfloat16"] = setting(
        "float32", help="format in which parameters are stored; bfloat16 is updated with stochastic rounding"
    )
    schedule: Schedule = Schedule()


class Mesh(Section):
    """How the devices of all processes are arranged."""

    data: Literal["auto"] | Annotated[int, Field(ge=-1)] = setting(
        -1, resume="elastic", help="devices that split the batch; -1 = all that remain; auto = the planner's choice"
    )
    fsdp: Literal["auto"] | Annotated[int, Field(ge=1)] = setting(
        1, resume="elastic", help="devices that split the parameters (and the batch); auto = the planner's choice"
    )
    tensor: Literal["auto"] | Annotated[int, Field(ge=1)] = setting(
        1, resume="elastic",
        help="devices that split heads, hidden widths and vocabulary; auto = the planner's choice",
    )

    @field_validator("data")
    @classmethod
    def _not_zero(cls, value):
        if value == 0:
            raise ValueError("must be -1 (all remaining devices) or at least 1")
        return value


class Memory(Section):
    """The memory planner's budget, and the choices that are made for it."""

    budget: str = setting("auto", resume="elastic", help="bytes per device the run may use, such as 96GB or 80GiB")
    accumulation: Literal["auto"] | Annotated[int, Field(ge=1)] = setting(
        "auto", resume="elastic", help="microbatches per optimizer step"
    )
    save: Literal["auto", "all", "nothing"] | list[str] = setting(
        "auto", resume="elastic", help="tensors kept for the backward pass: all, nothing, or a list of tags"
    )
    offload: Literal["none", "auto"] | list[str] = setting(
        "none", resume="elastic",
        help="kept tensors that wait in the processor's memory: none, auto (the planner's choice), or a list of tags",
    )
    unroll: Literal["auto"] | bool = setting("auto", resume="elastic", help="unroll the layers instead of scanning")
    on_oom: Literal["replan", "stop"] = setting(
        "replan", resume="free", help="out of memory while training: continue with the next smaller plan, or stop"
    )
    guard: Literal["auto", "on", "off"] = setting(
        "auto", resume="free",
        help="save and stop (status 77) while a save still fits in the memory that is left; auto = on where the "
        "processor and the device share memory",
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _is_a_size(cls, value):
        if value != "auto":
            try:
                parse_bytes(str(value))
            except ValueError:
                bare = str(value).isdecimal() and int(value)
                example = "96GB or 80GiB" if not bare else f"{bare}GB" if bare < 10_000 else f"{bare}B"
                raise ValueError(f"must be a size with its unit, such as {example}, or auto") from None
        return value

    def conflicts(self, config) -> Iterator[UserError]:
        batch, parts = config.train.batch, self.accumulation
        if parts != "auto" and batch % parts:
            below = batch // parts * parts
            nearest = " or ".join(f"train.batch={n}" for n in (below, below + parts) if n)
            fewer = next(n for n in range(parts, 0, -1) if batch % n == 0)
            yield UserError(
                f"a batch of {batch} does not divide into {parts} microbatches (memory.accumulation)",
                where="train.batch", hint=f"the nearest: {nearest}; or memory.accumulation={fewer}",
            )  # fmt: skip
        if self.offload == "none" or not self.offload:
            return
        if self.save == "all":
            yield UserError(
                "memory.save=all keeps everything without names, so nothing can be offloaded by name",
                where="memory.offload", hint="memory.save=auto, or a list of tags",
            )  # fmt: skip
        elif self.offload == "auto" and (self.save != "auto" or self.unroll != "auto"):
            yield UserError(
                "the planner chooses offloaded and kept tensors together, but the config already says what is kept",
                where="memory.offload", hint="memory.save=auto memory.unroll=auto, or name the tags to be offloaded",
            )  # fmt: skip


class Checkpoint(Section):
    """When to save and what to keep."""

    every: int = setting(100, resume="free", ge=1, help="steps between rolling checkpoints")
    keep: int = setting(2, resume="free", ge=1, help="rolling checkpoints kept")
    keep_every: int | None = setting(None, resume="free", ge=1, help="keep those at multiples of this; null = none")
    best: int = setting(
        1, resume="free", ge=0, help="checkpoints kept for the best evaluations, by the recipe's metric or the loss"
    )
    patience_minutes: float = setting(
        60, resume="free", ge=0, help="how long the run continues while no save succeeds, for instance on a full disk"
    )
    gather: bool = setting(
        False, resume="free",
        help="for several processes that share no disk: process 0 writes the state of all, and reads it for all",
    )


class Evaluate(Section):
    """Validation while training, and the score at its end."""

    every: int | None = setting(None, resume="warned", ge=1, help="steps between evaluations; null = only at the end")
    examples: int = setting(64, resume="warned", ge=1, help="validation examples per evaluation")
    score_every: int | None = setting(
        None, resume="warned", ge=1,
        help="steps between scores of the validation split, each with an evaluation; null = only the final score",
    )
    patience: int | None = setting(
        None, resume="warned", ge=1,
        help="end the run after this many evaluations in a row without a new best; null = never",
    )
    before: bool = setting(
        False, resume="free", help="also score the model that the run starts with, and compare the final score with it"
    )
    final: bool = setting(True, resume="free", help="run the recipe's score after the last step")
    baselines: bool = setting(True, resume="free", help="also score the recipe's simple baselines")

    def conflicts(self, config) -> Iterator[UserError]:
        if self.patience is not None and self.every is None and self.score_every is None:
            yield UserError(
                "it counts evaluations, and there is none before the last step", where="evaluate.patience",
                hint="evaluate.every=N, evaluate.score_every=N, or evaluate.patience=null",
            )  # fmt: skip
        if self.before and not self.final:
            yield UserError(
                "it is compared with the final score, and there is none", where="evaluate.before",
                hint="evaluate.final=true, or evaluate.before=false",
            )  # fmt: skip


class Log(Section):
    """What is shown, and where metrics are sent. Nothing here affects the numbers."""

    every: int = setting(10, resume="free", ge=1, help="steps between progress lines with rates")
    sinks: list[Literal["tensorboard", "wandb", "wandb-online"]] = setting(
        [], resume="free", help="viewers fed beside metrics.jsonl; only wandb-online uses the network"
    )


class Init(Section):
    """Where the initial parameters come from: for the whole model, or for a part by the prefix of its names.

    `init: {policy: RUN, teacher: RUN}` is short for `init: {parts: {policy: RUN, teacher: RUN}}`, and the prefix `""`
    for `from`.
    """

    from_: str | None = setting(
        None, alias="from", path_unless=(),
        help="a run folder, an open model (Hugging Face folder, GGUF) or weights file; null = random",
    )
    parts: dict[str, str] = setting(
        {}, path_unless=(),
        help="for a prefix of the model's parameters (`policy`), the run folder or weights file that they start from",
    )
    facts: str = setting(
        "inherit",
        help="tokenizer, sizes and scales: inherit = those of the run that `from` names; a prefix = those of that "
        "part's run; own = this config's own",
    )
    tokens: list[str] = setting(
        [], help="special tokens that the tokenizer of `from` gets in addition; their rows begin as the mean row"
    )

    @model_validator(mode="before")
    @classmethod
    def _is_a_section(cls, given):
        if isinstance(given, str):
            raise ValueError("must be a section: the source of the whole model is `from`, as in init.from=RUN")
        return given

    @model_validator(mode="after")
    def _has_a_tokenizer(self):
        if self.tokens and (self.from_ is None or self.facts_from != ""):
            raise ValueError("tokens are added to the tokenizer of `from`, which must be set, with facts: inherit")
        return self

    @field_validator("facts")
    @classmethod
    def _names_a_source(cls, value, info):
        known = ["inherit", "own", *info.data.get("parts", {})]
        if value not in known:
            raise PydanticKnownError("literal_error", {"expected": " or ".join(known)})
        return value

    @property
    def sources(self) -> dict[str, str]:
        """The run folder or weights file for each prefix, `""` for the whole model."""
        return ({} if self.from_ is None else {"": self.from_}) | self.parts

    @property
    def facts_from(self) -> str | None:
        """The prefix whose run provides the facts; None if they are the config's own or there is no such run."""
        prefix = "" if self.facts == "inherit" else self.facts
        return prefix if prefix in self.sources and self.facts != "own" else None


class Core(Section):
    """The whole config. Loading composes a subclass that adds the recipe's sections."""

    recipe: str = setting(..., min_length=1, help="a bundled recipe's name, or a .py file beside this config")
    name: str | None = setting(
        None, resume="free", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        help="name of the run folder; null = the config file's name",
    )
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    memory: Memory = Memory()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
    energy: Energy = Energy()
    gates: Gates = Gates()
    init: Init = Init()

    _loaded: Any = PrivateAttr(None)

    @property
    def source(self) -> Path:
        """The YAML file this config was read from."""
        return self._loaded.source

    @property
    def recipe_class(self) -> type:
        """The Recipe subclass that `recipe` names."""
        return self._loaded.recipe.cls

    @property
    def recipe_file(self) -> Path:
        """The file that holds the recipe."""
        return self._loaded.recipe.file

    @property
    def recipe_sha256(self) -> str:
        """sha256 hex of the recipe's code: its file, and the modules beside it that it imports."""
        return self._loaded.recipe.sha256

    @property
    def recipe_code(self) -> dict[str, Path]:
        """The recipe's file and the modules beside it that it imports, by their names in its folder."""
        return {self.recipe_file.name: self.recipe_file, **self._loaded.recipe.beside}

    @property
    def recipe_bundled(self) -> bool:
        """False for a user's own file, of which the run folder has to keep a copy."""
        return self._loaded.recipe.bundled

    @property
    def derived(self) -> list:
        """The `Derived` values that filled keys which the user left unset."""
        return self._loaded.derived

    @property
    def overruled(self) -> list[str]:
        """One line for each key on which a dial and an explicit setting disagree."""
        return self._loaded.overruled

    def __eq__(self, other):
        # Two configs with the same values are equal, wherever they were read from.
        return isinstance(other, Core) and self.model_dump() == other.model_dump()

    __hash__ = None
