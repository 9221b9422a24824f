"""A clock that is set back, between two lives of a run or in the middle of one, changes nothing but times on record."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import toy
from kit import Aurora, events, final_hash, losses, records

from aurora_train.checkpoint import durable

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
DAYS_S = 3 * 86400.0
MANY = ("train.steps=1500", "checkpoint.every=100", "checkpoint.keep=4", "evaluate.every=500", "log.every=50")

pytestmark = pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")


def with_clock(aurora: Aurora, **settings: str) -> dict[str, str]:
    """An environment whose wall clock is another one; monotonic clocks keep theirs, as where a clock is set."""
    real = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    return {**aurora.environment(), "LD_PRELOAD": str(FAKETIME), **real, **settings}


def checkpoints(run: Path) -> list[int]:
    found = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert all(durable.faults(run / "checkpoints" / str(step)) == [] for step in found)
    return found


def assert_sane(run: Path, undisturbed: Path) -> None:
    """The same steps, bits and kept checkpoints; no rate, wait or duration below zero."""
    assert losses(run) == losses(undisturbed) and final_hash(run) == final_hash(undisturbed)
    assert checkpoints(run) == checkpoints(undisturbed)
    told = [record for record in records(run) if "tokens_per_s" in record]
    assert told
    for record in told:
        assert all(record[key] is None or record[key] >= 0 for key in ("tokens_per_s", "mfu", "data_wait", "seconds"))
        assert record["seconds"] < 600, "a jump of the clock is no time that was trained for"
    saved = [event["step"] for event in events(run, "save")]
    assert saved == sorted(set(saved)), "in the order of steps"


@pytest.mark.release
def test_a_run_killed_and_resumed_three_days_earlier_says_so_and_ends_in_the_same_bits(tmp_path, shared_cache):
    aurora, config = Aurora(tmp_path, shared_cache), toy.write(tmp_path)
    aurora.good("train", config, "--run", "whole", "log.every=5", "--quiet")
    kill = {"TOY_SIGNAL": "take:27:SIGKILL"}
    killed = aurora("train", config, "--run", "cut", "log.every=5", "--quiet", environment=kill)
    assert killed.returncode == -9, killed.stderr[-2000:]
    before = time.time()
    resumed = subprocess.run(
        aurora.command("resume", "cut"), cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=with_clock(aurora, FAKETIME="-3d"),
    )  # fmt: skip
    assert resumed.returncode == 0 and "Traceback" not in resumed.stderr, resumed.stderr[-2000:]
    assert "before this run's newest record" in resumed.stderr
    assert not any(" -" in line and "left" in line for line in resumed.stderr.splitlines())
    (event,) = events(tmp_path / "cut", "clock")
    assert DAYS_S - (time.time() - before) - 60 < event["behind_seconds"] <= DAYS_S
    (finish,) = events(tmp_path / "cut", "finish")
    assert finish["time"] < events(tmp_path / "cut", "start")[0]["time"], "the clock was another one in truth"
    assert_sane(tmp_path / "cut", tmp_path / "whole")
    assert not events(tmp_path / "whole", "clock")


@pytest.mark.release
def test_a_clock_that_jumps_while_a_run_trains_confuses_neither_deadline_nor_watchdog(tmp_path, shared_cache):
    aurora, config = Aurora(tmp_path, shared_cache), toy.write(tmp_path)
    aurora.good("train", config, "--run", "whole", *MANY, "--quiet")
    clock = tmp_path / "clock"

    def life(*arguments, jumps):
        """One process; the clock jumps when the log has grown. Its exit status."""
        clock.write_text("+0d\n")
        process = subprocess.Popen(
            aurora.command(*arguments, "--quiet"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, env=with_clock(aurora, FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_CACHE_DURATION="1"),
        )  # fmt: skip
        log = tmp_path / "cut" / "metrics.jsonl"
        for jump in jumps:
            size, until = log.stat().st_size if log.exists() else 0, time.monotonic() + 120
            while process.poll() is None and time.monotonic() < until:
                if log.exists() and log.stat().st_size > size + 2000:
                    break
                time.sleep(0.002)
            assert process.poll() is None, "it ended before the clock jumped"
            clock.write_text(jump + "\n")
            time.sleep(2.5)  # it is looked at once a second
        _, err = process.communicate(timeout=240)
        assert "Traceback" not in err, err[-2000:]
        return process.returncode

    # Set back three days, 3.6 seconds must still come to an end.
    first = life("train", config, "--run", "cut", *MANY, "train.stop_after_minutes=0.06", jumps=["-3d"])
    assert first == 75
    (stop,), (start,) = events(tmp_path / "cut", "stop"), events(tmp_path / "cut", "start")
    assert stop["time"] < start["time"] and stop["by"] == "train.stop_after_minutes"
    # Set forth and back, five minutes and a watchdog of two must not be over.
    again = ("train.stop_after_minutes=5", "train.watchdog=2")
    assert life("resume", "cut", *again, jumps=["+3d", "-3d"]) == 0
    ahead = [record["time"] - time.time() for record in records(tmp_path / "cut") if "time" in record]
    assert max(ahead) > DAYS_S / 2 and ahead[-1] < -DAYS_S / 2, "the clock was another one in truth"
    assert_sane(tmp_path / "cut", tmp_path / "whole")
