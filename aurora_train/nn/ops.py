"""The operations that dominate a step's time: the forms in which each can be written, and the form of each platform.

A layer calls `form("linear")` as it is traced and passes the result to its own backward rule; models, plans and recipes
know neither forms nor platforms. "plain" is the formula as XLA compiles it, for any platform; "cpu" is written for
XLA:CPU, and runs anywhere. All forms of an operation compute the same, up to the order and the rounding of sums, and
tag the same tensors. An embedding has only one form, a gather, and is not here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from aurora_train.nn.platform import platform


class Operation(NamedTuple):
    """`forms`: a short description of each form. `takes`: the form by platform; all others take `otherwise`."""

    forms: dict[str, str]
    takes: dict[str, str]
    otherwise: str = "plain"


_ON_CPU = {"cpu": "cpu"}

OPERATIONS = {
    "linear": Operation({
        "plain": "one product each; sums over rows as reductions",
        "cpu": "bfloat16 operands row by row and the sum over rows in two axes: XLA:CPU upcasts all else",
    }, _ON_CPU),
    # Limits of shape and dtype, and the override `model.attention`, are handled in `attention.choose_attention`.
    "attention": Operation({
        "reference": "all scores at once, the form the others are held to",
        "xla": "jax.nn.dot_product_attention in XLA",
        "blocked": "by blocks of queries, a form for CPU",
        "cudnn": "cuDNN flash attention",
    }, {"cpu": "blocked", "gpu": "cudnn"}, otherwise="xla"),
    "cross_entropy": Operation({
        "plain": "gradients formed with each chunk's logits, summed as the head is stored",
        "cpu": "the same, a tied head's in bfloat16 summed as its product comes, and turned once",
    }, _ON_CPU),
    "norm": Operation({
        "plain": "means and sums over rows as reductions",
        "cpu": "both as products with ones: XLA:CPU's reductions do not use all lanes",
    }, _ON_CPU),
    "activation": Operation({
        "plain": "made again in the backward pass, as are attention's slices and transposes",
        "cpu": "the same, and not before the gradient is there: XLA:CPU would make them early and keep them",
    }, _ON_CPU),
    "units": Operation({
        "plain": "an unrolled stack is sliced",
        "cpu": "it is taken apart, and its gradients stacked once: XLA:CPU writes each slice's zeros",
    }, _ON_CPU),
    "grad_norm": Operation({
        "plain": "all units of a segment at once",
        "cpu": "one unit after another: else XLA:CPU sums the squares of another cut in another order",
    }, _ON_CPU),
}  # fmt: skip

# (operation, form) pairs that a config asks for. Part of jax's cache key: traces under other forms are not reused.
_asked = jax.make_user_context(())


def asking(forms: dict[str, str]):
    """In this context, these operations take these forms on any platform (`config.train.forms.asked`)."""
    for name, asked_form in forms.items():
        assert asked_form in OPERATIONS[name].forms, (name, asked_form)
    return _asked(tuple(sorted(forms.items())))


def form(name: str) -> str:
    """The form in which to write an operation for the platform of the current trace."""
    operation, asked = OPERATIONS[name], dict(_asked.value)
    return asked.get(name) or operation.takes.get(platform(), operation.otherwise)


def chosen() -> dict[str, dict]:
    """{"form", "how", "asked"} of every operation except attention, whose kernel depends on its shape too."""
    asked, forms = dict(_asked.value), {name: form(name) for name in OPERATIONS if name != "attention"}
    return {n: {"form": f, "how": OPERATIONS[n].forms[f], "asked": n in asked} for n, f in forms.items()}
