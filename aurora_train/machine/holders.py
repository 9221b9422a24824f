"""Which processes, caches and devices hold the machine's memory, and which of them grew."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from aurora_train.machine.memory import held_beside_processes, host_memory, processes_limited_with
from aurora_train.units import size

NOTHING_BYTES = 16 * 2**20  # less growth is not reported


@dataclass(frozen=True)
class Holders:
    """What holds memory after a step (None: before the first one), in bytes.

    `left` is available; `processes` is private memory by (id, name); `shared` belongs to several processes;
    `elsewhere` is the page cache and swap in use, which do not reduce what is available.
    """

    step: int | None
    left: int
    processes: dict[tuple[int, str], int]
    shared: int
    elsewhere: dict[str, int]

    @classmethod
    def now(cls, root: Path, step: int | None) -> Holders:
        """The holders on this machine, or in the cgroup whose limit this process shares."""
        among, processes = processes_limited_with(root), {}
        for process in psutil.process_iter(["name", "memory_info"]):
            held = process.info["memory_info"]
            if held is not None and (among is None or process.pid in among):
                processes[process.pid, process.info["name"]] = held.rss - held.shared
        beside = held_beside_processes(root)
        return cls(step, host_memory(root).usable, processes, beside.pop("tmpfs and shared memory"), beside)

    def what_grew(self, before: Holders) -> str:
        """A description of what grew since `before`; if nothing did, of what holds the most."""
        since = "since the start" if before.step is None else f"since step {before.step}"
        by = {key: held - before.processes.get(key, 0) for key, held in self.processes.items()}
        mine = {key for key in by if key[0] == os.getpid()}
        others = sorted(by.keys() - mine, key=by.get, reverse=True)
        grown = {"this process": sum(by[key] for key in mine)}
        if others:
            grown[_named(others[0])] = by[others[0]]
            grown["the other processes"] = sum(by[key] for key in others[1:])
        grown["tmpfs and shared memory"] = self.shared - before.shared
        unseen = before.left - self.left - sum(grown.values())
        grown["memory of no process here (a GPU's, another container's, the kernel's)"] = unseen
        shown = dict(sorted(grown.items(), key=lambda one: -one[1])[:3]) | {"this process": grown["this process"]}
        shown |= {who: held - before.elsewhere[who] for who, held in self.elsewhere.items()}
        lines = [f"{who} by {size(bytes_)}" for who, bytes_ in shown.items() if bytes_ > NOTHING_BYTES]
        if lines:
            return f"{since} grew: {', '.join(lines)}"
        return f"nothing grew {since}, so memory was short already; {self.who_holds()}"

    def who_holds(self) -> str:
        """A description of what this process and the three largest others hold."""
        others = sorted((key for key in self.processes if key[0] != os.getpid()), key=self.processes.get, reverse=True)
        mine = sum(held for key, held in self.processes.items() if key[0] == os.getpid())
        held = [f"{_named(key)} {size(self.processes[key])}" for key in others[:3]]
        return ", ".join([f"this process holds {size(mine)}", *held])


def _named(key: tuple[int, str]) -> str:
    return f"{key[1]} (process {key[0]})"
