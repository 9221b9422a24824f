"""What crosses between host and device in the loop: a batch in, the numbers of the step before it out, and no more.

JAX's own guard against transfers sees nothing on a CPU, so the calls that can transfer are counted.
"""

import threading

import jax
import numpy as np
import pytest

from aurora_train.cli.main import main
from aurora_train.train.loop import Loop
from aurora_train.train.session import Session

STEPS = 24
TRAIN = ["train", "toy.yaml", "--run", "run", "--quiet", f"train.steps={STEPS}", "log.every=8", "checkpoint.every=1000",
         "evaluate.every=null", "evaluate.final=false"]  # fmt: skip


class Crossings:
    """`between[n]`: what crossed after step n + 1 was handed to the device and before the next one was, by name."""

    def __init__(self, monkeypatch):
        self.between, self._inside = [], False
        array = type(jax.numpy.zeros(()))
        self._count(monkeypatch, jax, "device_put")
        self._count(monkeypatch, jax, "device_get")
        for name in ("asarray", "array", "ascontiguousarray"):
            self._count(monkeypatch, np, name, only=jax.Array)
        for name in ("__array__", "__float__", "__int__", "__bool__", "__index__", "__format__", "item", "tolist"):
            self._count(monkeypatch, array, name, only=jax.Array)
        compiled = Session.compile

        def counting(session, **how):
            step, seconds = compiled(session, **how)

            def counted(state, batch):
                assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((state, batch)))
                self.between.append([])
                return step(state, batch)

            return counted, seconds

        monkeypatch.setattr(Session, "compile", counting)

    def _count(self, monkeypatch, owner, name: str, only=object) -> None:
        own = getattr(owner, name)

        def counted(first, *others, **named):
            here = threading.current_thread() is threading.main_thread()
            if not here or self._inside or not self.between or not isinstance(first, only):
                return own(first, *others, **named)
            self.between[-1].append(f"{name} of {sum(np.size(leaf) for leaf in jax.tree.leaves(first))}")
            self._inside = True
            try:
                return own(first, *others, **named)
            finally:
                self._inside = False

        monkeypatch.setattr(owner, name, counted)


def test_between_two_steps_only_a_batch_and_the_numbers_of_a_finished_step_cross(here, monkeypatch):
    crossings = Crossings(monkeypatch)
    assert main(TRAIN) == 0
    numbers, batch = "device_get of 5", "device_put of 144"  # 8 rows of x, y, weights and example
    assert len(crossings.between) == STEPS
    assert crossings.between[0] == [batch], "the first step has none before it"
    assert crossings.between[1:-1] == [[numbers, batch]] * (STEPS - 2), "steps that are logged included"


@pytest.mark.parametrize(
    "read", [lambda x: float(x), lambda x: int(x), lambda x: bool(x), lambda x: x.item(), lambda x: x.tolist(),
             lambda x: np.asarray(x), lambda x: np.array(x), lambda x: f"{x:.0f}"],
    ids=["float", "int", "bool", "item", "tolist", "asarray", "array", "format"],
)  # fmt: skip
def test_whatever_reads_an_array_is_counted(monkeypatch, read):
    crossings = Crossings(monkeypatch)
    crossings.between.append([])
    read(jax.numpy.ones(()))
    assert len(crossings.between[0]) == 1


def test_a_loop_that_reads_its_state_would_be_seen(here, monkeypatch):
    crossings, idle = Crossings(monkeypatch), Loop._idle
    monkeypatch.setattr(Loop, "_idle", lambda loop: int(loop.state.step) >= 0 and idle(loop))
    assert main(TRAIN) == 0
    assert "__int__ of 1" in crossings.between[5]
