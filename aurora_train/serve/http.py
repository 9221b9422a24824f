"""The HTTP server of `aurora serve` and `aurora watch`: uvicorn in a thread of its own."""

from __future__ import annotations

import importlib.util
import socket
import threading

from aurora_train.errors import MissingExtra
from aurora_train.serve.address import Address, cannot_listen

_CLOSING_SECONDS = 5  # that clients have to take the end of their answers


def refuse_missing(*packages: str, by: str) -> None:
    """MissingExtra if one of the packages that serve HTTP is not installed, before anything is read for it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "serve", f"`{by}`")


class Http:
    """Listens from its construction until `close`, and answers from `start` on. UserError if it cannot listen there."""

    def __init__(self, address: Address):
        try:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            self._socket = socket.create_server((address.host, address.port), family=family, backlog=1024)
        except OSError as error:
            raise cannot_listen(address, error) from error
        self._server = self._thread = None

    @property
    def url(self) -> str:
        """Where it listens: `http://HOST:PORT`."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def is_alive(self) -> bool:
        """Whether it answers, or will."""
        return self._thread is None or self._thread.is_alive()

    def start(self, app) -> None:
        """Answer by an ASGI application."""
        import uvicorn

        self._server = uvicorn.Server(uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="off", ws="none", loop="asyncio",
            http="h11", server_header=False, date_header=False, timeout_graceful_shutdown=_CLOSING_SECONDS,
        ))  # fmt: skip
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="http", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Accept nothing more; what is being answered goes on."""
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """Accept nothing more, and wait a while until all answers are sent."""
        self.end()
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS + 5)
        self._socket.close()
