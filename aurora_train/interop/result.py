"""What a run has to give away: a plain decoder with its facts, adapters merged, 4-bit kernels decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.files import read_json
from aurora_train.nn import nf4
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.lora import ADAPTERS
from aurora_train.run import Run

if TYPE_CHECKING:
    from aurora_train.interop.parts import Parts


class Adapters(NamedTuple):
    """What a run trained beside a frozen base (`nn.lora`).

    Attributes:
        rank, alpha: the change of a kernel is (alpha / rank) A B.
        pairs: (A [in, rank], B [rank, out]) by the canonical name of the adapted kernel, float32.
        stored: a parameter of the base by canonical name, in the run's dtype; a kernel in 4 bits as (codes, scales).
    """

    rank: int
    alpha: float
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]
    stored: Callable[[str], np.ndarray | tuple[np.ndarray, np.ndarray]]


class Result(NamedTuple):
    """A model that can be written in another format.

    Attributes:
        config, vocabulary: its shape, without adapters, and the rows of its embedding.
        shapes: of each parameter by canonical name.
        read: a parameter by canonical name, in the dtype that the run keeps it in.
        facts: the run's.
        record: what the card says of its origin; see `origin_of`.
        adapters: those that `read` has merged; None for a run without.
        parts: what a Hugging Face export copies from the source beside the text model (`interop/parts.py`), or None.
    """

    config: DecoderConfig
    vocabulary: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    facts: Facts
    record: dict[str, Any]
    adapters: Adapters | None = None
    parts: Parts | None = None


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
            hint="--merge adds them to the weights that they were trained on; --format peft writes them alone",
        )  # fmt: skip
    arrays: dict[str, Any] = {}
    for names, stacked, leaf in layout.entries(_joined(loaded.state.params, loaded.state.frozen)):
        arrays |= {name: (leaf, number if stacked else None) for number, name in enumerate(names)}
    scale = None if config.lora is None else config.lora.alpha / config.lora.rank
    plain = config.model_copy(update={"lora": None})
    from aurora_train.interop.placing import our_shapes

    shapes = our_shapes(plain, facts["vocabulary"])
    adapters = None if config.lora is None else _adapters(arrays, config.lora)
    return Result(plain, facts["vocabulary"], shapes, lambda name: _merged(arrays, name, scale), facts,
                  origin_of(loaded), adapters)  # fmt: skip


def _adapters(arrays: dict[str, Any], lora) -> Adapters:
    down, up = ADAPTERS
    names = [name.removesuffix(down) for name in arrays if name.endswith(down)]
    pairs = {name: tuple(_stored(arrays, name + end).astype(np.float32) for end in (down, up)) for name in names}

    def stored(name: str) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        if name in arrays:
            return _stored(arrays, name)
        return _stored(arrays, name + nf4.CODES), _stored(arrays, name + nf4.SCALES)

    return Adapters(lora.rank, lora.alpha, pairs, stored)


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


def lineage(parent: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A parent as provenance records it, then that run's own parent, and so on, as far as the runs are there."""
    while parent:
        yield parent
        run = Run(parent["from"])
        parent = None if parent["step"] is None else (read_json(run.provenance, {}) or {}).get("parent")


def _joined(one: dict, other: dict) -> dict:
    """Two nested dicts without a common leaf, as one."""
    both = {**one, **other}
    return {key: _joined(one[key], other[key]) if key in one and key in other else value for key, value in both.items()}


def _stored(arrays: dict[str, Any], name: str) -> np.ndarray:
    leaf, number = arrays[name]
    return np.asarray(leaf if number is None else leaf[number])


def _merged(arrays: dict[str, Any], name: str, scale: float | None) -> np.ndarray:
    if name in arrays:
        kernel = _stored(arrays, name)
    else:
        codes, scales = _stored(arrays, name + nf4.CODES), _stored(arrays, name + nf4.SCALES)
        kernel = np.asarray(nf4.decode(codes, scales, "float32"))
    down, up = (name + suffix for suffix in ADAPTERS)
    if scale is None or down not in arrays:
        return kernel
    change = _stored(arrays, down).astype(np.float32) @ _stored(arrays, up).astype(np.float32)
    return kernel.astype(np.float32) + scale * change
