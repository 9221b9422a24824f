"""A hang ends the process with stacks on disk; work that is merely slow, or a process that was stopped, does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from aurora_train.train.watchdog import EXIT_HUNG, FIRST_SECONDS, FLOOR_SECONDS, TIMES, Budgets, Watchdog

HANG = """
import sys, time
from pathlib import Path
from aurora_train.train.watchdog import Watchdog
folder = Path(sys.argv[1])
with Watchdog(folder, folder / "events.jsonl", fixed=1.5, enabled=sys.argv[2] == "on") as dog:
    with dog.during("a step"):
        time.sleep(0.5)
    time.sleep(2.5)  # not watched
    print("watching", flush=True)
    with dog.during("a save"):
        with dog.during("a step"):
            time.sleep(1)
        time.sleep(1)  # its clock starts anew after the inner work
    with dog.during("a step"):
        time.sleep(float(sys.argv[3]))
print("ended")
"""


def hang(folder, seconds, watched="on"):
    return subprocess.Popen(
        [sys.executable, "-c", HANG, str(folder), watched, str(seconds)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_budgets_are_learned_and_never_short():
    budgets = Budgets()
    assert budgets.of("a step") == FIRST_SECONDS
    budgets.took("a step", 0.1)
    assert budgets.of("a step") == FLOOR_SECONDS and budgets.of("a save") == FIRST_SECONDS
    budgets.took("a step", 60.0)
    budgets.took("a step", 1.0)
    assert budgets.of("a step") == TIMES * 60.0
    assert Budgets(5.0).of("anything") == 5.0


def test_work_that_makes_no_progress_ends_the_process_with_every_stack_on_disk(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"torn')
    process = hang(tmp_path, 60)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_HUNG and "ended" not in out and "hang: a step" in err
    (stacks,) = tmp_path.glob("hang-*.txt")
    said = stacks.read_text()
    assert "no progress for" in said and 'line 16 in <module>' in said and "watchdog.py" in said
    assert '"event": "hang"' in (tmp_path / "events.jsonl").read_text().splitlines()[-1]
    assert stacks.name in err


@pytest.mark.parametrize("seconds,watched", [(0.5, "on"), (3, "off")])
def test_slow_work_within_its_budget_and_a_watchdog_that_is_off_end_nothing(tmp_path, seconds, watched):
    process = hang(tmp_path, seconds, watched)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended" in out and not list(tmp_path.glob("hang-*"))


def test_a_process_that_was_stopped_is_not_taken_for_hung(tmp_path):
    process = hang(tmp_path, 0.5)
    assert process.stdout.readline() == "watching\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended" in out


def test_what_fails_or_is_no_measure_teaches_nothing(tmp_path):
    with Watchdog(tmp_path, tmp_path / "events.jsonl", enabled=False) as dog:
        with pytest.raises(ValueError), dog.during("a step"):
            raise ValueError
        with dog.during("a step", learn=False):
            pass
        assert dog.budgets.of("a step") == FIRST_SECONDS
