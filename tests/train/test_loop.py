"""What the loop says of its own time."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from kit import records

from aurora_train.cli.main import main
from aurora_train.data import batches
from aurora_train.train.loop import Loop


def test_a_device_that_stands_still_for_want_of_data_is_seen(here, monkeypatch):
    read = batches.read_batch

    def late(*arguments):
        time.sleep(0.05)  # by two threads, so 25 ms a batch, for steps of a few
        return read(*arguments)

    monkeypatch.setattr(batches, "read_batch", late)
    assert main(["train", "toy.yaml", "--run", "run", "--quiet", "log.every=10"]) == 0
    waits = [record["data_wait"] for record in records(here / "run") if record.get("data_wait") is not None]
    assert len(waits) >= 3 and min(waits) > 0.2, waits


def test_a_wait_beside_a_step_that_is_under_way_is_nobodys():
    """A real program that takes a while, as the numbers of the newest step."""
    small = jnp.full((512, 512), 1e-3)
    busy = jax.jit(lambda a: jax.lax.fori_loop(0, 400, lambda _, x: x @ a, a).sum())
    jax.block_until_ready(busy(small))
    loop = SimpleNamespace(_late=[(1, {"loss": busy(small)})])
    assert not Loop._idle(loop)
    jax.block_until_ready(loop._late)
    assert Loop._idle(loop) and Loop._idle(SimpleNamespace(_late=[]))


def test_such_a_wait_is_in_no_record(here, monkeypatch):
    monkeypatch.setattr(Loop, "_idle", lambda loop: False)
    assert main(["train", "toy.yaml", "--run", "run", "--quiet", "log.every=10"]) == 0
    waits = [record["data_wait"] for record in records(here / "run") if record.get("data_wait") is not None]
    assert waits and not any(waits)
