"""Boxes that share no disk: process 0 writes and reads for all (`checkpoint.gather`), and the run is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from kit import Aurora, events, final_hash, free_address, losses

from aurora_train.checkpoint import durable
from aurora_train.machine.line import EXIT_LOST

SETTINGS = ("mesh.data=1", "mesh.fsdp=2", "train.steps=16", "checkpoint.every=4", "evaluate.final=false")
# Two cores may have much other work.
WAITING = {"XLA_FLAGS": "--xla_cpu_collective_call_terminate_timeout_seconds=300", "AURORA_JOIN_SECONDS": "600"}


class Boxes:
    """Two folders, in each of which a process of a run starts, with a config and a cache of its own. Process 1 does not
    see the folder of process 0: it has a mount namespace of its own, in which nothing is there."""

    def __init__(self, folder: Path):
        self.boxes = [Aurora(folder / name, folder / f"cache-{name}") for name in ("box0", "box1")]
        for box in self.boxes:
            box.folder.mkdir(parents=True, exist_ok=True)
            toy.write(box.folder)

    def start(self, *arguments):
        first, second = self.boxes
        place = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
                 "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
        hidden = f'mount -t tmpfs none "{first.folder}" && exec "$@"'
        apart = ["unshare", "-m", "sh", "-c", hidden, "sh", *second.command(*arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        own = [box.environment() | place | WAITING for box in self.boxes]
        return [first.forked(*arguments, environment=own[0] | {"JAX_PROCESS_ID": "0"}, **pipes),
                subprocess.Popen(apart, cwd=second.folder, env=own[1], text=True, **pipes)]  # fmt: skip


def ended(team) -> list[tuple[int, str]]:
    return [(process.wait(), said) for process, (_, said) in ((p, p.communicate(timeout=900)) for p in team)]


@pytest.fixture
def apart():
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces")


@pytest.mark.release
def test_without_a_shared_disk_a_run_is_refused_gathers_is_killed_and_comes_back_to_the_bit(apart, tmp_path):
    still, moved = Boxes(tmp_path / "still"), Boxes(tmp_path / "moved")
    refused = ended(still.start("train", "toy.yaml", *SETTINGS, "--run", "r"))
    assert [status for status, _ in refused] == [2, 2]
    assert all("do not share the run folder" in said and "checkpoint.gather=true" in said for _, said in refused)
    command = ("train", "toy.yaml", *SETTINGS, "--run", "r", "checkpoint.gather=true")
    results = ended(still.start(*command))
    assert [status for status, _ in results] == [0, 0], results
    team, run = moved.start(*command), tmp_path / "moved/box0/r"
    while not (run / "events.jsonl").exists() or len(events(run, "save")) < 2:
        assert all(process.poll() is None for process in team), ended(team)
        time.sleep(0.02)
    os.kill(team[1].pid, signal.SIGKILL)
    results = ended(team)
    assert results[0][0] == EXIT_LOST and losses(run)[-1][0] < 16, results
    saved = [path for path in (run / "checkpoints").iterdir() if durable.is_sealed(path)]
    newest = max(saved, key=lambda path: int(path.name))
    assert durable.parts(newest) == ["process-1"] and durable.faults(newest) == []
    results = ended(moved.start(*command))
    assert [status for status, _ in results] == [0, 0] and "resuming" in results[0][1], results
    assert losses(run) == losses(tmp_path / "still/box0/r")
    assert final_hash(run) == final_hash(tmp_path / "still/box0/r")
    assert not (tmp_path / "moved/box1/r").exists() and not (tmp_path / "still/box1/r").exists()
    absent = ended(moved.start("resume", "r", "train.steps=20"))
    assert [status for status, _ in absent] == [2, 2] and "aurora train CONFIG --run DIR" in absent[1][1]


SAVES = """
import json, shutil, sys, tempfile
from pathlib import Path
from aurora_train.machine import processes
with processes.together({}):
    import jax
    import numpy as np
    from aurora_train import mesh as meshes
    from aurora_train import run as runs
    from aurora_train.boxes import gather
    from aurora_train.checkpoint.store import SaveFailed
    run = runs.Run(Path(sys.argv[1]) / "r")
    if processes.leads():
        run.folder.mkdir()
        (run.checkpoints / "frozen").mkdir(parents=True)
        run.trash.touch()  # so it cannot move away the frozen parameters that are there
    place = jax.NamedSharding(meshes.make_mesh(1, 2), jax.P("fsdp"))
    tree = meshes.put({name: {"w": np.arange(8.0)} for name in ("params", "frozen")}, place)
    with gather.leading(run) if processes.leads() else gather.following(run, Path(tempfile.mkdtemp())) as own:
        store = own.store((0, 1))
        for copy in (True, False):
            try:
                store.save(3, tree, {}, copy=copy)
                store.wait()
                print(json.dumps("saved"))
            except SaveFailed as error:
                print(json.dumps(error.reason))
            processes.meet()
            if processes.leads() and run.trash.is_file():
                run.trash.unlink()
            processes.meet()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        read = store.restore(3, shapes, jax.tree.map(lambda leaf: leaf.sharding, tree))
        print(json.dumps([np.asarray(leaf.addressable_data(0)).tolist() for leaf in jax.tree.leaves(read)]))
        print(json.dumps(sorted(store.steps())))
        store.close()
"""


@pytest.mark.slow
def test_frozen_parts_and_saves_in_place_are_gathered_and_a_failure_of_process_0_is_known_to_all(tmp_path):
    here = Aurora(tmp_path, tmp_path / "cache").environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    place = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    team = [subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path)], env=here | place | {"JAX_PROCESS_ID": n},
                             text=True, **pipes) for n in "01"]  # fmt: skip
    said = [process.communicate(timeout=240) for process in team]
    assert [process.returncode for process in team] == [0, 0], said
    heard = [[line for line in out.splitlines() if line[0] in '"['] for out, _ in said]
    assert heard[0][0] == heard[1][0] != '"saved"' and heard[0][1] == heard[1][1] == '"saved"', said
    assert heard[0][2] == "[[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]]"
    assert heard[1][2] == "[[4.0, 5.0, 6.0, 7.0], [4.0, 5.0, 6.0, 7.0]]"
    assert heard[0][3] == heard[1][3] == "[3]"
    checkpoints = tmp_path / "r/checkpoints"
    assert durable.parts(checkpoints / "3") == durable.parts(checkpoints / "frozen") == ["process-1"]
    assert durable.faults(checkpoints / "3") == durable.faults(checkpoints / "frozen") == []
