"""A disk that becomes read-only or fails while a run trains: no saved step is lost, and nothing dies of a log.

The kernel refuses `remount,ro` while a file is open for writing, which a trainer's logs are: below them a disk becomes
read-only by an error of its own. Checkpoints on a disk of their own can be remounted between two saves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import toy
from killing import assert_whole
from kit import Aurora, can_mount, events, records

from aurora_train.train.saving import EXIT_UNSAVED

LONG = ("train.steps=600", "checkpoint.every=20", "checkpoint.keep=3", "evaluate.every=100")

pytestmark = [pytest.mark.release, pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small disk")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    Aurora(folder, folder / "cache").good("train", toy.write(folder), *LONG, "--run", folder / "run", "--quiet")
    return folder / "run"


def run_script(aurora: Aurora, script: str) -> subprocess.Popen:
    """Shell lines in a mount namespace of their own; `$TRAIN` is the command, `at EVENT COUNT` waits for the log."""
    train = " ".join(f"'{part}'" for part in aurora.command("train", "toy.yaml", *LONG, "--run", "run"))
    resume = " ".join(f"'{part}'" for part in aurora.command("resume", "run", "checkpoint.patience_minutes=5"))
    head = f"""train() {{ {train} "$@"; }}
resume() {{ {resume} "$@"; }}
at() {{ until [ -e over ]; do
  [ -e run/events.jsonl ] && [ "$(grep -c "\\"event\\": \\"$1\\"" run/events.jsonl)" -ge "$2" ] && return
  sleep 0.01
done; exit 1; }}
"""
    return subprocess.Popen(
        ["unshare", "-m", "sh", "-c", head + script], cwd=aurora.folder, env=aurora.environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def trainer_of(script: subprocess.Popen) -> int:
    """The process that trains below a script."""
    found = subprocess.run(["pgrep", "-g", str(script.pid), "python"], capture_output=True, text=True).stdout.split()
    (pid,) = (int(pid) for pid in found if b"aurora_train" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return pid


@pytest.fixture
def aurora(tmp_path):
    toy.write(tmp_path)
    return Aurora(tmp_path, tmp_path / "cache")


def test_checkpoints_that_are_read_only_for_a_while_are_waited_for(undisturbed, aurora):
    """`mount -o remount,ro` of the checkpoints' own disk after the third save, and rw again after a save failed."""
    process = run_script(aurora, """TOY_SIGNAL=take:25:SIGTERM train >/dev/null
[ $? = 75 ] || exit 98
mv run/checkpoints before; mkdir run/checkpoints
mount -t tmpfs -o size=64m tmpfs run/checkpoints && cp -r before/. run/checkpoints || exit 99
(at save 3 && until mount -o remount,ro run/checkpoints 2>/dev/null; do [ -e over ] && exit 1; sleep 0.005; done
 at save_failed 1; sleep 0.2; mount -o remount,rw run/checkpoints) &
train checkpoint.patience_minutes=0.5; status=$?
touch over; wait
mkdir copy; cp -r run/checkpoints copy; umount run/checkpoints; cp -r copy/checkpoints run
exit $status""")
    out, err = process.communicate(timeout=200)
    run = aurora.folder / "run"
    assert process.returncode == 0, (out, err[-3000:])
    assert "Read-only file system" in err and "again" in err and "Traceback" not in err
    failed = events(run, "save_failed")
    assert failed and not events(run, "room"), "on a disk that cannot be written nothing is given up for room"
    assert_whole(run, undisturbed)


ON_A_FAILING_DISK = """truncate -s 64M image && mkfs.ext4 -q -F image && mkdir disk || exit 99
mount -o loop,errors=remount-ro image disk || exit 99
mkdir disk/run && ln -s disk/run run
fault=/sys/fs/ext4/$(basename "$(findmnt -no SOURCE disk)")/trigger_fs_error
[ -w "$fault" ] || exit 98
(at save 3; echo 1 > "$fault") &
train checkpoint.patience_minutes=PATIENCE; status=$?
touch over; wait
[ $status = 74 ] || exit $status
umount disk && { fsck.ext4 -p image >/dev/null; [ $? -le 1 ]; } && mount -o loop image disk || exit 97
cp run/metrics.jsonl before.jsonl
resume >/dev/null; status=$?
rm run; cp -r disk/run run; umount disk
[ $status = 0 ] && exit 74
exit $status"""


@pytest.mark.parametrize("how", ["patience", "SIGTERM"])
def test_a_disk_that_fails_under_everything_ends_in_status_74_and_the_mended_one_is_gone_on_from(
    how, undisturbed, aurora
):
    """A real ext4 whose error makes it read-only, logs and all; then `fsck`, and the same command."""
    process = run_script(aurora, ON_A_FAILING_DISK.replace("PATIENCE", "0.03" if how == "patience" else "60"))
    if how == "SIGTERM":
        lines = []
        while "cannot save" not in (line := process.stderr.readline()):
            assert line, lines
            lines.append(line)
        time.sleep(0.5)
        os.kill(trainer_of(process), signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    if process.returncode == 98:
        pytest.skip("this kernel's ext4 has no trigger_fs_error to write to")
    assert process.returncode == EXIT_UNSAVED, (process.returncode, out, err[-3000:])
    assert "Traceback" not in err and "a disk that cannot be written" in out
    run = aurora.folder / "run"
    (resumed,) = events(run, "resume")
    assert resumed["step"] >= 60, "the third save was whole before the disk failed"
    assert [record["step"] for record in records(run) if "loss" in record] == list(range(1, 601))
    assert_whole(run, undisturbed)


