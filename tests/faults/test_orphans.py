"""A trainer has no children, so a `kill -9` of it leaves nobody: no data worker that holds memory or files."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid

import pytest
import toy
from kit import TINY, Aurora


def marked(mark: bytes) -> set[int]:
    """The living processes whose environment has the mark."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as handle:
                if mark in handle.read():
                    found.add(int(pid))
        except OSError:  # ended, or somebody else's
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "text"])
def test_a_trainer_has_no_children_and_kill_9_leaves_nobody(kind, tmp_path, corpus, shared_cache):
    aurora, config, mark = Aurora(tmp_path, shared_cache), toy.write(tmp_path), uuid.uuid4().hex
    if kind == "text":  # prepares a tokenizer and a store
        config = tmp_path / "text.yaml"
        config.write_text(TINY.format(corpus=corpus))
    process = subprocess.Popen(
        aurora.command("train", config, "train.steps=100000", "evaluate.every=null", "--run", "run", "--quiet"),
        cwd=tmp_path, env={**aurora.environment(), "FAULT_MARK": mark}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log, others, until = tmp_path / "run" / "metrics.jsonl", set(), time.monotonic() + 180
    try:
        while process.poll() is None and time.monotonic() < until:
            others |= marked(mark.encode()) - {process.pid}
            if log.exists() and log.read_bytes().count(b"\n") > 25:  # past its first saves
                break
            time.sleep(0.02)
        assert process.poll() is None and process.pid in marked(mark.encode())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not others, "a trainer has threads, and no processes"
    assert not marked(mark.encode())
