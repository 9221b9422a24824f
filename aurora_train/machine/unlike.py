"""What the processes of one run must have in common, how each says it, and how a difference is reported.

A process says the facts as plain JSON before it imports jax: `facts_of`. Process 0 compares them: `fault_among`.
"""

from __future__ import annotations

import os
import time

import psutil

from aurora_train.errors import UserError

CLOCK_SECONDS = 30  # by which clocks may differ: records of one run would contradict each other
_NUMERIC = ("JAX_", "XLA_", "LIBTPU_")  # variables that may change what is computed
_OWN = ("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "JAX_COMPILATION_CACHE",
        "JAX_PERSISTENT_CACHE", "XLA_PYTHON_CLIENT")  # fmt: skip
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ENOUGH_BYTES = 64 << 20  # free in the folder for temporary files and in the cache


def facts_of(*, command: dict, config: dict, code: dict, versions: dict, folders: list) -> dict:
    """The facts of this process. UserError for what makes it unfit by itself: an interface, a full disk.

    `command`, `config`, `code`, `versions`: dicts that have to be equal; `folders`: which it writes besides the run.
    """
    _refuse_interfaces()
    for folder in folders:
        _refuse_full(folder)
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(_NUMERIC) and not name.startswith(_OWN)
    }
    return {
        "versions": versions, "code": code, "command": command, "config": config, "environment": variables,
        "clock": time.time(), "address": _chosen_address(),
    }  # fmt: skip


_HINTS = {
    "versions": ("versions", "install the same ones on every machine"),
    "code": ("code", "copy the same files to every machine"),
    "command": ("command", "start every process with the same one"),
    "config": ("config", "start every process with the same file and the same overrides"),
    "environment": ("environment variables", "set the same ones for every process"),
}


def fault_among(hellos: dict[int, dict]) -> dict | None:
    """The arguments of the UserError that all processes raise, if one differs from process 0; else None."""
    first = hellos[0]
    for index in sorted(hellos):
        other = hellos[index]
        for kind, (words, hint) in _HINTS.items():
            mine, theirs = first["facts"].get(kind, {}), other["facts"].get(kind, {})
            differ = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            if differ:
                said = "; ".join(f"{key}: {_shown(mine, key)} and {_shown(theirs, key)}" for key in differ[:4])
                more = f" (and {len(differ) - 4} more)" if len(differ) > 4 else ""
                both = f"process 0 ({first['host']}) and process {index} ({other['host']})"
                return {"what": f"{both} differ in their {words}", "where": "rendezvous",
                        "why": said + more, "hint": hint}  # fmt: skip
        ahead = other.get("clock_ahead", 0)
        if abs(ahead) > CLOCK_SECONDS:
            return {"what": f"the clock of process {index} ({other['host']}) is {abs(ahead):.0f} s "
                            f"{'ahead of' if ahead > 0 else 'behind'} that of process 0 ({first['host']})",
                    "where": "rendezvous", "why": f"they may differ by {CLOCK_SECONDS} s",
                    "hint": "timedatectl set-ntp true, on both"}  # fmt: skip
    return None


def flat(tree, prefix: str = "") -> dict:
    """A nested dict as one of dotted keys, so that a difference can be named."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {key: value for name, part in tree.items()
            for key, value in flat(part, f"{prefix}.{name}" if prefix else str(name)).items()}  # fmt: skip


def _shown(values: dict, key: str) -> str:
    text = str(values[key]) if key in values else "none"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_interfaces() -> None:
    """UserError if a variable names a network interface that this machine lacks. NCCL takes prefixes and `^`, `=`."""
    there = psutil.net_if_addrs()
    for variable in _INTERFACES:
        written = os.environ.get(variable, "")
        names = [name for name in written.lstrip("=").split(",") if name]
        fits = any(known == name or variable[0] == "N" and not written.startswith("=") and known.startswith(name)
                   for name in names for known in there)  # fmt: skip
        if names and not fits and not written.startswith("^"):
            raise UserError(f"there is no network interface `{written}` here", where=variable,
                            hint=f"interfaces here: {', '.join(sorted(there))}")  # fmt: skip


def _chosen_address() -> str | None:
    """The address of the interface that GLOO_SOCKET_IFNAME names, which jax itself does not read; None without it."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    if not name:
        return None
    found = [address.address for address in psutil.net_if_addrs()[name] if address.family.name == "AF_INET"]
    if not found:
        raise UserError(f"the network interface `{name}` has no IPv4 address", where="GLOO_SOCKET_IFNAME",
                        hint="`ip -br address` shows those that have one")  # fmt: skip
    return found[0]


def _refuse_full(folder) -> None:
    """UserError if a folder that every process writes (compiled programs, temporary files) has no room."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < _ENOUGH_BYTES:
        raise UserError(f"the disk is full: {free / 1e6:.0f} MB are free", where=folder,
                        why=f"every process needs {_ENOUGH_BYTES >> 20} MiB there",
                        hint="make room, or set AURORA_CACHE and TMPDIR to folders on another disk")  # fmt: skip
