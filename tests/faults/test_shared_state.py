"""Processes that share one state: each holds, writes and reads its part, and the run is that of one process."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import babble
import jax
import numpy as np
import pytest
from kit import Aurora, events, losses, records

from aurora_train.checkpoint import durable, layout, parts
from aurora_train.checkpoint.store import CheckpointStore

SETTINGS = (
    "model.layers=3", "model.attention=reference", "optimizer.schedule.name=constant", "checkpoint.every=3",
    "checkpoint.keep=3", "evaluate.every=6", "evaluate.final=false",
)  # fmt: skip
STEPS = 14


def ended(team, timeout=300):
    return [(process.wait(), said) for process, (_, said) in ((p, p.communicate(timeout=timeout)) for p in team)]


def good(team):
    results = ended(team)
    assert all(status == 0 for status, _ in results), "\n".join(said[-2000:] for _, said in results)
    return results


def killed_after(run: Path, team, saves: int) -> None:
    """Kill process 1 once so many steps are saved."""
    while len(events(run, "save") if (run / "events.jsonl").exists() else []) < saves:
        assert all(process.poll() is None for process in team)
        time.sleep(0.2)
    os.kill(team[1].pid, signal.SIGKILL)
    results = ended(team)
    assert results[0][0] != 0 and not any("Traceback" in said for _, said in results)


def spoil(folder: Path) -> None:
    """Change one byte of the largest file that holds arrays."""
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """One process undisturbed; and two that are killed, then four after damage to a part, then one."""
    folder = tmp_path_factory.mktemp("shared")
    aurora, config = Aurora(folder, folder / "cache"), babble.write(folder)
    aurora.good("train", config, *SETTINGS, f"train.steps={STEPS}", "--run", "one", "--quiet")
    moved, cut = folder / "moved", ("mesh.data=1", "mesh.fsdp=2")
    team = aurora.team(2, "train", config, *SETTINGS, "train.steps=4000", *cut, "--run", "moved")
    killed_after(moved, team, 2)
    newest = max(int(path.name) for path in (moved / "checkpoints").iterdir() if durable.is_sealed(path))
    shutil.copytree(moved / "checkpoints" / str(newest), folder / "kept")
    shutil.copytree(moved, folder / "whole")
    spoil(moved / "checkpoints" / str(newest) / "process-1")
    last = newest + 3
    good(aurora.team(4, "resume", "moved", f"train.steps={last}", *cut, "mesh.tensor=2"))
    aurora.good("resume", "moved", f"train.steps={max(STEPS, last + 2)}", "mesh.fsdp=1", "mesh.tensor=1", "--quiet")
    return folder, newest, last


@pytest.mark.slow
def test_killed_damaged_and_continued_on_four_and_on_one_the_losses_are_those_of_one_process(chain):
    folder, newest, _ = chain
    one, moved = dict(losses(folder / "one")), dict(losses(folder / "moved"))
    assert [moved[step] for step in one] == pytest.approx(list(one.values()), rel=1e-5)
    walked = events(folder / "moved", "walk_back")
    assert len(walked) == 1 and walked[0]["restored"] == newest - 3 and "process-1/" in walked[0]["faults"][0]
    assert [r["step"] for r in records(folder / "moved") if "loss" in r] == list(range(1, len(moved) + 1))


@pytest.mark.slow
def test_each_process_holds_and_writes_half_of_the_state_and_no_byte_twice(chain):
    folder, _, _ = chain
    whole = events(folder / "one", "start")[0]["state_bytes_here"]
    assert events(folder / "whole", "start")[0]["state_bytes_here"] <= 1.05 * whole / 2
    written = parts.stored(folder / "kept")
    pieces = [piece for found in written.values() for piece in found]
    by_process: dict[Path, int] = {}
    for piece in pieces:
        size = int(np.prod(piece.spec.shape)) * np.dtype(piece.spec.dtype).itemsize
        by_process[piece.folder] = by_process.get(piece.folder, 0) + size
    assert len(by_process) == 2 and max(by_process.values()) <= 1.05 * sum(by_process.values()) / 2
    for found in written.values():
        shape = parts.shape_of(found).shape
        assert sum(int(np.prod(piece.spec.shape)) for piece in found) == int(np.prod(shape))
    files = [path for path in (folder / "kept").rglob("*") if path.is_file()]
    assert sum(durable.MANIFEST == path.name for path in files) == 2


@pytest.mark.slow
def test_one_process_reads_what_four_wrote_in_parts(chain):
    folder, _, last = chain
    store = CheckpointStore(folder / "moved/checkpoints", folder / "moved/.trash")
    assert len(durable.parts(store.folder / str(last))) == 3
    shapes = store.shapes(last)
    assert not any(layout.PART in name for name in shapes)
    read = store.restore_some(last, {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in shapes.items()})
    assert read["step"] == last and all(np.isfinite(array).all() for array in read.values())
