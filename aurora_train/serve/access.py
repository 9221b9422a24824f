"""Who may ask the server over HTTP. A page of the web can make a browser send requests to a server of this machine: it
is recognised by the name under which it asks (Host; DNS rebinding) and by where it comes from (Origin)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie

from starlette.responses import JSONResponse, Response

from aurora_train.serve.refusal import Refusal

LONGEST_BYTES = 16 << 20  # of a request's body
OPEN = ("/", "/health")  # paths that need no token and hold no secret


class Access:
    """ASGI middleware that refuses strangers before a byte of the body is read.

    Args:
        token: what a client sends as `Authorization: Bearer TOKEN`; None: nothing.
        hosts: the names by which the server may be called, besides any address: no name leads to an address that was
            typed, so that no page can have made it lead here.
        free: the paths that need no token.
        cookie: the name of a cookie that may stand for the token (`cookie_of`), for pages that a browser opens.
        respond: makes the answer to a refused request; None: `answer`.
    """

    def __init__(self, app, token: str | None, hosts: Iterable[str], free: Iterable[str] = OPEN,
                 cookie: str | None = None, respond: Callable[[Refusal], Response] | None = None):  # fmt: skip
        self._app, self._token, self._free, self._cookie = app, token, set(free), cookie
        self._hosts = {"localhost", *(host.lower().rstrip(".") for host in hosts)}
        self._respond = respond or answer

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        refusal = self._refusal(scope["path"], {name: value.decode("latin-1") for name, value in scope["headers"]})
        if refusal is None:
            return await self._app(scope, receive, send)
        return await self._respond(refusal)(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, str]) -> Refusal | None:
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._is_ours(_name(host)):
            return Refusal(f"this server is not called {host!r}; --allow-host NAME lets it be", code="foreign_host",
                           status=403)  # fmt: skip
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            return Refusal(f"a page of {origin} may not ask this server", code="foreign_origin", status=403)
        if self._token is None or path in self._free or self._has_cookie(headers.get(b"cookie", "")):
            return None
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        if kind.lower() == "bearer" and is_token(given, self._token):
            return None
        said = "this is not the server's token" if given else "this server wants its token: Authorization: Bearer TOKEN"
        return Refusal(said, code="invalid_api_key", status=401, headers={"WWW-Authenticate": "Bearer"})

    def _has_cookie(self, header: str) -> bool:
        if self._cookie is None:
            return False
        try:
            found = SimpleCookie(header).get(self._cookie)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), cookie_of(self._token).encode())

    def _is_ours(self, name: str) -> bool:
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def is_token(given: str, token: str) -> bool:
    """Whether a text that was sent is the token; it is compared in constant time."""
    return hmac.compare_digest(given.strip().encode(), token.encode())


def cookie_of(token: str) -> str:
    """What a cookie holds in place of a token, which is not to lie in a browser's files."""
    return hmac.digest(token.encode(), b"a cookie of aurora watch", "sha256").hex()


def names(host: str, further: Iterable[str]) -> set[str]:
    """The names by which a server that listens on `host` is called: on 127.0.0.1, none but localhost."""
    try:
        if ipaddress.ip_address(host).is_loopback:
            return set(further)
    except ValueError:
        return {host, *further}
    own = socket.gethostname()
    return {own, f"{own}.local", *further}


def answer(refusal: Refusal) -> JSONResponse:
    """The HTTP answer that a refusal is."""
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


def policy(script: str, *, images: str = "data:", forms: str = "'none'") -> str:
    """The Content-Security-Policy by which a page runs its own script and reaches nothing but this server."""
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{own}'; style-src 'unsafe-inline'; connect-src 'self'; "
            f"img-src {images}; base-uri 'none'; form-action {forms}; frame-ancestors 'none'")  # fmt: skip


def _name(host: str) -> str:
    """The name in a Host header, which may have a port; an IPv6 address has brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().rstrip(".")
