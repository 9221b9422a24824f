"""How long the page of `aurora watch` takes over many long runs: until it is painted, and to be brought up to date.

    python benchmarks/watch.py [--runs 100] [--steps 100000] [--folder DIR] [--rounds 7] [--page list]

Writes the runs into DIR (kept, if it is named; 17 MB a run of 100,000 steps), starts the server as a process of its
own, and asks in turns for the list, the page of one run and the comparison of eight: first by a server that has just
started, then again and again while one of the runs takes a step before each request. Times to an answer are a client's
over HTTP; with Chromium, time to the first paint is the browser's own (`first-contentful-paint`), and a refresh the
time of the page's own function, from asking to the changed page. The processor time of the server is taken too: where
other work runs on the machine, it says what a quiet one would take.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil

from aurora_train.machine.profile import cpu_model
from aurora_train.record.metrics import encode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import browser  # noqa: E402

CONFIG = Path(__file__).parents[1] / "tests" / "config" / "golden" / "language-quickstart.yaml"
LOG_EVERY, EVALUATE_EVERY = 10, 1000
FRESH = 3  # servers of which the first paint is taken
PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def record(step: int, steps: int, draw: random.Random) -> bytes:
    """A line of metrics.jsonl as a language model's training writes it."""
    loss = 2.2 + 6.5 * math.exp(-8 * step / steps) + draw.gauss(0, 0.1)
    made = {"step": step, "loss": loss, "grad_norm": abs(draw.gauss(1, 0.2)), "lr": 3e-4 * (1 - step / (2 * steps)),
            "skipped": 0, "tokens": 8192}  # fmt: skip
    if step % LOG_EVERY == 0:
        made |= {"tokens_per_s": draw.gauss(39e3, 1e3), "mfu": 0.41, "hfu": 0.44, "data_wait": abs(draw.gauss(0, 0.01)),
                 "seconds": 0.21 * step, "memory_bytes": 61_000_000_000 + step, "time": 1.79e9 + 0.21 * step,
                 "watts": draw.gauss(130, 3), "joules_per_step": 27.3, "tokens_per_joule": draw.gauss(300, 5),
                 "total_joules": 27.3 * step}  # fmt: skip
    return encode(made)


def write_runs(folder: Path, runs: int, steps: int) -> None:
    """Runs of which the first four have logs of their own, and the others copies of these."""
    for number in range(runs):
        run = folder / f"run-{number:03d}"
        run.mkdir(parents=True)
        text = CONFIG.read_text().replace("  steps: 600\n", f"  steps: {2 * steps}\n")
        (run / "config.yaml").write_text(text.replace("  seed: 0\n", f"  seed: {number}\n"))
        (run / "events.jsonl").write_bytes(
            encode({"event": "start", "step": 0}) + encode({"event": "stop", "step": 0, "by": "SIGTERM"}))
        if number >= 4:
            shutil.copyfile(folder / f"run-{number % 4:03d}" / "metrics.jsonl", run / "metrics.jsonl")
            continue
        draw = random.Random(number)
        with open(run / "metrics.jsonl", "wb") as log:
            for step in range(1, steps + 1):
                log.write(record(step, 2 * steps, draw))
                if step % EVALUATE_EVERY == 0:
                    log.write(encode({"step": step, "evaluation": {"loss": 2.3 + 3 * math.exp(-8 * step / steps)}}))


class Server:
    """`aurora watch` of a folder, as a process; `seconds` of its processor time so far."""

    def __init__(self, folder: Path):
        command = [sys.executable, "-m", "aurora_train", "watch", str(folder), "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        text = ""
        while not text.rstrip().endswith("}"):
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start")
            text += line
        self.url = json.loads(text)["url"]
        self._about = psutil.Process(self.process.pid)

    @property
    def seconds(self) -> float:
        times = self._about.cpu_times()
        return times.user + times.system

    @property
    def memory_mb(self) -> float:
        return self._about.memory_info().rss / 1e6

    def ask(self, path: str) -> tuple[float, bytes, float]:
        """(seconds to the last byte, the answer, processor seconds of the server)."""
        connection = http.client.HTTPConnection(self.url.partition("//")[2])
        before, began = self.seconds, time.perf_counter()
        connection.request("GET", path)
        response = connection.getresponse()
        content = response.read()
        return time.perf_counter() - began, content, self.seconds - before

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def until_complete(server: Server, path: str) -> tuple[float, int]:
    """(seconds, requests) until nothing is left to read."""
    began, asked = time.perf_counter(), 0
    while True:
        asked += 1
        connection = http.client.HTTPConnection(server.url.partition("//")[2])
        connection.request("GET", path)
        if b"data-again" not in connection.getresponse().read():
            return time.perf_counter() - began, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--page", action="append", choices=("list", "run", "compare"))
    parser.add_argument("--no-browser", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "runs"
        if not folder.exists():
            write_runs(folder, options.runs, options.steps)
        size = sum(path.stat().st_size for path in folder.rglob("metrics.jsonl"))
        print(f"{date.today()}, {cpu_model()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
              f"{options.runs} runs of {options.steps:,} steps, {size / 1e9:.2f} GB of logs")  # fmt: skip
        together = "&".join(f"run=run-{number:03d}" for number in range(min(options.runs, 8)))
        pages = {"list": "/", "run": "/run/run-000?smooth=2", "compare": f"/compare?{together}&smooth=2"}
        for name in options.page or pages:
            measure(name, pages[name], folder, options)


def measure(name: str, path: str, folder: Path, options) -> None:
    server, draw = Server(folder), random.Random(0)
    try:
        first = server.ask(path)
        waiting = first[1].count(b">reading</span>")
        print(f"{name}: first answer {1e3 * first[0]:.0f} ms, of the processor {1e3 * first[2]:.0f} ms; "
              f"{len(first[1]) / 1e3:.0f} kB, {waiting} runs not looked at yet")  # fmt: skip
        seconds, asked = until_complete(server, path)
        print(f"  everything read after another {seconds:.1f} s in {asked} requests; {server.memory_mb:.0f} MB")
        times = []
        for turn in range(options.rounds):
            with open(folder / "run-000" / "metrics.jsonl", "ab") as log:
                log.write(record(options.steps + LOG_EVERY * (turn + 1), 2 * options.steps, draw))
            times.append(server.ask(path))
        last, used = statistics.median(t[0] for t in times), statistics.median(t[2] for t in times)
        print(f"  refresh over HTTP: median {1e3 * last:.0f} ms, of the processor {1e3 * used:.0f} ms "
              f"(to 10 ms), {len(times[-1][1]) / 1e3:.0f} kB")  # fmt: skip
    finally:
        server.close()
    if browser.FOUND and not options.no_browser:
        in_browser(path, folder, options)


def in_browser(path: str, folder: Path, options) -> None:
    paints = []
    for _ in range(FRESH):
        server = Server(folder)
        try:
            with browser.page() as page:
                page.go(server.url + "/health")  # the browser is open, and has not seen a run
                page.go(server.url + path, width=1440, height=900)
                page.wait(f"{PAINT} > 0")
                paints.append(page.js(PAINT))
                if len(paints) == FRESH:
                    times = refreshes(page, folder, options)
        finally:
            server.close()
    for what, found in ((f"first paint, of {FRESH} servers that have just started", paints), ("refresh", times)):
        print(f"  Chromium: {what}: median {statistics.median(found):.0f} ms ({min(found):.0f} to {max(found):.0f})")


def refreshes(page, folder: Path, options) -> list[float]:
    """Milliseconds of each."""
    page.wait("!document.querySelector('main').dataset.again", 300)
    times, draw = [], random.Random(1)
    for turn in range(options.rounds):
        with open(folder / "run-000" / "metrics.jsonl", "ab") as log:
            log.write(record(2 * options.steps + LOG_EVERY * (turn + 1), 4 * options.steps, draw))
        times.append(page.js("(async () => { const began = performance.now(); await refresh();"
                             " return performance.now() - began; })()"))  # fmt: skip
    return times


if __name__ == "__main__":
    main()
