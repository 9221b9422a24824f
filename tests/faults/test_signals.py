"""A run that is asked to stop, at any moment, saves what it has and says so; it ends as the run that nobody asked.

    pytest -m release -s tests/faults/test_signals.py      # 60 signals, 20 of each kind: about 10 minutes
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import time
from collections import Counter

import pytest
import toy
from kit import Aurora, final_hash, losses

SEED = 20261125
KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def asked_again_and_again(tmp_path, number: int, seed: int, steps: int, cache):
    """Lives of one run, each asked to stop after a random part of its steps, until `number` signals were sent.

    Returns (signals by name, seconds from signal to exit, the run).
    """
    draw, sent, seconds = random.Random(seed), Counter(), []
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    settings = (f"train.steps={steps}", "checkpoint.every=1000", "evaluate.every=null")
    arguments = ("train", config, *settings, "--run", "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    for turn in range(number):
        kind = KINDS[turn % len(KINDS)]
        before = metrics.stat().st_size if metrics.exists() else 0
        process = aurora.start(*arguments, "--quiet")
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > before):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(kind)
        began = time.monotonic()
        _, err = process.communicate(timeout=120)
        seconds.append(time.monotonic() - began)
        assert process.returncode == 75, (kind.name, err[-2000:])
        sealed = max(int(p.parent.name) for p in (tmp_path / "run" / "checkpoints").glob("*/manifest.aurora.json"))
        assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, sealed + 1)), "the last step is saved"
        sent[kind.name] += 1
    aurora.good(*arguments, "--quiet")
    return sent, seconds, tmp_path / "run"


def undisturbed(tmp_path, steps: int, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path / "plain")
    settings = (f"train.steps={steps}", "checkpoint.every=1000", "evaluate.every=null")
    aurora.good("train", config, *settings, "--run", tmp_path / "plain" / "run", "--quiet")
    return tmp_path / "plain" / "run"


def ask(tmp_path, number: int, steps: int, cache):
    sent, seconds, run = asked_again_and_again(tmp_path, number, SEED, steps, cache)
    print(json.dumps({"seed": SEED, "sent": sent, "median_s": statistics.median(seconds), "longest_s": max(seconds)}))
    assert final_hash(run) == final_hash(undisturbed(tmp_path, steps, cache))
    assert [step for step, _ in losses(run)] == list(range(1, steps + 1))


@pytest.mark.slow
def test_a_signal_of_each_kind_is_a_save_an_exit_75_and_no_other_bit(tmp_path, shared_cache):
    ask(tmp_path, 3, 1500, shared_cache)


@pytest.mark.release
def test_sixty_signals_change_no_bit(tmp_path):
    ask(tmp_path, 60, 20000, tmp_path / "cache")
