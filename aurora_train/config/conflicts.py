"""Refuses combinations of config keys that exclude each other."""

from __future__ import annotations

from aurora_train.errors import UserError


def refuse_offload(config) -> None:
    """UserError if a config asks for `memory.offload` together with settings that leave nothing to offload."""
    if config.memory.offload == "none" or not config.memory.offload:
        return
    if config.memory.save == "all":
        raise UserError(
            "memory.save=all keeps everything without names, so nothing can be offloaded by name",
            where="memory.offload",
            hint="memory.save=auto, or a list of tags",
        )  # fmt: skip
    if config.memory.offload == "auto" and (config.memory.save != "auto" or config.memory.unroll != "auto"):
        raise UserError(
            "the planner chooses offloaded and kept tensors together, but the config already says what is kept",
            where="memory.offload", hint="memory.save=auto memory.unroll=auto, or name the tags to be offloaded",
        )  # fmt: skip


def refuse_uneven(config) -> None:
    """UserError if a batch does not divide into the requested number of microbatches, on any number of devices."""
    batch, parts = config.train.batch, config.memory.accumulation
    if parts == "auto" or batch % parts == 0:
        return
    below = batch // parts * parts
    nearest = " or ".join(f"train.batch={n}" for n in (below, below + parts) if n)
    fewer = next(n for n in range(parts, 0, -1) if batch % n == 0)
    raise UserError(
        f"a batch of {batch} does not divide into {parts} microbatches", where="train.batch",
        hint=f"the nearest: {nearest}; or memory.accumulation={fewer}",
    )  # fmt: skip


def refuse_idle_patience(config) -> None:
    """UserError if a config asks to stop for want of a better evaluation, and evaluates only at the end."""
    wish = config.evaluate
    if wish.patience is not None and wish.every is None and wish.score_every is None:
        raise UserError(
            "it counts evaluations, and there is none before the last step", where="evaluate.patience",
            hint="evaluate.every=N, evaluate.score_every=N, or evaluate.patience=null",
        )  # fmt: skip


def refuse_fp8(config) -> None:
    """UserError if a config asks for fp8 where it does not apply, or sets `train.bf16_ends` without fp8."""
    lora = getattr(getattr(config, "model", None), "lora", None)
    if config.train.precision == "fp8" and getattr(lora, "base", None) == "nf4":
        raise UserError(
            "a base of 4-bit codes is not multiplied in fp8", where="train.precision",
            why="its kernels are decoded to bfloat16", hint="train.precision=bfloat16, or model.lora.base=compute",
        )  # fmt: skip
    if config.train.bf16_ends and config.train.precision != "fp8":
        raise UserError(
            "train.bf16_ends applies to fp8 only: in any other precision all blocks have the same format",
            where="train.bf16_ends", hint="train.precision=fp8, or train.bf16_ends=0",
        )  # fmt: skip
    layers = getattr(getattr(config, "model", None), "layers", None)
    if config.train.bf16_ends and isinstance(layers, int) and layers <= 2 * config.train.bf16_ends:
        raise UserError(
            f"nothing is left for fp8: {config.train.bf16_ends} at either end of {layers} layers stay in bfloat16",
            where="train.bf16_ends", hint=f"train.bf16_ends={max(layers - 1, 0) // 2} at most",
        )  # fmt: skip
