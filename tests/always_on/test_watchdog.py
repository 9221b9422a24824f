"""A hang ends the process with stacks on disk; work that is merely slow, or a process that was stopped, does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from aurora_train.always_on.watchdog import EXIT_HUNG, FIRST_SECONDS, FLOOR_SECONDS, TIMES, Budgets, Watchdog

HANG = """
import sys, time
from pathlib import Path
from aurora_train.always_on.watchdog import Watchdog
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


CASES = {"hangs": (60, "on"), "slow": (0.5, "on"), "off": (3, "off"), "stopped": (0.5, "on")}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """(folder, process) of each case: all are started at once, because what they do most of the time is to wait."""
    started = {}
    for case, (seconds, watched) in CASES.items():
        folder = tmp_path_factory.mktemp(case)
        (folder / "events.jsonl").write_text('{"event": "start"}\n{"torn')
        command = [sys.executable, "-c", HANG, str(folder), watched, str(seconds)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started[case] = folder, subprocess.Popen(command, text=True, **pipes)
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


def test_a_process_that_was_stopped_is_not_taken_for_hung(processes):
    _, process = processes["stopped"]
    assert process.stdout.readline() == "watching\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3)  # twice its budget
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended" in out


def test_budgets_are_learned_and_never_short():
    budgets = Budgets()
    assert budgets.of("a step") == FIRST_SECONDS
    budgets.took("a step", 0.1)
    assert budgets.of("a step") == FLOOR_SECONDS and budgets.of("a save") == FIRST_SECONDS
    budgets.took("a step", 60.0)
    budgets.took("a step", 1.0)
    assert budgets.of("a step") == TIMES * 60.0
    assert Budgets(5.0).of("anything") == 5.0


def test_work_that_makes_no_progress_ends_the_process_with_every_stack_on_disk(processes):
    folder, process = processes["hangs"]
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_HUNG and "ended" not in out and "hang: a step" in err
    (stacks,) = folder.glob("hang-*.txt")
    said = stacks.read_text()
    assert "no progress for" in said and 'line 16 in <module>' in said and "watchdog.py" in said
    assert '"event": "hang"' in (folder / "events.jsonl").read_text().splitlines()[-1]
    assert stacks.name in err


@pytest.mark.parametrize("case", ["slow", "off"])
def test_slow_work_within_its_budget_and_a_watchdog_that_is_off_end_nothing(processes, case):
    folder, process = processes[case]
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended" in out and not list(folder.glob("hang-*"))


def test_what_fails_or_is_no_measure_teaches_nothing(tmp_path):
    with Watchdog(tmp_path, tmp_path / "events.jsonl", enabled=False) as dog:
        with pytest.raises(ValueError), dog.during("a step"):
            raise ValueError
        with dog.during("a step", learn=False):
            pass
        assert dog.budgets.of("a step") == FIRST_SECONDS
