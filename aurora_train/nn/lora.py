"""Low-rank adapters (Hu et al. 2021, section 4.1): y = x W + scale (x A) B, with W unchanged (`Lora.scale`).

The frozen kernels of the blocks may be stored in 4 bits (`nn.nf4`): QLoRA.

An adapted kernel `query` [in, out] stands beside `query_lora_a` [in, rank], normal, and `query_lora_b` [rank, out],
zero: before the first step they add exactly nothing. Of the embedding [V, width], whose rows are looked up, A [V, rank]
is zero and B is normal, as in the authors' own code. Where the embedding is also the head (`tied`), its adapter is part
of both: the model remains tied. Both matrices are `nnx.LoRAParam`. A model that has adapters trains only
these, and all its other parameters are frozen, unless its recipe says otherwise (`Recipe.trainable`): `mark` marks the
trained parameters, and only `split` reads the marks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.errors import UserError
from aurora_train.nn import int8, nf4
from aurora_train.nn.linear import linear
from aurora_train.nn.param import named
from aurora_train.nn.tracing import current, forms

ADAPTERS = ("_lora_a", "_lora_b")  # suffixes of the adapters' names
TABLE = "embedding"  # the parameter whose rows are looked up
TURNED = "_turned"  # suffix of the name of a kernel that is stored as [out, in]
_STREAM = 0x4C6F5241  # "LoRA": far from the counts with which the kernels' own keys are folded


def adapt(module: nnx.Module, config, names: tuple[str, ...], rngs: nnx.Rngs, *, place: str = "", plain=()) -> None:
    """Add adapters to the targeted kernels among `names` of a module, and encode all of them if `base` is nf4.

    Args:
        config: a `Lora` section, or None.
        place: the module's name in its block, by which patterns may name its kernels (`mlp.*`).
        plain: names of further kernels, which are never encoded.

    What a decoder does with the weights beforehand (`generate.weights`) it does to `module.kernels`, and stores in
    fewer bits `module.encodable` of them: those in 8 bits are named by `module.rounded`. Kernels that it stores as
    [out, in], which a CPU reads faster, are named by `module.turned`.

    The keys are folded separately and take nothing from the stream, so kernels are drawn as without adapters. A second
    call for a module adds to the first.
    """
    module.lora_scale = None if config is None else config.scale
    module.coded = () if config is None or config.base != "nf4" else names
    module.encodable, module.rounded = (*getattr(module, "encodable", ()), *names), ()
    module.turned = ()
    module.kernels = (*getattr(module, "kernels", ()), *names, *plain)
    chosen = () if config is None else tuple(name for name in (*names, *plain) if config.adapts(place, name))
    module.adapted = (*getattr(module, "adapted", ()), *chosen)
    for name in chosen:
        kernel = getattr(module, name)
        (inputs, outputs), (input_axis, output_axis) = kernel.shape, kernel.get_metadata()["out_sharding"]
        key = rngs.params.key[...]
        for number in (_STREAM, rngs.params.count[...], zlib.crc32(name.encode())):
            key = jax.random.fold_in(key, number)
        if name == TABLE:
            down = jnp.zeros((inputs, config.rank), jnp.float32)
            up = jax.random.normal(key, (config.rank, outputs), jnp.float32)
        else:
            down = jax.random.normal(key, (inputs, config.rank), jnp.float32) * inputs**-0.5
            up = jnp.zeros((config.rank, outputs), jnp.float32)
        setattr(module, f"{name}_lora_a", _named(down, (input_axis, "lora")))
        setattr(module, f"{name}_lora_b", _named(up, ("lora", output_axis)))
    for name in module.coded:
        kernel = getattr(module, name)
        delattr(module, name)
        for suffix, value in zip((nf4.CODES, nf4.SCALES), nf4.encode(kernel[...]), strict=True):
            setattr(module, name + suffix, named(value, kernel.get_metadata()["out_sharding"]))


def project(module: nnx.Module, name: str, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x[..., in] times the kernel `name` of a module, plus bias[out], plus its adapter's output; dtype of x."""
    if name in module.coded:
        _refuse_both()
        y = nf4.linear(x, *(getattr(module, name + suffix)[...] for suffix in (nf4.CODES, nf4.SCALES)))
        y = y if bias is None else forms().add_bias(y, bias)
    elif name in module.rounded:
        y = int8.linear(x, *(getattr(module, name + suffix)[...] for suffix in (int8.CODES, int8.SCALES)))
        y = y if bias is None else forms().add_bias(y, bias)
    elif name in module.turned:
        y = linear(x, getattr(module, name + TURNED)[...], bias, turned=True)
    else:
        y = linear(x, getattr(module, name)[...], bias)
    if not _is_adapted(module, name):
        return y
    # At a low rank, 8 bits would gain nothing.
    low = linear(x, getattr(module, f"{name}_lora_a")[...], wide=True) * jnp.asarray(module.lora_scale, x.dtype)
    return y + linear(low, getattr(module, f"{name}_lora_b")[...], wide=True)


def look_up(module: nnx.Module, tokens: jax.Array, dtype) -> jax.Array:
    """The rows of a module's embedding for tokens int[...], its adapter's included: [..., width] in `dtype`."""
    rows = getattr(module, TABLE)[...][tokens].astype(dtype)
    if not _is_adapted(module, TABLE):
        return rows
    low = getattr(module, f"{TABLE}_lora_a")[...][tokens].astype(dtype) * jnp.asarray(module.lora_scale, dtype)
    return rows + linear(low, getattr(module, f"{TABLE}_lora_b")[...], wide=True)


def head_products(module: nnx.Module, name: str, hidden: jax.Array, vocab_first: bool):
    """(hidden, head) as `nn.losses` takes them: two pairs, if the head [D, V], or the embedding, has an adapter.

    The second product is that of hidden states brought down to the rank with the matrix that has the vocabulary.
    """
    head = getattr(module, name)[...]
    if not _is_adapted(module, name):
        return hidden, head
    down, up = (getattr(module, name + end)[...] for end in ADAPTERS)
    first, second = (up.T, down) if vocab_first else (down, up)
    low = linear(hidden, first, wide=True) * jnp.asarray(module.lora_scale, hidden.dtype)
    return (hidden, low), (head, second)


def _is_adapted(module: nnx.Module, name: str) -> bool:
    """Whether an adapter adds to a parameter here: a trace may be of the frozen base alone (`nn.tracing`)."""
    return name in module.adapted and current().adapters


def _refuse_both() -> None:
    if current().in_8_bits:
        raise UserError(
            "a base of 4-bit codes cannot be multiplied in fp8", where="train.precision",
            why="its kernels are decoded to bfloat16", hint="train.precision=bfloat16, or model.lora.base=compute",
        )  # fmt: skip


def mark(model: nnx.Module, trainable: Callable[[str], bool]) -> None:
    """Mark every parameter of a model as trained or not, by its dotted path (`Recipe.trainable`).

    The mark stays with a parameter when its stack is cut and when its unit is taken out of the stack, so that a part of
    the model is split like the whole.
    """
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(trained=bool(trainable(_path_text(path))))


def has_adapters(model: nnx.Module) -> bool:
    """Whether a model has an adapter anywhere."""
    return any(isinstance(variable, nnx.LoRAParam) for _, variable in nnx.iter_graph(model))


def split(variables: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(trained, frozen) parameters, as marked. Without marks: the adapters and the rest, or all and none."""
    kept = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if any("trained" in variable.get_metadata() for variable in kept):
        return nnx.split_state(variables, lambda path, variable: variable.get_metadata()["trained"], ...)
    adapters, others = nnx.split_state(variables, nnx.LoRAParam, ...)
    return (adapters, others) if jax.tree.leaves(adapters) else (variables, adapters)


def _path_text(path: tuple) -> str:
    """A dotted path without the numbers of units and segments: `stack.units.attention.query`."""
    at = next((i for i, part in enumerate(path) if part == "segments"), None)
    parts = path if at is None else (*path[:at], "units", *path[at + 2 :])
    return ".".join(map(str, parts))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this dotted name belongs to an adapter."""
    return name.endswith(ADAPTERS)


def _named(value: jax.Array, names: tuple[str, str]) -> nnx.LoRAParam:
    return nnx.LoRAParam(value, out_sharding=names, eager_sharding=False)
