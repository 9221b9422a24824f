"""What a mesh costs: the bytes that a step brings into each device over the links of each axis, and their seconds.

Under `fsdp` every device gathers the weights of a unit to run it, again to differentiate it, and again where it is
recomputed, and the gradients are scattered; under `data` gradients are reduced. Both happen in every microbatch. Under
`tensor` the activations of a unit are reduced twice forward and twice backward. This is an estimate, made before
anything is compiled; `plan/traffic.py` reads the same from a compiled step.
"""

from __future__ import annotations

from dataclasses import replace

import jax

from aurora_train import mesh as meshes
from aurora_train.compat import is_unreadable
from aurora_train.machine.links import Links
from aurora_train.plan.account import tree_bytes


def moved(program, plan) -> dict[str, float]:
    """Bytes into each device in one step under a plan, by mesh axis; only for axes of more than one device."""
    shape = program.mesh.shape
    weights, gradients, whole = _parameters(program)
    scatters = 2 if program.platform == "cpu" else 1  # XLA:CPU has no reduce-scatter: it reduces all
    data, fsdp, tensor = (shape[axis] for axis in meshes.AXES)
    out = {
        "data": plan.accumulation * 2 * (data - 1) / data * (gradients + whole),
        "fsdp": plan.accumulation * (fsdp - 1) * (
            _gathers(plan) * weights + scatters * gradients + 2 / fsdp * whole
        ),
    }  # fmt: skip
    if tensor > 1:
        out["tensor"] = 2 * (tensor - 1) / tensor * (4 + 2 * _again(plan)) * _activations(program)
    return {axis: number for axis, number in out.items() if shape[axis] > 1}


def seconds_of(moved: dict[str, float], shape, links: Links) -> float | None:
    """Seconds to move the bytes of each axis of a mesh one after the other; None where a rate is not known."""
    strides = {"tensor": 1, "fsdp": shape["tensor"], "data": shape["tensor"] * shape["fsdp"]}
    rates = {axis: links.rate(strides[axis], shape[axis]) for axis in moved}
    return None if None in rates.values() else sum(number / rates[axis] for axis, number in moved.items())


def with_links(rates, program, links: Links):
    """Rates (or None) whose cost of one more microbatch includes what is communicated in each."""
    if rates is None or program.mesh.devices.size == 1:
        return rates
    each = {axis: number for axis, number in moved(program, program.simplest_plan()).items() if axis != "tensor"}
    return replace(rates, per_microbatch_seconds=rates.per_microbatch_seconds
                   + (seconds_of(each, program.mesh.shape, links) or 0.0))  # fmt: skip


def priced(plan, program, links: Links, rates):
    """The plan with what its mesh communicates. `rates`: those without links. Its step takes its products and all its
    communication: what of that is hidden behind products is not known before it is measured."""
    weighed = {"meshes": program.weighed} if program.weighed else {}
    if program.mesh.devices.size == 1:
        return replace(plan, details=plan.details | weighed) if weighed else plan
    bytes_in, time = moved(program, plan), plan.details.get("time")
    seconds = seconds_of(bytes_in, program.mesh.shape, links)
    if time and time["step_seconds"] is not None:
        folded = with_links(rates, program, links).per_microbatch_seconds - rates.per_microbatch_seconds
        products = time["step_seconds"] - plan.accumulation * folded
        step = products + (seconds or 0.0)
        time = time | {"product_seconds": products, "step_seconds": step, "seconds": step * time["steps"]}
    links_said = {"bytes": {axis: int(number) for axis, number in bytes_in.items()}, "seconds": seconds,
                  "rates": links.describe()}  # fmt: skip
    return replace(plan, details=plan.details | weighed | {"time": time, "links": links_said})


def _parameters(program) -> tuple[float, float, float]:
    """Bytes on a device: of weights that fsdp cuts, as they are gathered; of their gradients; of other gradients."""
    plan = program.simplest_plan()
    blueprint = program.blueprint(plan)
    state, places = blueprint.state, blueprint.shardings
    width = 4 if program.config.train.dtype == "float32" else 2
    weights = gradients = whole = 0.0
    for name in ("params", "frozen"):
        leaves, shardings = (jax.tree.leaves(getattr(tree, name)) for tree in (state, places))
        for leaf, sharding in zip(leaves, shardings, strict=True):
            held, trained = _number(sharding.shard_shape(leaf.shape)), name == "params"
            if "fsdp" in sharding.spec:
                weights += held * min(width, leaf.dtype.itemsize)
                gradients += held * leaf.dtype.itemsize * trained
            else:
                whole += held * leaf.dtype.itemsize * trained
    return weights, gradients, whole


def _number(shape) -> int:
    number = 1
    for length in shape:
        number *= length
    return number


def _gathers(plan) -> float:
    """How often the weights are gathered in a microbatch. Where all is kept in one program, XLA gathers them once."""
    segments = [segment for cut in plan.stacks.values() for segment in cut]
    once = segments and all(segment.unroll is True and segment.save is None for segment in segments)
    return 1.0 if once else 2.0 + _again(plan)


def _again(plan) -> float:
    """The share of the forward pass that is computed again."""
    time = plan.details.get("time") or {}
    if not time.get("flops") or not time.get("recompute_flops"):
        return 0.0
    return min(3 * time["recompute_flops"] * time["steps"] / time["flops"], 1.0)


def _activations(program) -> float:
    """Bytes of the inputs of all units of all stacks, for the examples of a step that one device works on."""
    local = program.config.train.batch / meshes.batch_ways(program.mesh)
    try:
        calls = program.stack_calls().values()
    except Exception as error:
        if not is_unreadable(error):
            raise
        return 0.0  # the planner says that it cannot read this step, and plans it without an estimate
    return local * sum(call[0].num_units * tree_bytes(call[1]) for call in calls)
