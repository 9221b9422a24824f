"""`aurora launch`: one command on several machines, with one ending for all of them.

An agent (`tools/agent.py`) runs on each machine, over ssh or, for this one, directly. In this order: all machines are
reached, their versions and clocks compared, the network between them chosen by measuring it, and the command started as
process 0, 1, ... of one run. What process 0 prints is passed on; what the others print is shown only if one of them is
the first to fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque

from aurora_train.errors import UserError
from aurora_train.machine import links
from aurora_train.machine.line import EXIT_LOST
from aurora_train.machine.place import ADDRESS, COUNT, INDEX
from aurora_train.machine.unlike import CLOCK_SECONDS
from aurora_train.tools.network import Link, choose_link
from aurora_train.tools.unit import STOPPED, kept_environment

_SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_ANSWER_SECONDS = 60  # for the first answer of a machine: Python starts there
_END_SECONDS = 45  # that the others may take to end by themselves after one has failed
_SAVING = (STOPPED, 77, 74)  # ends that all processes come to together, after a save that may take long
_HERE = "localhost"


class Host:
    """One process's machine, with the agent that runs there. `name` is as the user wrote it."""

    def __init__(self, index: int, name: str, ssh: str, python: str, folder: str):
        self.index, self.name = index, name
        self.inbox: queue.Queue = queue.Queue()
        self.errors: deque[str] = deque(maxlen=200)  # what ssh and the agent themselves say
        self.facts: dict = {}
        self._answered = threading.Event()
        agent = [python, "-P", "-m", "aurora_train.tools.agent"]
        paths = {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
        if name == _HERE:
            command, options = agent, {"cwd": folder}
        else:
            there = ["env", *(f"{key}={value}" for key, value in paths.items()), *agent]
            command = [*shlex.split(ssh), *_SSH, name, f"cd {shlex.quote(folder)} && exec {shlex.join(there)}"]
            options = {}
        try:
            self._agent = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True, **options,
            )  # fmt: skip
        except FileNotFoundError:
            raise UserError(f"there is no `{command[0]}` here", where="--ssh",
                            hint="apt install openssh-client") from None  # fmt: skip
        threading.Thread(target=lambda: self.errors.extend(self._agent.stderr), daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._agent.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # a login script may print something
                self.inbox.put((self, json.loads(line)))
        self.inbox.put((self, {"gone": self._agent.wait()}))

    def ask(self, do: str, **request) -> None:
        """Send a request. A machine that is gone is noticed where its answer is read."""
        with contextlib.suppress(OSError):
            self._agent.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._agent.stdin.flush()

    def answer(self, seconds: float) -> dict:
        """The answer to the last request; UserError if there is none."""
        try:
            _, message = self.inbox.get(timeout=seconds)
        except queue.Empty:
            raise UserError(f"no answer within {seconds:g} s", where=self.name,
                            hint=f"does `ssh {self.name} true` work?") from None  # fmt: skip
        if "gone" in message:
            raise self._unusable(message["gone"])
        return message

    def close(self) -> None:
        """Let the agent end: it stops its command, if that still runs."""
        with contextlib.suppress(OSError):
            self._agent.stdin.close()

    def _unusable(self, status: int) -> UserError:
        time.sleep(0.2)  # for the last of its words
        said = [line.strip() for line in self.errors if line.strip()]
        last = said[-1] if said else f"status {status}"
        if status == 255:
            return UserError(f"cannot be reached by ssh: {last}", where=self.name,
                             hint=f"`ssh {self.name} true` has to work without a password (ssh-copy-id)")  # fmt: skip
        if "No module named" in last:
            return UserError("aurora_train is not installed there", where=self.name, why=last,
                             hint="install it there, in the same place, or name a Python with --python")  # fmt: skip
        if status in (126, 127):
            return UserError(f"there is no such Python: {last}", where=self.name,
                             hint="--python PATH, the same on each")  # fmt: skip
        if ": cd:" in last or "can't cd" in last:
            return UserError(f"this folder is not there: {last}", where=self.name,
                             hint="start in a folder that every machine has, such as a shared disk")  # fmt: skip
        return UserError(f"cannot be used: {last}", where=self.name)


def launch(names: list[str], arguments: list[str], *, ssh: str = "ssh", python: str = sys.executable,
           interface: str | None = None) -> int:  # fmt: skip
    """Run `aurora ARGUMENTS` as one process on each of the named machines. Returns the exit status for all.

    UserError for a machine that cannot be used, or that differs from the first. A signal stops all: they save.
    """
    hosts = [Host(index, name, ssh, python, os.getcwd()) for index, name in enumerate(names)]
    try:
        with _Signals() as signals:
            _compare(hosts)
            link = choose_link(hosts, interface, say=_say)
            if signals.count:
                return 130
            return _supervise(hosts, arguments, python, link, signals)
    finally:
        for host in hosts:
            host.close()


def _compare(hosts: list[Host]) -> None:
    began = time.time()
    for host in hosts:
        host.ask("describe")
    for host in hosts:
        host.facts = host.answer(_ANSWER_SECONDS)
        host.facts["clock_ahead"] = host.facts["clock"] - min(max(host.facts["clock"], began), time.time())
    first = hosts[0]
    for host in hosts:
        mine, theirs = first.facts["versions"], host.facts["versions"]
        differ = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
        if differ:
            shown = "; ".join(f"{name}: {mine.get(name)} and {theirs.get(name)}" for name in sorted(differ))
            raise UserError(f"{first.name} and {host.name} have different versions", where="--hosts", why=shown,
                            hint="install the same ones on every machine")  # fmt: skip
        ahead = host.facts["clock_ahead"] - first.facts["clock_ahead"]
        if abs(ahead) > CLOCK_SECONDS:
            raise UserError(f"the clocks of {first.name} and {host.name} differ by {abs(ahead):.0f} s", where="--hosts",
                            hint="timedatectl set-ntp true, on both")  # fmt: skip


def _supervise(hosts: list[Host], arguments, python: str, link: Link, signals) -> int:
    """Start the processes, pass on what is to be seen, and end all of them when one has failed."""
    inbox: queue.Queue = queue.Queue()
    kept, job = kept_environment(dict(os.environ), False), secrets.token_hex(8)
    address = f"{link.addresses[0]}:{hosts[0].facts['port']}"
    for host in hosts:
        early, host.inbox = host.inbox, inbox
        while not early.empty():  # it may have gone already
            inbox.put(early.get())
        own = {ADDRESS: address, COUNT: str(len(hosts)), INDEX: str(host.index), "AURORA_JOB": job,
               links.MEASURED: str(link.rate)}  # fmt: skip
        host.ask("run", arguments=[python, "-P", "-m", "aurora_train", *arguments],
                 variables=_accelerators(hosts, host) | kept | link.variables(host.index) | own)  # fmt: skip
    shown, ends, told, deadline = _Shown(hosts), {}, 0, None
    while len(ends) < len(hosts):
        if signals.count > told:
            told = signals.count
            for host in hosts:
                host.ask("signal", name="SIGTERM" if told == 1 else "SIGKILL")
            _say("stopping all processes; a second signal ends them at once" if told == 1 else "ended at once")
        if deadline is not None and time.monotonic() > deadline:
            slow = [host for host in hosts if host.index not in ends]
            _say(f"{', '.join(host.name for host in slow)} did not end within {_END_SECONDS} s, and is ended now")
            for host in slow:
                host.ask("signal", name="SIGKILL")
            deadline = time.monotonic() + 10
        with contextlib.suppress(queue.Empty):
            host, message = inbox.get(timeout=0.2)
            if "line" in message:
                shown.take(host, message["stream"], message["line"])
            elif host.index not in ends and ("status" in message or "gone" in message):
                ends[host.index] = message.get("status", EXIT_LOST)
                if "gone" in message:
                    _say(f"{host.name}: the connection is lost")
                shown.ended(host, ends[host.index])
                if ends[host.index] not in (0, *_SAVING) and deadline is None:
                    deadline = time.monotonic() + _END_SECONDS
    return 130 if told > 1 else status_of_all(list(ends.values()))


def _accelerators(hosts: list[Host], host: Host) -> dict[str, str]:
    """The variable that gives a process its share of a machine's GPUs; {} if it is alone there, or there are too few.

    Without it, each process of a machine would take all of them.
    """
    beside = [other.index for other in hosts if other.facts["machine"] == host.facts["machine"]]
    share = host.facts["gpus"] // len(beside)
    if len(beside) == 1 or share == 0:
        return {}
    first = share * beside.index(host.index)
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + share)))}


def status_of_all(statuses: list[int]) -> int:
    """The status of the whole, from those of its processes in the order in which they ended.

    The first that failed by itself counts. A process that a signal has ended is lost to the others: a supervisor starts
    all of them again.
    """
    own = [status for status in statuses if status not in (0, EXIT_LOST)]
    if not own:
        return max(statuses)
    return own[0] if own[0] > 0 else EXIT_LOST


class _Shown:
    """What the user sees of the processes: all of process 0, and of another one only why it was the first to fail."""

    def __init__(self, hosts: list[Host]):
        self._seen: deque[str] = deque(maxlen=400)
        self._held = {host.index: deque(maxlen=400) for host in hosts}
        self._failed = False

    def take(self, host: Host, stream: str, line: str) -> None:
        if host.index == 0:
            self._seen.append(line.strip())
            print(line, end="", file=sys.stdout if stream == "out" else sys.stderr, flush=True)
        else:
            self._held[host.index].append(line)

    def ended(self, host: Host, status: int) -> None:
        if status in (0, EXIT_LOST, *_SAVING) or self._failed:
            return
        self._failed = True
        lines = list(self._held[host.index])
        starts = [at for at, line in enumerate(lines) if line.startswith(("Traceback", "error:", "hang:"))]
        why = [line for line in lines[starts[0] if starts else -5 :] if line.strip() not in self._seen]
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        if why or status < 0:
            _say(f"process {host.index} ({host.name}) ended with {how}")
        print("".join(why), end="", file=sys.stderr, flush=True)


class _Signals:
    """Counts the signals that ask for the end."""

    _ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.count = 0

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in self._ASKING}
        return self

    def __exit__(self, *exc):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.count += 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
