"""What the loop says of its own time."""

import time

from harness import records

from aurora_train.cli.main import main
from aurora_train.data import batches


def test_a_device_that_stands_still_for_want_of_data_is_seen(here, monkeypatch):
    read = batches.read_batch

    def late(*arguments):
        time.sleep(0.05)  # by two threads, so 25 ms a batch, for steps of a few
        return read(*arguments)

    monkeypatch.setattr(batches, "read_batch", late)
    assert main(["train", "toy.yaml", "--run", "run", "--quiet", "log.every=10"]) == 0
    waits = [record["data_wait"] for record in records(here / "run") if record.get("data_wait") is not None]
    assert len(waits) >= 3 and min(waits) > 0.4
