"""A hub on this machine: the parts of its HTTP interface that a download of a model needs, served from folders."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(folder: Path) -> str:
    """The commit of a folder: it changes with every file."""
    parts = [f"{path.name} {hashlib.sha1(path.read_bytes()).hexdigest()}" for path in sorted(folder.iterdir())]
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()


class Hub:
    """Serves `models`: owner/name -> folder. Large files are redirected, as a hub redirects them to its store.

    Attributes:
        requests: (path, the header Range) of every request for a file.
        breaks_after: bytes of a safetensors file after which the connection ends; such a file is then not served
            until this is None again.
        lies: the name of a file whose stated hash is of other content.
        store: the address to which requests for weights are sent on.
        tokens: the header Authorization of every request.
    """

    def __init__(self, models: dict[str, Path]):
        self.models, self.requests, self.breaks_after, self.lies = models, [], None, None
        self.broken, self.tokens = False, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = self.store = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def answer(self, handler):
        self.tokens.append(handler.headers.get("Authorization"))
        parts = [unquote(part) for part in urlsplit(handler.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._describe(handler, "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif parts[0] == "store":
            self._send_file(handler, self.models["/".join(parts[1:3])] / parts[3])
        elif parts[2] == "resolve":
            folder = self.models["/".join(parts[:2])]
            self.requests.append((parts[4], handler.headers.get("Range")))
            if parts[4].endswith(".safetensors"):
                self._send(handler, 302, b"", Location=f"{self.store}/store/{parts[0]}/{parts[1]}/{parts[4]}")
            else:
                self._send_file(handler, folder / parts[4])

    def _describe(self, handler, name: str, revision: str):
        folder = self.models.get(name)
        if folder is None:
            return self._send(handler, 401, b"{}", **{"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", commit_of(folder)):
            return self._send(handler, 404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": "original/params.json", "size": 2, "blobId": "0" * 40}]  # a folder is left out
        for path in sorted(folder.iterdir()):
            content = path.read_bytes() + (b"x" if path.name == self.lies else b"")
            one = {"rfilename": path.name, "size": path.stat().st_size,
                   "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}  # fmt: skip
            if path.suffix in (".safetensors", ".bin"):
                digest = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"sha256": digest, "size": one["size"], "pointerSize": 130}
            siblings.append(one)
        self._send(handler, 200, json.dumps({"id": name, "sha": commit_of(folder), "siblings": siblings}).encode())

    def _send_file(self, handler, path: Path):
        content, start = path.read_bytes(), 0
        if asked := handler.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        if self.breaks_after is None or path.suffix != ".safetensors":
            ranged = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
            return self._send(handler, 206 if asked else 200, content[start:], **ranged)
        if self.broken:
            return self._send(handler, 404, b"")
        self.broken = True
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: self.breaks_after])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.close()

    @staticmethod
    def _send(handler, status: int, content: bytes, **headers):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
