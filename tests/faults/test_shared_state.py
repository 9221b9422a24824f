"""Processes that share one state: each holds, writes and reads its part, and the run is that of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import babble
import jax
import numpy as np
import pytest
from kit import Aurora, events, free_address, losses, records

from aurora_train.checkpoint import durable, layout, parts
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.errors import UserError

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


SAVES = """
import json, shutil, sys
from pathlib import Path
from aurora_train.machine import processes
with processes.together({}):
    import jax
    import numpy as np
    from aurora_train import mesh as meshes
    from aurora_train.checkpoint.following import FollowedStore
    from aurora_train.checkpoint.store import CheckpointStore, SaveFailed
    checkpoints, trash = Path(sys.argv[1]) / "checkpoints", Path(sys.argv[1]) / ".trash"
    place = jax.NamedSharding(meshes.make_mesh(1, 2), jax.P("fsdp"))
    kind = CheckpointStore if processes.leads() else FollowedStore
    store = kind(checkpoints, trash, owners=(0, 1))
    for attempt in ("process 0 cannot", "process 1 cannot", "both can"):
        if processes.leads():
            shutil.rmtree(checkpoints, ignore_errors=True)
            (checkpoints / "frozen").mkdir(parents=True)
            if trash.is_file():
                trash.unlink()
            if attempt == "process 0 cannot":
                trash.touch()  # so it cannot move away the frozen parameters that are there
            elif attempt == "process 1 cannot":
                (checkpoints / "process-1").touch()
        processes.meet()
        tree = meshes.put({name: {"w": np.arange(8.0)} for name in ("params", "frozen")}, place)
        try:
            store.save(3, tree, {})
            store.wait()
            print(json.dumps("saved"))
        except SaveFailed as error:
            print(json.dumps(error.reason))
        processes.meet()
    store.close()
"""


@pytest.mark.slow
def test_a_part_that_cannot_be_written_is_a_failed_save_in_every_process_and_the_next_one_counts(tmp_path):
    address, here = free_address(), Aurora(tmp_path, tmp_path / "cache").environment()
    place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SAVES, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    team = [subprocess.Popen(command, env=here | place | {"JAX_PROCESS_ID": number}, text=True, **pipes)
            for number in "01"]  # fmt: skip
    said = [process.communicate(timeout=240) for process in team]
    assert [process.returncode for process in team] == [0, 0], said
    heard = [[json.loads(line) for line in out.splitlines()] for out, _ in said]
    assert [one == "saved" for one in heard[0]] == [one == "saved" for one in heard[1]] == [False, False, True]
    assert heard[0][1].startswith("process 1: ")
    store = CheckpointStore(tmp_path / "checkpoints", tmp_path / ".trash")
    assert store.newest_intact() == (3, [])
    read = store.restore_some(3, dict(store.shapes(3)))
    assert {name: array.tolist() for name, array in read.items()} == dict.fromkeys(read, list(range(8)))
    whole = store.folder / "3"
    found = parts.stored(whole)["params.w"]
    assert len(found) == 2
    with pytest.raises(UserError, match="a part of params.w is missing"):
        parts.shape_of(found[1:])
