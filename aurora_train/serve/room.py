"""Whether a server fits beside the runs that train on this device now: by their plans, which say what they will hold at
their peak, and not by what is free at this moment."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import psutil

from aurora_train.config import parse_bytes
from aurora_train.errors import UserError
from aurora_train.files import read_json
from aurora_train.machine.memory import most_for_a_run
from aurora_train.run import Run
from aurora_train.units import size


class Held(NamedTuple):
    """A run that is training here, and the bytes that its plan says it holds on this device at its peak."""

    folder: Path
    bytes: int


def training_here(machine) -> list[Held]:
    """The runs that processes of this machine train on the device of `machine`, a `machine.profile.Machine`.

    A run is known by its lock, which its process holds open; processes of other users are not seen.
    """
    folders = set()
    for process in psutil.process_iter():
        if process.pid != os.getpid():
            with contextlib.suppress(psutil.Error, OSError):
                folders |= {Path(one.path).parent for one in process.open_files() if one.path.endswith("/.lock")}
    return [held for folder in sorted(folders) if (held := _held(Run(folder), machine)) is not None]


def _held(run: Run, machine) -> Held | None:
    if not run.config.is_file() or not run.is_held():
        return None
    plan = read_json(run.plan, {})
    planned = plan.get("compiled_bytes") or plan.get("predicted_bytes")
    if not planned or plan.get("platform") != machine.platform:
        return None
    devices = 1
    if machine.device_memory_bytes is None or machine.unified:  # its devices share one memory
        devices = ((read_json(run.provenance, {}) or {}).get("machine") or {}).get("device_count") or 1
    return Held(run.folder, int(planned) * devices)


def allowed_bytes(asked: str | None) -> int | None:
    """The bytes of `--memory`, such as "8GB"; None without it. UserError if it is no amount."""
    try:
        return None if asked is None else parse_bytes(asked)
    except ValueError as error:
        raise UserError(str(error), where=f"--memory {asked}") from None


def refuse_without(needed: int, asked: str | None, machine) -> None:
    """UserError if a server of `needed` bytes exceeds what `--memory` allows it, or if that, or else what it needs, has
    no room beside the runs that train here.

    Args:
        asked: the amount of `--memory`, such as "8GB"; None: as much as is needed.
        machine: the `machine.profile.Machine`.
    """
    allowed = needed if asked is None else allowed_bytes(asked)
    smaller = "fewer --slots, a shorter --length, or --weights int8"
    if needed > allowed:
        raise UserError(f"the server needs {size(needed)}, and may take {size(allowed)}", where=f"--memory {asked}",
                        why="its weights and the caches of all its slots are allocated at the start", hint=smaller)
    apart = machine.device_memory_bytes is not None and not machine.unified
    whole = machine.device_memory_bytes if apart else most_for_a_run(machine.memory)
    runs = training_here(machine)
    room = whole - sum(held.bytes for held in runs)
    if allowed <= room:
        return
    plans = "; ".join(f"{held.folder.name} is training, and its plan holds {size(held.bytes)}" for held in runs)
    raise UserError(
        f"there is no room for {size(allowed)}: {size(max(room, 0))} of {size(whole)} are left on this device",
        where="--memory" if asked is None else f"--memory {asked}", why=plans or None,
        hint=f"{smaller}; or wait for the run" if runs else smaller,
    )  # fmt: skip
