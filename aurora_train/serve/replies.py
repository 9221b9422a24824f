"""From the engine's events to the answer of a request: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from aurora_train.errors import UserError
from aurora_train.serve import calls
from aurora_train.serve.answers import joined, usage
from aurora_train.serve.refusal import Refusal
from aurora_train.serve.tasks import Service, Task
from aurora_train.serve.worker import Exchange
from aurora_train.serve.written import Piece, Written

log = logging.getLogger("aurora_train")
_CLOSED = Refusal("the server is ending, and this answer is not complete", code="shutting_down", status=503,
                  headers={"Retry-After": "1"})  # fmt: skip


async def answered(service: Service, request: Request, task: Task) -> Response:
    """The answer to a request, once the engine has taken it. Refusal if it has no room for it."""
    exchange = service.worker.take(task.requests)
    service.measures.prompt_tokens.inc(sum(map(len, task.prompts)))
    if task.asked.stream:
        return _EventStream(_streamed(service, task, exchange), exchange)
    gone = asyncio.ensure_future(_until_gone(request))
    whole = asyncio.ensure_future(_whole(service, task, exchange))
    try:
        await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise ClientDisconnect()
        return JSONResponse(whole.result())
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    finally:
        exchange.leave()
        for one in (gone, whole):
            one.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(service: Service, task: Task, exchange: Exchange) -> dict:
    answers = task.written(service.speaker)
    pieces, choices = [[] for _ in answers], [None] * len(answers)
    for index, text in enumerate(task.echoed):
        pieces[index].append(Piece(text, []))
    async for index, piece, reason in _progress(task, exchange, answers):
        pieces[index].append(piece)
        if reason is not None:
            last, reason, made = _end(task, answers[index], reason)
            choices[index] = task.form.whole(index, joined([*pieces[index], last]), reason, made)
    drawn = sum(answer.count for answer in answers)
    return task.form.envelope(choices, usage(task.prompts, drawn), chunk=False)


async def _streamed(service: Service, task: Task, exchange: Exchange) -> AsyncIterator[str]:
    """Server-sent events: chunks, the usage if asked for, [DONE]; an `error` chunk for what is not to be completed."""
    answers, form = task.written(service.speaker), task.form

    def chunk(choices: list, told: dict | None = None) -> str:
        return _event(form.envelope(choices, told, chunk=True))

    try:
        for index in range(len(answers)):
            if (opening := form.first(index)) is not None:
                yield chunk([opening])
        for index, text in enumerate(task.echoed):
            yield chunk([form.more(index, Piece(text, []))])
        async for index, piece, reason in _progress(task, exchange, answers):
            if piece.text or piece.tokens:
                yield chunk([form.more(index, piece)])
            if reason is not None:
                last, reason, made = _end(task, answers[index], reason)
                yield chunk([form.more(index, last, reason, made)])
        if task.asked.stream_options and task.asked.stream_options.include_usage:
            yield chunk([], usage(task.prompts, sum(answer.count for answer in answers)))
        yield "data: [DONE]\n\n"
    except Refusal as refusal:
        yield _event(refusal.body())


async def _progress(task: Task, exchange: Exchange, answers: list[Written]):
    """(answer, piece of it, reason if it has ended) as they come."""
    async with contextlib.aclosing(exchange.events()) as events:
        async for event in events:
            answer = answers[event.answer]
            if event.reason == "closed":
                raise _CLOSED
            if event.reason == "failed":
                raise _failed(exchange.fault(event.answer))
            if event.token is None:
                yield event.answer, answer.close(), event.reason
                continue
            piece = answer.add(event.token)
            if answer.stopped:
                exchange.stop(event.answer)
            yield event.answer, piece, "stop" if answer.stopped else None


def _failed(fault: Exception | None) -> Refusal:
    """What a client reads of an answer that failed. The log has the traceback, and other answers go on."""
    log.error("an answer failed", exc_info=fault)
    said = fault.what if isinstance(fault, UserError) else type(fault).__name__
    return Refusal(f"this answer failed: {said}", code="answer_failed", status=500)


def _end(task: Task, answer: Written, reason: str) -> tuple[Piece, str, list | None]:
    """(what is still to be shown, the reason as OpenAI names it, the calls of tools)."""
    if faults := [one.fault for one in task.constraints if one.fault]:
        raise Refusal(f"the answer could not be kept to its form: {faults[0]}", "response_format", status=500)
    if not answer.calls:
        return Piece("", []), reason, None
    made = calls.read(answer.calls, task.tools)
    if made is None:  # cut short, or not what it set out to be: then it is what it is, a text
        return Piece(answer.calls, []), reason, None
    return Piece("", []), "tool_calls", made


class _EventStream(StreamingResponse):
    """A stream that gives back its slots however it ends, also if it never begins."""

    def __init__(self, events: AsyncIterator[str], exchange: Exchange):
        super().__init__(events, media_type="text/event-stream",
                         headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})  # fmt: skip
        self._exchange = exchange

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.leave()
            await self.body_iterator.aclose()


def _event(document: dict) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
