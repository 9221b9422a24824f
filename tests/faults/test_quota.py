"""A quota that ends in the middle of a save: the system's EDQUOT, of a btrfs subvolume with a limit.

The disk itself says that it has room, so the save begins and is refused half-way, unlike on a full disk.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
import toy
from killing import assert_whole
from kit import Aurora, can_mount, events

WIDE = ("model.width=64", "checkpoint.keep=100", "train.steps=200", "evaluate.every=100")  # 0.9 MB a checkpoint
WITH_A_QUOTA = """truncate -s 128M image && mkfs.btrfs -q --mixed image || exit 99
mkdir disk && mount -o loop image disk || exit 99
btrfs -q subvolume create disk/run && btrfs -q quota enable disk && btrfs -q qgroup limit LIMIT disk/run || exit 99
if head -c 24M /dev/zero > disk/run/probe; then exit 99; fi 2>probe.txt
rm disk/run/probe; sync -f disk
MEANWHILE
TRAIN
status=$?
cp -r disk/run kept; exit $status"""

pytestmark = [
    pytest.mark.release,
    pytest.mark.skipif(not can_mount() or shutil.which("mkfs.btrfs") is None, reason="needs mkfs.btrfs and a mount"),
]


def under_a_quota(folder, limit: str, *settings, meanwhile: str = ""):
    config, aurora = toy.write(folder), Aurora(folder, folder / "cache")
    train = " ".join(f"'{part}'" for part in aurora.command("train", config, *WIDE, *settings, "--run", "disk/run"))
    script = WITH_A_QUOTA.replace("LIMIT", limit).replace("MEANWHILE", meanwhile).replace("TRAIN", train)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=folder, env=aurora.environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    if done.returncode == 99:
        pytest.skip(f"no btrfs with quotas can be mounted here: {done.stderr[-200:]}")
    assert "quota exceeded" in (folder / "probe.txt").read_text()
    return done


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    Aurora(folder, folder / "cache").good("train", toy.write(folder), *WIDE, "--run", folder / "run", "--quiet")
    return folder / "run"


def test_older_checkpoints_make_room_under_a_quota(undisturbed, tmp_path):
    done = under_a_quota(tmp_path, "8M")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gave up the rolling checkpoints" in done.stderr and "Traceback" not in done.stderr
    rooms = events(tmp_path / "kept", "room")
    assert rooms and any("quota" in event["why"] for event in rooms)
    assert_whole(tmp_path / "kept", undisturbed)


def test_a_quota_that_ends_and_is_raised_costs_no_step(undisturbed, tmp_path):
    """Nothing can be given up; the records wait in memory as well. The limit is raised once a save has failed."""
    raised = """(until [ -e disk/run/events.jsonl ]; do sleep 0.02; done
 btrfs -q qgroup limit 500K disk/run; touch narrow
 until [ -e wide ]; do sleep 0.05; done; btrfs -q qgroup limit 100M disk/run) &
(sleep 25; touch wide) &"""
    done = under_a_quota(tmp_path, "8M", "checkpoint.patience_minutes=5", meanwhile=raised)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot save" in done.stderr and "Disk quota exceeded" in done.stderr and "Traceback" not in done.stderr
    assert events(tmp_path / "kept", "save_failed")
    assert_whole(tmp_path / "kept", undisturbed)
