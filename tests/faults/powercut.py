"""A disk of our own under a real program: a FUSE file system over the disk of `disk_model.py`, which logs every change.

    python tests/faults/powercut.py FOLDER LOG [PATH:COUNT]      # serves a disk at FOLDER until it is unmounted
"""

from __future__ import annotations

import errno
import os
import pickle
import shlex
import stat
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from disk_model import ROOT, Disk, Folder, read_log
from kit import can_mount


def why_not() -> str | None:
    """Why no such disk can be had here, or None where it can."""
    if not os.path.exists("/dev/fuse"):
        return "needs /dev/fuse"
    if not can_mount():
        return "needs the right to mount a disk"
    probe = subprocess.run([sys.executable, "-c", "import mfusepy"], capture_output=True, text=True)
    if probe.returncode:
        return f"needs mfusepy and libfuse ({probe.stderr.strip().splitlines()[-1]})"
    return None


def on_such_a_disk(command: list, folder: Path, environment: dict | None = None, failing: str = "") -> list[tuple]:
    """Run a command in `folder` with such a disk at `folder`/disk; the log. AssertionError where it fails.

    `failing`: "*/name:3" lets the third fsync of files of such a path fail, once, as of a disk that had an error. The
    mount is seen by this command alone, and is gone with it.
    """
    (folder / "disk").mkdir()
    serve = shlex.join([sys.executable, __file__, "disk", "operations.log", failing])
    script = f"""{serve} 2> server.txt &
server=$!
until grep -q ' {folder}/disk fuse' /proc/mounts; do
  kill -0 $server || {{ cat server.txt >&2; exit 99; }}
  sleep 0.05
done
{shlex.join(map(str, command))}
status=$?
umount disk && wait $server || exit 98
exit $status"""
    search = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=folder, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL, env={**(environment or os.environ), "PYTHONPATH": search},
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout[-1000:], done.stderr[-3000:])
    return read_log(folder / "operations.log")


class Operations:
    """What mfusepy calls. One thread; a file handle is the node's number."""

    use_ns = True

    def __init__(self, log, failing: str = ""):
        self.disk, self._log = Disk(), log
        self._failing, _, left = failing.partition(":")
        self._left = int(left or 0)
        self._number, self._began = ROOT, time.time_ns()
        self._changed: dict[int, int] = {}
        # libfuse renames a file that is unlinked while it is open. For the disk its name is gone all the same.
        self._unlinked: dict[str, int] = {}

    def _do(self, *operation) -> None:
        self.disk.apply(operation)
        pickle.dump(operation, self._log)

    def _at(self, path: str) -> int:
        node = self._unlinked.get(path) or self.disk.find(path)
        if node is None:
            raise OSError(errno.ENOENT, path)
        return node

    def _place(self, path: str) -> tuple[int, str]:
        head, _, name = path.rpartition("/")
        return self._at(head or "/"), name

    def _made(self, word: str, path: str) -> int:
        self._number += 1
        self._do(word, *self._place(path), self._number)
        self._changed[self._number] = time.time_ns()
        return self._number

    def getattr(self, path, fh=None):
        node = self._at(path) if fh is None else fh
        found, changed = self.disk.nodes[node], self._changed.get(node, self._began)
        is_folder = isinstance(found, Folder)
        return {
            "st_mode": stat.S_IFDIR | 0o755 if is_folder else stat.S_IFREG | 0o644, "st_nlink": 2 if is_folder else 1,
            "st_size": 0 if is_folder else len(found.now), "st_uid": os.getuid(), "st_gid": os.getgid(),
            "st_mtime": changed, "st_ctime": changed, "st_atime": changed,
        }  # fmt: skip

    def create(self, path, mode, flags=None):
        return self._made("create", path)

    def mkdir(self, path, mode):
        self._made("mkdir", path)

    def open(self, path, flags):
        node = self._at(path)
        if flags & os.O_TRUNC:
            self._do("truncate", node, 0)
        return node

    def opendir(self, path):
        return self._at(path)

    def readdir(self, path, fh):
        return [".", "..", *self.disk.nodes[fh].now]

    def read(self, path, size, offset, fh):
        return bytes(self.disk.nodes[fh].now[offset : offset + size])

    def write(self, path, data, offset, fh):
        self._do("write", fh, offset, bytes(data))
        self._changed[fh] = time.time_ns()
        return len(data)

    def truncate(self, path, length, fh=None):
        self._do("truncate", self._at(path) if fh is None else fh, length)

    def unlink(self, path):
        if self._unlinked.pop(path, None) is None:
            self._do("unlink", *self._place(path))

    def rmdir(self, path):
        if self.disk.nodes[self._at(path)].now:
            raise OSError(errno.ENOTEMPTY, path)
        self._do("unlink", *self._place(path))

    def rename(self, old, new):
        if PurePosixPath(new).name.startswith(".fuse_hidden"):
            self._unlinked[new] = self._at(old)
            return self.unlink(old)
        there = self.disk.find(new)
        if there is not None and isinstance(self.disk.nodes[there], Folder) and self.disk.nodes[there].now:
            raise OSError(errno.ENOTEMPTY, new)
        self._do("rename", *self._place(old), *self._place(new))

    def fsync(self, path, datasync, fh):
        if self._left and fnmatch(path, self._failing):
            self._left -= 1
            if not self._left:
                self._do("fsync_failed", fh)
                raise OSError(errno.EIO, path)
        self._do("fsync", fh)

    def fsyncdir(self, path, datasync, fh):
        self._do("fsyncdir", fh)

    def statfs(self, path):
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 1 << 22, "f_bfree": 1 << 21, "f_bavail": 1 << 21}

    def chmod(self, path, mode):
        return 0

    def utimens(self, path, times=None):
        return 0

    def destroy(self, path):
        self._log.flush()


def serve(folder: str, log: str, failing: str = "") -> None:
    """Mount a disk at `folder` and answer for it until it is unmounted. `failing`: see `on_such_a_disk`."""
    from mfusepy import FUSE

    with open(log, "wb") as handle:
        FUSE(Operations(handle, failing), folder, foreground=True, nothreads=True, fsname="powercut")


if __name__ == "__main__":
    serve(*sys.argv[1:])
