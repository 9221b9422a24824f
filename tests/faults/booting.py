"""A machine to switch off: a real systemd as process 1 of namespaces of its own, on a disk that outlives it.

The disk is this machine's own root under an overlay: what is written inside lands in `disk`, is there at the next boot,
and nothing is written outside. A power cut is a kill -9 of process 1: the kernel then kills every process inside at
once. What it cannot show is what a disk loses that was not yet written out.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import aurora_train

SYSTEMD = next((path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.path.exists(path)), None)
USER, UID = "trainer", 4321

# In namespaces of its own: (folder). A cgroup of its own is the root of what systemd will see and manage.
_ENTER = """
mount --make-rprivate / && mkdir -p "$1/groups" "$1/root" "$1/disk" "$1/scratch" || exit 90
mount -t cgroup2 cgroup2 "$1/groups" || exit 91
group="$1/groups$(sed -n s/^0:://p /proc/self/cgroup)/aurora-test-$$"
mkdir "$group" && echo 0 > "$group/cgroup.procs" || exit 92
echo "$group" > "$1/group"
exec unshare --pid --fork --kill-child=KILL --mount --ipc --uts --net --cgroup sh -c "$2" boot "$1" "$3"
"""

# Real kernel settings and real devices stay out of reach: /proc/sys and /sys are read-only, /dev holds the harmless.
_BOOT = """
cd "$1" && mount -t overlay overlay -o "lowerdir=/,upperdir=$1/disk,workdir=$1/scratch" root || exit 93
mount -t proc proc root/proc && mount --bind root/proc/sys root/proc/sys || exit 94
mount -o remount,bind,ro root/proc/sys && mount -t sysfs -o ro sysfs root/sys || exit 95
mount -t tmpfs -o mode=755 tmpfs root/run || exit 96
mount -t cgroup2 cgroup2 root/sys/fs/cgroup || exit 97
mount -t tmpfs -o mode=755 tmpfs root/dev && mkdir root/dev/pts root/dev/shm || exit 98
mount -t tmpfs -o mode=1777 tmpfs root/dev/shm && mount -t devpts -o newinstance,ptmxmode=666 devpts root/dev/pts
ln -s pts/ptmx root/dev/ptmx && ln -s /proc/self/fd root/dev/fd
for name in null zero full random urandom tty; do
    touch "root/dev/$name" && mount --bind "/dev/$name" "root/dev/$name" || exit 89
done
hostname desk
cd root && pivot_root . mnt && umount -l /mnt || exit 99
exec env -i container=test PATH="$PATH" "$2" --unit=multi-user.target --show-status=no --log-target=journal
"""

# Of systemd's own: consoles, clocks and devices. What else this machine starts is found in /etc.
_MASKED = (
    "getty.target", "console-getty.service", "systemd-timesyncd.service", "systemd-networkd.service",
    "systemd-networkd.socket", "systemd-resolved.service", "systemd-udevd.service", "systemd-udev-trigger.service",
    "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-binfmt.service", "modprobe@.service",
)  # fmt: skip


def _not_needed() -> set[str]:
    """Units that a desk machine in a test has no use for."""
    wanted = Path("/etc/systemd/system").glob("*.target.wants/*")
    return {*_MASKED, *(link.name for link in wanted)} - {"remote-fs.target"}


class Machine:
    """A machine whose disk is `folder`/disk. Boots, takes commands, loses power."""

    def __init__(self, folder: Path):
        self.folder, self.disk = folder, folder / "disk"
        self.process: subprocess.Popen | None = None
        self._init: int | None = None

    def on_disk(self, path: str) -> Path:
        """Where a file that was written inside lies outside."""
        return self.disk / path.lstrip("/")

    def boot(self, timeout: float = 60) -> None:
        """Switch on, and wait until systemd says that everything it should start is started."""
        # The last: /tmp is not emptied at boot, this package may be a checkout there.
        for name in (*(f"systemd/system/{name}" for name in _not_needed()), "tmpfiles.d/tmp.conf"):
            link = self.on_disk(f"/etc/{name}")
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to("/dev/null")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", _ENTER, "enter", str(self.folder), _BOOT, SYSTEMD],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise OSError(f"ended with {self.process.returncode}: {self.process.stderr.read()[-500:]}")
            self._init = self._first_child()
            state = self._init and self.inside("systemctl", "is-system-running", check=False).stdout.strip()
            if state in ("running", "degraded"):
                return
            time.sleep(0.1)
        self.cut_power()
        raise OSError(f"did not come up in {timeout} s")

    def _first_child(self) -> int | None:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None

    def shut_down(self, timeout: float = 60) -> None:
        """Switch off in an orderly way: systemd stops what runs, and waits for it."""
        self.inside("systemctl", "poweroff")
        self.process.wait(timeout)
        self.cut_power()

    def cut_power(self) -> None:
        """Kill everything inside at once; returns when nothing of it is left."""
        if self.process is None:
            return
        if self._init and self.process.poll() is None:
            os.kill(self._init, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.process = self._init = None
        self._forget_groups()

    def _forget_groups(self) -> None:
        """Remove the empty cgroups that it leaves; they can be seen from a mount of our own alone."""
        script = """mount -t cgroup2 cgroup2 "$1/groups" && group=$(cat "$1/group") && for turn in 1 2 3 4 5 6 7 8 9; do
        find "$group" -depth -type d -exec rmdir {} + 2> /dev/null && break; sleep 0.1; done"""
        subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", str(self.folder)], check=False)

    def inside(self, *command: str, check: bool = True, user: bool = False, **options) -> subprocess.CompletedProcess:
        """Run a command in the machine, as root or as its user with the user's systemd at hand."""
        environment = [f"PATH={os.environ['PATH']}"]
        if user:
            environment += [f"HOME=/home/{USER}", f"XDG_RUNTIME_DIR=/run/user/{UID}", f"USER={USER}"]
        prefix = ["nsenter", "--target", str(self._init), "--all", "env", "-i", *environment]
        as_user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--init-groups"] if user else []
        return subprocess.run(
            [*prefix, *as_user, *command], check=check, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            timeout=120, **options,
        )  # fmt: skip

    def add_user(self) -> None:
        """A user who is not root, who may read this Python and this package."""
        self.inside("useradd", "--uid", str(UID), "--create-home", "--shell", "/bin/sh", USER)
        for file in (sys.executable, os.path.realpath(sys.executable), aurora_train.__file__):
            self.inside("chmod", "a+x", *map(str, Path(file).parents))


def why_not() -> str | None:
    """What keeps such a machine from being booted here, or None."""
    tools = [name for name in ("unshare", "nsenter", "setpriv", "useradd", "systemctl") if not shutil.which(name)]
    if SYSTEMD is None or tools:
        return "no systemd is installed here" if SYSTEMD is None else f"no {', '.join(tools)} here"
    return "needs the right to make namespaces and mounts (root)" if os.geteuid() else None
