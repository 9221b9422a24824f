"""What `/metrics` tells, in Prometheus's text format. Times are seconds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from aurora_train.machine.memory import process_memory

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Measures:
    """Counts and times of one server. Its methods may be called from any thread."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, slots: int):
        self._registry = kept = CollectorRegistry()
        self.requests = Counter("aurora_requests", "Requests by path and status.", ["path", "status"], registry=kept)
        self.answers = Counter("aurora_answers", "Answers by what ended them.", ["reason"], registry=kept)
        self.prompt_tokens = Counter("aurora_prompt_tokens", "Tokens of prompts taken on.", registry=kept)
        self.drawn_tokens = Counter("aurora_completion_tokens", "Tokens drawn.", registry=kept)
        self.first = Histogram("aurora_first_token_seconds", "From a request to its first token.", buckets=_FIRST,
                               registry=kept)  # fmt: skip
        self.next = Histogram("aurora_next_token_seconds", "From a token of an answer to the one after it.",
                              buckets=_NEXT, registry=kept)  # fmt: skip
        self.open = Gauge("aurora_answers_open", "Answers that are being written, or wait for a slot.", registry=kept)
        Gauge("aurora_slots", "Answers that are written at the same time.", registry=kept).set(slots)
        self._memory = Gauge("aurora_resident_bytes", "Memory of this process.", registry=kept)

    def text(self) -> bytes:
        """All of it, as it is now."""
        self._memory.set(process_memory()["resident"])
        return generate_latest(self._registry)
