"""`model: {from: SOURCE}`: a model's shape and first weights from an open model or from a run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError, model_validator

from aurora_train.config import load_resolved, setting
from aurora_train.errors import UserError
from aurora_train.interop.hub import HUB, public_name
from aurora_train.interop.source import PACKAGE, located
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.recipe import Derived
from language.settings import TextDataConfig

# What the user of a source may choose: how the model is computed or trained, not what it is.
_FREE = ("from_", "size", "dropout", "lora", "attention", "loss_chunk")


class ModelConfig(DecoderConfig):
    """A decoder whose shape is written out, follows from a size, or is that of an existing model."""

    from_: str | None = setting(
        None, alias="from", resume="located", path_unless=(HUB, PACKAGE),
        help="start from this model: a Hugging Face folder, a GGUF file (package:NAME: that of an installed package), "
        "hub:owner/name (downloaded with data.online), or a run; its shape, weights, tokenizer and template follow",
    )


class CopyingConfig(ModelConfig):
    """A decoder that may also copy from the document so far (`language.copying`)."""

    copying: tuple[int, ...] = setting(
        (), strict=False,
        help="lengths of contexts, such as [1, 2, 3, 5, 8]: the model may also copy what followed the last earlier "
        "occurrence, in the document so far, of its last so many tokens; []: it does not",
    )

    @model_validator(mode="after")
    def _contexts_grow(self):
        if self.copying and self.from_ is not None:
            raise ValueError("a model that is started from another one (from) cannot be given copying")
        if self.copying[:1] not in ((), (1,)):
            raise ValueError("copying begins with a context of 1 token: [1, 2, 3, 5, 8]")
        for before, length in itertools.pairwise(self.copying):
            if not before < length <= 2 * before:
                raise ValueError(f"in copying, {before} is followed by {before + 1} to {2 * before}, not {length}")
        return self


def derive_from_source(given: dict) -> list[Derived]:
    """Shape and `init.from` of a config with `model.from`. UserError, by key, for what the config says otherwise."""
    model, online = given["model"], bool((given.get("data") or {}).get("online"))
    start = str(located(model["from"], online=online, where="model.from"))
    source = public_name(start)
    shape, formula = _shape_of(start)
    if model.get("size") is not None:
        raise UserError(f"the model from {source} has its own size", where="model.size", hint="leave it out")
    derived = []
    for name, field in DecoderConfig.model_fields.items():
        if name in _FREE:
            continue
        value = getattr(shape, name)
        if model.get(name) is not None:
            if _written(name, model[name]) != value:
                plain = shape.model_dump(mode="json")[name]
                raise UserError(
                    f"the model from {source} has {name}: {plain}", where=f"model.{name}",
                    why="a model's shape is that of its weights", hint=f"leave {name} out",
                )  # fmt: skip
        elif value != field.default:
            derived.append(Derived(f"model.{name}", shape.model_dump(mode="json")[name], formula, start))
    sequence = (given.get("data") or {}).get("sequence")
    if shape.positions == "learned" and sequence is None and shape.max_length < TextDataConfig().sequence:
        derived.append(Derived("data.sequence", shape.max_length, "as many as learned positions", start))
    named = (given.get("init") or {}).get("from")
    if named not in (None, start):
        raise UserError(f"model.from names {start}", where="init.from", why=f"here it is {named}", hint="name one")
    return [*derived, Derived("init.from", start, formula, start)]


def _shape_of(start: str) -> tuple[DecoderConfig, str]:
    """(shape, what it was read from) of an open model or of a run of a language model."""
    from aurora_train.interop.placing import shape_of
    from aurora_train.interop.source import is_foreign, open_source

    if not Path(start).exists():
        raise UserError(
            "there is no such folder or file", where="model.from", why=f"it names {start}",
            hint="a run folder, a folder with config.json, or *.gguf; a run that has begun continues without it: "
            "aurora resume RUN",
        )  # fmt: skip
    if is_foreign(start):
        family, shape = shape_of(open_source(start))
        return shape, f"a model of the family {family.model_type}"
    model = getattr(load_resolved(start), "model", None)
    if not isinstance(model, DecoderConfig):
        raise UserError(f"the run {start} is not one of a decoder", where="model.from")
    if getattr(model, "copying", ()):
        raise UserError(
            f"the run {start} copies from the document so far, which a model that starts from it cannot",
            where="model.from", why=f"its model.copying is {list(model.copying)}",
            hint="start from a run without model.copying",
        )  # fmt: skip
    fields = {name: getattr(model, name) for name in DecoderConfig.model_fields if name not in _FREE}
    return DecoderConfig(**fields), "the model of a run"


def _written(name: str, value: Any) -> Any:
    """A field as the config's own class reads it; the value itself if it cannot, which its own check then reports."""
    try:
        return TypeAdapter(DecoderConfig.model_fields[name].annotation).validate_json(json.dumps(value))
    except ValidationError:
        return value
