"""What a run lacks is said before it is trained for: no step is taken, nothing is changed, exit status 2."""

from __future__ import annotations

import subprocess

import pytest
import toy
from kit import Aurora, can_mount, events

WIDE = ("model.width=64", "train.steps=120")  # 0.9 MB a checkpoint
ON_A_FULL_DISK = "mount -t tmpfs -o size=6m tmpfs disk && head -c 5400000 /dev/zero > disk/filler"
READ_ONLY = "mount --bind run/checkpoints run/checkpoints && mount -o remount,ro,bind run/checkpoints"

mounting = pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small disk")


@pytest.fixture
def aurora(tmp_path, shared_cache):
    toy.write(tmp_path)
    return Aurora(tmp_path, shared_cache)


def assert_refused(done: subprocess.CompletedProcess, *said: str) -> None:
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "compiling" not in done.stderr
    assert all(text in done.stderr for text in said), done.stderr


@mounting
def test_a_disk_without_room_for_one_checkpoint_is_refused_before_anything_is_compiled(aurora):
    (aurora.folder / "disk").mkdir()
    done = aurora.after(ON_A_FULL_DISK, "train", "toy.yaml", *WIDE, "--run", "disk/run")
    assert_refused(done, "no room for a checkpoint", "are free", "disk/run")


@pytest.mark.slow
@pytest.mark.permissions
def test_checkpoints_that_cannot_be_written_are_found_before_the_run_goes_on(aurora):
    stop = {"TOY_SIGNAL": "take:13:SIGTERM"}
    stopped = aurora("train", "toy.yaml", "--run", "run", "--quiet", environment=stop)
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    folder = aurora.folder / "run" / "checkpoints"
    before = (aurora.folder / "run" / "events.jsonl").read_bytes()
    folder.chmod(0o555)
    try:
        (folder / "probe").touch()
        (folder / "probe").unlink()
    except PermissionError:
        done = aurora("resume", "run")
    else:  # root obeys no mode, but a mount
        if not can_mount():
            pytest.skip("root obeys no mode, and may not mount here")
        done = aurora.after(READ_ONLY, "resume", "run")
    finally:
        folder.chmod(0o755)
    assert_refused(done, "cannot write the run folder", "run/checkpoints")
    assert (aurora.folder / "run" / "events.jsonl").read_bytes() == before
    aurora.good("resume", "run", "--quiet")
    assert events(aurora.folder / "run", "finish")


def test_a_budget_that_no_plan_fits_is_refused_before_anything_is_compiled(aurora):
    done = aurora("train", "toy.yaml", "memory.budget=10kB", "--run", "run")
    assert_refused(done, "memory")
    assert not (aurora.folder / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_lock_file_that_names_a_living_process_holds_nobody_up(aurora):
    """The kernel's lock counts, which dies with its holder; the text in the file is for people."""
    (aurora.folder / "run").mkdir()
    (aurora.folder / "run" / ".lock").write_text("process 1 on somewhere, and a longer line than ours is")
    done = aurora.good("train", "toy.yaml", "train.steps=2", "evaluate.final=false", "--run", "run", "--quiet")
    assert "being trained" not in done.stderr and events(aurora.folder / "run", "finish")
    assert "somewhere" not in (aurora.folder / "run" / ".lock").read_text()


@pytest.mark.slow
def test_of_trainers_that_start_at_once_one_trains_and_the_others_say_why(aurora):
    command = ["train", "toy.yaml", "train.steps=500", "evaluate.every=null", "--run", "run", "--quiet"]
    racing = [aurora.start(*command) for _ in range(3)]
    told = [(process.communicate(timeout=240)[1], process.returncode) for process in racing]
    assert sorted(status for _, status in told) == [0, 2, 2], told
    (winner,) = (process for process in racing if process.returncode == 0)
    assert all(f"process {winner.pid}" in err for err, status in told if status == 2)
    assert len(events(aurora.folder / "run", "start")) == len(events(aurora.folder / "run", "finish")) == 1
