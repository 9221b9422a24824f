"""A tiny open model behind `aurora serve`'s server, in this process, and the plainest client."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from aurora_train.interop.gguf.write import write_gguf
from aurora_train.loading import load
from aurora_train.serve.address import Address

sys.path.insert(0, str(Path(__file__).parent / "interop"))
from tiny_sources import source_of  # noqa: E402

TOKEN = "a-token-of-24-characters"


def write_model(folder: Path) -> Path:
    """A GGUF file of a tiny model of 8,192 positions with random weights, a template and a licence."""
    source = source_of("llama")
    source = dataclasses.replace(source, config=source.config | {"max_position_embeddings": 8192})
    write_gguf(source, folder / "tiny.gguf", "bf16", "tiny")
    return folder / "tiny.gguf"


class Answer(NamedTuple):
    status: int
    body: object  # JSON, else bytes
    headers: dict[str, str]

    @property
    def error(self) -> dict:
        return self.body["error"]


class Client:
    """Asks a server; `headers` go with every request."""

    def __init__(self, port: int, **headers: str):
        self.port, self.headers = port, headers

    def __call__(self, method: str, path: str, body=None, **headers: str) -> Answer:
        """A body that is no bytes is sent as JSON. Of two headers of one name, those given here are sent."""
        with self.open(method, path, body, **headers) as response:
            content = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            kind = found.get("content-type", "")
            return Answer(response.status, json.loads(content) if kind == "application/json" else content, found)

    @contextlib.contextmanager
    def open(self, method: str, path: str, body=None, **headers: str):
        """The response while it comes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | self.headers | headers
        try:
            sent = {name.replace("_", "-"): value for name, value in sent.items() if value is not None}
            connection.request(method, path, content, sent)
            yield connection.getresponse()
        finally:
            connection.close()

    def post(self, path: str, body, **headers: str) -> Answer:
        return self("POST", path, body, **headers)

    def events(self, path: str, body, **headers: str) -> list:
        """The events of a stream: JSON, and the text "[DONE]"."""
        with self.open("POST", path, body | {"stream": True}, **headers) as response:
            lines = [line for line in response.read().decode().split("\n") if line]
        assert all(line.startswith("data: ") for line in lines), lines[:3]
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        lines = self("GET", "/metrics").body.decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))


@contextlib.contextmanager
def server(path: Path, token: str | None = None, **settings):
    """A `Server` of a model on a free port, and a client of it; of one shape, so that it is compiled once."""
    from aurora_train.serve.server import Server, Settings

    started = Server(load(path), Settings("tiny", **{"slots": 4, "length": 256} | settings), Address(token=token))
    try:
        yield started, Client(int(started.url.rpartition(":")[2]))
    finally:
        started.close()


def at_once(function, items) -> list:
    """The results of a function on each item, all at the same time."""
    results = [None] * len(items)

    def one(number):
        results[number] = function(items[number])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
