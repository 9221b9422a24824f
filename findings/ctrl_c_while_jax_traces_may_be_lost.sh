#!/usr/bin/env bash
# jax 0.10.2: a Ctrl-C while a function is traced is now and then printed and lost, and the program goes on: importing
# jax adds a callback to Python's garbage collector, written in Python (`_xla_gc_callback`), and an exception in such a
# callback cannot be raised. Tracing makes so many objects that the collector runs all the time. A supervisor that sends
# SIGINT once and waits, as `timeout -s INT` or a notebook's stop button do, then waits for the whole compilation. It
# takes a `sys.unraisablehook` that sends the signal again; SIGTERM without a Python handler is not affected.
# Seen: 1 of 200 presses lost, all others raised KeyboardInterrupt; which one it is, chance decides.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'P'
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp

MOST = 6000  # presses; one is lost in a few hundred
main = threading.main_thread().ident
answered, done = threading.Event(), threading.Event()
raised, lost = [], []


def swallowed(what):
    lost.append(what.object.__name__)
    answered.set()


def press():
    while len(raised) < MOST and not lost:
        time.sleep(0.01)
        answered.clear()
        signal.pthread_kill(main, signal.SIGINT)
        answered.wait()
    done.set()


def layers(x):
    for _ in range(30):
        x = jnp.tanh(x @ x) + x
    return x


sys.unraisablehook = swallowed
threading.Thread(target=press, daemon=True).start()
while not done.is_set():
    try:
        while not done.is_set():
            jax.jit(lambda x: layers(x)).lower(jnp.ones((8, 8)))
    except KeyboardInterrupt:
        raised.append(1)
        answered.set()  # the next press comes 10 ms later, when the inner loop runs again
print(f"{len(raised)} presses were raised, then one was lost in {lost}")
assert lost == ["_xla_gc_callback"]
P
echo "as described"
