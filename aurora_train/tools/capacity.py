"""Finds the largest model that a machine trains at each context, from a ladder of published shapes.

Every cell is the real step of the bundled language model, traced and estimated (or compiled, on request) for the
machine, one example at a time with everything recomputed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from aurora_train import mesh as meshes
from aurora_train.config import config_class
from aurora_train.config.find_recipe import find_recipe
from aurora_train.errors import UserError
from aurora_train.files import cache_folder
from aurora_train.machine.memory import budget_bytes
from aurora_train.machine.profile import this_machine
from aurora_train.machine.targets import find_machine, machine_names
from aurora_train.nn.stack import Segment
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import Planner
from aurora_train.plan.verify import can_compile_for_gpu, target_devices
from aurora_train.tools.report_page import flatten
from aurora_train.tools.sizes import GPT3, LLAMA3, LLAMA3_PAPER, NAMED
from aurora_train.train.rehearsal import Rehearsal, rehearse
from aurora_train.units import percent

CONTEXTS = (2048, 4096, 8192, 32768, 65536, 131072)
QWEN3 = "Yang et al. 2025, table 1; widths: the model's published config.json"
HEDGE = 0.1  # an estimate that exceeds the budget by up to this share is still worth compiling


@dataclass(frozen=True)
class Size:
    """One rung of the ladder: `model` is the section of a config, `vocab` the number of tokens."""

    name: str
    model: dict
    vocab: int
    source: str


@dataclass(frozen=True)
class State:
    """The formats of parameters and optimizer state: a nested dict of config sections.

    `short`: a little more than the largest share by which the estimate was seen to fall short of the compiled peak
    (docs/planner_accuracy.md). It is kept free where nothing is compiled.
    """

    name: str
    sections: dict
    short: float


def _named(size: str) -> dict:
    shape = NAMED[size]
    return {
        "width": shape.width, "layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads,
        "mlp_width": shape.mlp_width,
    }  # fmt: skip


_GPT = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "bias": "all", "tied": True}
_QWEN = {"kv_heads": 8, "head_dim": 128, "qk_norm": True}

LADDER = (  # in order of the number of parameters, which `climb` relies on
    Size("0.3B", _named("350m") | _GPT, 50257, f"GPT-3 Medium: {GPT3}"),
    Size("1B", _named("1b") | {"tied": True}, 128256, f"Llama 3.2 1B: {LLAMA3}"),
    Size("3B", _named("3b") | {"tied": True}, 128256, f"Llama 3.2 3B: {LLAMA3}"),
    Size("4B", {"width": 2560, "layers": 36, "heads": 32, "mlp_width": 9728, "tied": True} | _QWEN, 151936,
         f"Qwen3 4B: {QWEN3}"),
    Size("8B", _named("8b") | {"tied": False}, 128256, f"Llama 3 8B: {LLAMA3_PAPER}"),
    Size("14B", {"width": 5120, "layers": 40, "heads": 40, "mlp_width": 17408, "tied": False} | _QWEN, 151936,
         f"Qwen3 14B: {QWEN3}"),
    Size("32B", {"width": 5120, "layers": 64, "heads": 64, "mlp_width": 25600, "tied": False} | _QWEN, 151936,
         f"Qwen3 32B: {QWEN3}"),
    Size("70B", {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "mlp_width": 28672, "tied": False}, 128256,
         f"Llama 3 70B: {LLAMA3_PAPER}"),
)  # fmt: skip

STATES = (
    State("AdamW, float32", {"optimizer": {"master": "float32", "moments": "float32"}}, 0.08),
    State("AdamW, all bfloat16", {"optimizer": {"master": "bfloat16", "moments": "bfloat16"}}, 0.08),
    State("AdamW, 8-bit moments", {"optimizer": {"master": "bfloat16", "moments": "int8"}}, 0.08),
    State("LoRA, rank 16", {"model": {"lora": {"rank": 16}}}, 0.08),
    State("QLoRA, rank 16", {"model": {"lora": {"rank": 16, "base": "nf4"}}}, 0.08),
)


def capacity(
    machine: str | None, progress=None, *, verify: bool = False, ladder=LADDER, states=STATES, contexts=CONTEXTS
) -> dict:
    """The largest size of a ladder that trains on one device of a machine, for each state and context. Plain JSON.

    Args:
        machine: a name of `machine.targets`, or None for this machine's own accelerator.
        verify: compile what the estimate proposes, and use the compiler's bytes.

    Returns:
        `cells`, one record for each state and context: `size`, `parameters`, `peak_bytes`, `share` of the budget and
        `left_bytes` are None if not even the smallest size fits; `save_bytes` are those of the peak that a save takes,
        0 where the device has memory of its own; `saves_in_place` where a copy of the state does not fit; `how` is
        "estimated" or "compiled"; `next_size` and `next_bytes` describe the smallest size that does not fit. Also the
        budget, `trainings` and `sizes`.

    Raises:
        UserError: the machine is unknown, or it is this one and has no accelerator; MissingExtra if `verify` needs the
            extra `[plan]`.
    """
    box = _box(machine, verify)
    total, cells = len(states) * len(contexts), []
    what = f"{'compiling' if verify else 'estimating'} training steps for {box.name}"
    for state in states:
        # The result of the previous state is a good first guess, and so is that of the previous, shorter context.
        rung = next((c["rung"] for c in reversed(cells) if c["context"] == contexts[0]), len(ladder) // 2)
        for context in contexts:
            if progress:
                progress(len(cells), total, what)
            cells.append(_cell(box, state, context, ladder, max(rung or 0, 0), verify))
            rung = cells[-1]["rung"]
    if progress:
        progress(total, total, what)
    return {
        "machine": box.name,
        "budget_bytes": box.budget,
        "budget_reason": box.reason,
        "each_step": "one example, bfloat16 compute, every layer recomputed in the backward pass, and where memory is "
        "shared what a save takes: a copy of the state or, if that does not fit, a piece of it",
        "how": _how(verify, states),
        "cells": [{k: v for k, v in cell.items() if k != "rung"} for cell in cells],
        "trainings": [_described(state) for state in states],
        "sizes": [
            {"size": s.name, "layers": s.model["layers"], "width": s.model["width"], "vocabulary": s.vocab,
             "source": s.source}
            for s in ladder
        ],
    }  # fmt: skip


# ---- the machine


@dataclass(frozen=True)
class _Box:
    """`target` is None for this machine. `budget` in bytes on one device."""

    name: str
    budget: int
    reason: str
    target: object

    def rehearsal(self, state: State, size: Size, context: int) -> Rehearsal:
        config = step_config(state, size, context)
        recipe = config_recipe()(config, cache_folder())
        return rehearse(config, recipe, mesh=None if self.target else meshes.make_mesh(1, 1), target=self.target)


def _box(machine: str | None, verify: bool) -> _Box:
    if machine is not None:
        target = find_machine(machine)
        if verify and not can_compile_for_gpu():
            target_devices(target)  # raises MissingExtra, which names the package
        return _Box(target.slug, target.budget_bytes, target.budget_reason, target)
    here = this_machine()
    if here.platform == "cpu":
        raise UserError(
            "the table of capacities describes an accelerator, and this machine has none",
            where="--capacity",
            why="a CPU's memory holds models that it cannot train in any reasonable time",
            hint=f"--machine NAME, one of {', '.join(machine_names())}; or plan one run: aurora plan CONFIG",
        )
    return _Box(here.device_kind, *budget_bytes("auto", here), None)


def config_recipe() -> type:
    """The bundled language model's Recipe class."""
    return find_recipe("language_model", Path()).cls


def step_config(state: State, size: Size, context: int):
    """The config of one step: one example of `context` tokens on one device."""
    tree = {
        "recipe": "language_model",
        "model": {**size.model, "max_length": context, **state.sections.get("model", {})},
        "data": {"sequence": context, "tokenizer": {"kind": "bpe", "vocab": size.vocab}},
        "train": {"batch": 1, "precision": "bfloat16"},
        "optimizer": state.sections.get("optimizer", {}),
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }
    return config_class(config_recipe()).model_validate_json(json.dumps(tree))


# ---- one cell


@dataclass
class _Step:
    """One step under full recomputation. `bytes` is the estimated peak with what a save takes of the same memory."""

    planner: Planner
    plan: Plan
    bytes: int
    parameters: int
    save: int = 0
    in_place: bool = False

    def compiled(self) -> int:
        """The compiled peak, with what a save takes."""
        return self.planner.compile(self.plan) + self.save

    @property
    def known(self) -> int:
        """The compiled peak if there is one, otherwise the estimated one."""
        return next((held + self.save for held in self.planner.compiled.values()), self.bytes)


def _cell(box: _Box, state: State, context: int, ladder, start: int, verify: bool) -> dict:
    steps: dict[int, _Step] = {}

    def step(rung: int) -> _Step:
        if rung not in steps:
            steps[rung] = _step(box, state, ladder[rung], context)
        return steps[rung]

    limit = box.budget * (1 + HEDGE) if verify else box.budget / (1 + state.short)
    rung = climb(lambda rung: step(rung).bytes <= limit, min(start, len(ladder) - 1), len(ladder))
    compiled = None
    while verify and rung >= 0:
        compiled = step(rung).compiled()
        if compiled <= box.budget:
            break
        rung, compiled = rung - 1, None
    fits = rung >= 0
    peak = (compiled or step(rung).bytes) if fits else None
    more = rung + 1 < len(ladder)
    return {
        "training": state.name,
        "context": context,
        "size": ladder[rung].name if fits else None,
        "parameters": step(rung).parameters if fits else None,
        "peak_bytes": peak,
        "estimated_bytes": step(rung).bytes if fits else None,
        "compiled_bytes": compiled,
        "save_bytes": step(rung).save if fits else None,
        "saves_in_place": step(rung).in_place if fits else None,
        "share": peak / box.budget if fits else None,
        "left_bytes": box.budget - peak if fits else None,
        "how": "compiled" if compiled else "estimated",
        "next_size": ladder[rung + 1].name if more else None,
        "next_bytes": step(rung + 1).known if more else None,
        "rung": rung,
    }


def climb(fits, start: int, count: int) -> int:
    """The last of `count` rungs for which `fits(rung)` holds, or -1. If a rung fits, all below it fit too."""
    if fits(start):
        return next((rung - 1 for rung in range(start + 1, count) if not fits(rung)), count - 1)
    return next((rung for rung in reversed(range(start)) if fits(rung)), -1)


def _step(box: _Box, state: State, size: Size, context: int) -> _Step:
    program = box.rehearsal(state, size, context)
    whole = program.simplest_plan()
    plan = Plan(1, 1, {path: [Segment(0, cut[-1].stop, ())] for path, cut in whole.stacks.items()})
    planner = Planner(program, box.budget, box.reason, box.name)
    step, save, in_place = planner.estimated(plan).bytes, 0, False
    if not program.apart:
        in_place = step + program.taken_by_a_save(in_place=False) > box.budget / (1 + state.short)
        save = program.taken_by_a_save(in_place=in_place)
    return _Step(planner, plan, step + save, program.config.model.num_parameters(size.vocab), save, in_place)


# ---- in words


def _how(verify: bool, states) -> str:
    if verify:
        return "compiled for the machine, not measured on it: workspaces of cuDNN and cuBLAS are not included"
    most = percent(max(state.short for state in states))
    return (
        f"estimated, not measured: estimates were up to {most} below the compiled peak, depending on the kind of "
        "training; a size counts only if that much more would fit; --compile uses the compiler's own bytes"
    )


def _described(state: State) -> dict:
    settings = " ".join(f"{key}={value}" for key, value in flatten(state.sections))
    return {"training": state.name, "settings": settings, "kept_free_share": state.short}
