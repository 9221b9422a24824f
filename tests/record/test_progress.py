"""Progress says what is known, at a bounded rate, and never stands in the way of training."""

import io
import os
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from aurora_train.record.progress import Progress, preparation
from aurora_train.record.throughput import Throughput, TimeLeft
from aurora_train.units import count, duration, percent, size


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def plain():
    return Console(file=io.StringIO(), width=120, force_terminal=False)


def text(console):
    return console.file.getvalue().splitlines()


def test_a_log_step_is_one_plain_line_with_everything_in_it():
    console = plain()
    with Progress(1000, console) as progress:
        progress.step(
            {"step": 10, "loss": 2.5, "tokens_per_s": 12345.0, "mfu": None, "data_wait": 0.013, "memory_bytes": 1.3e9}
        )
    assert text(console) == [
        "step 10/1000  loss 2.5000  12.3k targets/s  data wait 1.3 %  1.30 GB"
    ]


def test_many_fast_steps_print_few_lines_and_always_the_last():
    console = plain()
    with Progress(5000, console) as progress:
        for step in range(1, 5001):
            progress.step({"step": step, "loss": 1.0, "tokens_per_s": 1.0})
    assert len(text(console)) <= 3
    assert text(console)[-1].startswith("step 5000/5000")


def test_quiet_says_nothing():
    console = plain()
    with Progress(2, console, quiet=True) as progress:
        progress.status("compiling")
        progress.step({"step": 2, "loss": 1.0})
        progress.event("saved step 2")
    with preparation(console, quiet=True) as prepare:
        prepare(1, 1, "reading")
    assert text(console) == []


def test_status_and_events_stay_as_lines_and_markup_is_not_read():
    console = plain()
    with Progress(2, console) as progress:
        progress.status("compiling")
        progress.status("compiling", 3.25)
        progress.event("saved [bold]step[/bold] 2")
    assert text(console) == ["compiling ...", "compiling: 3.2 s", "saved [bold]step[/bold] 2"]


def test_on_a_terminal_the_line_is_live_and_the_last_state_stays():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Progress(2, console) as progress:
        progress.step({"step": 2, "loss": 1.0})
    assert text(console)[-1].endswith("step 2/2  loss 1.0000")


def test_preparation_prints_its_beginning_and_its_end():
    console = plain()
    with preparation(console) as progress:
        for done in range(101):
            progress(done, 100, "tokenizing")
        progress(7, None, "hashing")
    assert text(console) == ["tokenizing  0/100  0 %", "tokenizing  100/100  100 %", "hashing  7"]


def test_an_ascii_terminal_does_not_stop_the_run():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress(3, Console(file=stream, force_terminal=True, width=100)) as progress:
        progress.step({"step": 1, "loss": 1.0})
        progress.event("gespeichert: Schrïtt")


@pytest.mark.parametrize("terminal", [False, True])
def test_training_goes_on_when_its_watcher_is_gone(terminal, tmp_path):
    code = """
    from aurora_train.record.progress import Progress
    with Progress(3) as progress:
        for step in (1, 2, 3):
            progress.event("line")
            progress.step({"step": step, "loss": 1.0})
    print("done")
    """
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    if terminal:
        environment["FORCE_COLOR"] = "1"
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, stderr=write_end, stdout=subprocess.PIPE, env=environment)
    os.close(write_end)
    assert done.stdout == b"done\n"


def test_a_rate_counts_only_what_was_done_between_two_log_points():
    clock = Clock()
    rate = Throughput(flops_per_token=2.0, peak_flops=1000.0, step_flops=300.0, clock=clock)
    assert rate.measure()["tokens_per_s"] is None
    clock.now = 30.0  # compiling
    rate.begin()
    rate.count(100)
    rate.waited(0.5)
    clock.now = 32.0
    assert rate.measure() == {"tokens_per_s": 50.0, "mfu": 0.1, "hfu": 0.15, "data_wait": 0.25, "seconds": 2.0}
    rate.count(100)
    with rate.excluding():
        clock.now = 42.0
    clock.now = 43.0
    assert rate.measure()["tokens_per_s"] == 100.0


def test_mfu_is_not_a_number_where_the_peak_is_unknown():
    clock = Clock()
    rate = Throughput(flops_per_token=2.0, peak_flops=None, clock=clock)
    rate.begin()
    rate.count(10)
    clock.now = 1.0
    found = rate.measure()
    assert found["mfu"] is None and found["hfu"] is None


def test_time_left_follows_a_change_of_speed_and_is_unknown_at_first():
    clock = Clock()
    left = TimeLeft(1000, memory_s=20.0, clock=clock)
    left.update(0)
    assert left.seconds() is None
    for step in range(1, 101):
        clock.now = float(step)
        left.update(step)
    assert left.seconds() == pytest.approx(900)
    for step in range(101, 201):
        clock.now += 2.0
        left.update(step)
    assert left.seconds() == pytest.approx(1600, rel=0.01)


def test_numbers_read_as_a_person_writes_them():
    assert [count(v) for v in (0, 999, 1000, 12345, 1.5e9, None)] == ["0", "999", "1.00k", "12.3k", "1.50G", "n/a"]
    assert [size(v) for v in (12, 1.3e9)] == ["12 B", "1.30 GB"]
    assert [percent(v) for v in (0, 0.013, 0.5, None)] == ["0 %", "1.3 %", "50 %", "n/a"]
    assert [duration(v) for v in (0.25, 9.96, 75, 7260, 90000, None)] == [
        "0.25 s", "10.0 s", "1 min 15 s", "2 h 01 min", "1 d 1 h", "n/a",
    ]  # fmt: skip
