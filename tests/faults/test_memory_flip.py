"""One bit flips in the memory of a living trainer: the high exponent bit of a weight, written through /proc/PID/mem."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from kit import Aurora, events, losses, records

from aurora_train import load as load_run
from aurora_train.checkpoint import durable
from aurora_train.checkpoint.store import CheckpointStore

EVERY, STEPS = 500, 6000
# So small a rate that a weight is near what the newest checkpoint has of it; no average that would be hit as well.
OPTIONS = [f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "evaluate.every=null", "optimizer.ema=null",
           "optimizer.lr=1e-6", "optimizer.weight_decay=0", "--quiet"]  # fmt: skip
NEAR = 0.005  # more than a weight moves between two checkpoints at that rate
LENGTH = 48  # this many weights in a row are like no other place in memory
CHUNK_BYTES = 1 << 26

pytestmark = [
    pytest.mark.release,
    pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc/PID/mem"),
]


def writable_regions(pid: int):
    """(first, end) of a process's private writable memory."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, rights, *_ = line.split()
        if rights.startswith("rw-p"):
            yield tuple(int(end, 16) for end in span.split("-"))


def places_of(pid: int, memory: int, wanted: np.ndarray) -> list[int]:
    """Addresses in a stopped process at which float32 values near the `wanted` ones stand in a row."""
    found = []
    for first, end in writable_regions(pid):
        for start in range(first, end, CHUNK_BYTES):
            try:
                read = os.pread(memory, min(CHUNK_BYTES + wanted.nbytes, end - start), start)
            except OSError:
                break  # a guard page
            values = np.frombuffer(read[: len(read) // 4 * 4], np.float32)
            places = np.arange(max(len(values) - len(wanted) + 1, 0))
            with np.errstate(invalid="ignore", over="ignore"):
                for offset, value in enumerate(wanted):
                    places = places[np.abs(values[places + offset] - value) < NEAR]
            found += [start + 4 * int(place) for place in places]
    return sorted(set(found))


def newest_weights(run: Path) -> tuple[int, np.ndarray]:
    """(step, the first weights of the second unit's kernel) of the newest checkpoint."""
    store = CheckpointStore(run / "checkpoints", run / ".trash")
    step = store.steps()[-1]
    shapes = store.shapes(step)
    (name,) = (name for name in shapes if name.startswith("params") and "0001" in name and name.endswith("up"))
    return step, np.asarray(store.restore_some(step, {name: shapes[name]})[name]).ravel()[:LENGTH]


def flip_exponent(pid: int, run: Path) -> int:
    """Flip bit 30 of one weight in every live copy of it; how many there were. The process is stopped meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        _, weights = newest_weights(run)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        places = places_of(pid, memory, weights)
        victim = int(np.argmax(np.abs(weights) * (np.abs(weights) < 1)))
        for place in places:
            (bits,) = np.frombuffer(os.pread(memory, 4, place + 4 * victim), np.uint32)
            os.pwrite(memory, np.uint32(bits ^ (1 << 30)).tobytes(), place + 4 * victim)
        os.close(memory)
    except PermissionError:
        pytest.skip("the memory of another process may not be written here")
    finally:
        os.kill(pid, signal.SIGCONT)
    return len(places)


def wait_for(process, condition, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def test_a_flipped_exponent_is_skipped_gone_back_from_and_in_no_checkpoint(tmp_path, shared_cache):
    aurora, config, run = Aurora(tmp_path, shared_cache), toy.write(tmp_path), tmp_path / "run"
    process = aurora.start("train", config, "--run", run, *OPTIONS)

    def count(what: str) -> int:
        log = run / "events.jsonl"
        return log.read_text().count(f'"event": "{what}"') if log.exists() else 0

    assert wait_for(process, lambda: count("save") >= 1, 120)
    for attempt in range(5):  # a buffer moves with every step: the place that was hit may have been left just then
        copies = flip_exponent(process.pid, run)
        print(f"attempt {attempt}: {copies} copies hit")
        if wait_for(process, lambda: count("skip") >= 1, 10):
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    skips, (rewind,) = events(run, "skip"), events(run, "rewind")
    assert len(skips) >= 5 and not np.isfinite([float(event["loss"]) for event in skips]).all()
    assert rewind["step"] % EVERY == 0
    told = losses(run)
    assert [step for step, _ in told] == list(range(1, STEPS + 1)) and np.isfinite([loss for _, loss in told]).all()
    assert not any(record.get("skipped") for record in records(run))
    assert all(durable.faults(p) == [] for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    params = jax.tree.leaves(load_run(run).state.params)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() < 100 for leaf in params)
