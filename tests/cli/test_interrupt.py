"""Ctrl-C while a verb that is no run compiles: one word, exit status 130, and no crash of the interpreter."""

import gc
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from kit import Aurora

from aurora_train.cli import main


@pytest.mark.optimized  # a program that takes long to compile
def test_ctrl_c_while_a_plan_is_compiled_ends_it_at_once(tiny, tmp_path):
    # A cache of its own: what was compiled before would be there at once.
    process = Aurora(tmp_path, tmp_path / "cache").start("plan", tiny, "model.width=48", "model.layers=40")
    told = ""
    while "compiling a plan" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.endswith("interrupted\n") and "Traceback" not in err and not out


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C raises as usual: a suite that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_within_garbage_collection_is_not_lost(monkeypatch, capsys):
    def pressed(phase, info):  # as jax's own callback, in which nothing can be raised
        gc.callbacks.remove(pressed)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", main._told_again)
    gc.callbacks.append(pressed)
    with pytest.raises(KeyboardInterrupt):
        gc.collect()
        time.sleep(5)
    assert not capsys.readouterr().err


def test_ctrl_c_that_comes_again_at_once_is_not_lost_either(monkeypatch):
    """On a busy machine the second signal is there before the hook is over."""
    timer, starts = threading.Timer, []

    def at_once(_, *arguments):
        starts.append(arguments)
        if len(starts) == 1:
            raise KeyboardInterrupt
        return timer(0.01, *arguments)

    monkeypatch.setattr(main.threading, "Timer", at_once)
    with pytest.raises(KeyboardInterrupt):
        main._told_again(SimpleNamespace(exc_type=KeyboardInterrupt))
        time.sleep(60)
    assert len(starts) == 2
