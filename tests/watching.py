"""Runs in every state, `aurora watch` of them in this process, and the plainest client."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import math
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

from tools.folders import make

from aurora_train.record.metrics import EventLog, MetricsLog
from aurora_train.serve.address import Address
from aurora_train.watch.server import Watching

TOKEN = "a-token-of-24-characters"
SCORES = {"headline": "bits_per_byte", "better": "min", "score": {"bits_per_byte": 1.625}, "step": 60,
          "baselines": {"xz": 1.819}}  # fmt: skip
GIF = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff!\xf9\x04\x00\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"  # noqa: E501


def step(number: int, **more) -> dict:
    """A record of a training step with all that a log point has."""
    return {
        "step": number, "loss": 2 + 4 / number, "grad_norm": 1 + 0.1 * math.sin(number), "lr": 1e-3, "skipped": 0,
        "tokens": 4096, "tokens_per_s": 39000.0, "mfu": 0.41, "data_wait": 0.013, "seconds": 2.0 * number,
        "memory_bytes": 61_000_000_000, "time": 1.79e9 + 2 * number, "watts": 131.0, "tokens_per_joule": 29.5,
        "total_joules": 275.0 * number, **more,
    }  # fmt: skip


def trained(folder: Path, done: int, steps: int, lr: float = 0.01, last: str | None = None, **more) -> Path:
    """A run whose log has all that a log point has; `last` is the event that ended it: None: it was killed."""
    make(folder, done=0, steps=steps, lr=lr, score=None, recipe="language_model")
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).unlink()
    with MetricsLog(folder / "metrics.jsonl") as log, EventLog(folder / "events.jsonl") as events:
        events.event("start", 0)
        for number in range(1, done + 1):
            log.write(step(number, **more))
            if number % 10 == 0:
                log.write({"step": number, "evaluation": {"loss": 2.1 + 4 / number, "accuracy": number / steps}})
                events.event("save", number)
        events.event("resume", 20)
        if last:
            events.event(last, done, **({"by": "SIGTERM"} if last == "stop" else {}))
    (folder / "checkpoints" / str(done)).mkdir(exist_ok=True)
    (folder / "checkpoints" / str(done) / "manifest.aurora.json").write_text("{}")
    return folder


def make_runs(top: Path) -> None:
    """One run of every kind that there is in a folder of runs, whole, damaged and foreign."""
    trained(top / "night", 40, 60)  # nobody holds it: killed
    trained(top / "day", 30, 60, lr=0.02)  # to be held
    trained(top / "stopped", 30, 60, lr=0.03, last="stop")
    done = trained(top / "sweep" / "lr=0.1", 60, 60, lr=0.1, last="finish")
    (done / "scores.json").write_text(json.dumps(SCORES))
    (done / "samples").mkdir()
    sample = [{"prompt": "<script>alert(1)</script>", "text": "<img src=x onerror=alert(2)>"}]
    (done / "samples" / "step-60.json").write_text(json.dumps(sample))
    (done / "report.html").write_text("<h1>report</h1><script>parent.ran = 1</script>")
    arm = make(top / "arm", recipe="robot", score=("success", 0.98))
    (arm / "work").mkdir()
    (arm / "work" / "rollout-0.gif").write_bytes(GIF)
    (arm / "work" / "unlisted.gif").write_bytes(GIF)
    (arm / "work" / "link.gif").symlink_to(done / "config.yaml")
    plots = [{"title": "Seed 0", "file": "rollout-0.gif"}, {"title": "Stolen", "file": "link.gif"},
             {"title": "Error", "x_label": "s", "y_label": "m", "series": {"ours": [[0, 1], [0.5, 1.5]]}}]  # fmt: skip
    (arm / "plots.json").write_text(json.dumps(plots))
    (make(top / "unreadable") / "config.yaml").write_bytes(b"\xff{{{\n")
    foreign = make(top / "foreign")
    (foreign / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 2.5}\n[1]\n\x00\x00\n{"step": "x", "loss": {}}\n{"step": true, "loss": 1}\n'
        b'{"step": 2, "loss": "NaN", "huge": ' + b"9" * 400 + b', "evaluation": 3}\n{"step": 3, "loss": 1.5}\n'
        b'{"step": 4'
    )
    (foreign / "events.jsonl").write_bytes(b'\xff\n{"event": 3}\n{"event": "skip", "step": "no"}\n')
    for name, content in (("scores.json", '{"headline": "x", "score": {"x": "<b>"}}'), ("plots.json", '{"a": 1}')):
        (foreign / name).write_text(content)
    (foreign / "samples").mkdir()
    (foreign / "samples" / "step-1.json").write_text("{")
    (top / "failed").mkdir()
    (top / "failed" / ".lock").touch()
    (top / "notes").mkdir()  # no run


@contextlib.contextmanager
def held(folder: Path):
    """A run as a process that trains it holds it."""
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Answer(NamedTuple):
    status: int
    text: str
    headers: dict[str, str]


class Browser:
    """Asks one server, as a browser that runs no script; `headers` go with every request."""

    def __init__(self, url: str, **headers: str):
        self.url, self.headers = url, headers

    def __call__(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.url.partition("//")[2], timeout=60)
        try:
            connection.request(method, path, body, self.headers | headers)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, response.read().decode(errors="replace"), found)
        finally:
            connection.close()

    def whole(self, path: str) -> str:
        """A page, asked for until nothing is left to read."""
        for _ in range(100):
            answer = self(path)
            assert answer.status == 200, answer.text
            if "data-again" not in answer.text:
                return answer.text
        raise AssertionError("never read to the end")

    def run(self, name: str, **query: str) -> str:
        return self.whole(f"/run/{quote(name)}?{urlencode(query)}")


@contextlib.contextmanager
def watching(folder: Path | None, token: str | None = None):
    """A browser of a server that watches a folder."""
    with contextlib.closing(Watching(folder, Address(token=token))) as server:
        yield Browser(server.url)
