"""The details of a plan: bytes by cause, tensors by tag, unused levers, time, disk. Plain JSON, no decisions."""

from __future__ import annotations

import jax
from flax import nnx

from aurora_train import mesh as meshes
from aurora_train.checkpoint import layout
from aurora_train.checkpoint.writer import PIECE_BYTES
from aurora_train.nn import fp8
from aurora_train.nn.attention import Choice
from aurora_train.nn.decoder_config import NF4_BLOCK
from aurora_train.nn.param import parameter_count
from aurora_train.nn.tracing import form_name
from aurora_train.optimizer import partition
from aurora_train.plan.search import Candidate
from aurora_train.plan.verify import can_compile_for_gpu

SAVE_COPIES = 1.1  # the memory of a save as a multiple of what it copies or reads (measured: docs/always-on.md)
WRITTEN_PER_SECOND = 1e9  # assumed bytes/s of a save to a local solid-state disk
ESTIMATE = "an estimate that has erred by up to 8 % (docs/planner_accuracy.md)"


def tree_bytes(tree) -> int:
    """Total bytes of a pytree of arrays, over all devices."""
    return sum(_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def _bytes(shape, dtype) -> int:
    number = 1
    for length in shape:
        number *= length
    return number * dtype.itemsize


def trained_bytes(state) -> int:
    """Bytes, over all devices, that every save writes: all of a state but what is frozen."""
    return tree_bytes(state) - tree_bytes(state.frozen)


def save_bytes(state, *, in_place: bool) -> int:
    """The most bytes, over all devices, that a save takes of the processor's memory.

    It copies what is trained, or reads it piece by piece if it is made `in_place`. The first save of a run writes the
    frozen parameters first, always piece by piece. Where memory is shared, a leaf passes through a temporary array.
    """
    leaves = [_bytes(leaf.shape, leaf.dtype) // len(names) for names, _, leaf in layout.entries(state)]
    piece = min(max(PIECE_BYTES, 2 * max(leaves)), tree_bytes(state))
    return int(SAVE_COPIES * (piece if in_place else max(trained_bytes(state), piece if state.frozen else 0)))


def sharded_bytes(tree, shardings) -> int:
    """Bytes of a pytree that one device holds under a matching pytree of shardings."""
    leaves, places = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    return sum(
        _bytes(sharding.shard_shape(leaf.shape), leaf.dtype) for leaf, sharding in zip(leaves, places, strict=True)
    )


def unit_gradient_bytes(stack, mesh) -> int:
    """Gradient bytes of one unit of an abstract Stack on one device of a mesh; 0 if none of it is trained."""
    from aurora_train.nn import lora

    _, state = nnx.split(stack.segments[0])
    trained, _ = lora.split(state)
    return sharded_bytes(trained, meshes.parameter_shardings(trained, mesh)) // stack.num_units


def parameter_bytes(program) -> int:
    """Total bytes of all parameters, over all devices."""
    return tree_bytes(nnx.state(program.model(), nnx.Param))


def arguments(program, blueprint) -> dict[str, int]:
    """Bytes of the step's arguments on one device, by cause."""
    state, places = blueprint.state, blueprint.shardings
    parts = {
        "parameters": ("params",), "optimizer": ("opt_state",), "average": ("extra",), "frozen": ("frozen", "rest"),
    }  # fmt: skip
    out = {
        cause: sum(sharded_bytes(getattr(state, name), getattr(places, name)) for name in names)
        for cause, names in parts.items()
    }
    out["batch"] = tree_bytes(program.batch(program.config.train.batch)) // meshes.batch_ways(program.mesh)
    return out


_BFLOAT16 = "train.precision=bfloat16"


def levers(program, blueprint, plan=None, activations: int | None = None) -> list[dict]:
    """Unused settings that would save memory, largest saving first. The planner never changes any of them itself.

    Savings are computed under `plan`, or for one example at a time if it is None. `activations`: their bytes at the
    peak, if known; otherwise the inputs of the layers stand in for them. bfloat16 comes first: it is also faster.
    """
    config = program.config
    params = blueprint.state.params
    share = sharded_bytes(params, blueprint.shardings.params) / tree_bytes(params)  # of a state, on one device
    count = share * sum(leaf.size for leaf in jax.tree.leaves(params))
    state = share * tree_bytes(blueprint.state.opt_state)
    unused = []

    def add(name, setting, saves):
        if saves > 0:
            unused.append({"name": name, "setting": setting, "saves_bytes": int(saves)})

    for moments, name in (("bfloat16", "bfloat16 moments"), ("int8", "8-bit moments")):
        if moments != config.optimizer.moments and config.optimizer.name != "adafactor":
            needed = share * tree_bytes(program.optimizer_state(moments=moments))
            add(name, f"optimizer.moments={moments}", state - needed)
    if config.optimizer.master == "float32":
        add("bfloat16 parameters and gradients", "optimizer.master=bfloat16", 4 * count)
    if config.optimizer.ema is not None:
        add("no moving average", "optimizer.ema=null", 4 * count)
    model = getattr(config, "model", None)
    if hasattr(model, "lora") and model.lora is None and not blueprint.state.frozen:
        add("LoRA (rank 16)", "model.lora.rank=16", 0.97 * (state + 4 * count) + 2 * count)
    if getattr(getattr(model, "lora", None), "base", "") == "compute":
        kernels = [leaf for leaf in jax.tree.leaves(partition(blueprint.state.frozen)[1]) if leaf.ndim == 3]
        saves = tree_bytes(kernels) - sum(leaf.size for leaf in kernels) * 4.25 / 8
        if all(leaf.shape[1] % NF4_BLOCK == 0 for leaf in kernels):
            add("a frozen base of 4 bits", "model.lora.base=nf4", share * saves)
    memory, local = config.memory, plan.microbatch // meshes.batch_ways(program.mesh) if plan else 1
    inputs = local * sum(call[0].num_units * tree_bytes(call[1]) for call in program.stack_calls().values())
    if program.apart and memory.offload == "none" and memory.save != "all":
        add("the inputs of layers kept on the host", "memory.offload=[unit_input]", inputs)
    if program.platform != "cpu" and config.train.dtype == "float32":
        add("bfloat16 compute", _BFLOAT16, max((activations or inputs) // 2, 1))
    return sorted(unused, key=lambda lever: (lever["setting"] != _BFLOAT16, -lever["saves_bytes"]))


def essentials(planner, plan, cost: Candidate) -> dict:
    """`Plan.details` of an estimated plan. `cost`: what the plan costs on top of the step's own work."""
    blueprint, estimate = planner.program.blueprint(plan), planner.estimate
    local = estimate.local(plan.microbatch)
    kept = sum((b - a) * score.saved_bytes * local for cut in cost.cuts.values() for a, b, score in cut)
    gradients = cost.bytes - estimate.rest(local) - kept
    causes = estimate.by_cause(local, kept, gradients)
    return standing(planner, plan, causes["saved"] + causes["workspace"]) | {
        "by_cause": causes,
        "host_bytes": cost.host,
        "time": _time(planner, cost, blueprint),
    }


def standing(planner, plan, activations: int | None = None) -> dict:
    """The part of `Plan.details` that is known without an estimate. `activations`: as in `levers`."""
    program = planner.program
    blueprint = program.blueprint(plan)
    with program.here():
        taken = form_name()
    return planner.collectives.get(repr(plan.work), {}) | {
        "parameters": parameter_count((blueprint.state.params, blueprint.state.frozen)),
        "levers": [_with_speed(lever, planner.rates) for lever in levers(program, blueprint, plan, activations)],
        "checkpoint": _checkpoint(program, blueprint),
        "attention": _attention(program.model()),
        "forms": taken,
        "writing": program.writing(),
        "not_verified": _not_verified(planner),
        "compiles": planner.compiles,
    }


def _with_speed(lever: dict, rates) -> dict:
    """Adds to the bfloat16 lever how many times faster its products are, if the machine's rates are known."""
    if lever["setting"] != _BFLOAT16 or rates is None or not {"bfloat16", "float32"} <= rates.matmul.keys():
        return lever
    return {**lever, "faster": round(rates.matmul["bfloat16"] / rates.matmul["float32"], 1)}


def _attention(model) -> str | None:
    """Which attention kernel each part of the model uses, and why; None for a model that does not use our attention."""
    parts = [getattr(module, "attention", None) for _, module in nnx.iter_modules(model)]
    chosen = dict.fromkeys(f"{one.name} ({one.reason})" for one in parts if isinstance(one, Choice))
    return "; ".join(chosen) or None


def details(planner, space, shortlist, chosen: Candidate, faster) -> dict:
    """`Plan.details` of a plan that was searched for; tools/report_plan.py shows them."""
    plan = planner.plan_of(chosen)
    fits = [c.microbatch for c in shortlist.candidates if shortlist.expected(c) <= planner.budget]
    return essentials(planner, plan, chosen) | {
        "tensors": {stack.path: _tensors(stack, chosen, space) for stack in space.stacks},
        "next_faster": None if faster is None else {
            "microbatch": faster.microbatch, "accumulation": faster.accumulation,
            "stacks": {
                path: [s._asdict() | {"save": list(s.save), "offload": list(s.offload)} for s in cut]
                for path, cut in faster.stacks().items()
            },
            "lacks_bytes": max(shortlist.expected(faster) - planner.usable, 0),
            "seconds": faster.seconds if planner.rates else None,
        },
        "largest_microbatch": max(fits, default=None),
        "pareto": _pareto(planner, shortlist, chosen),
    }  # fmt: skip


def _tensors(stack, chosen: Candidate, space) -> list[dict]:
    """One row per tag: what keeping it alone costs, and what recomputing it costs when everything is recomputed."""
    by_save = {score.save: score for score in stack.scores if not score.offload}
    none = by_save.get((), stack.scores[0])
    moving = {score.offload[0]: score.offloaded_bytes for score in stack.scores if len(score.offload) == 1}
    local = max(chosen.microbatch // space.devices, 1)
    rows = []
    for tag in dict.fromkeys(tag for score in stack.scores for tag in (*(score.save or ()), *score.offload)):
        alone = by_save.get((tag,))
        size = alone.saved_bytes - none.saved_bytes if alone else moving.get(tag)
        kept = sum(b - a for a, b, score in chosen.cuts[stack.path] if tag in (score.save or ()))
        moved = sum(b - a for a, b, score in chosen.cuts[stack.path] if tag in score.offload)
        rows.append({
            "tag": tag,
            "bytes": size * local if size is not None else None,
            "recompute_flops": (none.flops - alone.flops) * local if alone else None,
            "kept_units": kept,
            "offloaded_units": moved,
            "units": stack.units,
        })  # fmt: skip
    return rows


def _time(planner, cost: Candidate, blueprint) -> dict | None:
    program = planner.program
    config = program.config
    per_target = program.recipe.flops(parameter_count(blueprint.state.params), parameter_count(blueprint.state.frozen))
    targets = _targets(program)
    if per_target is None or targets is None:
        return None
    flops = per_target * targets * config.train.batch
    out = {
        "steps": config.train.steps, "tokens": round(config.train.steps * targets * config.train.batch),
        "flops": flops * config.train.steps, "recompute_flops": cost.flops,
        "step_seconds": None, "seconds": None, "rates": "unknown", "source": "",
    }  # fmt: skip
    rates = planner.rates
    if rates is not None:
        step = flops / program.mesh.devices.size / product_rate(rates, config) + cost.seconds
        out |= {"step_seconds": step, "seconds": step * config.train.steps}
        out |= {"rates": rates.source, "source": rates.note or rates.device}
    return out


def product_rate(rates, config) -> float:
    """FLOP/s of a run's products. fp8 uses the rate of bfloat16: its own has not been measured."""
    return rates.matmul.get(config.train.dtype) or max(rates.matmul.values())


def _targets(program) -> float | None:
    """Number of targets in one example, for recipes that state it or whose batch has a weight for each; else None."""
    if program.recipe.targets_per_example is not None:
        return program.recipe.targets_per_example
    weights = program.shapes.get("weights")
    if weights is None:
        return None
    number = 1
    for length in weights.shape:
        number *= length
    return number


def _checkpoint(program, blueprint) -> dict:
    saved, frozen = trained_bytes(blueprint.state), tree_bytes(blueprint.state.frozen)
    kept = program.config.checkpoint.keep + program.config.checkpoint.best
    return {"bytes": saved, "kept": kept, "frozen_bytes": frozen, "disk_bytes": saved * (kept + 1) + frozen}


def _pareto(planner, shortlist, chosen: Candidate) -> list[dict]:
    best: dict[int, list[Candidate]] = {}
    for candidate in shortlist.candidates:
        best.setdefault(candidate.microbatch, []).append(candidate)
    rows = []
    for microbatch, candidates in best.items():
        whole = [c for c in candidates if all(len(cut) == 1 for cut in c.cuts.values()) or c.key == chosen.key]
        rows += [
            {"microbatch": microbatch, "bytes": shortlist.expected(c), "recompute_flops": c.flops,
             "seconds": c.seconds if planner.rates else None, "chosen": c.key == chosen.key}
            for c in whole
        ]  # fmt: skip
    return rows


def _not_verified(planner) -> list[str]:
    out, program = [], planner.program
    if not (planner.compiles or planner.compiled_later):
        installed = can_compile_for_gpu() or not program.remote
        hint = "" if installed else "; pip install 'aurora_train[plan]' adds a compiler"
        out.append(f"the peak: nothing was compiled, it is {ESTIMATE}{hint}")
    if program.remote:
        out.append("workspaces that cuDNN and cuBLAS choose on the device")
    if program.config.train.precision == "fp8":
        out.append("the time: products in fp8 are assumed to be as fast as in bfloat16")
        if program.capability is not None and program.capability < fp8.FIRST_WITH_FP8:
            out.append("a gain from fp8: this GPU has no 8-bit products; bfloat16 is as fast and more exact")
    return out
