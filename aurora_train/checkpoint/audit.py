"""Answers questions about a run's checkpoints: which steps there are, their size and score, if they are intact.

This module only reads. A trainer may be writing to the same folder: a checkpoint that it deletes meanwhile is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from aurora_train.checkpoint import durable, frozen
from aurora_train.checkpoint.ledger import NAME, Ledger
from aurora_train.checkpoint.retention import reasons

ASIDE = "damaged-"  # prefix of a folder that was set aside


def listing(folder: Path, *, keep: int, keep_every: int | None, best: int) -> list[dict]:
    """One row per checkpoint, by step: step, bytes, files, saved (ISO time), score, kept (why), state, folder.

    `state` is "whole" where every file exists with its recorded size, otherwise the first fault. No data is read.
    """
    entries, rows = Ledger(folder).read(), []
    sealed = sealed_steps(folder)
    why = reasons(
        sorted(sealed), entries.scores, keep=keep, keep_every=keep_every, best=best,
        lower_is_better=entries.lower_is_better,
    )  # fmt: skip
    for path in sorted(_folders(folder), key=lambda p: (_step(p), p.name)):
        step = _step(path)
        rows.append(_row(path, entries.scores.get(step) if path.name.isdigit() else None, why.get(step)))
    for step in sorted(entries.committed - {_step(p) for p in _folders(folder) if p.name.isdigit()}):
        lost = {"step": step, "bytes": 0, "files": 0, "saved": None, "score": entries.scores.get(step), "kept": None}
        rows.append({**lost, "state": "the folder is missing", "folder": str(folder / str(step))})
    if entries.fault:
        lost = {"step": None, "bytes": 0, "files": 0, "saved": None, "score": None, "kept": None}
        rows.append({**lost, "state": entries.fault, "folder": str(Ledger(folder).path)})
    existing = (row for row in rows if row is not None)
    return sorted(existing, key=lambda row: (row["step"] is None, row["step"] or 0))


def verify(folder: Path, steps: Iterable[int], progress: Callable[[int, int], None] | None = None) -> list[dict]:
    """Read every byte of these checkpoints, and of the frozen parameters if there are any. Returns one row for each.

    Keys: step (None for what all share), files, bytes, faults (one line per file; [] if it is intact), folder.
    `progress(done, total)` is called with the number of bytes read so far and the number to read.
    """
    folders = [(step, folder / str(step)) for step in steps]
    if (folder / frozen.FOLDER).is_dir():
        folders.append((None, folder / frozen.FOLDER))
    in_all = sum(durable.num_bytes(path) for _, path in folders)
    done, rows = 0, []

    def read(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, in_all)

    for step, path in folders:
        lines = step_faults(folder, step, read) if step is not None else durable.faults(path, read)
        rows.append({
            "step": step, "files": len(durable.manifest(path).get("files", ())), "bytes": durable.num_bytes(path),
            "faults": lines, "folder": str(path),
        })  # fmt: skip
    if (fault := Ledger(folder).read().fault) is not None:
        record = str(Ledger(folder).path)
        rows.append({"step": None, "files": 0, "bytes": 0, "faults": [f"{NAME}: {fault}"], "folder": record})
    return rows


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


def _row(path: Path, score: float | None, why: str | None) -> dict | None:
    manifest = durable.manifest(path)
    try:
        files = [p for p in path.rglob("*") if p.is_file()]
        sizes = sum(p.stat().st_size for p in files)
        copied = datetime.fromtimestamp((path / durable.MANIFEST).stat().st_mtime, UTC) if manifest else None
    except FileNotFoundError:  # the trainer has just deleted it
        return None
    if path.name.startswith(ASIDE):
        state = "set aside"
    elif not path.name.isdigit():
        state = "unfinished"
    else:
        state = (durable.quick_faults(path) or ["whole"])[0]
    return {
        "step": _step(path), "bytes": sizes, "files": len(files),
        "saved": manifest.get("saved") or (copied and copied.isoformat(timespec="seconds")), "score": score,
        "kept": why if path.name.isdigit() else None, "state": state, "folder": str(path),
    }  # fmt: skip


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.is_dir() and _step(p) is not None]


def sealed_steps(folder: Path) -> set[int]:
    """The steps whose folder has a manifest. Reads only file names, and imports neither jax nor Orbax."""
    return {_step(p) for p in _folders(folder) if p.name.isdigit() and durable.is_sealed(p)}


def _step(path: Path) -> int | None:
    """The step in a folder's name: "30", "30.orbax-checkpoint-tmp", "damaged-30" and "damaged-30-2" are all step 30."""
    name = path.name.removeprefix(ASIDE)
    digits = name[: len(name) - len(name.lstrip("0123456789"))]
    return int(digits) if digits else None
