"""Which mesh `auto` is: of all that the devices allow, the one with the fastest step among those that fit.

Every mesh is weighed by what its links have to move, which is known without a plan and bounds its step from below. The
cheapest are planned, without a compiler, until no other can be faster. Each gets one line that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from aurora_train import mesh as meshes
from aurora_train.boxes.cost import moved, seconds_of
from aurora_train.errors import UserError
from aurora_train.machine.links import Links
from aurora_train.plan.account import sharded_bytes
from aurora_train.plan.report import amount
from aurora_train.units import duration

_UNKNOWN_RATE = 1e9  # bytes/s of links whose rates are not known: it only ranks meshes

Shape = tuple[int, int, int]  # data, fsdp, tensor


class _Bound(NamedTuple):
    """A mesh before it is planned: the least seconds of its links in a step."""

    shape: Shape
    program: Any
    seconds: float
    state_bytes: int


def is_auto(section) -> bool:
    """Whether a config's `mesh` section leaves a choice."""
    return "auto" in (section.data, section.fsdp, section.tensor)


def shapes_of(section, devices: int) -> list[Shape]:
    """Every mesh of so many devices that a config's `mesh` section allows. UserError if there is none."""
    asked = [None if wish in ("auto", -1) else wish for wish in (section.data, section.fsdp, section.tensor)]
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    found = [(data, fsdp, tensor) for data in divisors for fsdp in divisors for tensor in divisors
             if data * fsdp * tensor == devices
             and all(wish in (None, size) for wish, size in zip(asked, (data, fsdp, tensor), strict=True))]  # fmt: skip
    if not found:
        given = ", ".join(f"{axis}: {getattr(section, axis)}" for axis in meshes.AXES)
        raise UserError(
            f"no mesh {{{given}}} has {devices} device{'s' if devices > 1 else ''}", where="mesh",
            hint=f"axes whose product is {devices}, each one of {', '.join(map(str, divisors))}",
        )  # fmt: skip
    return found


def kept(section, known: dict, devices: int, kind: str) -> Shape | None:
    """The mesh with which a run was begun, if it still is one of these devices and the config allows it; else None.

    `known`: what the run recorded (`train.session.pin`). `kind`: jax's name of the devices.
    """
    mesh = {"tensor": 1, **known.get("mesh", {})}
    shape = tuple(mesh.get(axis, 0) for axis in meshes.AXES)
    return shape if known.get("device") == kind and shape in shapes_of(section, devices) else None


def choose(shapes: list[Shape], on: Callable[[Shape], Any], plan: Callable[[Any], Any],
           links: Links) -> tuple[Shape, list[dict]]:  # fmt: skip
    """(the chosen mesh, what was found of each). UserError, with the reasons, if none can be used.

    `on(shape)`: the rehearsal on a mesh; `plan(program)`: its plan, not compiled. Both may raise a UserError that says
    why a mesh cannot be used.
    """
    if len(shapes) == 1:
        return shapes[0], []
    rows, bounds, best = [], [], None
    for shape in shapes:
        try:
            bounds.append(_bound(shape, on(shape), links))
        except UserError as error:
            rows.append(_row(shape, why=error.what))
    for bound in sorted(bounds, key=lambda one: (one.seconds, one.shape[2], one.shape[1])):
        if best is not None and bound.seconds >= best["seconds"]:
            rows.append(_row(bound.shape, bound, why=f"its links alone take {duration(bound.seconds)} a step"))
            continue
        row = _planned(bound, plan, links)
        rows.append(row)
        if row["seconds"] is not None and (best is None or row["seconds"] < best["seconds"]):
            best = row
    if best is None:
        raise UserError("no mesh of these devices can train this config", where="mesh",
                        why="\n  ".join(map(line_of, rows)))  # fmt: skip
    best["chosen"] = True
    rows.sort(key=lambda row: (row["seconds"] is None, row["seconds"] or 0.0))
    return tuple(best["mesh"]), [*rows, {"links": links.describe()}]


def lines_of(rows: list[dict]) -> list[str]:
    """One line for each mesh that was weighed, the chosen one first."""
    meshes_weighed = sorted((row for row in rows if "mesh" in row), key=lambda row: not row.get("chosen"))
    links = [f"links: {row['links']}" for row in rows if "links" in row]
    return [*map(line_of, meshes_weighed), *links]


def line_of(row: dict) -> str:
    """What one mesh would hold and take, or why it cannot be used."""
    name = "mesh " + ", ".join(f"{axis} {n}" for axis, n in zip(meshes.AXES, row["mesh"], strict=True))
    if row["seconds"] is None:
        held = f" ({amount(row['state_bytes'])} of state a device)" if row.get("state_bytes") else ""
        return f"{name}: not chosen, {row['why']}{held}"
    verdict = "chosen, the fastest that fits" if row.get("chosen") else "not chosen, slower"
    products, links = row["product_seconds"], row["link_seconds"]
    takes = f"{duration(products)} of products and " if products is not None else ""
    takes += f"{duration(links)} of links" if links is not None else "links of unknown rate"
    return f"{name}: {verdict}: {amount(row['bytes'])} a device, {takes} a step, {amount(row['moved_bytes'])} moved"


def _bound(shape: Shape, program, links: Links) -> _Bound:
    config, ways = program.config, meshes.batch_ways(program.mesh)
    if config.train.batch % ways:
        raise UserError(f"a batch of {config.train.batch} does not divide over {ways} devices")
    plan = program.simplest_plan()
    blueprint, bytes_in = program.blueprint(plan), moved(program, plan)
    held = sharded_bytes(blueprint.state, blueprint.shardings)
    return _Bound(shape, program, _ranked(bytes_in, program, links), held)


def _planned(bound: _Bound, plan: Callable, links: Links) -> dict:
    try:
        made = plan(bound.program)
    except UserError as error:
        return _row(bound.shape, bound, why=error.what)
    if made.budget_bytes is not None and (made.predicted_bytes or 0) > made.budget_bytes:
        return _row(bound.shape, bound, why=f"it needs {amount(made.predicted_bytes)} of {amount(made.budget_bytes)}")
    bytes_in, time = moved(bound.program, made), made.details.get("time") or {}
    link_seconds = seconds_of(bytes_in, bound.program.mesh.shape, links)
    products = time.get("product_seconds", time.get("step_seconds"))
    return _row(bound.shape, bound) | {
        "bytes": made.predicted_bytes, "moved_bytes": int(sum(bytes_in.values())), "product_seconds": products,
        "link_seconds": link_seconds, "seconds": (products or 0.0) + _ranked(bytes_in, bound.program, links),
    }  # fmt: skip


def _ranked(bytes_in: dict, program, links: Links) -> float:
    """Seconds by which meshes are compared: of their links, at one rate for all where a rate is not known."""
    seconds = seconds_of(bytes_in, program.mesh.shape, links)
    return sum(bytes_in.values()) / _UNKNOWN_RATE if seconds is None else seconds


def _row(shape: Shape, bound: _Bound | None = None, why: str = "") -> dict:
    return {"mesh": list(shape), "state_bytes": bound and bound.state_bytes, "seconds": None, "why": why}
