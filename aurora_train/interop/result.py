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
from aurora_train.nn.lora import ADAPTERS, is_adapter


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


class Unread(NamedTuple):
    """A run, or an open model, whose parameters are still on disk.

    Attributes:
        run, config, provenance, step: its folder, resolved config, record of origin and checkpoint.
        facts: with which it was trained.
        specs: shape and dtype of each stored parameter by its name without `params.` or `frozen.`.
        read: one of them; at most one layer is held at a time.
    """

    run: Path
    config: Any
    facts: Facts
    provenance: dict[str, Any]
    step: int
    specs: dict[str, Any]
    read: Callable[[str], np.ndarray]


def result_of(found: Unread, *, merge: bool = False) -> Result:
    """What a run has to give away.

    `merge` adds adapters to their kernels. UserError for a run that is not one of a decoder, for adapters without
    `merge`, and for a checkpoint of another model than the config describes.
    """
    config, facts = getattr(found.config, "model", None), found.facts
    has_embedding = not {"embedding", "embedding" + nf4.CODES}.isdisjoint(found.specs)  # not of a classifier
    if not isinstance(config, DecoderConfig) or "vocabulary" not in facts or not has_embedding:
        raise UserError(f"a run of {found.config.recipe} has no decoder to export", where=str(found.run))
    if config.lora is not None and not merge:
        raise UserError(
            "this run trained adapters", where=str(found.run),
            hint="--merge adds them to the weights that they were trained on",
        )  # fmt: skip
    from aurora_train.interop.placing import our_shapes

    plain = DecoderConfig(**{name: getattr(config, name) for name in DecoderConfig.model_fields if name != "lora"})
    shapes = our_shapes(plain, facts["vocabulary"])
    _refuse_other_model(found, shapes)
    scale = None if config.lora is None else config.lora.alpha / config.lora.rank
    return Result(plain, facts["vocabulary"], shapes, lambda name: _merged(found, name, scale), facts,
                  origin_of(found), (facts.get("origin") or {}).get("dtypes", {}))  # fmt: skip


def _refuse_other_model(found: Unread, shapes: dict[str, tuple[int, ...]]) -> None:
    import jax

    from aurora_train.checkpoint import layout

    coded = {name.removesuffix(nf4.CODES) for name in found.specs if name.endswith(nf4.CODES)}
    plain = {name: one for name, one in found.specs.items() if not is_adapter(name) and not nf4.is_coded(name)}
    wanted = {name: jax.ShapeDtypeStruct(shape, plain[name].dtype if name in plain else "float32")
              for name, shape in shapes.items() if name not in coded}  # fmt: skip
    layout.refuse_difference(plain, wanted, where=str(found.run))


def origin_of(found: Unread) -> dict[str, Any]:
    """Where a run's weights come from, for the card and the proof: run, step, recipe, data, parent, licence."""
    provenance, origin = found.provenance, found.facts.get("origin") or {}
    return {
        "run": found.run.name, "step": found.step, "recipe": found.config.recipe,
        "sequence": getattr(getattr(found.config, "data", None), "sequence", None),
        "precision": found.config.train.precision, "data": provenance.get("data", {}),
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


def _merged(found: Unread, name: str, scale: float | None) -> np.ndarray:
    if name in found.specs:
        kernel = found.read(name)
    else:
        codes, scales = (found.read(name + suffix) for suffix in (nf4.CODES, nf4.SCALES))
        kernel = np.asarray(nf4.decode(codes, scales, "float32"))
    down, up = (name + suffix for suffix in ADAPTERS)
    if scale is None or down not in found.specs:
        return kernel
    return kernel.astype(np.float32) + scale * (
        found.read(down).astype(np.float32) @ found.read(up).astype(np.float32)
    )
