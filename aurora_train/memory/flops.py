"""Floating-point operations, counted from a jaxpr: what a program is asked to compute, recomputation included.

A product of M x N x K is 2 M N K (Kaplan et al. 2020). What a form of attention masks away after computing it counts;
what it never computes (blocks above the diagonal, half of cuDNN's causal attention) does not.
"""

from __future__ import annotations

import math

from aurora_train.compat import is_unreadable, jaxprs_in_params

# Layout alone: no arithmetic. XLA folds these into their consumers.
FREE = frozenset(
    ("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose", "slice", "rev", "iota", "copy", "name")
    + ("optimization_barrier", "stop_gradient", "reduce_precision", "concatenate", "pad", "split")
)
PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"))


def equation_flops(equation) -> tuple[int, int]:
    """(all, products') floating-point operations of one jaxpr equation; a loop's body counts once a turn.

    The turns of a `while` are unknown and count as one; a `cond` counts its dearest branch.
    """
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return (_product_flops(equation),) * 2
    if name.startswith("dot_product_attention_fwd"):
        return (_attention_flops(equation),) * 2
    if name.startswith("dot_product_attention_bwd"):  # five products for the forward pass's two: one is made again
        return (_attention_flops(equation) * 5 // 2,) * 2
    if (estimate := params.get("cost_estimate")) is not None:  # a Pallas kernel that says so itself
        return int(estimate.flops), int(estimate.flops)
    bodies = [jaxpr_flops(body) for body in jaxprs_in_params(params)]
    if bodies and name == "cond":
        return max(bodies)
    if bodies:
        turns = _turns(name, params)
        return tuple(turns * sum(part) for part in zip(*bodies, strict=True))
    if name in FREE:
        return 0, 0
    sized = equation.invars[:1] if is_reduction(name) else equation.outvars
    return sum(math.prod(getattr(v.aval, "shape", ())) for v in sized), 0


def jaxpr_flops(jaxpr) -> tuple[int, int]:
    """(all, products') floating-point operations of a jaxpr, over all devices together."""
    parts = [equation_flops(equation) for equation in jaxpr.eqns]
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def product_flops(jaxpr) -> int | None:
    """Those of the products of a jaxpr alone. None where it holds what cannot be counted: no run depends on them."""
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
    """cuDNN's fused forward pass: two products, of which a causal mask needs half."""
    (batch, length, heads, dim), (_, seen, _, _) = (v.aval.shape for v in equation.invars[:2])
    causal = "CAUSAL" in str(equation.params["mask_type"]).upper()
    return 4 * batch * length * seen * heads * dim // (2 if causal else 1)


def _turns(name: str, params) -> int:
    """How often a body is run: of a scan, of a Pallas kernel's grid, on the devices of a shard_map."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size
    grid = getattr(params.get("grid_mapping"), "grid", ())
    return math.prod(n for n in grid if isinstance(n, int))


def is_reduction(name: str) -> bool:
    """Whether a primitive reads many values for one."""
    return name.startswith(("reduce_", "arg")) and name != "reduce_precision"
