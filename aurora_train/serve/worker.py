"""The thread in which the engine decodes, and the way from a request to it and back.

Requests live in the event loop of the server, the engine in this thread alone; what the engine has to say is handed to
the loop. Whatever ends an answer gives back its slot: its last token, a client that leaves, the end of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from aurora_train.serve.measures import Measures
from aurora_train.serve.refusal import Refusal

_RETRY_AFTER = {"Retry-After": "1"}  # seconds
_IDLE_SECONDS = 1.0


class Event(NamedTuple):
    """What happened to one answer of a request: a token, or its end ("stop", "length", or "closed" by the server)."""

    answer: int
    token: Any = None
    reason: str | None = None


class Worker:
    """Decodes from `start` until `close`.

    Args:
        engine: a `generate.engine.Engine` of `slots` slots.
        steering: makes the context in which the engine traces its programs.
        waiting: how many answers may wait for a slot.
        failed: called in the thread if the engine fails, which ends the server.
    """

    def __init__(self, engine, slots: int, waiting: int, measures: Measures,
                 steering: Callable[[], contextlib.AbstractContextManager], failed: Callable[[], None]):  # fmt: skip
        self.slots, self.most, self.measures = slots, slots + waiting, measures
        self._engine, self._steering, self._failed = engine, steering, failed
        self._lock, self._wake, self._open = threading.Lock(), threading.Event(), set()
        self._closing, self.fault = False, None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._closing

    def take(self, requests: Sequence[Any]) -> Exchange:
        """Queue the answers of one HTTP request; called in the event loop.

        Raises Refusal if too many answers wait already, and UserError for a request that the engine refuses.
        """
        if len(requests) > self.most:
            raise Refusal(f"{len(requests)} answers in one request; {self.most} are the most here", "n")
        with self._lock:
            if not self.healthy:
                raise Refusal("the server is ending", code="shutting_down", status=503, headers=_RETRY_AFTER)
            if sum(len(one.unfinished) for one in self._open) + len(requests) > self.most:
                raise Refusal(f"all {self.slots} slots are taken, and as many answers wait as may; try again later",
                              code="server_busy", status=429, headers=_RETRY_AFTER)  # fmt: skip
            exchange = Exchange(self, len(requests))
            self._open.add(exchange)
            self._count()
        try:
            for answer, request in enumerate(requests):
                exchange.tickets.append(self._engine.submit(request, exchange.listener(answer)))
        except BaseException:
            self.leave(exchange)
            raise
        self._wake.set()
        return exchange

    def leave(self, exchange: Exchange) -> None:
        """Give back what an exchange still holds."""
        with self._lock:
            left = sorted(exchange.unfinished)
            exchange.unfinished.clear()
            self._open.discard(exchange)
            self._count()
        for answer in left:  # without the lock, which the engine's own calls take
            self.measures.answers.labels("left").inc()
            if answer < len(exchange.tickets):
                self._engine.cancel(exchange.tickets[answer])
        self._wake.set()

    def cancel(self, exchange: Exchange, answer: int) -> None:
        """End one answer, which has reached a stop."""
        self.ended(exchange, answer, "stop")
        self._engine.cancel(exchange.tickets[answer])
        self._wake.set()

    def ended(self, exchange: Exchange, answer: int, reason: str) -> bool:
        """Note an end; whether it was not ended before."""
        with self._lock:
            if answer not in exchange.unfinished:
                return False
            exchange.unfinished.discard(answer)
            if not exchange.unfinished:
                self._open.discard(exchange)
            self._count()
        self.measures.answers.labels(reason).inc()
        return True

    def _count(self) -> None:
        self.measures.open.set(sum(len(one.unfinished) for one in self._open))

    def _run(self) -> None:
        try:
            with self._steering():
                while not self._closing:
                    if not self._engine.advance():
                        self._wake.wait(_IDLE_SECONDS)
                        self._wake.clear()
        except BaseException as error:  # also a device out of memory: whoever waits must not wait forever
            self.fault = error
            self._failed()
        finally:
            self._end_all()

    def _end_all(self) -> None:
        self._closing = True
        with self._lock:
            exchanges, self._open = list(self._open), set()
        for exchange in exchanges:
            for answer in sorted(exchange.unfinished):
                exchange.put(Event(answer, None, "closed"))

    def close(self) -> None:
        """End all answers, and the thread after its current step."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()


class Exchange:
    """The answers of one HTTP request while they are written. Made and read in the event loop."""

    def __init__(self, worker: Worker, count: int):
        self.tickets: list[Any] = []
        self.unfinished = set(range(count))
        self._worker, self._queue, self._loop = worker, asyncio.Queue(), asyncio.get_running_loop()
        self._began = time.perf_counter()

    def put(self, event: Event) -> None:
        """Hand an event to the loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def listener(self, answer: int) -> Callable[[Any, str | None], None]:
        """What the engine calls, in its thread, with each token of an answer and with its end."""
        measures, last = self._worker.measures, None

        def listen(token, reason: str | None) -> None:
            nonlocal last
            if token is not None:
                now = time.perf_counter()
                (measures.first if last is None else measures.next).observe(now - (last or self._began))
                measures.drawn_tokens.inc()
                last = now
                self.put(Event(answer, token))
            if reason is not None and reason != "cancelled" and self._worker.ended(self, answer, reason):
                self.put(Event(answer, None, reason))

        return listen

    async def events(self) -> AsyncIterator[Event]:
        """Tokens and ends as they come, until every answer has ended; `stop` ends one before that."""
        self._left = set(self.unfinished)
        while self._left:
            event = await self._queue.get()
            if event.answer in self._left:
                if event.reason is not None:
                    self._left.discard(event.answer)
                yield event

    def stop(self, answer: int) -> None:
        """End an answer that has reached a stop; no event of it follows."""
        self._left.discard(answer)
        self._worker.cancel(self, answer)

    def leave(self) -> None:
        """Give back all slots: the client is gone, or has all it asked for."""
        self._worker.leave(self)
