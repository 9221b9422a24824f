"""The parameters of a trained run or of a weights file, into the state of a model that may keep some of them frozen.

A parameter has one name wherever it lies: what one run trained, another may freeze. So names are looked up without
their first part: the moving average where one was kept, else the trained parameters, and the frozen ones.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from aurora_train import run as runs
from aurora_train.checkpoint import layout
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.errors import UserError
from aurora_train.nn import nf4
from aurora_train.nn.lora import is_adapter
from aurora_train.train.lineage import Parent
from aurora_train.train.state import Blueprint

log = logging.getLogger("aurora_train")

_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I32": "int32",
}  # fmt: skip
_READ = ", ".join(_SAFETENSORS)
_PLACES = ("frozen.", "params.", "extra.ema.")  # the later one wins


def parameters_from(parent: Parent, blueprint: Blueprint, drawn: dict) -> tuple[dict, dict]:
    """(params, frozen) from another run's checkpoint or a safetensors file.

    Where the model has adapters and the source has none, they stay as `drawn`: the nested dict of initial parameters.
    """
    path = parent.path
    if parent.step is None:
        return _poured(_from_safetensors, Path(path), blueprint, path, drawn)
    other = runs.Run.existing(path)
    store = CheckpointStore(other.checkpoints, other.trash)
    return load_parameters(store, parent.step, blueprint, where=path, drawn=drawn)


def load_parameters(store: CheckpointStore, step: int, blueprint: Blueprint, *, where: str, drawn: dict | None = None):
    """(params, frozen) of a checkpoint, averaged where an average was kept. `drawn` as in `parameters_from`."""
    return _poured(_from_store, (store, step), blueprint, where, drawn)


def _poured(source, what, blueprint: Blueprint, where: str, drawn: dict | None) -> tuple[dict, dict]:
    """`source(what)` gives the stored shapes by bare name, and a function that reads the wanted arrays."""
    stored, read = source(what)
    tree = {"params": blueprint.state.params, "frozen": blueprint.state.frozen}
    places = {"params": blueprint.shardings.params, "frozen": blueprint.shardings.frozen}
    wanted, own = layout.abstract(tree, places), {}
    if drawn is not None and not any(map(is_adapter, stored)):
        own = {name: array for name, array in _canonical(drawn).items() if is_adapter(name)}
    wanted = {name: spec for name, spec in wanted.items() if name not in own}
    kernels = _uncoded(wanted, stored)
    _refuse_coded(wanted, stored, where)
    wanted = {name: spec for name, spec in wanted.items() if _kernel_of(name) not in kernels} | kernels
    bare = {name: name.split(".", 1)[1] for name in wanted}
    home = {short: name for name, short in bare.items()}
    known = {home.get(name, f"params.{name}"): spec for name, spec in stored.items()}
    # Weights are read in the dtype that they have in their source, and cast once in place to that of the new run.
    specs = {name: _as_stored(spec, known.get(name)) for name, spec in wanted.items()}
    if drawn is None:  # a trained run is judged by what it saved: an average has more bits than bfloat16 masters
        tree["params"] = _in_stored_dtypes(tree["params"], specs)
    layout.refuse_difference(known, specs, where=where)
    arrays = read({bare[name]: spec for name, spec in specs.items() if name not in kernels})
    flat = {name: arrays.pop(bare[name]) for name in wanted if name not in kernels} | own
    for name in kernels:  # one at a time: as it is in its source it may be eight times as large
        (kernel,) = read({bare[name]: specs[name]}).values()
        flat[name + nf4.CODES], flat[name + nf4.SCALES] = _encode(kernel)
    filled = layout.assemble(flat, tree, places)
    return filled["params"], filled["frozen"]


def state_from(parent: Parent, blueprint: Blueprint, drawn: dict) -> dict:
    """What the parent held beside its parameters, such as the statistics of BatchNorm; as `drawn` where it has none."""
    if not jax.tree.leaves(drawn):
        return drawn
    if parent.step is None:
        log.warning("%s holds parameters alone: the model's other state (BatchNorm's statistics) starts anew", parent)
        return drawn
    other = runs.Run.existing(parent.path)
    return load_state(CheckpointStore(other.checkpoints, other.trash), parent.step, blueprint)


def load_state(store: CheckpointStore, step: int, blueprint: Blueprint) -> dict:
    """What a checkpoint holds of the model beside its parameters. UserError where it is of another model."""
    if not jax.tree.leaves(blueprint.state.rest):
        return blueprint.state.rest
    tree, places = {"rest": blueprint.state.rest}, {"rest": blueprint.shardings.rest}
    return layout.assemble(store.restore_some(step, layout.abstract(tree, places)), tree, places)["rest"]


_encode = jax.jit(nf4.encode)


def _kernel_of(name: str) -> str | None:
    """The kernel that a parameter holds the codes or the scales of."""
    return name.removesuffix(nf4.SCALES).removesuffix(nf4.CODES) if nf4.is_coded(name) else None


def _refuse_coded(wanted: dict, stored: dict, where: str) -> None:
    """UserError where the source has a base of 4 bits and the model has none."""
    if any(map(nf4.is_coded, stored)) and not any(map(nf4.is_coded, wanted)):
        raise UserError(
            "its base is stored in 4 bits, and what was rounded away cannot be had back", where=where,
            hint="model.lora.base=nf4 and the model.lora.rank it was trained with; or start from what it started from",
        )  # fmt: skip


def _uncoded(wanted: dict, stored: dict) -> dict:
    """The kernels that are wanted in 4 bits and that the source does not have so, as they are before."""
    found = {}
    for name, spec in wanted.items():
        if name.endswith(nf4.CODES) and name.split(".", 1)[1] not in stored:
            half, outputs = spec.shape
            found[_kernel_of(name)] = jax.ShapeDtypeStruct((2 * half, outputs), "float32", sharding=spec.sharding)
    return found


def _canonical(drawn: dict) -> dict[str, Any]:
    """The initial parameters by canonical name, one array per layer."""
    flat = {}
    for names, stacked, leaf in layout.entries({"params": drawn}):
        flat.update(zip(names, leaf if stacked else [leaf], strict=True))
    return flat


def _as_stored(spec, found):
    floats = found is not None and all(jax.numpy.issubdtype(one.dtype, jax.numpy.floating) for one in (spec, found))
    return jax.ShapeDtypeStruct(spec.shape, found.dtype, sharding=spec.sharding) if floats else spec


def _in_stored_dtypes(params, specs: dict):
    """The nested dict of abstract parameters in the dtypes of `specs`, which go by canonical name."""
    entries = layout.entries({"params": params})
    leaves = [jax.ShapeDtypeStruct(leaf.shape, specs[names[0]].dtype) for names, _, leaf in entries]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _from_store(what):
    store, step = what
    shapes, names = store.shapes(step), {}
    for place in _PLACES:
        names |= {name.removeprefix(place): name for name in shapes if name.startswith(place)}

    def read(wanted: dict) -> dict:
        arrays = store.restore_some(step, {names[bare]: spec for bare, spec in wanted.items()})
        return {bare: arrays[names[bare]] for bare in wanted}

    return {bare: shapes[name] for bare, name in names.items()}, read


def _from_safetensors(path: Path):
    """Arrays are read when they are asked for: a file may be larger than memory."""
    from safetensors import SafetensorError, safe_open

    def asked(what):
        try:
            return what()
        except SafetensorError as error:
            raise UserError(f"not a readable safetensors file: {error}", where=str(path)) from error

    handle = asked(lambda: safe_open(path, framework="numpy"))
    stored = {}
    for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
        part = handle.get_slice(name)
        dtype = _SAFETENSORS.get(part.get_dtype())
        if dtype is None:
            raise UserError(
                f"{name} is stored as {part.get_dtype()}", where=str(path), why=f"supported dtypes are {_READ}"
            )
        stored[name] = jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)

    def read(wanted: dict) -> dict:
        return {
            name: jax.device_put(asked(lambda name=name: handle.get_tensor(name)), spec.sharding)
            for name, spec in wanted.items()
        }

    return stored, read
