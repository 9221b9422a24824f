"""Loads the parameters of a trained run or of a weights file into the state of a model, which may freeze some of them.

What one run trained, another may freeze. So names are looked up without their first part: in the moving average if one
was kept, else among the trained and the frozen parameters. A part of a model may come from a run of that part alone,
whose names then lack the part's prefix.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from aurora_train import run as runs
from aurora_train.check.intent import init_key
from aurora_train.checkpoint import layout
from aurora_train.checkpoint.reading import reading
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.errors import UserError
from aurora_train.interop.hf import tensors_of_file
from aurora_train.interop.placing import matched
from aurora_train.interop.source import is_foreign, open_source
from aurora_train.nn import nf4
from aurora_train.nn.lora import is_adapter
from aurora_train.origin.parents import Parent
from aurora_train.origin.widening import refuse_frozen, widened

if TYPE_CHECKING:
    from aurora_train.train.state import Blueprint

log = logging.getLogger("aurora_train")

_PLACES = ("frozen.", "params.", "extra.ema.")  # the later one wins


def parameters_from(parents: tuple[Parent, ...], blueprint: Blueprint, drawn: dict[str, Any]) -> tuple[dict, dict]:
    """(params, frozen) from the checkpoints and files that are the sources of a model's parts.

    `drawn`: the initial parameters that no parent provides, by canonical name (`drawn_beside`); emptied. If the model
    has adapters and a source has none, they are among these.
    """
    tree, places = _parameters(blueprint)
    _refuse_frozen_rows(parents, tree, places)
    flat, own = drawn, set(drawn)
    for parent in parents:
        with _opened(parent) as source:
            part, lazily = _Part.of(parent, parents), parent.step is None
            flat |= _poured(source, tree, places, parent.path, part, own, lazily=lazily)
    filled = layout.assemble(flat, tree, places)
    return filled["params"], filled["frozen"]


def refuse_other_shapes(parents: tuple[Parent, ...], blueprint: Blueprint) -> None:
    """UserError if a source does not have the parameters of a model, by their names and shapes; reads no weights."""
    tree, places = _parameters(blueprint)
    _refuse_frozen_rows(parents, tree, places)
    own = {name for name in layout.abstract(tree, places) if is_adapter(name) or _owner(_bare(name), parents) is None}
    for parent in parents:
        with _opened(parent) as source:
            _matched(source, tree, places, parent.path, _Part.of(parent, parents), own)


@contextlib.contextmanager
def _opened(parent: Parent):
    """The shapes of a source by bare name, with the rows of new tokens, and a function that reads the wanted arrays."""
    with contextlib.ExitStack() as closing:
        if is_foreign(parent.path):
            opened = matched(open_source(parent.path))
            shapes = {name: (shape, opened.dtype(name)) for name, shape in opened.shapes.items()}
            source = _by_name(shapes, opened.read)
        elif parent.step is None:
            tensors = tensors_of_file(Path(parent.path))
            shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            source = _by_name(shapes, lambda name: tensors[name].whole())
        else:
            run = runs.Run.existing(parent.path)
            store = closing.enter_context(contextlib.closing(CheckpointStore(run.checkpoints, run.trash)))
            closing.enter_context(reading(store, parent.step))
            source = stored_parameters(store, parent.step)
        yield source if parent.rows is None else widened(*source, parent.rows, parent.path)


def drawn_beside(parents: tuple[Parent, ...], state: dict) -> dict[str, Any]:
    """The drawn parameters that stay: adapters, and those under no parent's prefix, by canonical name."""
    kept = {}
    for names, stacked, leaf in layout.entries(state):
        for number, name in enumerate(names):
            bare = name.split(".", 1)[1]
            if is_adapter(name) or _owner(bare, parents) is None:
                kept[name] = leaf[number] if stacked else leaf
    return kept


def load_parameters(store: CheckpointStore, step: int, blueprint: Blueprint, *, where: str) -> tuple[dict, dict]:
    """(params, frozen) of a checkpoint of this very model; the moving average if one was kept."""
    tree, places = _parameters(blueprint)
    flat = _poured(stored_parameters(store, step), tree, places, where, _Part("", ()), None)
    # Keep the saved dtype: the moving average of a trained run has more bits than bfloat16 masters.
    tree["params"] = _in_dtypes_of(tree["params"], flat)
    filled = layout.assemble(flat, tree, places)
    return filled["params"], filled["frozen"]


def refuse_unknown_prefix(config, model) -> None:
    """UserError if `init` names a prefix under which a model has no parameter."""
    names = [entry.names[0] for entry in layout.entries(nnx.to_pure_dict(nnx.state(model, nnx.Param)))]
    parts = [name.split(".") for name in names]
    known = list(dict.fromkeys(".".join(one[:end]) for one in parts for end in range(1, len(one))))
    for prefix in config.init.parts:
        if prefix not in known:
            near = get_close_matches(prefix, [*known, "from", "facts"], 1)
            tops = ", ".join(dict.fromkeys(one[0] for one in parts))
            raise UserError(
                f"the model has no parameters under `{prefix}`", where=init_key(prefix),
                hint=f"did you mean `{near[0]}`?" if near else f"it has parameters under: {tops}",
            )  # fmt: skip


class _Part(NamedTuple):
    """The parameters under `prefix` but under none of `others`, which have their own sources."""

    prefix: str
    others: tuple[str, ...]

    @classmethod
    def of(cls, parent: Parent, parents: tuple[Parent, ...]) -> _Part:
        inner = [one.prefix for one in parents if one is not parent and _is_under(one.prefix, parent.prefix)]
        return cls(parent.prefix, tuple(inner))

    def has(self, bare: str) -> bool:
        """Whether a parameter of the model belongs to this part, by its name without `params.` or `frozen.`."""
        return _is_under(bare, self.prefix) and not any(_is_under(bare, other) for other in self.others)

    def named(self, stored: dict) -> dict[str, str]:
        """The model's name -> the source's, for what a source has of this part.

        If a source itself has a part of this name, that part is used; otherwise the whole source is the part.
        """
        itself = not self.prefix or any(_is_under(name, self.prefix) for name in stored)
        names = {name if itself else f"{self.prefix}.{name}": name for name in stored}
        return {ours: name for ours, name in names.items() if self.has(ours)}


def _is_under(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _owner(bare: str, parents: tuple[Parent, ...]) -> Parent | None:
    """The parent with the longest prefix that a parameter is under."""
    under = [parent for parent in parents if _is_under(bare, parent.prefix)]
    return max(under, key=lambda parent: len(parent.prefix), default=None)


def _parameters(blueprint: Blueprint) -> tuple[dict, dict]:
    tree = {"params": blueprint.state.params, "frozen": blueprint.state.frozen}
    return tree, {"params": blueprint.shardings.params, "frozen": blueprint.shardings.frozen}


def _refuse_frozen_rows(parents: tuple[Parent, ...], tree: dict, places: dict) -> None:
    if any(parent.rows is not None for parent in parents):
        refuse_frozen(layout.abstract(tree, places))


def _poured(
    source, tree: dict, places: dict, where: str, part: _Part, own: set[str] | None, *, lazily: bool = False
) -> dict[str, Any]:
    """The arrays that a source has for a part of the model, by canonical name. For the arguments see `_matched`.

    `lazily`: functions that read them, because reading them one at a time costs nothing; not so from a checkpoint.
    """
    specs, theirs, kernels = _matched(source, tree, places, where, part, own)

    def loaded(names) -> dict:
        arrays = source[1]({theirs[_bare(name)]: specs[name] for name in names})
        return {name: arrays[theirs[_bare(name)]] for name in names}

    plain = [name for name in specs if name not in kernels]
    flat = {name: functools.partial(lambda name: loaded([name])[name], name) for name in plain} if lazily else (
        loaded(plain))  # fmt: skip
    for name in kernels:  # one at a time, because in its source it may be eight times as large
        (kernel,) = loaded([name]).values()
        flat[name + nf4.CODES], flat[name + nf4.SCALES] = _encode(kernel)
    return flat


def _matched(source, tree: dict, places: dict, where: str, part: _Part, own: set[str] | None) -> tuple[dict, ...]:
    """(what is to be read, by canonical name; the source's names by bare name; the kernels among it to be encoded).

    `source`: the stored shapes by bare name, and a function that reads the wanted arrays. `own`: the names of drawn
    parameters; adapters among them stay as drawn if the source has none. None for a trained run that is read.
    UserError if the source has other parameters.
    """
    stored, _ = source
    theirs = part.named(stored)
    stored = {ours: stored[name] for ours, name in theirs.items()}
    wanted = {name: spec for name, spec in layout.abstract(tree, places).items() if part.has(_bare(name))}
    if own is not None and not any(map(is_adapter, stored)):
        wanted = {name: spec for name, spec in wanted.items() if not (name in own and is_adapter(name))}
    kernels = _uncoded(wanted, stored)
    _refuse_coded(wanted, stored, where)
    wanted = {name: spec for name, spec in wanted.items() if _kernel_of(name) not in kernels} | kernels
    home = {_bare(name): name for name in wanted}
    known = {home.get(name, f"params.{name}"): spec for name, spec in stored.items()}
    # Weights are read in the dtype of their source, and cast once in place to that of the new run.
    specs = {name: _as_stored(spec, known.get(name)) for name, spec in wanted.items()}
    layout.refuse_difference(known, specs, where=where)
    return specs, theirs, kernels


def _bare(name: str) -> str:
    """A canonical name without `params.` or `frozen.`: what one run trained, another may freeze."""
    return name.split(".", 1)[1]


def state_from(parents: tuple[Parent, ...], blueprint: Blueprint, drawn: dict) -> dict:
    """The parents' state beside their parameters, such as the statistics of BatchNorm; as `drawn` elsewhere."""
    if not jax.tree.leaves(drawn):
        return drawn
    flat, tree, places = _canonical({"rest": drawn}), {"rest": blueprint.state.rest}, {"rest": blueprint.shardings.rest}
    specs = layout.abstract(tree, places)
    for parent in parents:
        wanted = {name: spec for name, spec in specs.items() if _owner(_bare(name), parents) is parent}
        if parent.step is None and wanted:
            log.warning("%s holds only parameters: other state (BatchNorm's statistics) starts anew", parent)
        elif wanted:
            run = runs.Run.existing(parent.path)
            flat |= _rest_of(CheckpointStore(run.checkpoints, run.trash), parent, parents, wanted)
    return layout.assemble(flat, tree, places)["rest"]


def _rest_of(store: CheckpointStore, parent: Parent, parents: tuple[Parent, ...], wanted: dict) -> dict[str, Any]:
    stored = [name.removeprefix("rest.") for name in store.shapes(parent.step) if name.startswith("rest.")]
    theirs = _Part.of(parent, parents).named(dict.fromkeys(stored))
    names = {name: f"rest.{theirs.get(_bare(name), _bare(name))}" for name in wanted}
    arrays = store.restore_some(parent.step, {names[name]: spec for name, spec in wanted.items()})
    store.close()
    return {name: arrays[names[name]] for name in wanted}


def load_state(store: CheckpointStore, step: int, blueprint: Blueprint) -> dict:
    """The state that a checkpoint holds beside the model's parameters. UserError if it is of another model."""
    if not jax.tree.leaves(blueprint.state.rest):
        return blueprint.state.rest
    tree, places = {"rest": blueprint.state.rest}, {"rest": blueprint.shardings.rest}
    return layout.assemble(store.restore_some(step, layout.abstract(tree, places)), tree, places)["rest"]


_encode = jax.jit(nf4.encode)


def _kernel_of(name: str) -> str | None:
    """The kernel whose codes or scales a parameter holds; None for any other parameter."""
    return name.removesuffix(nf4.SCALES).removesuffix(nf4.CODES) if nf4.is_coded(name) else None


def _refuse_coded(wanted: dict, stored: dict, where: str) -> None:
    """UserError if the source has a 4-bit base and the model has none."""
    if any(map(nf4.is_coded, stored)) and not any(map(nf4.is_coded, wanted)):
        raise UserError(
            "its base is stored in 4 bits, from which full precision cannot be recovered", where=where,
            hint="set model.lora.base=nf4 and the model.lora.rank it was trained with, or start from its own source",
        )  # fmt: skip


def _uncoded(wanted: dict, stored: dict) -> dict:
    """The unencoded specs of kernels that are wanted in 4 bits but that the source does not store in 4 bits."""
    kernels = {}
    for name, spec in wanted.items():
        if name.endswith(nf4.CODES) and name.split(".", 1)[1] not in stored:
            half, outputs = spec.shape
            kernels[_kernel_of(name)] = jax.ShapeDtypeStruct((2 * half, outputs), "float32", sharding=spec.sharding)
    return kernels


def _canonical(drawn: dict) -> dict[str, Any]:
    """The leaves of a nested dict by canonical name, one array per layer."""
    flat = {}
    for names, stacked, leaf in layout.entries(drawn):
        flat.update(zip(names, leaf if stacked else [leaf], strict=True))
    return flat


def _as_stored(spec, stored):
    floats = stored is not None and all(jax.numpy.issubdtype(one.dtype, jax.numpy.floating) for one in (spec, stored))
    return jax.ShapeDtypeStruct(spec.shape, stored.dtype, sharding=spec.sharding) if floats else spec


def _in_dtypes_of(params, flat: dict):
    """The nested dict of abstract parameters in the dtypes of the arrays `flat`, by canonical name."""
    entries = layout.entries({"params": params})
    leaves = [jax.ShapeDtypeStruct(leaf.shape, flat[names[0]].dtype) for names, _, leaf in entries]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def stored_parameters(store: CheckpointStore, step: int):
    """(specs of a run's parameters by bare name, reader of those that are wanted, with their shardings).

    The moving average stands for the trained parameters if one was kept.
    """
    shapes, names = store.shapes(step), {}
    for place in _PLACES:
        names |= {name.removeprefix(place): name for name in shapes if name.startswith(place)}

    def read(wanted: dict) -> dict:
        arrays = store.restore_some(step, {names[bare]: spec for bare, spec in wanted.items()}, shapes)
        return {bare: arrays[names[bare]] for bare in wanted}

    return {bare: shapes[name] for bare, name in names.items()}, read


def _by_name(stored: dict[str, tuple[tuple[int, ...], str]], read_one: Callable[[str], np.ndarray]):
    """(specs, reader) of a source with a (shape, dtype) by name. Each parameter is read and put in its place alone,
    because a source may be larger than memory."""

    def read(wanted: dict) -> dict:
        return {name: jax.device_put(read_one(name), spec.sharding) for name, spec in wanted.items()}

    return {name: jax.ShapeDtypeStruct(*one) for name, one in stored.items()}, read
