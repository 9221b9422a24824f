"""The helper of `aurora launch` on one machine: it describes the machine, measures its network and runs the command.

It is started over ssh (or directly, for this machine), reads one JSON request a line from standard input, and writes
JSON lines to standard output. Signals do not pass through ssh, and a connection that breaks tells nobody: so the
command is this process's child, a signal comes as a request, and the end of standard input lets it save and stop.
Nothing here imports jax.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

_CHUNK_BYTES = 4 << 20
_CONNECT_SECONDS = 5
_out = threading.Lock()


def say(**message) -> None:
    """Send one message to `aurora launch`; its end is noticed by `main`."""
    with _out, contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def describe() -> dict:
    """What `aurora launch` compares and chooses by: versions, the clock (seconds), addresses, which machine this is."""
    from aurora_train.machine.profile import installed_gpus
    from aurora_train.run import code_hash, versions

    addresses = [
        [name, address.address, address.netmask]
        for name, known in psutil.net_if_addrs().items()
        if psutil.net_if_stats()[name].isup
        for address in known
        if address.family == socket.AF_INET
    ]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/net")
    return {"versions": versions() | {"code": code_hash()[:12]}, "clock": time.time(), "addresses": addresses,
            "machine": boot, "host": platform.node(), "port": free_port(), "gpus": _visible(len(installed_gpus()))}


def _visible(gpus: int) -> int:
    """How many of so many GPUs CUDA shows to this process and its children."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if chosen is None else min(gpus, len([one for one in chosen.split(",") if one]))


def free_port() -> int:
    """A TCP port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Receiver:
    """Takes what the neighbour in the ring sends to one address, and counts its bytes."""

    def __init__(self, address: str):
        self._door = socket.create_server((address, 0))
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        self._door.settimeout(30)
        with contextlib.suppress(OSError):
            sock, _ = self._door.accept()
            into = bytearray(_CHUNK_BYTES)
            while sock.recv_into(into):
                pass


def send(address: str, port: int, seconds: float, source: str) -> dict:
    """Send to a neighbour for some seconds. Returns {"bytes", "seconds"}, or {"error"} if it cannot be reached."""
    data, sent = bytes(_CHUNK_BYTES), 0
    try:
        with socket.create_connection((address, port), _CONNECT_SECONDS, source_address=(source, 0)) as sock:
            sock.settimeout(seconds + _CONNECT_SECONDS)
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                sent += sock.send(data)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)  # the neighbour closes when it has everything: what is in buffers was not sent
            return {"bytes": sent, "seconds": time.monotonic() - began}
    except OSError as error:
        return {"error": error.strerror or str(error) or type(error).__name__}


class Command:
    """The command of this machine's process, whose lines are passed on."""

    def __init__(self, arguments: list[str], variables: dict[str, str], status):
        self._process = subprocess.Popen(
            arguments, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        readers = [threading.Thread(target=self._read, args=pair, daemon=True)
                   for pair in (("out", self._process.stdout), ("err", self._process.stderr))]  # fmt: skip
        for reader in readers:
            reader.start()
        threading.Thread(target=self._wait, args=(readers, status), daemon=True).start()

    def _read(self, stream: str, pipe) -> None:
        for line in pipe:
            say(stream=stream, line=line.decode(errors="replace"))

    def _wait(self, readers, status) -> None:
        code = self._process.wait()
        for reader in readers:
            reader.join(5)
        status(code)

    def signal(self, name: str) -> None:
        """Send a signal to the command; SIGKILL to all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            if name == "SIGKILL":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.send_signal(signal.Signals[name])

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.wait()


def main() -> None:
    """Answer requests until standard input ends; then stop the command, which saves, and end."""
    receivers, command = {}, None

    def ended(code: int) -> None:
        say(status=code)

    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "describe":
                say(**describe())
            case "listen":
                receivers[request["address"]] = Receiver(request["address"])
                say(port=receivers[request["address"]].port)
            case "send":
                say(**send(request["to"], request["port"], request["seconds"], request["source"]))
            case "run":
                try:
                    command = Command(request["arguments"], request["variables"], ended)
                except OSError as error:
                    say(stream="err", line=f"cannot start {request['arguments'][0]}: {error.strerror}\n")
                    say(status=127)
            case "signal" if command:
                command.signal(request["name"])
    if command:
        command.signal("SIGTERM")
        command.wait()


if __name__ == "__main__":
    main()
