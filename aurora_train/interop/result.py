"""What a run has to give away: a plain decoder with its facts, adapters merged, 4-bit kernels decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.files import read_json
from aurora_train.nn import nf4
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.lora import ADAPTERS, is_adapter
from aurora_train.nn.lora_config import scale_of
from aurora_train.run import Run

if TYPE_CHECKING:
    from aurora_train.interop.parts import Parts

AS_IT_IS = "its run folder is complete: copy it as it is"  # the way of a recipe whose runs have no format to export


class Adapters(NamedTuple):
    """What a run trained beside a frozen base (`nn.lora`), read when it is asked for.

    Attributes:
        rank, alpha, rank_stabilised: the change of a kernel is `scale` A B (`lora_config.scale_of`).
        names: the canonical names of the adapted kernels; the embedding [vocabulary, width] and the head among them.
        pair: (A [in, rank], B [rank, out]) of one of them, float32.
        stored: a parameter of the base by canonical name, in the run's dtype; a kernel in 4 bits as (codes, scales).
    """

    rank: int
    alpha: float
    names: tuple[str, ...]
    pair: Callable[[str], tuple[np.ndarray, np.ndarray]]
    stored: Callable[[str], np.ndarray | tuple[np.ndarray, np.ndarray]]
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilised)

    def change(self, name: str) -> np.ndarray:
        """What is added to an adapted kernel, float32."""
        down, up = self.pair(name)
        return np.float32(self.scale) * (down @ up)


class Result(NamedTuple):
    """A model that can be written in another format.

    Attributes:
        config, vocabulary: its shape, without adapters, and the rows of its embedding.
        shapes: of each parameter by canonical name.
        read: a parameter by canonical name, in the dtype that the run keeps it in.
        facts: the run's.
        record: what the card says of its origin; see `origin_of`.
        dtypes: the dtype of each tensor that its base stores otherwise than most, by the family's name for it.
        adapters: those that `read` has merged; None for a run without.
        parts: what a Hugging Face export copies from the source beside the text model (`interop/parts.py`), or None.
    """

    config: DecoderConfig
    vocabulary: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    facts: Facts
    record: dict[str, Any]
    dtypes: Mapping[str, str] = MappingProxyType({})
    adapters: Adapters | None = None
    parts: Parts | None = None


class OnDisk(NamedTuple):
    """A run, or an open model, whose parameters are still on disk.

    Attributes:
        run, config, provenance, step: its folder, resolved config, record of origin and checkpoint.
        facts: with which it was trained.
        specs: shape and dtype of each stored parameter by its name without `params.` or `frozen.`.
        read: one of them; at most one layer is held at a time.
        mask: which tokens a token sees, as `nn.transformer.Transformer` says.
    """

    run: Path
    config: Any
    facts: Facts
    provenance: dict[str, Any]
    step: int
    specs: dict[str, Any]
    read: Callable[[str], np.ndarray]
    mask: str = "causal"


def result_of(found: OnDisk, *, merge: bool = False) -> Result:
    """What a run has to give away.

    `merge` adds adapters to their kernels. UserError for a run that is not one of a decoder, for adapters without
    `merge`, and for a checkpoint of another model than the config describes.
    """
    config, facts = getattr(found.config, "model", None), found.facts
    if not isinstance(config, DecoderConfig) or "vocabulary" not in facts:
        formats = getattr(found.config.recipe_class, "formats", ())
        raise UserError(f"a run of {found.config.recipe} has no decoder to export", where=str(found.run),
                        hint=f"its own format: --format {' or '.join(formats)}" if formats else AS_IT_IS)  # fmt: skip
    from aurora_train.interop.placing import our_shapes

    plain = DecoderConfig(**{name: getattr(config, name) for name in DecoderConfig.model_fields if name != "lora"})
    shapes = our_shapes(plain, facts["vocabulary"])
    missing = [name for name in shapes if name not in found.specs and name + nf4.CODES not in found.specs]
    if getattr(config, "copying", ()):
        raise UserError("a model that copies from the document so far cannot be exported", where=str(found.run),
                        why="no other format has such a head", hint=AS_IT_IS)  # fmt: skip
    if missing or found.mask != "causal":
        raise UserError(
            f"a run of {found.config.recipe} has no decoder to export", where=str(found.run),
            why=f"it has no parameter {missing[0]}" if missing else "its tokens see those that come after them",
            hint=AS_IT_IS,
        )  # fmt: skip
    if config.lora is not None and not merge:
        raise UserError(
            "this run trained adapters", where=str(found.run),
            hint="--merge adds them to the weights that they were trained on; --format peft writes them alone",
        )  # fmt: skip
    _refuse_other_model(found, shapes)
    adapters = None if config.lora is None else _adapters(found, config.lora)
    return Result(plain, facts["vocabulary"], shapes, lambda name: _merged(found, name, adapters), facts,
                  origin_of(found), (facts.get("origin") or {}).get("dtypes", {}), adapters)  # fmt: skip


def _adapters(found: OnDisk, lora) -> Adapters:
    down, _ = ADAPTERS
    names = tuple(name.removesuffix(down) for name in found.specs if name.endswith(down))

    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        down, up = (found.read(name + end).astype(np.float32) for end in ADAPTERS)
        return down, up

    stabilised = lora.scaling == "rank_stabilised"
    return Adapters(lora.rank, lora.alpha, names, pair, lambda name: _stored(found, name), stabilised)


def _refuse_other_model(found: OnDisk, shapes: dict[str, tuple[int, ...]]) -> None:
    import jax

    from aurora_train.checkpoint import layout

    coded = {name.removesuffix(nf4.CODES) for name in found.specs if name.endswith(nf4.CODES)}
    plain = {name: one for name, one in found.specs.items() if not is_adapter(name) and not nf4.is_coded(name)}
    wanted = {name: jax.ShapeDtypeStruct(shape, plain[name].dtype if name in plain else "float32")
              for name, shape in shapes.items() if name not in coded}  # fmt: skip
    layout.refuse_difference(plain, wanted, where=str(found.run))


def origin_of(found: OnDisk) -> dict[str, Any]:
    """Where a run's weights come from, for the card and the proof: run, step, recipe, data, parent, licence."""
    provenance, origin = found.provenance, found.facts.get("origin") or {}
    return {
        "run": found.run.name, "step": found.step, "recipe": found.config.recipe,
        "sequence": getattr(getattr(found.config, "data", None), "sequence", None),
        "precision": found.config.train.precision, "data": provenance.get("data", {}),
        "parent": provenance.get("parent"), "base": origin.get("name"), "licence": origin.get("licence"),
        "code_sha256": provenance.get("code_sha256"), "versions": provenance.get("versions", {}),
    }  # fmt: skip


def lineage(parent: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A parent as provenance records it, then that run's own parent, and so on, as far as the runs are there."""
    while parent:
        yield parent
        run = Run(parent["from"])
        parent = None if parent["step"] is None else (read_json(run.provenance, {}) or {}).get("parent")


def published(record: dict[str, Any]) -> dict[str, Any]:
    """What an export says of its origin: a record without the folders of this machine, of which the names remain."""
    parent, source = record.get("parent"), record["data"].get("source")
    return {
        **{name: record.get(name) for name in ("run", "step", "recipe", "base", "licence", "code_sha256", "versions")},
        "data": Path(source).name if source else None,
        "parent": parent and {
            "from": parent.get("hub") or Path(parent["from"]).name,
            **({"revision": parent["revision"]} if "revision" in parent else {}),
            "step": parent["step"], "digest": parent["digest"],
        },
    }


def _stored(found: OnDisk, name: str) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """A parameter as a run keeps it: an array, or (codes, scales)."""
    if name in found.specs:
        return found.read(name)
    return found.read(name + nf4.CODES), found.read(name + nf4.SCALES)


def _merged(found: OnDisk, name: str, adapters: Adapters | None) -> np.ndarray:
    kernel = _stored(found, name)
    if isinstance(kernel, tuple):
        kernel = np.asarray(nf4.decode(*kernel, "float32"))
    if adapters is None or name not in adapters.names:
        return kernel
    return kernel.astype(np.float32) + adapters.change(name)
