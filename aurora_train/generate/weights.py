"""A model as it is decoded: its weights cast or encoded once, on a mesh if there is one.

The units are copied out of their stack, because a scan over them would copy each unit and its caches for every token.
Where memory is short and nothing else is asked for, the model is decoded as it is.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_train import mesh as meshes
from aurora_train.errors import UserError
from aurora_train.machine.memory import host_memory
from aurora_train.nn import int8, lora, nf4, param
from aurora_train.nn.decoder_config import KINDS, LINEAR
from aurora_train.nn.stack import stacks
from aurora_train.nn.tracing import form_name

Weights = Literal["float32", "bfloat16", "int8", "nf4"]


class Form:
    """All of a decoded model but its arrays; static in the programs, so its hash is computed once."""

    def __init__(self, graph, structure, mesh: Mesh | None):
        self.graph, self.structure, self.mesh = graph, structure, mesh
        self._hash = hash((graph, structure, mesh))

    def model(self, arrays: list):
        """The model with these arrays."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, arrays))

    def by_slot(self, caches, logits):
        """Caches [units, S, ...] and logits [S, V] with their slots over the devices of the mesh."""
        if self.mesh is None:
            return caches, logits
        places = NamedSharding(self.mesh, PartitionSpec(None, meshes.AXES)), meshes.batch_sharding(self.mesh)
        return jax.lax.with_sharding_constraint((caches, logits), places)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        same = self is other
        return same or (self._hash, self.graph, self.structure, self.mesh) == (
            other._hash, other.graph, other.structure, other.mesh
        )  # fmt: skip


class Decoded(NamedTuple):
    """A model ready to decode."""

    form: Form
    arrays: list

    @property
    def model(self):
        """The model as a module; abstract if its arrays are."""
        return self.form.model(self.arrays)


def decoded(model, weights: Weights | None = None, mesh: Mesh | None = None) -> Decoded:
    """A `Decoder` as it is decoded; the given one stays as it is.

    `weights`: how kernels are stored. float32 and bfloat16 are also the dtype of the computation; None leaves that, and
    casts kernels to it where there is room for a copy. UserError for 4 bits and inputs that no block of 64 divides.
    """
    graph, state = nnx.split(model)
    if weights is not None or _has_room(state):
        model = nnx.merge(graph, state)
        _store(model, weights)
        for stack in stacks(model).values():
            stack.cut_into_units()
        graph, state = nnx.split(model)
    if mesh is not None:
        places = meshes.parameter_shardings(state, mesh)
        nnx.replace_by_pure_dict(state, jax.tree.map(jax.device_put, nnx.to_pure_dict(state), places))
    arrays, structure = jax.tree.flatten(state)
    return Decoded(_interned(Form(graph, structure, mesh)), arrays)


def bytes_beside(model) -> int:
    """Bytes that an abstract model's weights take as they are decoded, beside those that it has.

    On a device with memory of its own these are 0: the model is copied only if there is room when it is decoded.
    """

    def stored(state):
        model = nnx.merge(graph, state)
        _store(model, None)
        return jax.tree.leaves(nnx.state(model))

    graph, state = nnx.split(model)
    copied = form_name() == "cpu" and _has_room(state)
    return _bytes(jax.eval_shape(stored, state)) if copied else 0


def own_kinds(config) -> bool:
    """Whether a layer is of a recipe's own kind, which need not know of padding."""
    return any(row.kind not in (*KINDS, LINEAR) for row in config.rows)


@functools.lru_cache(64)
def _interned(form: Form) -> Form:
    """One object for equal forms, so that a program finds its compilation without comparing them."""
    return form


def _has_room(state) -> bool:
    """Whether a copy takes at most a quarter of a CPU's memory, or half of what a device of its own memory has left."""
    if form_name() == "cpu":
        return 4 * _bytes(state) <= host_memory().usable
    said = jax.local_devices()[0].memory_stats()
    return bool(said) and 2 * _bytes(state) <= said["bytes_limit"] - said["bytes_in_use"]


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _store(model, weights) -> None:
    """Store the kernels of a model as asked, in place of its own."""
    if weights in ("float32", "bfloat16"):
        model.dtype = weights
    for _, module in list(nnx.iter_graph(model)):
        if not isinstance(module, nnx.Module) or not hasattr(module, "kernels"):
            continue
        if weights in ("int8", "nf4"):
            _encode(module, weights)
        for name in module.kernels:
            if model.dtype == "bfloat16" and hasattr(module, name):
                _replace(module, name, name, jnp.asarray(getattr(module, name)[...], jnp.bfloat16))
        if form_name() == "cpu":
            _turn(module)


def _encode(module, weights) -> None:
    names = tuple(name for name in module.encodable if hasattr(module, name))
    form = int8 if weights == "int8" else nf4
    for name in names:
        kernel = getattr(module, name)
        inputs = kernel[...].shape[-2]
        if weights == "nf4" and inputs % nf4.BLOCK:
            raise UserError(
                f"a kernel of {inputs} inputs cannot be stored in 4 bits", where="weights",
                why=f"they are encoded in blocks of {nf4.BLOCK} inputs", hint="weights=int8",
            )  # fmt: skip
        for suffix, value in zip((form.CODES, form.SCALES), form.encode(kernel[...]), strict=True):
            _replace(module, name, name + suffix, value)
        delattr(module, name)
    if weights == "int8":
        module.rounded = names
    else:
        module.coded = (*module.coded, *names)


def _turn(module) -> None:
    """Store kernels as [out, in], as `nn.cpu.few_rows` reads them; but no embedding, which is so already, and no head
    with an adapter, whose products are of one form."""
    fixed = {lora.TABLE, *module.adapted} - set(module.encodable)
    names = tuple(name for name in module.kernels if hasattr(module, name) and name not in fixed)
    for name in names:
        kernel = getattr(module, name)
        *units, inputs, outputs = kernel.get_metadata()["out_sharding"]
        setattr(module, name + lora.TURNED, param.named(kernel[...].swapaxes(-1, -2), (*units, outputs, inputs)))
        delattr(module, name)
    module.turned = names


def _replace(module, old: str, new: str, value) -> None:
    setattr(module, new, param.named(value, getattr(module, old).get_metadata()["out_sharding"]))
