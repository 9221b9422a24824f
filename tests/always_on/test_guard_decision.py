"""When the guard asks a run to stop: the decision, on what Linux says of memory, written down as files.

`tests/faults/test_guard.py` lets real memory run out under real runs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aurora_train.always_on.guard import LOW_MEMORY, Guard, falling

MIB, GIB = 2**20, 2**30
HIDDEN = "memory of no process here (a GPU's, another container's, the kernel's)"


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
    why = guard.asked(3, lambda: None)  # a third reading may be old enough for a rate at which memory falls
    assert re.search(r"537 MB of 68.7 GB left within a step(, falling by .* a second)?, but 1.37 GB are needed", why)


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
