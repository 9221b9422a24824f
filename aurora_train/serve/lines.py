"""A server of JSON lines: each line of a client is a request, and is answered by one line.

    {"observation.state": [0.1, 0.2]}      ->  {"action": [[0.3, 0.4]]}
    {"id": 7, "observation.state": [NaN]}  ->  {"id": 7, "error": "..."}
    {"reset": true}                        ->  {"reset": true}

`id` is given back as it came. `reset` forgets what the client has sent so far, as at the start of an episode. An
error is an answer; the connection stays. Arrays are written as `arrays.py` says; an answer has them in the form of its
request. With a token, a client's first line is {"token": "..."}, answered by {"accepted": true}.

Clients are served side by side, and their requests are answered one at a time: the model has one machine.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any

from aurora_train.errors import UserError
from aurora_train.serve.address import Address, cannot_listen, make_way
from aurora_train.serve.arrays import decoded, encoded
from aurora_train.serve.latency import Latencies

log = logging.getLogger("aurora_train")

Respond = Callable[[dict], dict]
LONGEST_BYTES = 64 << 20  # of a request
_TOKEN_BYTES, _TOKEN_SECONDS = 4096, 10
_SILENT_SECONDS = 60  # after which the system asks whether a client is still there
_CLIENTS = 64  # at the same time
# A web page can make a browser send this to a port of its machine, with lines of its own to follow.
_HTTP = re.compile(rb"[A-Z]+ \S+ HTTP/")


class LineServer:
    """Listens from its construction until `close`. `connect` makes the function that answers one client.

    Args:
        connect: called before the server listens, so that it may compile, and again for each client and each reset.
        address: where to listen. UserError if that is not possible.
    """

    def __init__(self, connect: Callable[[], Respond], address: Address):
        self.latencies = Latencies()
        self._address, self._answering = address, threading.Lock()
        connect()
        self._server = _listening(address)
        self._server.owner = _Owner(connect, address.token, self.latencies, self._answering)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def place(self) -> str:
        """HOST:PORT, or the path of the socket."""
        if self._address.path is not None:
            return str(self._address.path)
        host, port = self._server.server_address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def run(self, stop: threading.Event, say: Callable[[str], None], every_s: float = 10.0) -> None:
        """Wait for `stop`; while requests come, `say` the latencies from time to time."""
        said = 0
        while not stop.wait(every_s):
            if (done := self.latencies.answers + self.latencies.refused) != said:
                said = done
                say(self.latencies.line())

    def close(self) -> None:
        """Stop listening, and let the answer in progress be finished."""
        self._server.shutdown()
        self._server.server_close()
        with self._answering:
            if self._address.path is not None:
                self._address.path.unlink(missing_ok=True)


class _Owner:
    """What the handlers of all clients share."""

    def __init__(self, connect, token: str | None, latencies: Latencies, answering: threading.Lock):
        self.connect, self.token, self.latencies, self.answering = connect, token, latencies, answering
        self.places = threading.BoundedSemaphore(_CLIENTS)


class _Handler(socketserver.StreamRequestHandler):
    """One client, in a thread of its own."""

    def setup(self):
        super().setup()
        if self.connection.family != socket.AF_UNIX:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            # A robot that lost its power gives its place back after some minutes, rather than never.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, True)
            if hasattr(socket, "TCP_KEEPIDLE"):
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_SECONDS)

    def handle(self):
        with contextlib.suppress(OSError):  # the client is gone
            owner: _Owner = self.server.owner
            if not owner.places.acquire(blocking=False):
                return self._send({"error": f"this server has {_CLIENTS} clients already"})
            try:
                if owner.token is None or self._is_trusted(owner.token):
                    self._converse(owner)
            finally:
                owner.places.release()
        return None

    def _is_trusted(self, token: str) -> bool:
        # Of the whole line: a stranger who sends a byte now and then must not hold a place.
        late = threading.Timer(_TOKEN_SECONDS, self.connection.shutdown, (socket.SHUT_RD,))
        late.daemon = True
        late.start()
        try:
            given = json.loads(self.rfile.readline(_TOKEN_BYTES))["token"]
            good = hmac.compare_digest(str(given).encode(), token.encode())
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        finally:
            late.cancel()
        self._send({"accepted": True} if good else {"error": 'the first line has to be {"token": "..."}'})
        return good

    def _converse(self, owner: _Owner) -> None:
        respond = None
        while line := self.rfile.readline(LONGEST_BYTES + 1):
            began = time.perf_counter()
            if len(line) > LONGEST_BYTES or _HTTP.match(line):
                fault = "this is not HTTP" if _HTTP.match(line) else f"a request has at most {LONGEST_BYTES:,} bytes"
                owner.latencies.refused_one()
                return self._send({"error": f"{fault}; the connection is closed"})
            if not line.strip():
                continue
            respond = self._answer(owner, line, respond, began)
        return None

    def _answer(self, owner: _Owner, line: bytes, respond: Respond | None, began: float) -> Respond | None:
        """Answer one line. Returns the function that answers the client's next one."""
        known: dict[str, Any] = {}
        try:
            request = _request(line)
            known = _id(request)
            request, as_base64 = _decoded(request)
            reset = _reset(request)
            with owner.answering:
                respond = owner.connect() if respond is None or reset else respond
                answer = {"reset": True} if reset and not request else respond(request)
            text = _line(known | encoded(answer, as_base64))
            warnings = [str(warning) for warning in answer.get("warnings", ())]
        except UserError as fault:
            owner.latencies.refused_one()
            self._send(known | {"error": str(fault)})
            return respond
        except Exception as error:
            log.exception("a request could not be answered")
            owner.latencies.refused_one()
            self._send(known | {"error": f"the server failed: {type(error).__name__}: {error}"})
            return respond
        owner.latencies.answered(time.perf_counter() - began)
        for warning in warnings:
            if owner.latencies.warned(warning.split(":")[0]):  # the first of its kind
                log.warning("%s", warning)
        self.wfile.write(text)
        return respond

    def _send(self, answer: dict) -> None:
        self.wfile.write(_line(answer))


def _request(line: bytes) -> dict:
    """The request as it was sent. UserError if it is not a JSON object."""
    try:
        found = json.loads(line)
    except RecursionError:
        raise UserError("a request is one line of JSON: this one is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"a request is one line of JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError("a request is a JSON object", why=f"this is a {type(found).__name__}")
    return found


def _id(request: dict) -> dict:
    """{"id": what was sent}, taken out of the request; {} if it has none. UserError if it could not be given back."""
    if "id" not in request:
        return {}
    known = {"id": request.pop("id")}
    try:
        json.dumps(known, allow_nan=False)
    except (ValueError, RecursionError):
        raise UserError("`id` has a number that is not finite, or is nested too deeply", where="request.id",
                        hint="a text or a whole number") from None  # fmt: skip
    return known


def _decoded(request: dict) -> tuple[dict, bool]:
    """(the request with its encoded arrays as numpy arrays, whether there was any)."""
    try:
        parts = {name: decoded(value, f"request.{name}") for name, value in request.items()}
    except RecursionError:
        raise UserError("a request is one line of JSON, and this one is nested too deeply") from None
    return {name: value for name, (value, _) in parts.items()}, any(found for _, found in parts.values())


def _reset(request: dict) -> bool:
    reset = request.pop("reset", False)
    if not isinstance(reset, bool):
        raise UserError("`reset` is true or false", where="request.reset")
    return reset


def _line(answer: dict) -> bytes:
    try:
        return json.dumps(answer, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"the answer is no JSON: {error}") from None


class _Tcp(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False


class _Tcp6(_Tcp):
    address_family = socket.AF_INET6


class _Unix(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False


def _listening(address: Address):
    try:
        if address.path is not None:
            make_way(address.path)
            before = os.umask(0o177)  # for its owner alone
            try:
                return _Unix(str(address.path), _Handler)
            finally:
                os.umask(before)
        kind = _Tcp6 if ":" in address.host else _Tcp
        return kind((address.host, address.port), _Handler)
    except OSError as error:
        raise cannot_listen(address, error) from error
