"""`Server`: a loaded model behind HTTP, from its first compilation until its last answer has ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aurora_train.errors import UserError
from aurora_train.serve.address import Address
from aurora_train.serve.http import Http, refuse_missing
from aurora_train.units import counted

PACKAGES = ("starlette", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
        name: the model's name in the protocol.
        slots, waiting: answers that are written at the same time, and that may wait for a slot.
        length: the most tokens of a prompt and its answer; None: as many as the model was made for, at most `_LENGTH`.
        memory: the most bytes that it may take, such as "8GB"; None: what it needs.
        weights: how the weights are held: "float32", "bfloat16", "int8", "nf4", or None: as the run computes.
        template: the text of a chat template that replaces the model's own.
        hosts: further names by which clients may call the server.
    """

    name: str
    slots: int = 8
    waiting: int = 64
    length: int | None = None
    memory: str | None = None
    weights: str | None = None
    template: str | None = None
    hosts: Sequence[str] = ()


_LENGTH, _CHUNK = 4096, 256


class Server:
    """Listens from its construction until `close`.

    Args:
        trained: a `loading.Loaded`, whose model and state are taken from it.
        address: where to listen.

    Raises UserError for a recipe that writes no texts, without room (`room`), and if it cannot listen there; and
    MissingExtra without starlette and uvicorn.
    """

    def __init__(self, trained: Any, settings: Settings, address: Address):
        refuse_missing(*PACKAGES, by="aurora serve")
        from aurora_train.serve import access
        from aurora_train.serve.app import application

        self._ended = threading.Event()
        with contextlib.ExitStack() as undo:
            self._http = undo.enter_context(contextlib.closing(Http(address)))
            service = _service(trained, settings, self._ended.set)
            hosts = access.names(address.host, settings.hosts)
            app = application(service, address.token, hosts)
            undo.pop_all()
        self.name, self.converses, self._worker = settings.name, service.speaker.converses, service.worker
        self.slots_in_words = f"{counted(settings.slots, 'slot')} of {service.length:,} tokens"
        self._worker.start()
        self._http.start(app)

    @property
    def url(self) -> str:
        """Where it listens: `http://HOST:PORT`."""
        return self._http.url

    def run(self, stop: threading.Event) -> None:
        """Wait for `stop`. Raises what made the engine fail, if it fails before."""
        while not stop.wait(0.2):
            if self._ended.is_set() or not self._http.is_alive:
                raise self._worker.fault or RuntimeError("the HTTP server has ended")

    def close(self) -> None:
        """Accept nothing more, end all answers with a reason, and wait until they are sent."""
        self._http.end()
        self._worker.close()
        self._http.close()


def _service(trained: Any, settings: Settings, failed: Callable[[], None]):
    from aurora_train.nn.tracing import tracing
    from aurora_train.serve.constrained import Grammars
    from aurora_train.serve.measures import Measures
    from aurora_train.serve.tasks import Service
    from aurora_train.serve.worker import Worker

    def steering():
        return tracing(forms=trained.config.train.forms)

    speaker = trained.recipe.speaker(settings.template)
    length = settings.length or min(speaker.longest or _LENGTH, _LENGTH)
    if speaker.longest is not None and length > speaker.longest:
        raise UserError(f"the model was made for {speaker.longest:,} tokens", where=f"--length {length}",
                        hint=f"--length {speaker.longest}, or less")  # fmt: skip
    with steering():
        engine = _engine(trained, settings, length)
    measures = Measures(settings.slots)
    worker = Worker(engine, settings.slots, settings.waiting, measures, steering, failed)
    return Service(settings.name, int(time.time()), speaker, engine.length, worker, measures, Grammars(speaker))


def _engine(trained: Any, settings: Settings, length: int):
    """The engine, all of whose programs are compiled; those for a prompt that a model with a prefix mask reads at once,
    and that is longer than a chunk, are when they are needed. UserError without room, and for a model whose scores are
    not finite."""
    from aurora_train.generate.engine import Engine, planned_bytes
    from aurora_train.generate.requests import Request, Sampling
    from aurora_train.generate.weights import decoded
    from aurora_train.machine.memory import give_back_freed
    from aurora_train.machine.profile import this_machine
    from aurora_train.serve.room import refuse_without

    model = decoded(trained.model, settings.weights)
    trained.model = trained.state = None  # the units were copied, and are not to be held twice
    give_back_freed()
    planned = planned_bytes(model.model, settings.slots, length)
    refuse_without(planned["weights"] + planned["caches"] + planned["rest"], settings.memory, this_machine())
    engine = Engine(model, settings.slots, length, _CHUNK)
    penalised = Sampling(repetition_penalty=1.1)
    asked = [Request((0,) * min(size, engine.length - 2), 2, penalised) for size in engine.sizes]
    asked.append(Request((0,), 2, logprobs=0, allow=lambda drawn: np.ones(engine.vocabulary, bool)))
    tickets = [engine.submit(request, lambda token, reason: None) for request in asked]
    while engine.advance():
        pass
    for ticket in tickets:
        ticket.check()
    give_back_freed()  # what compiling took
    return engine
