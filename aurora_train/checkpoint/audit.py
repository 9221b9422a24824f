"""Which checkpoints a run has, by what lies in its folder, and whether they are intact. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aurora_train.checkpoint import durable
from aurora_train.checkpoint.ledger import Ledger

ASIDE = "damaged-"  # prefix of a folder that was set aside


def committed(folder: Path) -> list[int]:
    """The steps that should exist: those with a manifest, and those on record."""
    return sorted(sealed_steps(folder) | Ledger(folder).read().committed)


def newest_fault(folder: Path, read: Callable[[int], None] | None = None) -> str | None:
    """What is wrong with the newest checkpoint, or None. Reads every byte of it; `read(n)` is called after n more."""
    steps = committed(folder)
    if not steps:
        return "no checkpoint is left"
    lines = step_faults(folder, steps[-1], read)
    return f"step {steps[-1]}: {lines[0]}" if lines else None


def step_faults(folder: Path, step: int, read: Callable[[int], None] | None = None) -> list[str]:
    """What is wrong with one checkpoint that should exist, one line per file; [] if it is intact."""
    path = folder / str(step)
    return durable.faults(path, read) if path.is_dir() else ["the folder is missing"]


def folders_of(folder: Path) -> list[Path]:
    """The folders of checkpoints: whole, unfinished and set aside."""
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.is_dir() and step_of(p) is not None]


def sealed_steps(folder: Path) -> set[int]:
    """The steps whose folder has a manifest. Reads only file names, and imports neither jax nor Orbax."""
    return {step_of(p) for p in folders_of(folder) if p.name.isdigit() and durable.is_sealed(p)}


def step_of(path: Path) -> int | None:
    """The step in a folder's name: "30", "30.orbax-checkpoint-tmp", "damaged-30" and "damaged-30-2" are all step 30."""
    name = path.name.removeprefix(ASIDE)
    digits = name[: len(name) - len(name.lstrip("0123456789"))]
    return int(digits) if digits else None
