"""What the loop says of its own time."""

import time
from types import SimpleNamespace

import pytest
from harness import records

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
    assert len(waits) >= 3 and min(waits) > 0.4


@pytest.mark.parametrize("done", [True, False])
def test_a_wait_beside_a_step_that_is_under_way_is_nobodys(done, here, monkeypatch):
    """The newest step's numbers as they are seen when the batch comes; the rest of the loop is the real one."""
    monkeypatch.setattr(Loop, "_idle", lambda loop: original(newest(done)))
    assert main(["train", "toy.yaml", "--run", "run", "--quiet", "log.every=10"]) == 0
    waits = [record["data_wait"] for record in records(here / "run") if record.get("data_wait") is not None]
    assert all((wait > 0) == done for wait in waits)


original = Loop._idle


def newest(done: bool):
    """A loop that has handed over one step."""
    return SimpleNamespace(_late=[(1, {"loss": SimpleNamespace(is_ready=lambda: done)})])
