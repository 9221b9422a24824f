"""Memory runs out under a run, on real files and in a real cgroup: it saves, stops with 77 and says what grew.

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

from aurora_train.checkpoint.audit import sealed_steps
from aurora_train.plan.account import SAVE_COPIES
from aurora_train.train.guard import EXIT_LOW_MEMORY, LOW_MEMORY, Guard, falling

MIB, GIB = 2**20, 2**30
FIRST_TO_GO = 900  # oom_score_adj: however large the ballast is


# ---- the decision, on readings written down


def box(root: Path, available: float, *, total: float = 64, swap: float = 0, swap_free: float = 0, stalled: float = 0):
    """What Linux says of a machine without cgroups; amounts in GiB, `stalled` in percent."""
    (root / "proc/pressure").mkdir(parents=True, exist_ok=True)
    amounts = {"MemTotal": total, "MemAvailable": available, "SwapTotal": swap, "SwapFree": swap_free}
    amounts |= {"Cached": 3, "Buffers": 1, "Shmem": 1}
    text = "".join(f"{name}: {int(amount * GIB) // 1024} kB\n" for name, amount in amounts.items())
    (root / "proc/meminfo").write_text(text)
    (root / "proc/pressure/memory").write_text(
        f"some avg10={stalled:.2f} avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    return root


def never() -> None:
    raise AssertionError("a step was waited for where memory is not scarce")


def test_with_room_for_two_saves_nothing_is_waited_for(tmp_path):
    guard = Guard(2 * GIB, root=box(tmp_path, 8))
    assert guard.asked(1, never) is None and guard.asked(2, never) is None


def test_with_less_than_a_save_left_it_stops_and_stays_asked(tmp_path):
    guard, waited = Guard(4 * GIB, root=box(tmp_path, 6)), []
    assert guard.asked(1, lambda: waited.append(1)) is None, "a save and 2 % of 64 GiB fit in 6"
    assert waited
    box(tmp_path, 5)
    guard = Guard(4 * GIB, root=tmp_path)
    why = guard.asked(2, lambda: None)
    assert why.splitlines()[0] == LOW_MEMORY and "5.37 GB of 68.7 GB left, a save needs 5.67 GB" in why
    assert guard.asked(3, never) == why


def test_the_copy_of_a_save_that_is_under_way_is_not_asked_for_twice(tmp_path):
    root = box(tmp_path, 2)
    assert Guard(4 * GIB, root=root, saving=lambda: True).asked(1, lambda: None) is None
    assert Guard(4 * GIB, root=root, saving=lambda: False).asked(1, lambda: None)


def test_a_save_in_place_that_is_under_way_holds_nothing_between_two_steps(tmp_path):
    root = box(tmp_path, 2)
    sealing = {"saving": lambda: True, "in_place": True, "root": root}
    assert Guard(GIB, 40 * GIB, **sealing).asked(1, lambda: None) is not None, "a piece and 2 % of 64 GiB are more"
    assert Guard(GIB // 2, 40 * GIB, **sealing).asked(1, lambda: None) is None


def test_after_the_first_save_only_what_later_saves_take_is_asked_for(tmp_path):
    under_way = [True]
    guard = Guard(4 * GIB, root=box(tmp_path, 4), saving=lambda: under_way[0], later_bytes=lambda: GIB)
    guard.look()
    under_way[0] = False
    guard.look()
    assert guard.asked(1, lambda: None) is None, "a save of 1 GiB and 2 % of 64 GiB fit in 4"


def test_too_little_within_a_step_stops_though_there_is_enough_between_two(tmp_path):
    root = box(tmp_path, 6)
    guard = Guard(4 * GIB, root=root)
    guard.asked(1, lambda: None)
    guard._decided = 0.0  # and not half a second later
    box(root, 0.5)
    guard.look()  # of the thread, while a step runs
    box(root, 6)
    assert guard.asked(2, lambda: None) is None, "it may have been garbage: it is given back, and seen once more"
    guard._decided = 0.0
    box(root, 0.5)
    guard.look()
    box(root, 6)
    assert "537 MB of 68.7 GB left within a step, but 1.37 GB are needed" in guard.asked(3, lambda: None)


@pytest.mark.parametrize(
    ("swap_free", "stalled", "available", "stops"),
    [
        pytest.param(5, 40, 4, True, id="swap fills and processes wait"),
        pytest.param(0.5, 40, 4, True, id="swap is full and processes wait"),
        pytest.param(5, 10, 4, False, id="nobody waits: what lay idle was swapped out"),
        pytest.param(8, 90, 4, False, id="nothing was swapped out"),
        pytest.param(5, 90, 32, False, id="half of the memory is there: others wait for their own limits"),
    ],
)
def test_a_box_that_swaps_is_left_before_its_memory_ends(tmp_path, swap_free, stalled, available, stops):
    guard = Guard(10 * MIB, root=box(tmp_path, 40, swap=8, swap_free=8))
    assert guard.asked(1, never) is None
    box(tmp_path, available, swap=8, swap_free=swap_free, stalled=stalled)
    guard.look()
    why = guard.asked(2, lambda: None)
    assert bool(why) == stops
    if stops:
        assert f"processes waited for memory in {stalled} % of the last ten seconds" in why
        assert "swap in use by" in why


def test_without_an_account_of_pressure_memory_alone_decides(tmp_path):
    guard = Guard(10 * MIB, root=box(tmp_path, 40, swap=8, swap_free=8))
    box(tmp_path, 4, swap=8, swap_free=0)
    (tmp_path / "proc/pressure/memory").unlink()
    assert guard.asked(1, never) is None
    box(tmp_path, 1, swap=8, swap_free=0)
    guard.look()
    assert "a save needs" in guard.asked(2, lambda: None) or "within a step" in guard.why


def test_what_falls_steadily_counts_and_what_was_taken_once_does_not():
    steady = [(t / 10, 1000 - 5 * t) for t in range(20)]
    once = [(t / 10, 1000 if t < 10 else 600) for t in range(20)]
    assert falling(steady) == pytest.approx(50)
    assert falling(once) < 250 and falling([*once, *((2 + t / 10, 600) for t in range(20))][-20:]) == 0
    assert falling(list(reversed([(-t, left) for t, left in steady]))) == 0, "more is left"
    assert falling(steady[:2]) == falling([]) == 0


def test_switched_off_it_reads_nothing_and_never_asks(tmp_path):
    with Guard(10**15, enabled=False, root=tmp_path / "nothing") as guard:
        assert guard.asked(1, never) is None


def test_what_this_process_itself_took_is_said(tmp_path):
    guard = Guard(4 * GIB, root=box(tmp_path, 40))
    leak = b"x" * (64 * MIB)
    box(tmp_path, 5)
    guard.look()
    why = guard.asked(1, lambda: None)
    assert f"since the start grew: {HIDDEN} by" in why and "this process by" in why and len(leak) == 64 * MIB


HIDDEN = "memory of no process here (a GPU's, another container's, the kernel's)"


# ---- real memory, in a real cgroup


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


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
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


@pytest.mark.slow
def test_a_run_that_left_a_full_box_goes_on_to_the_same_bits(lab, shared_box, tmp_path):
    run, settings = tmp_path / "run", ("train.steps=300", "checkpoint.every=200")
    ended = trained_beside(lab, shared_box, run, *settings, rate=100)
    out = assert_left_in_time(lab, shared_box, run, ended)
    assert re.search(r"since step \d+ grew: python\S* \(process \d+\) by", out), out
    lab.good("resume", run, "--quiet")
    lab.good("train", "toy.yaml", *STATE, *settings, "--run", tmp_path / "undisturbed", "--quiet")
    assert losses(run) == losses(tmp_path / "undisturbed")
    assert final_hash(run) == final_hash(tmp_path / "undisturbed")


@pytest.mark.slow
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
