"""Inspects a batch: facts about its rows as plain data, and their text with document boundaries."""

from __future__ import annotations

import numpy as np

from aurora_train.data.order import examples_at, slots
from aurora_train.errors import UserError
from aurora_train.recipe import Source
from aurora_train.units import counted

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")


def inspect_batch(source: Source | None, split: str, seed: int, batch: int, data_step: int, rows: int) -> dict:
    """JSON-able facts about the batch that training reads at `data_step`.

    They always include the shape, dtype and range of every array, and the example indices; and what the source itself
    says of the first `rows` rows (`Source.reading`), such as their documents and text. UserError if the split has no
    data.
    """
    if source is None:
        raise UserError(f"the {split} split is empty", where=f"data.holdout_{split}", hint=f"data.holdout_{split}=0.01")
    chosen = examples_at(source, seed, data_step, batch)
    arrays, mixture = source.take(chosen), getattr(source, "mixture", None)
    facts = {
        "split": split,
        "data_step": data_step,
        "epoch": None if mixture else data_step * batch // len(source),
        "examples": len(source),
        "fingerprint": source.fingerprint,
        "arrays": {
            name: {"shape": list(a.shape), "dtype": str(a.dtype), "min": a.min().item(), "max": a.max().item()}
            for name, a in arrays.items()
        },
        "indices": chosen.tolist(),
        "not_finite": not_finite(arrays, chosen),
    }
    if mixture:
        facts["mix"] = _mixed(source, chosen, data_step * batch)
    if hasattr(source, "reading"):
        facts |= source.reading(arrays, chosen, min(rows, batch))
    return facts


def _mixed(source, chosen: np.ndarray, position: int) -> dict[str, dict]:
    """For each source of a mixture: its share, its rows, its number of passes so far, its rows in this batch."""
    shares = slots(source.mixture) / slots(source.mixture).sum()
    return {
        name: {
            "share": float(share), "rows": part.count, "passes": float(position * share / part.count),
            "in_batch": int(((chosen >= part.first) & (chosen < part.first + part.count)).sum()),
        }
        for name, part, share in zip(source.weights, source.mixture, shares, strict=True)
    }  # fmt: skip


def not_finite(arrays: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, list[int]]:
    """The examples among `chosen` whose arrays hold NaN or an infinity, by array name; only names that have any."""
    bad_examples = {}
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating):
            bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
            bad_examples |= {name: chosen[bad].tolist()} if bad.any() else {}
    return bad_examples


def show(facts: dict, console) -> None:
    """Print `inspect_batch`'s facts on a rich console; each document has its own colour, each row a rule above."""
    from rich.table import Table
    from rich.text import Text

    epoch = "" if facts["epoch"] is None else f" (epoch {facts['epoch']})"
    console.print(
        f"split {facts['split']}, data step {facts['data_step']}{epoch}, "
        f"{len(facts['indices'])} of {counted(facts['examples'], 'example')}", highlight=False,
    )
    for line in facts.get("summary", ()):
        console.print(line, highlight=False)
    for name, part in facts.get("mix", {}).items():
        console.print(
            f"{name}: {part['share']:.2%} of the rows, {part['in_batch']} here; {part['passes']:.2f} times through its "
            f"{counted(part['rows'], 'row')} before this batch", highlight=False,
        )
    table = Table("array", "shape", "dtype", "min", "max")
    for name, array in facts["arrays"].items():
        table.add_row(name, str(array["shape"]), array["dtype"], f"{array['min']:g}", f"{array['max']:g}")
    console.print(table)
    for name, examples in facts["not_finite"].items():
        console.print(f"{name} is not finite in example {', '.join(map(str, examples))}", style="bold", highlight=False)
    for row in facts.get("rows", ()):
        console.rule(f"row {row['index']}")
        for number, segment in enumerate(row["segments"]):
            colour = _COLOURS[number % len(_COLOURS)]
            console.print(Text(f"[{segment['document']}: {segment['tokens']} tokens]", style=f"bold {colour}"))
            console.print(Text(segment["text"], style=colour))
        if "last_target" in row:
            console.print(Text(f"last target: {row['last_target']!r}", style="dim"))
