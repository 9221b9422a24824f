"""Inspects a batch: facts about its rows as plain data, and their text with document boundaries."""

from __future__ import annotations

import numpy as np

from aurora_train.data.order import examples_at, slots
from aurora_train.errors import UserError
from aurora_train.recipe import Source
from aurora_train.units import counted, printable

LEARNED_MARKS = ("[[", "]]")  # around what is learned, where there are no colours
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")


def inspect_example(source: Source | None, split: str, number: int) -> dict:
    """As `inspect_batch`, of one example by its number in the source. UserError if there is none of that number."""
    source = _there(source, split)
    if not 0 <= number < len(source):
        raise UserError(f"the {split} split has no example {number}", where="--example",
                        why=f"it has {counted(len(source), 'example')}, from 0")  # fmt: skip
    facts = {"split": split, "example": number, "examples": len(source), "fingerprint": source.fingerprint}
    return facts | _read(source, np.array([number], np.int64), 1)


def inspect_batch(source: Source | None, split: str, seed: int, batch: int, data_step: int, rows: int) -> dict:
    """JSON-able facts about the batch that training reads at `data_step`.

    They always include the shape, dtype and range of every array, and the example indices; and what the source itself
    says of the first `rows` rows (`Source.reading`), such as their documents and text. UserError if the split has no
    data.
    """
    source = _there(source, split)
    chosen, mixture = examples_at(source, seed, data_step, batch), getattr(source, "mixture", None)
    facts = {
        "split": split,
        "data_step": data_step,
        "epoch": None if mixture else data_step * batch // len(source),
        "examples": len(source),
        "fingerprint": source.fingerprint,
    }
    if mixture:
        facts["mix"] = _mixed(source, chosen, data_step * batch)
    return facts | _read(source, chosen, min(rows, batch))


def _there(source: Source | None, split: str) -> Source:
    if source is None:
        raise UserError(f"the {split} split is empty", where=f"data.holdout_{split}", hint=f"data.holdout_{split}=0.01")
    return source


def _read(source: Source, chosen: np.ndarray, rows: int) -> dict:
    """Facts about the examples `chosen` themselves."""
    arrays = source.take(chosen)
    facts = {
        "arrays": {
            name: {"shape": list(a.shape), "dtype": str(a.dtype), "min": a.min().item(), "max": a.max().item()}
            for name, a in arrays.items()
        },
        "indices": chosen.tolist(),
        "not_finite": not_finite(arrays, chosen),
    }
    return facts | (source.reading(arrays, chosen, rows) if hasattr(source, "reading") else {})


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
    """Print facts on a rich console; each document has its own colour, each row a rule above.

    Characters of the data that would steer the terminal are written out. Of a document in parts, what is learned is
    green and the rest dim; without colours it stands between marks.
    """
    from rich.table import Table
    from rich.text import Text

    console.print(_heading(facts), highlight=False)
    for line in facts.get("summary", ()):
        console.print(printable(line), highlight=False)
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
    if any("parts" in segment for row in facts.get("rows", ()) for segment in row["segments"]):
        console.print(_learned([["what is learned looks like ", False], ["this", True]], bool(console.color_system)))
    for row in facts.get("rows", ()):
        console.rule(f"row {row['index']}")
        for number, segment in enumerate(row["segments"]):
            colour = _COLOURS[number % len(_COLOURS)]
            heading = printable(f"[{segment['document']}: {segment['tokens']} tokens]")
            console.print(Text(heading, style=f"bold {colour}"))
            if "parts" in segment:
                console.print(_learned(segment["parts"], bool(console.color_system)))
            else:
                console.print(Text(printable(segment["text"]), style=colour))
        if "last_target" in row:
            console.print(Text(f"last target: {row['last_target']!r}", style="dim"))


def _heading(facts: dict) -> str:
    of = counted(facts["examples"], "example")
    if "example" in facts:
        return f"split {facts['split']}, example {facts['example']} of {of}"
    epoch = "" if facts["epoch"] is None else f" (epoch {facts['epoch']})"
    return f"split {facts['split']}, data step {facts['data_step']}{epoch}, {len(facts['indices'])} of {of}"


def _learned(parts: list, has_colours: bool):
    """The text of [[text, is it learned]] with its learned parts distinct."""
    from rich.text import Text

    styled = Text()
    for text, is_learned in parts:
        opening, closing = LEARNED_MARKS if is_learned and not has_colours else ("", "")
        styled.append(f"{opening}{printable(text)}{closing}", style="bold green" if is_learned else "dim")
    return styled
