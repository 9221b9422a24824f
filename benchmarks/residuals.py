"""The planner's residual bytes and recomputed FLOPs against JAX's own, for random save-sets of real units.

    python benchmarks/residuals.py [--sets 100] [--seed 0]

JAX's bytes: the residual leaves of `jax.vjp(jax.checkpoint(unit, policy=save_only_these_names(...)))` that are no
weights or context. JAX's FLOPs: those of its forward and backward pass, dead code removed, less those of the same unit
without checkpoint. Bytes and products must be equal; elementwise operations may differ by what JAX's two ways of
differentiating share differently, the same for all save-sets: `other FLOPs off` is the largest difference, over what
the unit recomputes with nothing saved. Prints a table; exit status 1 where bytes or products of any save-set differ.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from aurora_train import bundled
from aurora_train.compat import jaxprs_in_params
from aurora_train.nn.decoder import Decoder
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.nn.tracing import platform, tracing
from aurora_train.nn.transformer import make_context
from aurora_train.plan.residuals import equation_flops, frontier, num_bytes, stack_unit, trace_unit

sys.path.insert(0, str(bundled.recipes_folder()))  # for the kit
from neural.sequence import CausalGRU, CausalTransformer  # noqa: E402

BATCH, LENGTH = 2, 128
SHAPE = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 160}
NEURAL_WIDTH, NEURAL_HEADS = 60, 5  # a head of 12 is no size for cuDNN, which cannot be traced without a GPU
DECODERS = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "bias": "all", "dropout": 0.1},
    "llama": {"kv_heads": 2},
    "qwen3": {"kv_heads": 2, "qk_norm": True, "head_dim": 32},
    "gemma2": {
        "kv_heads": 2, "window": 32, "window_pattern": ("local", "global"), "post_norm": True, "norm_offset": True,
        "activation": "geglu", "attention_softcap": 50.0, "embed_scale": True,
    },
}  # fmt: skip
SEQUENCES = {"neural_transformer": CausalTransformer, "neural_gru": CausalGRU}
ARCHITECTURES = (*DECODERS, *SEQUENCES)


class Case(NamedTuple):
    """A unit as the Stack runs it, `fun(x, weights, *others)`, with abstract arguments."""

    fun: object
    args: tuple


def make_case(architecture: str, dtype: str) -> Case:
    """For the platform that `tracing` has set. Dropout keys are given where the architecture drops."""
    positions = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    width = SHAPE["width"] if architecture in DECODERS else NEURAL_WIDTH
    if architecture in DECODERS:
        config = DecoderConfig(**SHAPE, **DECODERS[architecture], attention=_kernel(architecture))
        model = nnx.eval_shape(lambda: Decoder(config, 96, dtype, nnx.Rngs(0)))
        context = jax.eval_shape(lambda p: make_context(config, p, p), positions)
        rate = config.dropout
    else:
        heads = {"heads": NEURAL_HEADS} if architecture == "neural_transformer" else {}
        made, rate = SEQUENCES[architecture], 0.2
        options = {"width": width, "layers": 2, "dropout": rate, "dtype": dtype, **heads}
        model = nnx.eval_shape(lambda: made(24, 3, rngs=nnx.Rngs(0), **options))
        context = jax.eval_shape(lambda p: model._context(p, p), positions)
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, width), dtype)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH)) if rate else None
    fun, weights, others = stack_unit(model.stack)
    return Case(fun, (x, weights, *others, context, keys))


def _kernel(architecture: str) -> str:
    """cuDNN cannot be traced where it is not installed; without it the GPU takes these."""
    if platform() == "cpu":
        return "auto"
    return "reference" if "attention_softcap" in DECODERS[architecture] else "xla"


class Reference:
    """What JAX makes of a unit: bytes kept and FLOPs recomputed, read off the jaxpr of its forward and backward."""

    def __init__(self, case: Case):
        self.case = case
        x, weights = case.args[:2]
        self.num_carried = len(jax.tree.leaves(x))
        self.out = jax.eval_shape(case.fun, *case.args)
        self.plain_bytes, *self.plain_flops = self._measure(case.fun)

    def __call__(self, save) -> tuple[int, int, int]:
        """(bytes, all recomputed FLOPs, those of products) under `jax.checkpoint`."""
        policy = jax.checkpoint_policies.save_only_these_names(*save)
        kept, *flops = self._measure(jax.checkpoint(self.case.fun, policy=policy))
        return kept, flops[0] - self.plain_flops[0], flops[1] - self.plain_flops[1]

    def _measure(self, fun) -> tuple[int, int, int]:
        def run(x, weights, others, cotangent):
            out, pull = jax.vjp(lambda x, w: fun(x, w, *others), x, weights)
            return jax.tree.leaves(pull), (out, pull(cotangent))

        x, weights, *others = self.case.args
        jaxpr, shape = jax.make_jaxpr(run, return_shape=True)(x, weights, others, self.out)
        jaxpr, num_leaves = jaxpr.jaxpr, len(shape[0])
        given = set((*jaxpr.invars[self.num_carried :], *jaxpr.constvars))
        kept = {v for v in jaxpr.outvars[:num_leaves] if not isinstance(v, core.Literal)} - given
        live = {v for v in jaxpr.outvars[num_leaves:] if not isinstance(v, core.Literal)}
        return sum(num_bytes(v.aval) for v in kept), *live_flops(jaxpr, live)


CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")


def live_flops(jaxpr, live: set) -> tuple[int, int]:
    """(all, products') FLOPs on the way to `live` values, which grows by all values on that way."""
    total = products = 0
    for equation in reversed(jaxpr.eqns):
        outs = [v in live for v in equation.outvars]
        if not any(outs):
            continue
        needed = equation.invars
        if equation.primitive.name in CALLS:
            body = next(jaxprs_in_params(equation.params))
            inner = {v for v, wanted in zip(body.outvars, outs, strict=True) if wanted and isinstance(v, core.Var)}
            flops, dots = live_flops(body, inner)
            needed = [v for v, own in zip(equation.invars, body.invars, strict=True) if own in inner]
        else:
            flops, dots = equation_flops(equation)
        total, products = total + flops, products + dots
        live.update(v for v in needed if isinstance(v, core.Var))
    return total, products


def random_sets(tags, count: int, seed: int) -> list[tuple[str, ...]]:
    """Sets of any size, small and large ones as likely as middling ones."""
    draw = random.Random(seed)
    return [tuple(draw.sample(tags, draw.randint(0, len(tags)))) for _ in range(count)]


class Row(NamedTuple):
    architecture: str
    platform: str
    dtype: str
    tags: int
    sets: int
    equal_bytes: int
    equal_products: int
    flops_off: float
    points: int
    frontier: int
    trace_s: float
    points_s: float
    jax_s: float  # for one save-set


def compare(architecture: str, target: str, dtype: str, sets: int, seed: int = 0) -> Row:
    """Our scores of random save-sets against JAX's."""
    with tracing(target=target):
        case = make_case(architecture, dtype)
        began = time.perf_counter()
        graph = trace_unit(case.fun, *case.args)
        traced = time.perf_counter()
        points = graph.points(max_tags=16)
        scored = time.perf_counter()
        reference = Reference(case)
        assert graph.score(None).saved_bytes == reference.plain_bytes, architecture
        same_bytes = same_products = off = 0
        for save in random_sets(graph.tags, sets, seed):
            ours, (kept, flops, dots) = graph.score(save), reference(save)
            same_bytes += ours.saved_bytes == kept
            same_products += ours.dot_flops == dots
            off = max(off, abs(ours.flops - flops) / graph.score(()).flops)
        per_set = (time.perf_counter() - scored) / sets
    counts = (same_bytes, same_products, off, len(points), len(frontier(points)))
    times = (traced - began, scored - traced, per_set)
    return Row(architecture, target, dtype, len(graph.tags), sets, *counts, *times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    heads = ("unit", "for", "dtype", "tags", "bytes equal", "products equal", "other FLOPs off", "points", "frontier")
    print("|", " | ".join((*heads, "trace s", "points s", "JAX s a set")), "|")
    print("|" + "---|" * 12)
    wrong = 0
    for architecture in ARCHITECTURES:
        for target, dtype in (("cpu", "bfloat16"), ("gpu", "bfloat16"), ("cpu", "float32")):
            row = compare(architecture, target, dtype, asked.sets, asked.seed)
            wrong += 2 * row.sets - row.equal_bytes - row.equal_products
            cells = [*row[:4], f"{row.equal_bytes}/{row.sets}", f"{row.equal_products}/{row.sets}"]
            cells += [f"{row.flops_off:.2%}", row.points, row.frontier]
            cells += [f"{seconds:.3f}" for seconds in (row.trace_s, row.points_s, row.jax_s)]
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
