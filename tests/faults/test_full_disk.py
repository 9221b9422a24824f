"""A disk that fills loses no step that was saved, and does not end a run that could still save later."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import toy
from kit import Aurora, can_mount, events, final_hash, losses

from aurora_train.checkpoint import durable
from aurora_train.train.saving import EXIT_UNSAVED

pytestmark = pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small disk")
WIDE = ("model.width=64", "checkpoint.keep=100", "train.steps=120", "evaluate.every=60")  # 0.9 MB a checkpoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shared_cache):
    folder = tmp_path_factory.mktemp("undisturbed")
    Aurora(folder, shared_cache).good("train", toy.write(folder), *WIDE, "--run", folder / "run", "--quiet")
    return folder / "run"


def on_a_small_disk(tmp_path, cache, size: str, *settings, filler: str = "0", then: str = ""):
    """Train on a tmpfs of its own; `filler` bytes of another file come when it compiles. The rest ends in `kept`."""
    config, aurora = toy.write(tmp_path), Aurora(tmp_path, cache)
    (tmp_path / "disk").mkdir()
    command = " ".join(f"'{part}'" for part in aurora.command("train", config, *WIDE, *settings, "--run", "disk/run"))
    script = f"""mount -t tmpfs -o size={size} tmpfs disk || exit 99
(while [ ! -e disk/run/events.jsonl ]; do sleep 0.02; done; head -c {filler} /dev/zero > disk/filler) &
{then}
{command}
status=$?
rm -f disk/filler
cp -r disk kept
exit $status"""
    return subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script], cwd=tmp_path, env=aurora.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def whole_checkpoints(run) -> list[int]:
    sealed = [p for p in (run / "checkpoints").iterdir() if p.name.isdigit() and durable.is_sealed(p)]
    assert all(durable.faults(path) == [] for path in sealed)
    return sorted(int(path.name) for path in sealed)


def test_older_rolling_checkpoints_make_room_and_the_run_ends_in_the_same_bits(undisturbed, tmp_path, shared_cache):
    process = on_a_small_disk(tmp_path, shared_cache, "6m")
    _, err = process.communicate(timeout=300)
    run = tmp_path / "kept" / "run"
    assert process.returncode == 0, err[-3000:]
    assert "the disk is full: gave up the rolling checkpoints" in err and "Traceback" not in err
    assert events(run, "room") and final_hash(run) == final_hash(undisturbed)
    assert whole_checkpoints(run)[-1] == 120 and [s for s, _ in losses(run)] == list(range(1, 121))


@pytest.mark.slow
def test_a_disk_without_room_is_waited_for_and_the_next_save_commits(undisturbed, tmp_path, shared_cache):
    freed = "(while [ ! -e free ]; do sleep 0.1; done; rm -f disk/filler) &"
    settings = {"filler": "5400000", "then": freed}
    process = on_a_small_disk(tmp_path, shared_cache, "6m", "checkpoint.patience_minutes=5", **settings)
    deadline = time.monotonic() + 120
    lines = []
    while time.monotonic() < deadline and not any("cannot save" in line for line in lines):
        lines.append(process.stderr.readline())
    assert any("cannot save" in line for line in lines), lines
    time.sleep(2)
    (tmp_path / "free").touch()
    _, err = process.communicate(timeout=300)
    run = tmp_path / "kept" / "run"
    assert process.returncode == 0, err[-3000:]
    assert events(run, "save_failed") and "again" in err and "NOT SAVED" in "".join(lines) + err
    assert final_hash(run) == final_hash(undisturbed) and whole_checkpoints(run)[-1] == 120


@pytest.mark.parametrize(
    "how", [pytest.param("patience", marks=pytest.mark.slow), pytest.param("SIGTERM", marks=pytest.mark.release)]
)
def test_a_run_that_can_save_nothing_stops_with_its_own_status(how, tmp_path, shared_cache):
    patience = "0.05" if how == "patience" else "60"
    process = on_a_small_disk(tmp_path, shared_cache, "6m", f"checkpoint.patience_minutes={patience}", filler="5400000")
    if how == "SIGTERM":
        while "cannot save" not in (line := process.stderr.readline()):
            assert line, "it ended before a save failed"
        time.sleep(1)
        trainer = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "aurora_train.cli.main train"],
                                 capture_output=True, text=True).stdout.split()  # fmt: skip
        for pid in trainer:
            if "unshare" not in (cmd := open(f"/proc/{pid}/cmdline").read()) and not cmd.startswith("sh"):
                os.kill(int(pid), signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == EXIT_UNSAVED, (out, err[-3000:])
    assert "a disk that cannot be written" in out and "Traceback" not in err
    assert events(tmp_path / "kept" / "run", "save_failed")
