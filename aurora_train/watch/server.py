"""`Watching`: the page of `aurora watch`, served until it is closed."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from aurora_train.serve.address import Address
from aurora_train.serve.http import Http, refuse_missing
from aurora_train.tools import runs


class Watching:
    """Serves the page of a folder's runs (None: `runs/`, which need not exist yet) from its construction until `close`.

    `hosts` are further names by which browsers may call the server. Raises UserError for a named folder that does not
    exist and if it cannot listen there, and MissingExtra without starlette and uvicorn.
    """

    def __init__(self, folder: Path | None, address: Address, hosts: Iterable[str] = ()):
        refuse_missing("starlette", "uvicorn", by="aurora watch")
        from aurora_train.serve import access
        from aurora_train.watch.app import application

        self.found = len(runs.find(folder))
        self._http = Http(address)
        self._http.start(application(folder, address.token, access.names(address.host, hosts)))

    @property
    def url(self) -> str:
        """Where it listens: `http://HOST:PORT`."""
        return self._http.url

    def run(self, stop: threading.Event) -> None:
        """Wait for `stop`. RuntimeError if the server ends before."""
        while not stop.wait(0.2):
            if not self._http.is_alive:
                raise RuntimeError("the HTTP server has ended")

    def close(self) -> None:
        """Accept nothing more, and wait until open answers are sent."""
        self._http.close()
