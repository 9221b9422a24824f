"""The page of `aurora plan`, and its document for a script.

Missing parts of `Plan.details` are left out, never guessed. Bytes are per device and decimal (1 GB = 1e9 bytes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aurora_train.boxes.choice import lines_of
from aurora_train.nn.saving import UNIT_INPUT
from aurora_train.plan.account import WRITTEN_PER_SECOND
from aurora_train.plan.report import amount, by_cause, difference, verdict
from aurora_train.record.console import plain_console, table_of
from aurora_train.units import count, duration, percent

if TYPE_CHECKING:
    from rich.console import Console

    from aurora_train.plan.plan import Plan

_LEVERS_SHOWN = 5
_SHORT_STEP_S = 0.02  # a step launches some thousand kernels at a few microseconds each


def document(plan: Plan) -> dict:
    """What `aurora plan --json` prints: the plan's own keys and those of its details, on one level."""
    own = plan.to_json()
    return {**own.pop("details"), **own}


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the page of `aurora plan`: the verdict first, then the figures behind it."""
    console = console or plain_console()
    console.print(verdict(plan), style="bold", soft_wrap=True)
    if plan.reason and (plan.compiled_bytes or plan.predicted_bytes):
        console.print(plan.reason, soft_wrap=True)
    _show_bytes(plan, console)
    for name, cut in plan.stacks.items():
        _show_stack(name, cut, plan, console)
    _show_lines("", [*_offloaded(plan), *_alternatives(plan)], console)
    _show_lines("", lines_of(plan.details.get("meshes") or []), console)
    _show_levers(plan.details.get("levers") or [], console)
    _show_lines("", [*time_lines(plan), *_disk(plan), *_writing(plan)], console)
    _show_lines("not verified:", plan.details.get("not_verified") or [], console)
    _show_lines("", _made(plan), console)


def _show_lines(title: str, lines: list[str], console) -> None:
    if not lines:
        return
    console.print()
    if title:
        console.print(title, style="bold")
    for line in lines:
        console.print(f"  {line}" if title else line, soft_wrap=True)


def _show_bytes(plan: Plan, console) -> None:
    rows = by_cause(plan.details.get("by_cause") or {})
    if rows:
        total = sum(held for *_, held in rows)
        whole, of = (plan.budget_bytes, "of budget") if plan.budget_bytes else (total, "share")
        unit, divisor = _unit(max(total, 1))
        listed = [(name, held) for _, name, held in rows]
        listed += [("total", total), *([("budget", plan.budget_bytes)] if plan.budget_bytes else [])]
        table = table_of("at the peak", unit, of)
        for name, held in listed:
            share = "" if name == "budget" else percent(held / whole)
            table.add_row(name, f"{held / divisor:,.1f}", share, style="bold" if name == "total" else None)
        console.print()
        console.print(table)
    if plan.predicted_bytes and plan.compiled_bytes:
        both = f"predicted {amount(plan.predicted_bytes)}, compiled {amount(plan.compiled_bytes)}"
        console.print(f"{both} ({difference(plan.compiled_bytes, plan.predicted_bytes)})", soft_wrap=True)


def _writing(plan: Plan) -> list[str]:
    """What samples and scores take between steps, where the step's activations are not held."""
    writing = plan.details.get("writing")
    if not writing:
        return []
    texts = f"{writing['texts']} texts of up to {writing['length']} tokens"
    return [f"samples and scores: {texts} at once take {amount(writing['bytes'])} beside the state, between steps"]


def _unit(total: int) -> tuple[str, float]:
    """(unit, bytes in it) for a whole column, so that its figures can be compared."""
    return next((name, value) for name, value in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if total >= value)


def _show_stack(name: str, cut: list, plan: Plan, console) -> None:
    tensors = (plan.details.get("tensors") or {}).get(name) or []
    tags = [tensor["tag"] for tensor in tensors]
    num_units = cut[-1].stop if cut else 0
    cuts = f"{len(cut)} segments" if len(cut) > 1 else "one segment"
    _show_lines(f"{name}: {num_units} units in {cuts}", segments(cut, tags), console)
    if tensors:
        table = table_of("tag", "bytes a unit", "FLOPs to recompute", "plan", left=(0, 3))
        for tensor in tensors:
            held, again = tensor.get("bytes"), tensor.get("recompute_flops")
            table.add_row(tensor["tag"], amount(held), count(again), _fate(tensor))
        console.print(table)


def _fate(tensor: dict) -> str:
    """Whether one tagged tensor is kept, offloaded or recomputed, over the units of its stack."""
    kept, units = tensor.get("kept_units"), tensor.get("units")
    if kept is None or units is None:
        return "n/a"
    moved = tensor.get("offloaded_units") or 0
    rest = "keep" if tensor["tag"] == UNIT_INPUT else "recompute"
    for number, word in ((kept, "keep"), (moved, "offload"), (units - kept - moved, rest)):
        if number == units:
            return word
    parts = [f"{word} {number}" for number, word in ((kept, "keep"), (moved, "offload")) if number]
    return f"partly: {', '.join(parts)} of {units} units"


def _offloaded(plan: Plan) -> list[str]:
    """One line on the bytes held in the processor's memory, if there are any."""
    held = plan.details.get("host_bytes")
    return [f"in the processor's memory: {amount(held)} a device, pinned"] if held else []


def _alternatives(plan: Plan) -> list[str]:
    lines = []
    faster = plan.details.get("next_faster")
    if faster:
        what = [f"microbatch {faster['microbatch']} x accumulation {faster['accumulation']}"]
        for name, cut in (faster.get("stacks") or {}).items():
            what.append(f"{name}: {'; '.join(segments(cut))}")
        lacks = faster.get("lacks_bytes")
        line = f"next faster plan: {', '.join(what)}"
        line += f"; lacks {amount(lacks)}" if lacks is not None else ""
        line += f"; {duration(faster['seconds'])} a step" if faster.get("seconds") is not None else ""
        lines.append(line)
    elif "next_faster" in plan.details:
        lines.append("next faster plan: none, more memory would gain nothing")
    if plan.details.get("largest_microbatch") is not None:
        lines.append(f"largest microbatch that fits: {plan.details['largest_microbatch']}")
    return lines


def _show_levers(levers: list[dict], console) -> None:
    if not levers:
        return
    table = table_of("levers not pulled", "saves", "setting", left=(0, 2))
    for lever in levers[:_LEVERS_SHOWN]:
        faster = f", products {lever['faster']:.0f} x as fast" if lever.get("faster", 1) > 1 else ""
        table.add_row(lever["name"] + faster, amount(lever.get("saves_bytes")), lever.get("setting") or "")
    console.print()
    console.print(table)


_RATES = {  # how certain a time is: `details.time.rates` in words
    "measured": "measured rates",
    "assumed": "assumed rates",
    "bound": "peak rates: a bound, it cannot be faster",
}


def time_lines(plan: Plan) -> list[str]:
    """Steps, tokens, FLOPs and time of the run. If the time is unknown, the line names the command that measures it."""
    if "time" not in plan.details:
        return []
    time = plan.details["time"] or {}
    sizes = {
        "steps": f"{time.get('steps') or 0:,} steps",
        "tokens": f"{count(time.get('tokens'))} tokens",
        "flops": f"{count(time.get('flops'))}FLOP",
    }
    run = [text for name, text in sizes.items() if time.get(name) is not None]
    lines = [f"run: {', '.join(run)}"] if run else []
    if time.get("seconds") is None and time.get("step_seconds") is None:
        return [*lines, "time: unknown, run `aurora doctor --calibrate`"]
    durations = []
    if time.get("seconds") is not None:
        durations.append(duration(time["seconds"]))
    if time.get("step_seconds") is not None:
        durations.append(f"{duration(time['step_seconds'])} a step")
    mark = _RATES.get(time.get("rates"), time.get("rates") or "rates of unknown origin")
    source = f": {time['source']}" if time.get("source") else ""
    least = "at least " if time.get("rates") == "bound" else ""
    lines.append(f"time: {least}{', '.join(durations)} ({mark}{source})")
    lines += _links(plan, time)
    if plan.platform == "gpu":
        much = ", which is most of a step this short" if (time.get("step_seconds") or 1) < _SHORT_STEP_S else ""
        lines.append(f"not included: the time to launch each kernel{much}; saves and evaluations")
    return lines


def _links(plan: Plan, time: dict) -> list[str]:
    """What a step communicates under a mesh, and how much of its time that is."""
    links = plan.details.get("links")
    if not links:
        return []
    moved = ", ".join(f"{amount(number)} over {axis}" for axis, number in links["bytes"].items())
    if links["seconds"] is None:
        return [f"links: a step moves {moved} into each device; {links['rates']}"]
    beside = f", beside {duration(time['product_seconds'])} of products" if time.get("product_seconds") else ""
    return [f"links: a step moves {moved} into each device, which takes {duration(links['seconds'])} if products hide "
            f"none of it{beside}; {links['rates']}"]  # fmt: skip


def _disk(plan: Plan) -> list[str]:
    disk = plan.details.get("checkpoint") or {}
    if disk.get("bytes") is None:
        return []
    line = f"disk: {amount(disk['bytes'])} a checkpoint"
    if disk.get("kept") is not None:
        line += f", {disk['kept']} kept"
    if disk.get("frozen_bytes"):
        line += f", {amount(disk['frozen_bytes'])} of frozen parameters, stored once"
    lines = [line + (f", {amount(disk['disk_bytes'])} in all" if disk.get("disk_bytes") is not None else "")]
    if disk.get("frozen_bytes"):
        lines[0] += ", or less: a run beside one that froze the same parameters shares them"
    if plan.saves_in_place:
        lines.append(
            "saves: in place, because a copy of the state does not fit beside a step; training waits for each about "
            f"{duration(disk['bytes'] / WRITTEN_PER_SECOND)}, at an assumed {amount(WRITTEN_PER_SECOND)} a second"
        )
    return lines


def _made(plan: Plan) -> list[str]:
    """How the plan was made: the attention kernel, the planning time, the number of compilations."""
    details, parts = plan.details, []
    if details.get("attention"):
        parts.append(f"attention: {details['attention']}")
    if details.get("planning_seconds") is not None:
        parts.append(f"planned in {duration(details['planning_seconds'])}")
    if details.get("compiles") is not None:
        parts.append("nothing compiled" if details["compiles"] == 0 else f"compiled {details['compiles']} x")
    lines = [", ".join(parts)] if parts else []
    if details.get("collectives"):
        listed = ", ".join(f"{number} {kind}" for kind, number in details["collectives"].items())
        brought = details.get("received") or {}
        into = ", ".join(f"{amount(number)} by {kind}" for kind, number in brought.items())
        lines.insert(0, f"a compiled step communicates by {listed}; those in a stack's loop run once for each unit"
                     + (f"; into each device come {into}" if into else ""))  # fmt: skip
    return lines


def segments(cut: list, tags: list[str] | None = None) -> list[str]:
    """One line for each segment of a stack: which units, and what they keep for the backward pass.

    Args:
        cut: `Segment`s, or their fields as a plan's JSON has them.
        tags: every tag of the stack; if given, the lines also name those that are not kept.
    """
    parts = map(_fields, cut)
    return [f"units {_units(p['start'], p['stop'])}: {_kept(p['save'], tags, p.get('offload') or ())}" for p in parts]


def _fields(part) -> dict:
    if isinstance(part, dict):
        return part
    # A plan written before tensors could be offloaded has lists.
    return part._asdict() if hasattr(part, "_asdict") else dict(zip(("start", "stop", "save"), part, strict=True))


def _units(start: int, stop: int) -> str:
    return f"{start}" if stop - start == 1 else f"{start} to {stop - 1}"


def _kept(save, tags, offload: tuple[str, ...] = ()) -> str:
    if save is None:
        return "keep everything"
    moved = f"offload {', '.join(offload)}; " if offload else ""
    if not save:
        return moved + ("recompute the rest" if offload else "recompute everything")
    dropped = [tag for tag in tags or () if tag not in save and tag not in offload and tag != UNIT_INPUT]
    if tags and not dropped:
        return f"{moved}keep {', '.join(save)}; recompute what lies between them and has no tag"
    return f"{moved}keep {', '.join(save)}" + (f"; recompute {', '.join(dropped)}" if dropped else "")
