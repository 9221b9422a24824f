"""What a run has to give away: a plain decoder with its facts, adapters merged, 4-bit kernels decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.nn import nf4
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.lora import ADAPTERS


class Result(NamedTuple):
    """A model that can be written in another format.

    Attributes:
        config, vocabulary: its shape, without adapters, and the rows of its embedding.
        shapes: of each parameter by canonical name.
        read: a parameter by canonical name, in the dtype that the run keeps it in.
        facts: the run's.
        record: what the card says of its origin; see `origin_of`.
        dtypes: the dtype of each tensor that its base stores otherwise than most, by the family's name for it.
    """

    config: DecoderConfig
    vocabulary: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    facts: Facts
    record: dict[str, Any]
    dtypes: Mapping[str, str] = MappingProxyType({})


def result_of(loaded, *, merge: bool = False) -> Result:
    """The result of an `aurora_train.loading.Loaded` run.

    `merge` adds adapters to their kernels. UserError for a run that is not one of a decoder, and for adapters without
    `merge`.
    """
    from aurora_train.checkpoint import layout

    config = getattr(loaded.config, "model", None)
    facts = loaded.recipe.known
    if not isinstance(config, DecoderConfig) or "vocabulary" not in facts:
        raise UserError(f"a run of {loaded.config.recipe} has no decoder to export", where=str(loaded.run))
    if config.lora is not None and not merge:
        raise UserError(
            "this run trained adapters", where=str(loaded.run),
            hint="--merge adds them to the weights that they were trained on",
        )  # fmt: skip
    arrays: dict[str, Any] = {}
    for names, stacked, leaf in layout.entries(_joined(loaded.state.params, loaded.state.frozen)):
        arrays |= {name: (leaf, number if stacked else None) for number, name in enumerate(names)}
    scale = None if config.lora is None else config.lora.alpha / config.lora.rank
    plain = config.model_copy(update={"lora": None})
    from aurora_train.interop.placing import our_shapes

    shapes = our_shapes(plain, facts["vocabulary"])
    missing = [name for name in shapes if name not in arrays and name + nf4.CODES not in arrays]
    if missing or getattr(loaded.model, "mask", "causal") != "causal":
        raise UserError(
            f"a run of {loaded.config.recipe} has no decoder to export", where=str(loaded.run),
            why=f"it has no parameter {missing[0]}" if missing else "its tokens see those that come after them",
        )  # fmt: skip
    return Result(plain, facts["vocabulary"], shapes, lambda name: _merged(arrays, name, scale), facts,
                  origin_of(loaded), (facts.get("origin") or {}).get("dtypes", {}))  # fmt: skip


def origin_of(loaded) -> dict[str, Any]:
    """Where a run's weights come from, for the card and the proof: run, step, recipe, data, parent, licence."""
    provenance = loaded.provenance
    origin = loaded.recipe.known.get("origin") or {}
    return {
        "run": loaded.run.name, "step": loaded.step, "recipe": loaded.config.recipe,
        "sequence": getattr(getattr(loaded.config, "data", None), "sequence", None),
        "precision": loaded.config.train.precision, "data": provenance.get("data", {}),
        "parent": provenance.get("parent"), "base": origin.get("name"), "licence": origin.get("licence"),
        "code_sha256": provenance.get("code_sha256"), "versions": provenance.get("versions", {}),
    }  # fmt: skip


def told(record: dict[str, Any]) -> dict[str, Any]:
    """What an export says of its origin: a record without the folders of this machine, of which the names remain."""
    parent, source = record.get("parent"), record["data"].get("source")
    return {
        **{name: record.get(name) for name in ("run", "step", "recipe", "base", "licence", "code_sha256", "versions")},
        "data": Path(source).name if source else None,
        "parent": parent and {"from": Path(parent["from"]).name, "step": parent["step"], "digest": parent["digest"]},
    }


def _joined(one: dict, other: dict) -> dict:
    """Two nested dicts without a common leaf, as one."""
    both = {**one, **other}
    return {key: _joined(one[key], other[key]) if key in one and key in other else value for key, value in both.items()}


def _merged(arrays: dict[str, Any], name: str, scale: float | None) -> np.ndarray:
    def stored(name: str) -> np.ndarray:
        leaf, number = arrays[name]
        return np.asarray(leaf if number is None else leaf[number])

    if name in arrays:
        kernel = stored(name)
    else:
        kernel = np.asarray(nf4.decode(stored(name + nf4.CODES), stored(name + nf4.SCALES), "float32"))
    down, up = (name + suffix for suffix in ADAPTERS)
    if scale is None or down not in arrays:
        return kernel
    return kernel.astype(np.float32) + scale * (stored(down).astype(np.float32) @ stored(up).astype(np.float32))
