"""The line between the processes of a run: each knows within seconds that another one is lost, and which.

The connections of `machine/rendezvous.py` stay open for the whole run. When a process dies, its kernel closes its
connection at once; when a machine or its network dies, this kernel notices within `_SILENT_SECONDS`. A process that is
merely slow or stopped is not lost, because its kernel still answers: that is the watchdog's business. A process that is
lost ends all others: jax leaves them for about 100 s, and NCCL's collectives for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time

from aurora_train.machine.rendezvous import Met

EXIT_LOST = 69  # EX_UNAVAILABLE: another process of the run is lost; the same commands continue
_SILENT_SECONDS = 15  # without an answer from another machine's kernel
_GRACE_SECONDS = 20  # that a process may need to end by itself after another one has left with a reason


class Line:
    """Tells the others of this process, and ends this process when another one is lost.

    `left` is (who, why, status) once another process has left with a reason. Messages pass through process 0:
    `heard(process, message)` is called for those with other kinds than this module's, in a thread of the line.
    """

    def __init__(self, met: Met, index: int):
        self.hosts, self._index, self._connections = met.hosts, index, dict(met.connections)
        self.left: tuple[str, str, int] | None = None
        self.at_loss = lambda who: None  # called with the name of a lost process, before this one ends
        self.heard = lambda process, message: None
        self._parted: set[int] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        for connection in self._connections.values():
            _keep_alive(connection.socket)
        threading.Thread(target=self._watch, name="line", daemon=True).start()

    def name(self, process: int) -> str:
        """How a message calls a process."""
        return f"process {process} ({self.hosts[process]})"

    def tell(self, kind: str, **fields) -> None:
        """Send a message to all others. One that has gone is noticed by the thread that watches."""
        self._pass({"kind": kind, "from": self._index, **fields})

    def part(self) -> None:
        """Say that this process is done: its end is no loss."""
        self.tell("part")

    def leave(self, why: str, status: int) -> None:
        """Say that this process ends before the work is done."""
        self.tell("leave", why=why, status=status)

    def await_loss(self, seconds: float) -> None:
        """Wait for the line to learn why a collective broke. If a process is lost, this does not return."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.left is None:
            if self._ending.wait(0.05):
                time.sleep(60)  # the line's thread is ending this process

    def _pass(self, message: dict, but: int | None = None) -> None:
        with self._lock:
            for process, connection in self._connections.items():
                if process != but:
                    with contextlib.suppress(OSError):
                        connection.send(message)

    def _watch(self) -> None:
        while self._connections:
            waiting = {connection.socket: process for process, connection in self._connections.items()}
            for ready in select.select(list(waiting), [], [], 1.0)[0]:
                self._receive(waiting[ready])

    def _receive(self, process: int) -> None:
        connection = self._connections[process]
        try:
            messages = connection.read()
        except (OSError, ValueError):
            messages = None
        if messages is None:
            with self._lock:
                del self._connections[process]
            if process not in self._parted:
                self._lost(process)
            return
        for message in messages:
            if self._index == 0:
                self._pass(message, but=process)
            self._take(message)

    def _take(self, message: dict) -> None:
        kind, process = message["kind"], message["from"]
        if kind in ("part", "leave"):
            self._parted.add(process)
        if kind == "leave":
            self.left = self.name(process), message["why"], message["status"]
            timer = threading.Timer(_GRACE_SECONDS, self._end_after_leaving)
            timer.daemon = True
            timer.start()
        elif kind == "lost":
            self._end(message["who"])
        elif kind != "part":
            self.heard(process, message)

    def _lost(self, process: int) -> None:
        who = self.name(process)
        self.tell("lost", who=who)
        self._end(who)

    def _end(self, who: str) -> None:
        """End this process: it may be in a collective that never returns."""
        self._ending.set()
        with contextlib.suppress(Exception):
            self.at_loss(who)
        _say(f"{who} is lost: it was killed, it crashed, or its machine or network is gone",
             "nothing was saved since the newest checkpoint; the same commands for all processes continue from it")
        os._exit(EXIT_LOST)

    def _end_after_leaving(self) -> None:
        who, why, status = self.left
        _say(f"{who} ended: {why}", "this process could not end by itself: it waits for what will not come")
        os._exit(status or EXIT_LOST)


def _keep_alive(sock: socket.socket) -> None:
    """Let the kernel ask the other machine every few seconds, and give up after `_SILENT_SECONDS`."""
    sock.settimeout(5.0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, (_SILENT_SECONDS - 3) // 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENT_SECONDS)


def _say(what: str, hint: str) -> None:
    os.write(2, f"error: {what}\n  {hint}\n".encode())


