"""Carries arrays and small files between process 0 and the others, where their boxes share no disk.

Process 0 opens a door at the address by which the others have met it, and tells them, through the store of jax, where
it is and a word that lets them in. A message is a line of JSON; the bytes of an array follow it as they are. Like all
traffic of a run it is neither encrypted nor, but for that word, authenticated.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import math
import queue
import secrets
import socket
import threading
from collections.abc import Callable

import jax
import numpy as np

from aurora_train.errors import UserError
from aurora_train.machine import processes

log = logging.getLogger("aurora_train")

_MOST_LINE_BYTES = 1 << 26  # a listing of the parts of a process


class Channel:
    """A connection of two processes of a run. ConnectionError where the other one has gone."""

    def __init__(self, sock: socket.socket):
        self._socket, self._file = sock, sock.makefile("rwb")

    def send(self, message: dict, data: np.ndarray | bytes | None = None) -> None:
        """Send a message, and the bytes that belong to it."""
        self._file.write(json.dumps(message).encode() + b"\n")
        if data is not None:
            self._file.write(data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        self._file.flush()

    def receive(self) -> dict:
        """The next message; UserError for one that says what failed on the other side."""
        line = self._file.readline(_MOST_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the other process has closed the connection")
        message = json.loads(line)
        if "failed" in message:
            raise UserError(message["failed"])
        return message

    def array(self, shape, dtype: str) -> np.ndarray:
        """The array that follows a message."""
        into = np.empty(tuple(shape), jax.numpy.dtype(dtype))
        self._fill(memoryview(into.reshape(-1).view(np.uint8)))
        return into

    def bytes(self, number: int) -> bytes:
        """So many bytes that follow a message."""
        into = bytearray(number)
        self._fill(memoryview(into))
        return bytes(into)

    def _fill(self, into: memoryview) -> None:
        at = 0
        while at < len(into):
            read = self._file.readinto(into[at:])
            if not read:
                raise ConnectionResetError("the other process has closed the connection")
            at += read

    def close(self) -> None:
        """Close it; the other side notices."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()


class Depot:
    """Process 0's side: answers what the others ask, and takes in what they offer for a save."""

    def __init__(self, address: str, answer: Callable[[dict, Channel], None]):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._door = socket.create_server((address, 0), family=family)
        self._answer, self._word = answer, secrets.token_hex(16)
        self._offers: dict[str, queue.Queue] = {}
        self._refused: set[str] = set()
        self._lock = threading.Lock()
        self.place = {"host": address, "port": self._door.getsockname()[1], "word": self._word}
        threading.Thread(target=self._receive, name="depot", daemon=True).start()

    def offered(self, name: str) -> Channel:
        """The connection on which a process offers its part of a save; waits for it."""
        with self._lock:
            waiting = self._offers.setdefault(name, queue.Queue())
        return waiting.get()

    def refuse(self, save: str) -> None:
        """Close what is or will be offered for a save that does not count: nobody will fetch it."""
        with self._lock:
            self._refused.add(save)
            waiting = [one for name, one in self._offers.items() if name.startswith(f"{save}/")]
        for one in waiting:
            with contextlib.suppress(queue.Empty):
                one.get_nowait().close()

    def close(self) -> None:
        """Let nobody in any more."""
        self._door.close()

    def _receive(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                sock, _ = self._door.accept()
                threading.Thread(target=self._let_in, args=(Channel(sock),), daemon=True).start()

    def _let_in(self, channel: Channel) -> None:
        try:
            hello = channel.receive()
            if not hmac.compare_digest(str(hello.get("word")), self._word):
                return channel.close()
            if "offer" in hello:
                return self._take(str(hello["offer"]), channel)
            while True:
                self._answered(channel.receive(), channel)
        except (OSError, ValueError, AttributeError, TypeError, UserError):  # it has gone, or is none of the run
            channel.close()

    def _take(self, name: str, channel: Channel) -> None:
        with self._lock:
            if not any(name.startswith(f"{save}/") for save in self._refused):
                return self._offers.setdefault(name, queue.Queue()).put(channel)
        channel.close()

    def _answered(self, request: dict, channel: Channel) -> None:
        try:
            self._answer(request, channel)
        except (UserError, OSError, KeyError) as error:
            log.debug("what another process asked for failed", exc_info=True)
            channel.send({"failed": str(error)})


@contextlib.contextmanager
def _while_process_0_is_there():
    """In this context, a connection that breaks is the end of process 0, as it is known to the line between them."""
    try:
        yield
    except OSError as error:
        raise processes.lost(ConnectionError(f"connection reset: {error}")) from None


class Courier:
    """The side of another process: asks process 0, and offers its part of a save."""

    def __init__(self, place: dict):
        self._place, self._lock = place, threading.Lock()
        self._channel = self._connected({})

    def _connected(self, hello: dict) -> Channel:
        with _while_process_0_is_there():
            channel = Channel(socket.create_connection((self._place["host"], self._place["port"])))
            channel.send({"word": self._place["word"], **hello})
        return channel

    def ask(self, what: str, **about) -> dict:
        """Process 0's answer. UserError if it has none."""
        with self._lock, _while_process_0_is_there():
            self._channel.send({"ask": what, **about})
            return self._channel.receive()

    def files(self) -> tuple[dict, bytes]:
        """(what process 0 knows of the run, an archive of its small files)."""
        with self._lock, _while_process_0_is_there():
            self._channel.send({"ask": "files"})
            known = self._channel.receive()
            return known, self._channel.bytes(known["bytes"])

    def array(self, **which) -> np.ndarray:
        """A part of a stored leaf, in the dtype in which it is stored."""
        with self._lock, _while_process_0_is_there():
            self._channel.send({"ask": "array", **which})
            answer = self._channel.receive()
            return self._channel.array(answer["shape"], answer["dtype"])

    def offer(self, name: str, leaves: dict) -> Offer:
        """Offer leaves (numpy arrays, or `layout.Unread`) for the save `name`: process 0 fetches them one by one."""
        return Offer(self._connected({"offer": name}), leaves)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


class Offer:
    """The part of a save that a process holds until process 0 has written it."""

    def __init__(self, channel: Channel, leaves: dict):
        self._channel, self._leaves = channel, leaves
        listed = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}
        channel.send({"leaves": listed})

    def result(self) -> None:
        """Hand out what process 0 asks for until it has all, or has gone: how the save went it says elsewhere."""
        with contextlib.suppress(OSError):
            while self._leaves and (name := self._channel.receive().get("get")) is not None:
                leaf = self._leaves[name]
                self._channel.send({}, leaf.read() if hasattr(leaf, "read") else leaf)
        self._leaves = {}
        self._channel.close()


class Fetched:
    """A leaf that another process offers. numpy reads it when it is written, and not before."""

    def __init__(self, channel: Channel, name: str, shape, dtype: str):
        self._channel, self._name, self._dtype = channel, name, dtype
        self.shape, self.dtype = tuple(shape), np.dtype(jax.numpy.dtype(dtype))
        self.size, self.ndim = math.prod(self.shape), len(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self._channel.send({"get": self._name})
        self._channel.receive()
        return self._channel.array(self.shape, self._dtype)


def fetched(channel: Channel) -> dict[str, Fetched]:
    """The leaves that another process offers on a channel."""
    listed = channel.receive()["leaves"]
    return {name: Fetched(channel, name, shape, dtype) for name, (shape, dtype) in listed.items()}
