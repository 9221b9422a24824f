"""`aurora profile`: traces a few real steps of a config in a folder of its own. No run folder is changed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import NamedTuple

import jax

from aurora_train.plan.report import one_line
from aurora_train.run import Run
from aurora_train.tools.trace import Timeline, perfetto_file, read_events, timeline
from aurora_train.train.feed import open_feed
from aurora_train.train.session import open_session

HOST = ("data", "dispatch", "wait")
_WARM = 3  # steps before the trace: the first one includes work that the compiler deferred


class Profile(NamedTuple):
    """The result of `profile`. Times in seconds; `save`: how long a save of the state blocks training; `plan`: one
    line; `trace`: the file for Perfetto; `product_flops`: FLOPs of one step's products, recomputation included."""

    timeline: Timeline
    steps: int
    compile: float
    save: float
    plan: str
    trace: Path
    product_flops: int | None


def profile(config, folder: Path, *, steps: int, progress) -> Profile:
    """Trace `steps` steps of a config into `folder`, which must be empty or new. UserError for what `train` refuses."""
    try:
        return _measured(config, folder, steps, progress)
    finally:
        shutil.rmtree(folder / "run", ignore_errors=True)  # its checkpoint was only timed


def _measured(config, folder: Path, steps: int, progress) -> Profile:
    # The compilation cache may hold this program with names of an older version. This line must come first, because
    # jax decides once per process whether to use the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    session = open_session(config, Run(folder / "run"), progress)
    progress(0, 1, "compiling")
    compiled, seconds = session.compile(fresh=True)
    state = session.fresh()
    with open_feed(session, 0, _WARM + steps) as feed:
        for number in range(_WARM):
            progress(number, _WARM, "steps before the trace")
            state, metrics = compiled(state, feed(number, state))
            jax.block_until_ready(metrics)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python events would dominate the trace and slow the host
        with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
            state = _traced(compiled, state, metrics, feed, steps, progress)
    progress(0, 1, "a save")
    blocked = _blocked_by_a_save(session.store, state)
    text = session.program.compile(session.plan).as_text()
    line = timeline(read_events(folder), text, steps, HOST)
    flops = session.program.product_flops(session.plan)
    return Profile(line, steps, seconds, blocked, one_line(session.plan), perfetto_file(folder), flops)


def _blocked_by_a_save(store, state) -> float:
    """Seconds until the next step could begin."""
    store.sweep()
    began = time.perf_counter()
    store.save(1, state, {})
    blocked = time.perf_counter() - began
    store.wait()
    store.close()
    return blocked


def _traced(compiled, state, before, feed, steps: int, progress):
    """Run steps as the training loop does: dispatch a step, then wait for the results of the previous one."""
    for number in range(steps):
        progress(number, steps, "steps traced")
        with jax.profiler.TraceAnnotation("step"):
            with jax.profiler.TraceAnnotation("data"):
                batch = feed(_WARM + number, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=number), jax.profiler.TraceAnnotation("dispatch"):
                state, metrics = compiled(state, batch)
            with jax.profiler.TraceAnnotation("wait"):
                jax.device_get(before)
        before = metrics
    with jax.profiler.TraceAnnotation("step"), jax.profiler.TraceAnnotation("wait"):
        jax.device_get(before)
    return state
