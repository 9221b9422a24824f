"""The HTTP side of `aurora serve`: OpenAI's routes, a chat page, `/health` and `/metrics`.

A request is read (`requests`) and made into a task for the engine (`tasks`), whose events become the answer
(`replies`). Errors have OpenAI's form wherever they arise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from aurora_train.errors import UserError
from aurora_train.serve import access, tasks
from aurora_train.serve.measures import Measures
from aurora_train.serve.refusal import Refusal
from aurora_train.serve.replies import answered
from aurora_train.serve.requests import parsed
from aurora_train.serve.tasks import Service, Task


def application(service: Service, token: str | None, hosts: set[str]) -> Starlette:
    """The ASGI application. `hosts`: see `access.Access`."""
    page, policy = _page()

    def told(path: str, task: Callable[[Service, dict], Task]):
        async def endpoint(request: Request) -> Response:
            body = await _body(request)
            return await answered(service, request, await run_in_threadpool(task, service, body))

        return Route(path, endpoint, methods=["POST"])

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        tasks.refuse_other(service, request.path_params["name"])
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        healthy = service.worker.healthy
        return JSONResponse({"status": "ok" if healthy else "ending"}, 200 if healthy else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.measures.text(), headers={"content-type": service.measures.content_type})

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    return Starlette(
        routes=[
            Route("/", index), Route("/health", health), Route("/metrics", metrics),
            Route("/v1/models", models), Route("/v1/models/{name:path}", model),
            told("/v1/chat/completions", tasks.chat), told("/v1/completions", tasks.completion),
        ],
        middleware=[
            Middleware(_Counted, measures=service.measures), Middleware(access.Access, token=token, hosts=hosts),
        ],
        exception_handlers={Refusal: _refused, UserError: _refused, HTTPException: _refused, Exception: _refused},
    )  # fmt: skip


class _Counted:
    """ASGI middleware that counts requests by path and status."""

    _known = {"/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"}

    def __init__(self, app, measures: Measures):
        self._app, self._measures = app, measures

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._known else "other"

        async def counting(message):
            if message["type"] == "http.response.start":
                self._measures.requests.labels(path, str(message["status"])).inc()
            await send(message)

        return await self._app(scope, receive, counting)


def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, UserError):
        error = Refusal.of(error)
    elif isinstance(error, HTTPException):
        what = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} takes no {request.method}"}
        error = Refusal(what.get(error.status_code, error.detail), status=error.status_code,
                        headers=dict(error.headers or {}))  # fmt: skip
    elif not isinstance(error, Refusal):
        error = Refusal(f"the server failed: {type(error).__name__}", status=500)  # starlette logs the traceback
    return access.answer(error)


def _page() -> tuple[str, str]:
    """(the chat page, the policy that lets it run its own script and reach nothing but this server)."""
    page = resources.files("aurora_train.serve").joinpath("page.html").read_text()
    script = re.search("<script>(.*?)</script>", page, re.DOTALL)[1]
    return page, access.policy(script)


def _model(service: Service) -> dict[str, Any]:
    """What `/v1/models` tells; the last three are no fields of OpenAI's."""
    about = {name: value for name, value in service.speaker.about.items() if value is not None}
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "aurora_train", **about,
            "context_length": service.length, "chat": service.speaker.converses}  # fmt: skip


async def _body(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal("send JSON, and say so: Content-Type: application/json", status=415)
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > access.LONGEST_BYTES:
            raise Refusal(f"a request has at most {access.LONGEST_BYTES >> 20} MiB", status=413)
    return parsed(bytes(content))
