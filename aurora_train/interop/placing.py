"""Where each parameter of ours stands in a file of a family, and the reverse. Both directions use the same places."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from aurora_train.errors import UserError
from aurora_train.interop import families
from aurora_train.interop.families.family import Family, Weight
from aurora_train.interop.hf import refuse_codes
from aurora_train.interop.source import OpenModel, Tensor
from aurora_train.nn.decoder_config import DecoderConfig

_UNIT = re.compile(r"stack\.units\.(\d+)\.(?:blocks\.(\d+)\.)?(.+)")
# Parts of vision, speech and prediction models that lie beside the text model and are not read.
_BESIDE = re.compile(r"(model\.)?(visual|vision_tower|vision_model|multi_modal_projector|audio_tower|mtp)\.")
_BLOCK_BYTES = 1 << 26

Theirs = dict[str, Callable[[], np.ndarray]]


class Place(NamedTuple):
    """A parameter of ours: elements [start, stop) of the tensor `theirs` along `axis`, transposed if `transpose`.

    `heads`, if not 0: the parts of the tensor take turns this many times along the axis, `start` and `stop` being those
    without turns. `middle`: the tensor has a middle axis of size one.
    """

    theirs: str
    axis: int
    start: int
    stop: int
    transpose: bool
    heads: int = 0
    middle: bool = False

    def read(self, tensor: Tensor) -> np.ndarray:
        """The parameter, C-contiguous (safetensors 0.8 stores views wrongly)."""
        if self.heads:
            whole, size = tensor.whole(), self.stop - self.start
            turns = whole.reshape(self.heads, -1, size // self.heads, whole.shape[1])
            part = turns[:, self.start // size].reshape(size, -1)
        elif self.axis == 0:
            part = tensor.read(self.start, self.stop)
        else:
            part = tensor.whole()[:, self.start : self.stop]
        part = part[:, 0] if self.middle else part
        return np.ascontiguousarray(part.T if self.transpose else part)

    def their_shape(self, shape: tuple[int, ...]) -> list[int]:
        """The shape of the tensor if it held nothing else than this parameter of ours."""
        flat = shape[::-1] if self.transpose else shape
        return [flat[0], 1, flat[1]] if self.middle else list(flat)


def our_shapes(config: DecoderConfig, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of a decoder by its canonical name (`stack.units.0003.attention.query`), adapters left out.

    In the order of the names, so layer by layer: a run's parameters are read by layer.
    """
    return dict(_shapes(config.model_copy(update={"lora": None, "attention": "reference"}), vocabulary))


@functools.lru_cache(maxsize=8)  # one command opens a model several times, and has it built only once
def _shapes(config: DecoderConfig, vocabulary: int) -> dict[str, tuple[int, ...]]:
    from flax import nnx

    from aurora_train.checkpoint import layout
    from aurora_train.nn.decoder import Decoder

    model = nnx.eval_shape(lambda: Decoder(config, vocabulary, "float32", nnx.Rngs(params=0)))
    shapes = {}
    for names, stacked, leaf in layout.entries(nnx.to_pure_dict(nnx.state(model, nnx.Param))):
        shapes |= dict.fromkeys(names, tuple(leaf.shape[1:] if stacked else leaf.shape))
    return dict(sorted(shapes.items()))


def places(family: Family, shapes: Mapping[str, tuple[int, ...]], heads: int) -> dict[str, Place]:
    """The place of each parameter of ours. UserError for one that the family has no tensor for.

    `heads`: of the queries, by which some tensors are interleaved.
    """
    tables = [{ours: weight for weight in weights for ours in weight.ours} for weights in (family.block, family.outer)]
    num_blocks = 1 + max((int(m[2] or 0) for m in map(_UNIT.fullmatch, shapes) if m), default=0)
    found = {}
    for name, shape in shapes.items():
        unit = _UNIT.fullmatch(name)
        inner = unit[3] if unit else name
        weight: Weight | None = tables[0 if unit else 1].get(inner)
        if weight is None:
            raise UserError(f"{family.title} has no tensor for the parameter {name}", where="model")
        layer = int(unit[1]) * num_blocks + int(unit[2] or 0) if unit else 0
        stem = name.removesuffix(inner)
        sizes = [_along(weight, shapes[stem + one]) for one in weight.ours]
        at = weight.ours.index(inner)
        theirs = family.layer.format(layer) + weight.theirs if unit else weight.theirs
        flips = weight.transpose and len(shape) == 2
        axis, turns = weight.axis if len(shape) == 2 else 0, heads if weight.by_head else 0
        found[name] = Place(theirs, axis, sum(sizes[:at]), sum(sizes[: at + 1]), flips, turns, weight.middle)
    return found


def _along(weight: Weight, shape: tuple[int, ...]) -> int:
    """The size of a parameter of ours along the axis of theirs on which parts are joined."""
    if len(shape) == 1:
        return shape[0]
    return (shape[::-1] if weight.transpose else shape)[weight.axis]


def their_shapes(family: Family, shapes: Mapping[str, tuple[int, ...]], heads: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that a file of these parameters has, with its shape."""
    found: dict[str, tuple[int, ...]] = {}
    for name, place in places(family, shapes, heads).items():
        whole = list(found.get(place.theirs, place.their_shape(shapes[name])))
        whole[place.axis] = max(whole[place.axis], place.stop)
        found[place.theirs] = tuple(whole)
    return found


def ours(
    family: Family, shapes: Mapping[str, tuple[int, ...]], heads: int, arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, by canonical name, of arrays by their names."""
    tensors = {name: Tensor(array.shape, str(array.dtype), lambda start, stop, a=array: a[start:stop])
               for name, array in arrays.items()}  # fmt: skip
    return {name: place.read(tensors[place.theirs]) for name, place in places(family, shapes, heads).items()}


def theirs(
    family: Family, shapes: Mapping[str, tuple[int, ...]], heads: int, read: Callable[[str], np.ndarray]
) -> Theirs:
    """The inverse of `ours`: (name, function that makes the array of their layout) for each tensor of a file.

    `read(name)` returns a parameter of ours. Arrays are C-contiguous, because safetensors 0.8 stores views wrongly.
    """
    parts: dict[str, list[tuple[Place, str]]] = {}
    for name, place in places(family, shapes, heads).items():
        parts.setdefault(place.theirs, []).append((place, name))

    def made(pieces: list[tuple[Place, str]]) -> np.ndarray:
        pieces = sorted(pieces, key=lambda piece: piece[0].start)
        arrays = [read(name).T if place.transpose else read(name) for place, name in pieces]
        first = pieces[0][0]
        if first.heads:
            turns = [array.reshape(first.heads, 1, -1, array.shape[1]) for array in arrays]
            arrays = [np.concatenate(turns, 1).reshape(-1, arrays[0].shape[1])]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, first.axis)
        return np.ascontiguousarray(whole[:, None] if first.middle else whole)

    return {name: functools.partial(made, pieces) for name, pieces in parts.items()}


def assembled(tree, read: Callable[[str], np.ndarray]):
    """The nested dict of parameters `tree` (abstract), float32, of what `read` returns by canonical name."""
    import jax
    import jax.numpy as jnp

    from aurora_train.checkpoint import layout

    leaves = []
    for names, stacked, _ in layout.entries(tree):
        arrays = [np.asarray(read(name), np.float32) for name in names]
        leaves.append(jnp.asarray(np.stack(arrays) if stacked else arrays[0]))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


class Opened(NamedTuple):
    """A source as a model of ours, matched tensor by tensor.

    `beside`: the names of tensors of other parts (vision, speech), which are not read.
    """

    source: OpenModel
    family: Family
    config: DecoderConfig
    vocabulary: int
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, Place]
    tensors: dict[str, Tensor]
    beside: list[str]

    def dtype(self, name: str) -> str:
        return self.tensors[self.places[name].theirs].dtype

    def read(self, name: str) -> np.ndarray:
        """One parameter of ours, in the dtype that it is stored in."""
        return self.places[name].read(self.tensors[self.places[name].theirs])


def shape_of(source: OpenModel) -> tuple[Family, DecoderConfig]:
    """(family, shape) of a source, without jax. UserError as `families.of` and `read_shape` say."""
    where = str(source.path / "config.json" if source.path.is_dir() else source.path)
    family = families.of(source.config, where)
    try:
        fields = families.read_shape(source.config, family, where)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json describes no model: {error}", where=where) from error
    fields["tied"] = bool(fields["tied"]) and not _has_own_head(text_tensors(source, family)[0], family)
    try:
        return family, DecoderConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"config.json describes no model: {key and key + ': '}{first['msg'].removeprefix('Value error, ')}",
            where=where,
        ) from None


def matched(source: OpenModel) -> Opened:
    """A source matched with our parameters. UserError for every tensor that is missing, extra or of another shape."""
    family, config = shape_of(source)
    vocabulary = families.vocabulary(source.config, str(source.path))
    shapes = our_shapes(config, vocabulary)
    tensors, beside = text_tensors(source, family)
    head = next(weight.theirs for weight in family.outer if weight.ours == ("head",))
    if config.tied:
        tensors.pop(head, None)  # stored twice, and equal
    refuse_codes(tensors, str(source.path))
    _refuse_difference(tensors, their_shapes(family, shapes, config.heads), source)
    placed = places(family, shapes, config.heads)
    return Opened(source, family, config, vocabulary, shapes, placed, tensors, beside)


def text_tensors(source: OpenModel, family: Family) -> tuple[dict[str, Tensor], list[str]]:
    """(the text model's tensors by the family's names, the names of tensors of other parts)."""
    tensors, beside = {}, []
    for name, tensor in source.tensors.items():
        stands_for = family.meant(name)
        if _BESIDE.match(stands_for):
            beside.append(name)
        elif not stands_for.endswith(family.unused):
            tensors[stands_for] = tensor
    return tensors, beside


def _has_own_head(tensors: dict[str, Tensor], family: Family) -> bool:
    """Whether a file holds an output head that differs from the embedding: a flag that says "tied" is no proof."""
    by_ours = {weight.ours[0]: weight.theirs for weight in family.outer}
    head, embedding = tensors.get(by_ours["head"]), tensors.get(by_ours["embedding"])
    if head is None or embedding is None or head.shape != embedding.shape or len(head.shape) != 2:
        return head is not None
    rows = max(1, _BLOCK_BYTES // (4 * head.shape[1]))
    ends = [(at, min(at + rows, head.shape[0])) for at in range(0, head.shape[0], rows)]
    return any(not np.array_equal(head.read(*part), embedding.read(*part)) for part in ends)


def _refuse_difference(found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], source: OpenModel) -> None:
    lines = [f"{name}: missing" for name in wanted if name not in found]
    lines += [f"{name}: not part of this architecture" for name in found if name not in wanted]
    lines += [
        f"{name}: of shape {list(found[name].shape)}, where config.json means {list(shape)}"
        for name, shape in wanted.items() if name in found and tuple(found[name].shape) != shape
    ]  # fmt: skip
    if lines:
        more = f"\n  ... and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError(
            "the tensors are not those that config.json describes", where=str(source.path),
            why="\n  ".join(lines[:8]) + more,
            hint="the files are incomplete, or belong to another model: fetch all of them again",
        )  # fmt: skip
