"""Writes the systemd unit that keeps one run going on this machine; it needs no editing.

A unit starts with almost no environment and not in a folder of the user's. Therefore every path in it is absolute, and
the variables that training reads are copied from the shell that ran the command. This module decides which exit
statuses lead to another start; docs/always-on.md explains each.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

from aurora_train.files import read_json
from aurora_train.machine.memory import host_memory, most_for_a_run

# The user has to fix something (2), the finished run exceeds a limit of its config (4), or the disk has had no room for
# as long as the run may wait (74).
NOT_AGAIN = (2, 4, 74)
# The run was stopped by a signal and saved, which is not a failure. `systemctl stop` and a shutdown stay stopped
# whatever the unit says; anyone else who sends a signal (a guard against low memory, a stray `killall python`) has not
# decided that the run is over. SIGTERM itself is the status of a process that had not installed its handler yet.
STOPPED = 75
RESTART_SECONDS = 30
STARTS_A_DAY = 20
STOP_MINUTES = 10
# If memory runs out after all, the kernel should kill the run: it comes back, which the desktop and sshd do not. With
# this score the kernel adds half of all memory to the run's size, more than a browser asks for its tabs; systemd-oomd
# may kill it too (ManagedOOMPreference stays none). A user's systemd may raise this score, but never lower it.
OOM_SCORE = 500

_KEPT = re.compile(
    r"(AURORA|JAX|XLA|CUDA|NVIDIA|NCCL|OMP)_\w+|TF_CPP_\w+|TF_CUDNN_\w+|HF_HOME|PATH|PYTHONPATH|LD_LIBRARY_PATH"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|_KEY", re.IGNORECASE)
_LISTS = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")  # their values are lists of folders


def unit_name(run: Path) -> str:
    """`aurora-<name of the run folder>`, without the characters that systemd reserves."""
    return "aurora-" + re.sub(r"[^A-Za-z0-9:_.-]", "_", run.name)


def unit_text(
    run, *, system: bool, stop_minutes: int = STOP_MINUTES, on_failure: str | None = None, stays_stopped: bool = False
) -> str:
    """The unit of a run (a `run.Run`), as the text of a .service file.

    Args:
        system: for the machine's own systemd, as the owner of the run folder; otherwise for the user's.
        stop_minutes: how long systemd waits for the last save before it kills the run.
        on_failure: a unit that systemd starts when it gives up.
        stays_stopped: a run that stops itself (`train.stop_after_minutes`) is not started again until the next boot.
    """
    options = [] if stop_minutes == STOP_MINUTES else [f"--stop-minutes={stop_minutes}"]
    options += [f"--on-failure={on_failure}"] if on_failure else []
    name, variables = unit_name(run.folder), kept_environment(dict(os.environ), _is_on_gpu(run))
    go_on = (sys.executable, "-P", "-m", "aurora_train", "resume", str(run.folder))
    parts = [
        f"# {name}.service: continues a run at boot and after a crash, a hang or a power cut. See docs/always-on.md",
        *(f"#   {line}" for line in commands(run.folder, system, options) if "\n" not in line),
        "",
        "[Unit]",
        f"Description=aurora run {_plain(run.folder.name)}",
        # Wait for a disk that is mounted late: without it the folder would not be a run, which ends with status 2.
        f"RequiresMountsFor={_quoted(str(run.folder))} {_quoted(sys.executable)}",
        *(["After=nvidia-persistenced.service"] if system else []),
        f"StartLimitIntervalSec=1d\nStartLimitBurst={STARTS_A_DAY}",
        *([f"OnFailure={_plain(on_failure)}"] if on_failure else []),
        "",
        "[Service]",
        "Type=exec",
        *([f"User={_plain(_owner(run.folder))}"] if system else []),
        "WorkingDirectory=~",
        *(f"Environment={_quoted(f'{key}={value}')}" for key, value in sorted(variables.items())),
        "ExecStart=" + " ".join(map(_argument, go_on)),
        # What a kill leaves of a power cap or a clock lock (`energy.mode`); the dash: a failure of it changes nothing.
        "ExecStopPost=-" + " ".join(map(_argument, (*go_on[:4], "energy", "--restore"))),
        "Restart=on-failure",
        f"RestartSec={RESTART_SECONDS}",
        f"RestartPreventExitStatus={' '.join(map(str, NOT_AGAIN))}",
        *([] if stays_stopped else [f"RestartForceExitStatus={STOPPED} SIGTERM"]),
        f"SuccessExitStatus={STOPPED}",
        # Only the trainer gets the signal: its children are needed for the current step, and are killed after it ends.
        "KillMode=mixed\nKillSignal=SIGTERM",
        f"TimeoutStopSec={stop_minutes}min",
        # A leak ends the run instead of the machine; the guard sees this limit before it is reached.
        f"OOMScoreAdjust={OOM_SCORE}\nMemoryMax={most_for_a_run(host_memory()) >> 20}M",
        "",
        "[Install]",
        f"WantedBy={'multi-user.target' if system else 'default.target'}",
    ]
    return "\n".join(parts) + "\n"


def commands(run: Path, system: bool, options: list[str]) -> list[str]:
    """The commands that install the unit and start it now and at every boot. `options`: those of `aurora unit`."""
    name, asked = unit_name(run), shlex.join(["aurora", "unit", str(run), *options])
    if system:
        return [
            f"{asked} --system | sudo install -D -m 644 /dev/stdin /etc/systemd/system/{name}.service",
            f"sudo systemctl enable --now {name}",
        ]
    return [
        f"{asked} | install -D -m 644 /dev/stdin ~/.config/systemd/user/{name}.service",
        f"systemctl --user enable --now {name} && loginctl enable-linger",
    ]


def kept_environment(environment: dict[str, str], on_gpu: bool) -> dict[str, str]:
    """The variables of a shell that training reads, with absolute paths and without secrets."""
    kept = {k: v for k, v in environment.items() if v and _KEPT.fullmatch(k) and not _SECRET.search(k)}
    for name in kept.keys() & set(_LISTS):
        kept[name] = os.pathsep.join(os.path.abspath(folder) for folder in kept[name].split(os.pathsep) if folder)
    for name in kept.keys() & {"AURORA_CACHE", "AURORA_MACHINES"}:
        kept[name] = os.path.abspath(kept[name])
    if on_gpu:
        # At boot the driver may be late. Without this the run would continue on the processor, slowly, for days.
        kept.setdefault("JAX_PLATFORMS", "cuda,cpu")
    return kept


def _is_on_gpu(run) -> bool:
    return str((read_json(run.plan) or {}).get("device", "")).startswith("NVIDIA")


def _owner(folder: Path) -> str:
    """The name of a folder's owner, or the number if it has no name (in a container)."""
    try:
        return folder.owner()
    except KeyError:
        return str(folder.stat().st_uid)


def _plain(text: str) -> str:
    """A value that systemd reads to the end of the line."""
    return " ".join(text.replace("%", "%%").split())


def _quoted(text: str) -> str:
    """One word, for a list of words."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '"' + escaped.replace("%", "%%") + '"'


def _argument(text: str) -> str:
    """One argument of a command line, in which systemd would expand a dollar sign."""
    return _quoted(text.replace("$", "$$")) if re.search(r"[^\w./@:+=,-]", text) else text
