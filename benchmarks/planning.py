"""What the planner's benchmarks share: a case as a rehearsal for its machine, and its plan."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from plan_cases import PRODUCTS, SHAPES, TAGS, VOCABULARY, overrides

from aurora_train.config import load
from aurora_train.machine.targets import find_machine
from aurora_train.nn.stack import Segment, stacks
from aurora_train.plan.plan import Plan
from aurora_train.train.rehearsal import Rehearsal, rehearse


def load_tree(tree: dict):
    """A config from a nested dict."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.yaml"
        file.write_text(json.dumps(tree))  # YAML holds JSON
        return load(file)


def rehearsal_of(tree: dict, machine: str) -> Rehearsal:
    """The step of a config for a machine that need not be here."""
    config = load_tree(tree)
    recipe = config.recipe_class(config, Path(tempfile.gettempdir()))
    return rehearse(config, recipe, target=find_machine(machine))


def shape_tree(model: str, sequence: int, batch: int, **sections) -> dict:
    """A language model of a published shape in bfloat16, as a nested dict of config sections."""
    return {
        "recipe": "language_model", "model": {**SHAPES[model], "max_length": sequence},
        "data": {"sequence": sequence, "tokenizer": {"kind": "bpe", "vocab": VOCABULARY.get(model, 128256)}},
        "train": {"batch": batch, "precision": "bfloat16"}, **sections,
    }  # fmt: skip


def case_rehearsal(case) -> Rehearsal:
    """The rehearsal of a `plan_cases.Case`."""
    return rehearsal_of(overrides(case), case.machine)


def case_plan(case, program: Rehearsal) -> Plan:
    """The plan that a case asks for."""
    cuts = {}
    for path, stack in stacks(program.model()).items():
        first = stack.tags if case.save == TAGS else _named(case.save, stack.tags)
        stop = stack.num_units - round(stack.num_units * case.cut)
        cut = [Segment(0, stop, first)]
        if stop < stack.num_units:
            cut.append(Segment(stop, stack.num_units, _named(PRODUCTS, stack.tags)))
        cuts[".".join(map(str, path))] = cut
    return Plan(case.batch // case.accumulation, case.accumulation, cuts)


def _named(save, tags) -> tuple[str, ...]:
    """The tags of this model; cuDNN's attention keeps its output and its statistics under one name."""
    named = ["attn_flash" if name == "attn_out" and "attn_flash" in tags else name for name in save]
    return tuple(name for name in named if name in tags)
