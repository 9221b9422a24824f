"""Memory runs out under a run in a real cgroup: it saves, stops with 77 and says what grew.

    pytest -m "slow or release" -s tests/faults/test_guard.py      # as root: a cgroup of its own is needed

A cgroup stands for the box: what is in it beside the trainer is a ballast that grows until the trainer has left. The
kernel is asked to kill the trainer first, as it is by the unit that `aurora unit` prints.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from kit import Aurora, events, final_hash, losses

from aurora_train.always_on.guard import EXIT_LOW_MEMORY, LOW_MEMORY
from aurora_train.checkpoint.audit import sealed_steps
from aurora_train.plan.account import SAVE_COPIES

MIB, GIB = 2**20, 2**30
FIRST_TO_GO = 900  # oom_score_adj: however large the ballast is


class Box:
    """A cgroup of one's own with a limit, in which processes are started. Version 1 or 2, whichever has memory."""

    def __init__(self, limit: int):
        top = Path("/sys/fs/cgroup")
        self._v1 = (top / "memory/memory.limit_in_bytes").exists()
        self.folder = (top / "memory" if self._v1 else top) / f"aurora-guard-{os.getpid()}-{random.getrandbits(32):x}"
        if not self._v1 and "memory" not in (top / "cgroup.subtree_control").read_text().split():
            (top / "cgroup.subtree_control").write_text("+memory")
        self.folder.mkdir()
        self._write("memory.limit_in_bytes" if self._v1 else "memory.max", str(limit))
        if not self._v1:
            with contextlib.suppress(OSError):  # without swap there is no such file
                self._write("memory.swap.max", "0")

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def start(self, command: list[str], score: int, **options) -> subprocess.Popen:
        """A process in the box, with an `oom_score_adj`."""
        enter = f"echo $$ > {self.folder}/cgroup.procs && echo {score} > /proc/self/oom_score_adj && exec \"$@\""
        return subprocess.Popen(["sh", "-c", enter, "sh", *map(str, command)], **options)

    def used(self) -> int:
        """Bytes, page cache included."""
        return int((self.folder / ("memory.usage_in_bytes" if self._v1 else "memory.current")).read_text())

    def killed(self) -> int:
        """How many processes the kernel has killed in it."""
        text = (self.folder / ("memory.oom_control" if self._v1 else "memory.events")).read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))

    def remove(self) -> None:
        """Once every process has left it."""
        deadline = time.monotonic() + 10
        while True:
            try:
                return self.folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


# Saves a state four times, two of them in place, and prints what each save and the next step took, in times of the
# state's bytes.
SAVING = '''
import sys, tempfile, threading, time
from pathlib import Path
import jax
from jax.sharding import NamedSharding, PartitionSpec
from aurora_train.checkpoint import writer
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.machine.memory import give_back_freed, process_memory

places = NamedSharding(jax.make_mesh((jax.device_count(),), ("fsdp",)), PartitionSpec("fsdp"))
draw = jax.jit(lambda key: jax.random.normal(key, (2560, 1024)), out_shardings=places)
following = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
writer.PIECE_BYTES = 20 * 2**20  # two leaves
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
store = CheckpointStore(folder / "checkpoints", folder / "trash")
store.folder.mkdir()
for step, copy in enumerate((True, True, False, False)):
    state = {"params": {str(number): draw(jax.random.key(number)) for number in range(20)}}
    jax.block_until_ready(state)
    give_back_freed()
    before = peak = process_memory()["anonymous"]
    ended = threading.Event()
    def watch():
        global peak
        while not ended.wait(0.001):
            peak = max(peak, process_memory()["anonymous"])
    thread = threading.Thread(target=watch)
    thread.start()
    store.save(step, state, {}, copy=copy)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if not copy:  # the step after it takes no new buffers
        state = jax.block_until_ready(following(state))
    store.wait()
    ended.set()
    thread.join()
    print((peak - before) / size)
    del state
store.close()
'''


@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=pytest.mark.release), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_save_takes_the_state_once_and_a_save_in_place_takes_a_piece_of_it(devices, aurora):
    command = [sys.executable, "-c", SAVING, aurora.folder]
    result = subprocess.run(command, env=aurora.environment(devices), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    times = [float(line) for line in result.stdout.splitlines()]
    print(f"{devices} devices: {', '.join(f'{one:.2f}' for one in times)} times the state")
    copied, in_place = times[:2], times[2:]
    assert len(times) == 4 and max(copied) <= SAVE_COPIES and max(in_place) < 0.25, times
    assert max(copied) > SAVE_COPIES - 0.5, "too much is reckoned"


def why_not() -> str | None:
    """Why no cgroup can be made here, or None."""
    try:
        Box(GIB).remove()
    except OSError as error:
        return f"NOT TRIED, no cgroup can be made (it takes root): {error}"
    return None


BALLAST = '''
import sys, time
first, rate = (float(text) * 1e6 for text in sys.argv[1:])
held, began, number = [bytearray(b"x") * int(first)], time.monotonic(), 0
while True:
    while number < rate * (time.monotonic() - began):
        held.append(bytearray(b"x") * (1 << 20))
        number += 1 << 20
    time.sleep(0.01)
'''
# A data source that keeps what it has read, from a batch on.
LEAK = ("        self.taken += 1\n", '''        self.taken += 1
        if self.taken > 60 and "TOY_LEAK" in os.environ:
            self.kept = [*getattr(self, "kept", []), np.ones(int(os.environ["TOY_LEAK"]) << 17)]
''')
LIMIT = 1400 * MIB
STATE = ("model.width=512", "optimizer.lr=1e-4", "evaluate.every=null")  # 50 MB of state
LONG = ("train.steps=100000", "checkpoint.every=100000")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Aurora:
    """A folder with the toy, its leaking data source and the ballast."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("guard")
    toy.write(folder)
    recipe = folder / "toy.py"
    assert LEAK[0] in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(*LEAK))
    (folder / "ballast.py").write_text(BALLAST)
    return Aurora(folder, folder / "cache")


@pytest.fixture
def shared_box():
    made = Box(LIMIT)
    try:
        yield made
    finally:
        made.remove()


def trained_beside(lab: Aurora, box: Box, run: Path, *settings: str, rate: float = 0, leak: int = 0):
    """(status, stdout, stderr) of a run in the box, beside a ballast that grows by `rate` MB/s or with a leak of so
    many MiB a step. The ballast is there until the run has left."""
    environment = lab.environment() | ({"TOY_LEAK": str(leak)} if leak else {})
    command, pipes = lab.command("train", "toy.yaml", *STATE, *settings, "--run", run), dict.fromkeys(
        ("stdout", "stderr"), subprocess.PIPE
    )
    trainer = box.start(command, FIRST_TO_GO, cwd=lab.folder, env=environment, text=True, **pipes)
    ballast = None
    try:
        while rate and trainer.poll() is None and steps_of(run) < 10:
            time.sleep(0.01)
        if rate and trainer.poll() is None:
            first = max(LIMIT - box.used() - 600e6, 0) / 1e6
            ballast = box.start([sys.executable, "ballast.py", first, rate], 0, cwd=lab.folder)
        out, err = trainer.communicate(timeout=240)
        return trainer.returncode, out, err, ballast is None or ballast.poll() is None
    finally:
        for process in filter(None, (trainer, ballast)):
            process.kill()
            process.wait()


def steps_of(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").exists() else 0


def assert_left_in_time(lab: Aurora, box: Box, run: Path, ended) -> str:
    """It saved its last step and stopped with the guard's status, and nobody was killed; what it said."""
    status, out, err, ballast_lives = ended
    assert (status, box.killed(), ballast_lives) == (EXIT_LOW_MEMORY, 0, True), (status, box.killed(), out, err[-2000:])
    step = losses(run)[-1][0]
    assert max(sealed_steps(run / "checkpoints")) == step
    assert f"stopped by {LOW_MEMORY} at step {step}; everything is saved" in out
    assert f"resume with: aurora resume {run}" in out
    assert events(run, "stop")[-1]["by"].splitlines()[0] == LOW_MEMORY
    return out


@pytest.mark.release
def test_a_run_that_left_a_full_box_goes_on_to_the_same_bits(lab, shared_box, tmp_path):
    run, settings = tmp_path / "run", ("train.steps=300", "checkpoint.every=200")
    ended = trained_beside(lab, shared_box, run, *settings, rate=100)
    out = assert_left_in_time(lab, shared_box, run, ended)
    assert re.search(r"since step \d+ grew: python\S* \(process \d+\) by", out), out
    lab.good("resume", run, "--quiet")
    lab.good("train", "toy.yaml", *STATE, *settings, "--run", tmp_path / "undisturbed", "--quiet")
    assert losses(run) == losses(tmp_path / "undisturbed")
    assert final_hash(run) == final_hash(tmp_path / "undisturbed")


@pytest.mark.release
def test_a_run_whose_recipe_leaks_says_that_it_is_itself(lab, shared_box, tmp_path):
    ended = trained_beside(lab, shared_box, tmp_path / "run", *LONG, leak=4)
    out = assert_left_in_time(lab, shared_box, tmp_path / "run", ended)
    assert re.search(r"since step \d+ grew: this process by", out), out


@pytest.mark.slow
def test_where_the_copy_of_a_save_does_not_fit_a_run_saves_in_place_and_is_not_killed(lab, tmp_path):
    """Of 3.15 GB, Python and jax leave 2.5 GB, half of which is kept free. A step takes 0.8 GB, a state 0.6 GB."""
    box, run, settings = Box(3000 * MIB), tmp_path / "run", ("model.width=1800", "train.steps=9", "checkpoint.every=3")
    try:
        status, _, err, _ = trained_beside(lab, box, run, *settings)
        assert (status, box.killed()) == (0, 0), err[-2000:]
    finally:
        box.remove()
    assert "saves in place" in err and err.count("in place: training waited") == 3, err
    assert sealed_steps(run / "checkpoints") >= {6, 9} and lab.good("verify", run)


@pytest.mark.slow
def test_without_the_guard_the_same_run_is_killed(lab, shared_box, tmp_path):
    status, _, err, _ = trained_beside(lab, shared_box, tmp_path / "run", *LONG, "memory.guard=off", rate=150)
    assert status == -9 and shared_box.killed() >= 1, err[-2000:]  # and the ballast, where it went on growing
    assert not sealed_steps(tmp_path / "run/checkpoints"), "what it had trained is lost"


@pytest.mark.slow
def test_a_run_is_not_started_into_a_full_box(lab, shared_box, tmp_path):
    """Python, jax and the compiler fit, and 200 MB of state beside a save of it and the floor do not."""
    settings = ("model.width=1024", "memory.budget=600MB", *LONG)
    ballast = shared_box.start([sys.executable, "ballast.py", 850, 0], 0, cwd=lab.folder)
    try:
        while shared_box.used() < 850e6:
            time.sleep(0.01)
        status, out, err, _ = trained_beside(lab, shared_box, tmp_path / "run", *settings)
    finally:
        ballast.kill()
        ballast.wait()
    assert (status, shared_box.killed()) == (EXIT_LOW_MEMORY, 0), err
    assert "too little memory is left to continue" in err and "Traceback" not in err
    assert re.search(rf"python\S* \(process {ballast.pid}\) 8\d\d MB", err), err


@pytest.mark.release
def test_ten_ballasts_of_any_speed_ten_runs_that_left_in_time(lab, tmp_path):
    """Up to a twelfth of the box a second. A run that is killed by a faster one has lost what it had not saved."""
    draw, said = random.Random(19), []
    for number in range(10):
        box, run, rate = Box(LIMIT), tmp_path / str(number), draw.uniform(10, 120)
        try:
            out = assert_left_in_time(lab, box, run, trained_beside(lab, box, run, *LONG, rate=rate))
        finally:
            box.remove()
        said.append(f"{rate:.0f} MB/s: {out.splitlines()[1].strip()}")
    print("\n".join(said), f"\n{len(said)} of 10 saved and stopped, 0 killed")
