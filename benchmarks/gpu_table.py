"""What gpu.py prints. A number that is not there is "not measured", and an MFU without a known peak "n/a"."""

from __future__ import annotations

from statistics import median

NONE = "not measured"
GOAL = 0.55  # MFU at 1B
ROWS = 12  # of a profile


def card_line(card: dict) -> str:
    """The card and the versions."""
    driver = f"driver {card['driver'] or NONE}"
    peak = f"{card['peak_flops'] / 1e12:.0f} TFLOP/s ({card['peak_source']})" if card["peak_flops"] else "n/a"
    versions = ", ".join(f"{name} {card[name]}" for name in ("jax", "torch", "transformers"))
    return f"{card['date']}, {card['name']}, {driver}, {versions}; bfloat16 peak {peak}"


def header() -> str:
    """Of the table: microbatches are steps of accumulation x examples."""
    names = ["case", "T", "batch", "ours, tokens/s", "MFU", "memory", "microbatches"]
    names += ["torch, tokens/s", "MFU", "memory", "microbatches", "ratio"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def row(found: dict) -> str:
    """One line of the table; torch's side is the best of those measured."""
    told = [found["case"], f"{found['sequence']:,}", str(found["batch"])]
    for side in ("ours", found["best"]):
        told += side_cells(found["sides"].get(side))
    return f"| {' | '.join([*told, spread(found['ratios'])])} |"


def spread(ratios: list[float]) -> str:
    """Median, least and most."""
    return f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else NONE


def fp8_table(rows: list[dict]) -> list[str]:
    """Ours in 8 bits beside ours in 16, where both were asked for."""
    asked = [found for found in rows if "ours in fp8" in found["sides"]]
    if not asked:
        return []
    names = ["case", "T", "fp8, tokens/s", "MFU (of the bfloat16 peak)", "memory", "microbatches", "over bfloat16"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for found in asked:
        cells = [found["case"], f"{found['sequence']:,}", *side_cells(found["sides"]["ours in fp8"])]
        lines.append(f"| {' | '.join([*cells, spread(found['fp8_ratios'])])} |")
    return ["", *lines]


def side_cells(side: dict | None) -> list[str]:
    """Rate, MFU, memory and microbatches of one side."""
    if side is None or side["tokens_per_s"] is None:
        return [NONE] * 4
    mfu = "n/a" if side["mfu"] is None else f"{side['mfu']:.1%}"
    return [f"{side['tokens_per_s']:,.0f}", mfu, f"{side['memory_bytes'] / 1e9:.1f} GB", side["microbatches"]]


def notes(rows: list[dict]) -> list[str]:
    """What a side said of its kernels and its plan, or why it was not measured."""
    return [
        f"{found['case']} T {found['sequence']:,}, {side}: {line}"
        for found in rows for side, told in found["sides"].items()
        for line in (*told["remarks"], *([f"{NONE}: {told['why']}"] if told["why"] else []))
    ]  # fmt: skip


def goals(rows: list[dict]) -> list[str]:
    """What was set out for, beside what came of it."""
    at_1b = [found["sides"]["ours"]["mfu"] for found in rows if found["case"] == "1b"]
    known = [mfu for mfu in at_1b if mfu is not None]
    best = f"{max(known):.1%}: {'met' if max(known) >= GOAL else 'not met'}" if known else NONE
    ratios = [found["ratio"] for found in rows if found["ratio"] is not None]
    ahead = f"ahead in {sum(ratio > 1 for ratio in ratios)} of {len(ratios)} rows measured" if ratios else NONE
    return [f"goal of {GOAL:.0%} MFU at 1B: {best}", f"goal of being ahead of torch at every size: {ahead}"]


def top_of_profile(name: str, found: dict) -> str:
    """The rows of `aurora profile` that take most of a step."""
    step, busy = 1e3 * found["step_s"], 1e3 * found["device_busy_s"]
    lines = [
        f"{name}: a step of {step:.1f} ms, device busy {busy:.1f} ms; {found['plan']}", f"trace: {found['trace']}", "",
        "| part | kind | ms a step | share |", "|---|---|---|---|",
    ]  # fmt: skip
    rows = sorted(found["operations"], key=lambda one: -one["seconds"])[:ROWS]
    lines += [f"| {one['part']} | {one['kind']} | {1e3 * one['seconds']:.2f} | {one['share']:.1%} |" for one in rows]
    return "\n".join(lines)
