"""Counts the floating-point operations of a jaxpr, recomputation included.

A product of M x N x K takes 2 M N K (Kaplan et al. 2020). Attention scores that are computed and then masked count;
those that are never computed (blocks above the diagonal, half of cuDNN's causal attention) do not.
"""

from __future__ import annotations

import math

from aurora_train.compat import is_unreadable, jaxprs_in_params

# These change the layout only, without arithmetic. XLA folds them into their consumers.
FREE = frozenset(
    ("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose", "slice", "rev", "iota", "copy", "name")
    + ("optimization_barrier", "stop_gradient", "reduce_precision", "concatenate", "pad", "split")
    + ("sharding_constraint",)
)
PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"))


def equation_flops(equation) -> tuple[int, int]:
    """(all, products') floating-point operations of one jaxpr equation; a loop's body counts once per iteration.

    The number of iterations of a `while` is unknown and counts as one; a `cond` counts its most expensive branch.
    """
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return (_product_flops(equation),) * 2
    if name.startswith("dot_product_attention_fwd"):
        return (_attention_flops(equation),) * 2
    if name.startswith("dot_product_attention_bwd"):  # five products to the forward pass's two: one is recomputed
        return (_attention_flops(equation) * 5 // 2,) * 2
    if (estimate := params.get("cost_estimate")) is not None:  # a Pallas kernel that declares its own cost
        return int(estimate.flops), int(estimate.flops)
    bodies = [jaxpr_flops(body) for body in jaxprs_in_params(params)]
    if bodies and name == "cond":
        return max(bodies)
    if bodies:
        iterations = _iterations(name, params)
        return tuple(iterations * sum(part) for part in zip(*bodies, strict=True))
    if name in FREE:
        return 0, 0
    sized = equation.invars[:1] if is_reduction(name) else equation.outvars
    return sum(math.prod(getattr(v.aval, "shape", ())) for v in sized), 0


def jaxpr_flops(jaxpr) -> tuple[int, int]:
    """(all, products') floating-point operations of a jaxpr, over all devices together."""
    parts = [equation_flops(equation) for equation in jaxpr.eqns]
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def product_flops(jaxpr) -> int | None:
    """FLOPs of a jaxpr's products only. None if an equation cannot be read: no run depends on this figure."""
    try:
        return jaxpr_flops(jaxpr)[1]
    except Exception as error:
        if not is_unreadable(error):
            raise
        return None


def _product_flops(equation) -> int:
    left, right = (v.aval.shape for v in equation.invars[:2])
    out = math.prod(equation.outvars[0].aval.shape)
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * out * math.prod(left[i] for i in contracted)
    if equation.primitive.name == "conv_general_dilated":
        return 2 * out * math.prod(right) // right[params["dimension_numbers"].rhs_spec[0]]
    numbers = params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    return 2 * out * math.prod(left[i] for i in contracted)


def _attention_flops(equation) -> int:
    """FLOPs of cuDNN's fused forward pass: two products, half of which a causal mask leaves out."""
    (batch, length, heads, dim), (_, seen, _, _) = (v.aval.shape for v in equation.invars[:2])
    causal = "CAUSAL" in str(equation.params["mask_type"]).upper()
    return 4 * batch * length * seen * heads * dim // (2 if causal else 1)


def _iterations(name: str, params) -> int:
    """How often a body runs: in a scan, over a Pallas kernel's grid, on the devices of a shard_map."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size
    grid = getattr(params.get("grid_mapping"), "grid", ())
    return math.prod(n for n in grid if isinstance(n, int))


def is_reduction(name: str) -> bool:
    """Whether a primitive reads many values to produce one."""
    return name.startswith(("reduce_", "arg")) and name != "reduce_precision"
