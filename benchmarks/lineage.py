"""What the chain of a run costs: an event with it against an event alone, interleaved, in a run of many records.

    python benchmarks/lineage.py [--records 1000] [--rounds 100] [--folder DIR]

A step of training writes no event, so it costs nothing there: what is measured comes with a save, a resume or a skip.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

from aurora_train.lineage import chain
from aurora_train.lineage.following import ChainedEvents
from aurora_train.machine.profile import cpu_model
from aurora_train.record.metrics import EventLog
from aurora_train.run import Run


def run_in(folder: Path, name: str) -> Run:
    """A run folder that holds what a chain begins with."""
    run = Run(folder / name)
    run.folder.mkdir()
    run.config.write_text("recipe: toy.py\ntrain: {steps: 10}\n")
    run.provenance.write_text(json.dumps({"data": {"fingerprint": "f" * 64}}))
    return run


def timed(log: EventLog, step: int) -> float:
    """Seconds that an event takes."""
    began = time.perf_counter()
    log.event("skip", step, loss=0.5, grad_norm=1.0)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1000, help="events that the run has had before")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where the runs lie while they are measured: the disk matters")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        alone, chained = (run_in(Path(folder), name) for name in ("alone", "chained"))
        before = "".join(json.dumps({"event": "save", "step": step}) + "\n" for step in range(options.records))
        for run in (alone, chained):
            run.events.write_text(before)
        began = time.perf_counter()
        with EventLog(alone.events) as one, ChainedEvents(chained, begun=True) as other:
            opened = time.perf_counter() - began
            pairs = [(timed(one, step), timed(other, step)) for step in range(options.rounds)]
        records = chain.head_of(chained.lineage).count
    plain, with_chain = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(after / before for before, after in pairs)
    print(f"{date.today()}, {cpu_model()}: {records} records; opened in {1e3 * opened:.0f} ms")
    print(f"an event alone {plain:.2f} ms, with the chain {with_chain:.2f} ms (ratio {ratio:.2f}); a step has no event")


if __name__ == "__main__":
    main()
