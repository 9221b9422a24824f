"""The plan: how a run uses memory. It is data, made once and pinned to its run, and it never changes the maths.

A plan holds the size of a microbatch and, for each stack, what is kept for the backward pass. `make_plan` builds the
one that the config spells out; plan/planner.py searches for one where the config leaves the choice open.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from aurora_train.errors import UserError
from aurora_train.nn.fp8 import without_ends
from aurora_train.nn.stack import Segment, stacks
from aurora_train.plan import offload


@dataclass(frozen=True)
class Plan:
    """`accumulation` microbatches of `microbatch` examples per step; segments by the dotted path of each stack."""

    microbatch: int
    accumulation: int
    stacks: dict[str, list[Segment]] = field(default_factory=dict)
    reason: str = ""
    machine: str = ""  # jax's name of the device that the plan was made for
    platform: str = ""  # "cpu" or "gpu"
    budget_bytes: int | None = None
    predicted_bytes: int | None = None  # the analytic peak, before anything was compiled
    compiled_bytes: int | None = None  # the compiler's own peak; None if nothing was compiled
    measured_bytes: int | None = None  # after the run
    details: dict = field(default_factory=dict)  # plain JSON for people and pictures; see tools/report_plan.py
    saves_in_place: bool = False  # a save has no room for a copy of the state, so training waits while it is written
    beside_copy_bytes: int | None = None  # a step of more bytes leaves no room for that copy; None if there always is

    def apply(self, model, ends: int = 0) -> None:
        """Cut the stacks of a freshly constructed model, once, before it is split. `ends`: see `Stack.cut`."""
        for path, stack in stacks(model).items():
            name = _dotted(path)
            without_ends(stack.num_units, ends, name)  # raises an error that names the stack
            stack.cut(tuple(self.stacks[name]), ends)

    def to_json(self) -> dict:
        """A dict of plain values; `from_json` is the inverse."""
        return {**asdict(self), "stacks": {name: [s._asdict() for s in cut] for name, cut in self.stacks.items()}}

    @classmethod
    def from_json(cls, value: dict) -> Plan:
        """The plan that a run was pinned to."""
        cuts = {
            name: [Segment(**{key: tuple(v) if isinstance(v, list) else v for key, v in s.items()}) for s in cut]
            for name, cut in value["stacks"].items()
        }
        return cls(**{**value, "stacks": cuts})

    @property
    def work(self) -> dict:
        """The part that determines the program: two plans with equal work compile to the same program."""
        whole = self.to_json()
        return {key: whole[key] for key in ("microbatch", "accumulation", "stacks")}


def make_plan(config, model, *, platform: str, num_devices: int, apart: bool = False) -> Plan:
    """The plan that the config asks for. `model` may be abstract. UserError if a batch or a tag does not fit.

    `apart`: whether a device has its own memory, without which nothing can be offloaded.
    """
    batch, memory = config.train.batch, config.memory
    accumulation = 1 if memory.accumulation == "auto" else memory.accumulation
    parts = accumulation * num_devices
    if batch % parts:
        raise UserError(
            f"a batch of {batch} does not divide into {accumulation} microbatches over {num_devices} device(s)",
            where="train.batch",
            hint=f"the nearest that does is {max(batch // parts, 1) * parts}",
        )
    cuts, moved = {}, offload.named(config, stacks(model).values(), apart=apart)
    for path, stack in stacks(model).items():
        save = _save_set(memory.save, stack.tags, platform)
        # On a CPU a scan costs a fifth of the speed. An unrolled stack cannot recompute: XLA merges the copies.
        scans = platform != "cpu" or save is not None
        unroll = memory.unroll if memory.unroll != "auto" else not scans
        if moved:
            save = tuple(tag for tag in save or () if tag not in moved)
        here = tuple(tag for tag in moved if tag in offload.tags_of(stack))
        cuts[_dotted(path)] = [Segment(0, stack.num_units, save, unroll, here)]
    asked = {"save": memory.save, "accumulation": memory.accumulation, "offload": ", ".join(moved)}
    settings = ", ".join(f"{name} {value}" for name, value in asked.items() if value not in ("auto", ""))
    return Plan(batch // accumulation, accumulation, cuts, f"as configured: {settings}" if settings else "")


def _save_set(save, tags: tuple[str, ...], platform: str) -> tuple[str, ...] | None:
    if save == "nothing":
        return ()
    if save == "all":
        return None
    if save == "auto":
        return None if platform == "cpu" else tags or None
    unknown = [name for name in save if name not in tags]
    if unknown:
        known = ", ".join(tags) or "none"
        raise UserError(f"the model tags no tensor {unknown[0]!r}", where="memory.save", hint=f"its tags: {known}")
    return tuple(save)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
