"""Whether a plan changes numbers: random plans of one config trained side by side, and how far they end up apart.

    python benchmarks/plan_numerics.py [--case adamw ...] [--plans 20] [--steps 10] [--seed 0] [--devices 8]

A plan is random save-sets out of the stack's tags in one to three segments of at least two units, each scanned or
unrolled. Every plan is compiled on the trainer's own path (Rehearsal) and trained for a few steps on the same batches;
its losses and final parameters, layer by layer, are held against the plan that keeps all in one scan. Prints a table
of the differences, largest absolute and in units in the last place (ulps: floats in between, plus one), and why a plan
may differ; exit status 1 where one that has no such reason has other bits on one device. On several simulated devices
every cut may change bits: --devices shows by how much.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

MODULES = ("abc", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "copy")  # of the interpreter's own library
LAYERS = 6
LANGUAGE = f"""
recipe: language_model
model: {{{{width: 32, layers: {LAYERS}, heads: 2}}}}
data: {{{{source: {{corpus}}, sequence: 32, holdout_test: 0.1, holdout_validation: 0.1}}}}
train: {{{{steps: 10, batch: 8}}}}
optimizer: {{{{name: adamw, lr: 1e-2, clip: 1.0, ema: 0.9, schedule: {{{{warmup: 3}}}}}}}}
"""
NEURAL = f"""
recipe: neural/decoding
model: {{{{width: 32, layers: {LAYERS}, heads: 2}}}}
data: {{{{simulated_trials: 40, simulated_units: 24, window: 16}}}}
train: {{{{steps: 10, batch: 8}}}}
optimizer: {{{{name: adamw, lr: 1e-3, clip: 1.0, ema: 0.9, schedule: {{{{warmup: 3}}}}}}}}
"""
STORED = ["optimizer.clip=null", "optimizer.ema=null"]
CASES = {
    "adamw": (LANGUAGE, []),
    "unclipped": (LANGUAGE, ["optimizer.clip=null"]),
    "dropout": (LANGUAGE, ["model.dropout=0.1"]),
    "unclipped dropout": (LANGUAGE, ["model.dropout=0.1", "optimizer.clip=null"]),
    "gpt2": (LANGUAGE, ["model.dropout=0.1", "model.norm=layernorm", "model.positions=learned", "model.max_length=32",
                        "model.activation=gelu_tanh", "model.bias=all"]),
    "muon": (LANGUAGE, ["model.dropout=0.1", "optimizer.name=muon"]),
    # Unclipped, so that every cut must have the bits. Wide enough that matrices are coded: 8 bits are for rows of at
    # least 64 and leaves of at least 4,096.
    "int8": (LANGUAGE, ["model.width=64", "optimizer.moments=int8", *STORED]),
    "bfloat16 masters": (LANGUAGE, ["optimizer.master=bfloat16", *STORED]),
    "int8, bfloat16 masters": (
        LANGUAGE, ["model.width=64", "optimizer.moments=int8", "optimizer.master=bfloat16", *STORED],
    ),
    "neural": (NEURAL, []),
    "unclipped neural": (NEURAL, ["optimizer.clip=null"]),
    "neural gru": (NEURAL, ["model.kind=gru"]),
}  # fmt: skip


class Outcome(NamedTuple):
    """What a few steps gave. `losses`: float32[steps]; `parameters`: by canonical name, one array per layer."""

    losses: np.ndarray
    parameters: dict[str, np.ndarray]


class Difference(NamedTuple):
    """Two outcomes: largest absolute and ulp distances. All zero means the same bits, the sign of a zero apart."""

    loss: float
    loss_ulps: int
    parameter: float
    parameter_ulps: int

    @property
    def none(self) -> bool:
        return not any(self)


class Bench:
    """A config's recipe and data, prepared once; `devices` > 1 shards the batch over simulated ones."""

    def __init__(self, config, cache: Path, devices: int = 1):
        import jax

        from aurora_train import mesh as meshes
        from aurora_train.data.batches import read_batch
        from aurora_train.train.rehearsal import Rehearsal, shapes_of

        recipe = config.recipe_class(config, cache)
        recipe.ready(lambda *_: None)
        source = recipe.data("train")
        self.mesh = meshes.make_mesh(devices, 1)
        self.program = Rehearsal(config, recipe, self.mesh, jax.default_backend(), False, shapes_of(source))
        train = config.train
        self.batches = [read_batch(source, train.seed, train.batch, n) for n in range(train.steps)]

    @property
    def stack(self):
        """(dotted path, stack) of the model's only stack."""
        from aurora_train.nn.stack import stacks

        ((path, stack),) = stacks(self.program.model()).items()
        return ".".join(map(str, path)), stack

    def plan(self, cut, accumulation: int = 1):
        """A plan of the stack's segments."""
        from aurora_train.plan.plan import Plan

        return Plan(self.program.config.train.batch // accumulation, accumulation, {self.stack[0]: list(cut)})

    def reference(self, accumulation: int = 1):
        """Everything kept, the stack in one scan."""
        from aurora_train.nn.stack import Segment

        return self.plan([Segment(0, self.stack[1].num_units)], accumulation)

    def random_plan(self, draw: random.Random, unroll: float = 0.4):
        """Random save-sets in one to three segments of at least two units; a share of them unrolled."""
        return self.plan(random_cut(draw, self.stack[1].num_units, self.stack[1].tags, unroll))

    def train(self, plan) -> Outcome:
        """The config's steps under a plan, from the start."""
        import jax

        from aurora_train import mesh as meshes
        from aurora_train.checkpoint import layout
        from aurora_train.train.state import together

        step = together(self.program.compile(plan))
        state, losses = self.program.blueprint(plan).initialise(), []
        for batch in self.batches:
            state, metrics = step(state, jax.device_put(batch, meshes.batch_sharding(self.mesh)))
            losses.append(np.float32(metrics["loss"]))
        assert not metrics["skipped"]
        return Outcome(np.array(losses), layout.snapshot({"params": state.params}))


def random_cut(draw: random.Random, units: int, tags: tuple[str, ...], unroll: float):
    """Segments of at least two units: None, nothing or a random set of tags kept in each; scanned or unrolled."""
    from aurora_train.nn.stack import Segment

    count = draw.randint(1, min(3, units // 2))
    cuts = [c for c in _cuts(units, count) if all(b - a >= 2 for a, b in zip(c, c[1:], strict=False))]
    edges = draw.choice(cuts)
    segments = []
    for start, stop in zip(edges, edges[1:], strict=False):
        some = tuple(tag for tag in tags if draw.random() < draw.choice((0.2, 0.5, 0.8)))
        save = draw.choice((None, (), some, some, some))
        segments.append(Segment(start, stop, save, draw.random() < unroll))
    return segments


def excuse(plan) -> str | None:
    """Why XLA:CPU may round otherwise under this plan than in one scan; None where the bits are promised."""
    (cut,) = plan.stacks.values()
    if any(segment.unroll for segment in cut):
        # Fused across the edge of a unit, a product and a sum become one operation with one rounding (FMA): without
        # FMA, under XLA_FLAGS=--xla_cpu_max_isa=AVX, unrolled units have the bits of scanned ones.
        return "unrolled"
    return None


def _cuts(units: int, count: int) -> list[tuple[int, ...]]:
    from itertools import combinations

    return [(0, *inner, units) for inner in combinations(range(1, units), count - 1)]


def difference(one: Outcome, other: Outcome) -> Difference:
    """Largest distances of losses and of parameters. AssertionError where names differ."""
    assert one.parameters.keys() == other.parameters.keys()
    pairs = [(one.parameters[name], other.parameters[name]) for name in one.parameters]
    return Difference(
        _apart(one.losses, other.losses), ulps(one.losses, other.losses),
        max(_apart(a, b) for a, b in pairs), max(ulps(a, b) for a, b in pairs),
    )  # fmt: skip


def _apart(a, b) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """The largest number of steps from float to float between two arrays of one dtype; bfloat16 or float32."""
    assert a.dtype == b.dtype and a.shape == b.shape
    kind = {2: np.int16, 4: np.int32}[a.dtype.itemsize]

    def line(x):
        bits = np.ascontiguousarray(x).view(kind).astype(np.int64)
        return np.where(bits < 0, np.iinfo(kind).min - bits, bits)  # so that neighbours differ by one across zero

    return int(np.abs(line(a) - line(b)).max(initial=0))


def load_case(name: str, folder: Path, overrides=()):
    """The config of a case; its corpus is written to `folder`."""
    from aurora_train.config import load
    from aurora_train.machine.precision import settled

    text, changes = CASES[name]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for module in MODULES:
        shutil.copyfile(Path(sysconfig.get_path("stdlib")) / f"{module}.py", corpus / f"{module}.py")
    path = folder / "numerics.yaml"
    path.write_text(text.format(corpus=corpus))
    return settled(load(path, [*changes, *overrides]))


def describe(plan) -> str:
    """A plan in a line."""
    (cut,) = plan.stacks.values()

    def kept(save):
        return "all" if save is None else "none" if not save else f"{len(save)} tags"

    parts = [f"{s.start}-{s.stop} {kept(s.save)}{' unrolled' if s.unroll else ''}" for s in cut]
    return f"{plan.microbatch}x{plan.accumulation}: " + ", ".join(parts)


def table(name: str, bench: Bench, plans) -> bool:
    """Print each plan's difference from the reference; whether all that have no excuse have its bits."""
    print(f"\n{name}\n{'plan':72s} {'loss':>9s} {'ulps':>6s} {'parameter':>10s} {'ulps':>8s}  may differ because")
    reference, same = bench.train(bench.reference()), True
    for plan in plans:
        found, reason = difference(reference, bench.train(plan)), excuse(plan)
        same &= found.none or reason is not None
        print(f"{describe(plan):72s} {found.loss:9.2g} {found.loss_ulps:6d} {found.parameter:10.2g} "
              f"{found.parameter_ulps:8d}  {reason or ''}", flush=True)
    return same


def microbatches(name: str, bench: Bench) -> None:
    """Print how far apart the losses of other microbatch sizes are, relative."""
    whole = bench.train(bench.reference())
    for accumulation in (2, 4, 8):
        other = bench.train(bench.reference(accumulation))
        relative = np.abs(other.losses / whole.losses - 1).max()
        print(f"{name}: accumulation {accumulation} against 1: losses within {relative:.1e} relative", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=CASES, default=["adamw"])
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--unroll", type=float, default=0.4, help="share of the segments that are unrolled")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1, help="simulated devices that share the batch")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides of the config, key=value")
    options = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for name in options.case:
            config = load_case(name, Path(folder), [f"train.steps={options.steps}", *options.set])
            bench, draw = Bench(config, Path(folder) / "cache", options.devices), random.Random(options.seed)
            plans = [bench.random_plan(draw, options.unroll) for _ in range(options.plans)]
            same &= table(f"{name}, {options.devices} device(s), {options.steps} steps", bench, plans)
            if options.devices == 1:
                microbatches(name, bench)
    return 0 if same or options.devices > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
