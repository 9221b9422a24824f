"""What `aurora checkpoints` and `aurora verify` report: the steps there are, their size and score, if they are intact.

This module only reads. A trainer may be writing to the same folder: a checkpoint that it deletes meanwhile is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from aurora_train.checkpoint import durable, frozen
from aurora_train.checkpoint.audit import ASIDE, folders_of, sealed_steps, step_faults, step_of
from aurora_train.checkpoint.ledger import NAME, Ledger
from aurora_train.checkpoint.retention import reasons


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
    for path in sorted(folders_of(folder), key=lambda p: (step_of(p), p.name)):
        step = step_of(path)
        rows.append(_row(path, entries.scores.get(step) if path.name.isdigit() else None, why.get(step)))
    for step in sorted(entries.committed - {step_of(p) for p in folders_of(folder) if p.name.isdigit()}):
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
    folders: list[tuple[int | None, Path]] = [(step, folder / str(step)) for step in steps]
    needed = next((one for _, path in folders if (one := durable.manifest(path).get("frozen"))), None)
    if needed or (folder / frozen.FOLDER).is_dir():
        folders.append((None, folder / frozen.FOLDER))
    in_all = sum(durable.num_bytes(path) for _, path in folders)
    done, rows = 0, []

    def read(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, in_all)

    for step, path in folders:
        if step is not None:
            lines = step_faults(folder, step, read)
        else:
            lines = frozen.faults(path, needed, read) if needed else durable.faults(path, read)
        rows.append({
            "step": step, "files": len(durable.manifest(path).get("files", ())), "bytes": durable.num_bytes(path),
            "faults": lines, "folder": str(path),
        })  # fmt: skip
    if (fault := Ledger(folder).read().fault) is not None:
        record = str(Ledger(folder).path)
        rows.append({"step": None, "files": 0, "bytes": 0, "faults": [f"{NAME}: {fault}"], "folder": record})
    return rows


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
        "step": step_of(path), "bytes": sizes, "files": len(files),
        "saved": manifest.get("saved") or (copied and copied.isoformat(timespec="seconds")), "score": score,
        "kept": why if path.name.isdigit() else None, "state": state, "folder": str(path),
    }  # fmt: skip
