"""The HTTP side of `aurora watch`: pages drawn for each request, reports and pictures of runs, a door for a token."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from aurora_train.record import PICTURES
from aurora_train.serve import access
from aurora_train.serve.refusal import Refusal
from aurora_train.tools.markup import escape
from aurora_train.watch.catalog import Catalog
from aurora_train.watch.compare_page import compare_page
from aurora_train.watch.figures import MOST
from aurora_train.watch.layout import page, script
from aurora_train.watch.list_page import list_page
from aurora_train.watch.run_page import picture_file, run_page

_SECONDS = 0.15  # that one request spends on reading files; the next one, which comes at once, goes on
_UNSEEN_SECONDS = 0.45  # that the list spends on runs that it has not seen yet, so that its first answer has most rows
_COOKIE = "aurora_watch"
_COOKIE_SECONDS = 30 * 86400
_TOKEN_BYTES = 1 << 12  # of the form with the token
# Files of a run may be someone else's: they are shown, and run nothing.
_SHOWN_ONLY = {"Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
               "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}  # fmt: skip


def application(folder: Path | None, token: str | None, hosts: set[str]) -> Starlette:
    """The ASGI application that shows the runs of a folder (None: `runs/`). `hosts`: see `access.Access`."""
    catalog = Catalog(folder)
    routes = {
        "/": _listed, "/compare": _compared, "/run/{name:path}": _shown, "/report/{name:path}": _report,
        "/picture/{name:path}": _picture,
    }  # fmt: skip

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def enter(request: Request) -> Response:
        return await _entered(request, token)

    return Starlette(
        routes=[
            *(Route(path, partial(_answered, catalog, answer)) for path, answer in routes.items()),
            Route("/health", health), Route("/enter", enter, methods=["POST"]),
        ],
        middleware=[Middleware(access.Access, token=token, hosts=hosts, free=("/health", "/enter"), cookie=_COOKIE,
                               respond=_refused)],
        exception_handlers={HTTPException: _absent, Exception: _failed},
    )  # fmt: skip


async def _answered(catalog: Catalog, answer: Callable[[Catalog, Request], Response], request: Request) -> Response:
    def one_at_a_time() -> Response:
        with catalog.lock:
            return answer(catalog, request)

    return await run_in_threadpool(one_at_a_time)


# ---- pages


def _listed(catalog: Catalog, request: Request) -> Response:
    return _html(list_page(catalog.look(_SECONDS, _UNSEEN_SECONDS), catalog.folder, request.query_params))


def _shown(catalog: Catalog, request: Request) -> Response:
    one = _run(catalog, request)
    complete = one.read(time.monotonic() + _SECONDS)
    return _html(run_page(one, request.query_params, complete))


def _compared(catalog: Catalog, request: Request) -> Response:
    names = list(dict.fromkeys(request.query_params.getlist("run")))[:MOST]
    deadline = time.monotonic() + _SECONDS
    chosen = catalog.chosen(names)
    complete = all([one.read(deadline) for one in chosen])
    missing = [name for name in names if name not in {one.name for one in chosen}]
    return _html(compare_page(chosen, missing, request.query_params, complete))


def _report(catalog: Catalog, request: Request) -> Response:
    return _file(_run(catalog, request).run.report, "text/html")


def _picture(catalog: Catalog, request: Request) -> Response:
    path = picture_file(_run(catalog, request).run, request.query_params.get("file", ""))
    if path is None or path.suffix not in PICTURES:
        raise HTTPException(404)
    return _file(path, PICTURES[path.suffix])


def _run(catalog: Catalog, request: Request):
    name = request.path_params["name"]
    for one in catalog.chosen([name]):
        return one
    raise HTTPException(404, f"There is no run {name}")


def _file(path: Path, kind: str) -> Response:
    if not path.is_file() or path.is_symlink():
        raise HTTPException(404)
    return FileResponse(path, media_type=kind, headers=_SHOWN_ONLY)


def _html(text: str, status: int = 200) -> Response:
    return HTMLResponse(text, status, {
        "Content-Security-Policy": access.policy(script(), images="'self' data:", forms="'self'"),
        "Referrer-Policy": "same-origin", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
    })  # fmt: skip


# ---- refusals


def _refused(refusal: Refusal) -> Response:
    """A refusal by `access.Access`: where the token is missing, a form that asks for it."""
    asks = refusal.status == 401
    form = ('<form class="tools" method="post" action="/enter"><label>token <input type="password" name="token" '
            'required autofocus autocomplete="current-password"></label> <button>Enter</button></form>')  # fmt: skip
    body = f"<h1>{'This server wants its token' if asks else 'Not here'}</h1>"
    body += form if asks else f"<p>{escape(refusal.message)}</p>"
    return _html(page("aurora watch", body, live=False), refusal.status)


async def _entered(request: Request, token: str | None) -> Response:
    """A right token becomes a cookie, which scripts cannot read and other sites cannot send."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > _TOKEN_BYTES:
            break
    given = parse_qs(content.decode("utf-8", "replace")).get("token", [""])[0]
    if token is None or not access.is_token(given, token):
        body = '<h1>This is not the server\'s token</h1><p><a href="/">Try again</a></p>'
        return _html(page("aurora watch", body, live=False), 401)
    answer = RedirectResponse("/", 303)
    answer.set_cookie(_COOKIE, access.cookie_of(token), max_age=_COOKIE_SECONDS, httponly=True, samesite="lax")
    return answer


async def _absent(request: Request, error: HTTPException) -> Response:
    text = "There is nothing at this address" if error.detail == "Not Found" else error.detail
    body = f'<h1>{escape(text)}</h1>\n<p><a href="/">All runs</a></p>'
    return _html(page("aurora watch", body), error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    body = f"<h1>This page failed: {escape(type(error).__name__)}</h1>\n<p>The server's output has the traceback.</p>"
    return _html(page("aurora watch", body), 500)
