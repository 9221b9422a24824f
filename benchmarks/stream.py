"""How long `aurora stream` takes for a bin of spikes: the server's own latency, and the round trip of its client.

    python benchmarks/stream.py RUN [--bins 3000] [--period-ms 20]

RUN is a finished run of neural/decoding. The server is a process of its own on a Unix socket; random counts are sent,
one bin every `--period-ms` as a rig does, or with 0 each as soon as the one before is answered. The first 50 bins do
not count in the round trip.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from aurora_train.machine.profile import cpu_model

UNCOUNTED = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--bins", type=int, default=3000)
    parser.add_argument("--period-ms", type=float, default=20.0)
    options = parser.parse_args()
    units = json.loads((options.run / "facts" / "facts.json").read_text())["units"]["value"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "stream.sock"
        command = [sys.executable, "-m", "aurora_train", "stream", str(options.run), "--socket", str(place), "--json"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            took_ms = asked(connected(place, server), units, options.bins, options.period_ms / 1000)
        finally:
            server.send_signal(signal.SIGTERM)
            said, _ = server.communicate(timeout=60)
    found = json.loads(said)
    p50, p99 = np.percentile(took_ms[UNCOUNTED:], (50, 99))
    print(f"{options.bins} bins, {units} units, one in {options.period_ms:g} ms; {os.cpu_count()} cores, {cpu_model()}")
    print(f"server      p50 {found['latency_ms_p50']:.2f} ms  p99 {found['latency_ms_p99']:.2f} ms")
    print(f"round trip  p50 {p50:.2f} ms  p99 {p99:.2f} ms  longest {took_ms[UNCOUNTED:].max():.2f} ms")


def connected(place: Path, server) -> socket.socket:
    """A connection, once the server listens."""
    while server.poll() is None:
        try:
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(place))
            return client
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"the server ended with status {server.returncode}")


def asked(client: socket.socket, units: int, bins: int, period_s: float) -> np.ndarray:
    """Milliseconds from the sending of each bin to the last byte of its answer."""
    lines, rng, took_ms = client.makefile("rwb"), np.random.default_rng(0), []
    due = time.perf_counter()
    for _ in range(bins):
        request = json.dumps({"spikes": rng.poisson(0.2, units).tolist()}).encode() + b"\n"
        due += period_s
        time.sleep(max(due - time.perf_counter(), 0.0))
        began = time.perf_counter()
        lines.write(request)
        lines.flush()
        answer = json.loads(lines.readline())
        took_ms.append(1000 * (time.perf_counter() - began))
        assert len(answer["velocity"]) > 0, answer
    return np.array(took_ms)


if __name__ == "__main__":
    main()
