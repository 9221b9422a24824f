"""A server of the command line in this process, and who asks it: a thread with a real socket, and a real signal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from kit import free_address, in_process


class Client:
    """Requests and answers over one connection to HOST:PORT, or to the path of a Unix socket."""

    def __init__(self, place: str):
        host, _, port = place.rpartition(":")
        self.socket = socket.socket(socket.AF_INET if port.isdigit() else socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect((host, int(port)) if port.isdigit() else place)
        self.file = self.socket.makefile("rwb")

    def raw(self, line: bytes) -> bytes:
        """The answer to one line."""
        self.file.write(line + b"\n")
        self.file.flush()
        return self.file.readline()

    def __call__(self, **request) -> dict:
        return json.loads(self.raw(json.dumps(request).encode()))


def served(arguments, ask: Callable[[str], None], path: str | None = None) -> int:
    """The exit status of `aurora ARGUMENTS`, which a SIGTERM ends when `ask(HOST:PORT)` has returned.

    With `path` it listens on that Unix socket, which is what `ask` is given.
    """
    place, faults = path or free_address(), []

    def asked() -> None:
        deadline = time.monotonic() + 120
        while not _listens(place) and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            ask(place)
        except BaseException as fault:
            faults.append(fault)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=asked)
    thread.start()
    where = ("--socket", path) if path else ("--port", place.rpartition(":")[2])
    status = in_process(*arguments, *where)
    thread.join()
    if faults:
        raise faults[0]
    return status


def _listens(place: str) -> bool:
    with contextlib.suppress(OSError):
        Client(place).socket.close()
        return True
    return False
