"""What the list shows of a run's log without reading it whole: its end, a sketch of its loss, and its evaluations."""

from __future__ import annotations

from statistics import median

import numpy as np

from aurora_train.record.metrics import decode_lines, scalars
from aurora_train.watch.log import Log, left

SKETCHED = 40  # places of the log whose loss is in the sketch
_LINES_BYTES = 1 << 11  # which hold a whole record, or some
_GROWN = 1.04  # times the size at which the sketch was drawn: then it is drawn anew
_SEARCHED_BYTES = 1 << 22  # of which evaluations are searched at once
_EVALUATION = b'"evaluation"'


class Glance:
    """Looks at a `metrics.jsonl` again and again.

    Attributes:
        last: the newest value of each field, of the records at the end of the log.
        seconds_a_step: the median between the last records that have a time; None before there are two.
        sketch: losses along the log, float64[at most SKETCHED + 1]. One in thousands: a spike may be missing.
        evaluation: the newest evaluation's numbers; {} before there is one.
        best: (step, loss) of the evaluation with the lowest loss; None before there is one.
        behind: whether evaluations are still to be searched in a part of the log.
    """

    def __init__(self, log: Log):
        self._log = log
        self._forget()

    def _forget(self) -> None:
        self.last, self.evaluation, self.best, self.seconds_a_step = {}, {}, None, None
        self.sketch, self._sketched_size, self._looked_size = np.empty(0), 0, -1

    @property
    def behind(self) -> bool:
        return self._log.behind

    def look(self, deadline: float) -> None:
        """Look at what is new, until a moment of `time.monotonic`. The end of the log is always looked at."""
        if self._log.is_another():
            self._forget()
        size = self._log.size
        if size != self._looked_size:
            self._look_at_the_end()
            self._looked_size = size
        if size > _GROWN * self._sketched_size:
            self.sketch, self._sketched_size = self._sketched(), size
        if self.behind and left(deadline):
            self._search(deadline)

    def _look_at_the_end(self) -> None:
        timed = []
        for record in self._log.last():
            if "loss" not in record or not isinstance(record.get("step"), int):
                continue
            self.last |= {name: value for name, value in record.items() if value is not None}
            if isinstance(record.get("time"), float):
                timed.append((record["step"], record["time"]))
        pairs = zip(timed, timed[1:], strict=False)
        rates = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairs if after[0] > before[0]]
        if rates:
            self.seconds_a_step = median(rates)

    def _sketched(self) -> np.ndarray:
        begins = np.linspace(0, max(self._log.size - _LINES_BYTES, 0), SKETCHED).astype(int).tolist()
        begins = list(dict.fromkeys(begins))
        parts = zip(begins, self._log.pieces(begins, _LINES_BYTES), strict=False)
        found = [_first_loss(part.split(b"\n")[bool(begin) : -1]) for begin, part in parts]
        return np.array([one for one in [*found, self.last.get("loss")] if isinstance(one, float)])

    def _search(self, deadline: float) -> None:
        """Search evaluations where none were searched yet. Their lines alone are decoded."""
        for block in self._log.blocks(_SEARCHED_BYTES):
            at = block.find(_EVALUATION)
            while at >= 0:
                end = block.find(b"\n", at) + 1
                self._judge(*decode_lines(block[block.rfind(b"\n", 0, at) + 1 : end])[0])
                at = block.find(_EVALUATION, end)
            if not left(deadline):
                return

    def _judge(self, record: dict | None = None) -> None:
        if record is None or not isinstance(record.get("evaluation"), dict):
            return
        self.evaluation = scalars(record["evaluation"])
        loss, step = self.evaluation.get("loss"), record.get("step")
        if isinstance(step, int) and loss is not None and loss == loss and (self.best is None or loss < self.best[1]):
            self.best = (step, loss)


def _first_loss(lines: list[bytes]) -> float | None:
    """The first loss in lines, of which the first two are looked at: one of them may be an evaluation."""
    records, _ = decode_lines(b"".join(line + b"\n" for line in lines[:2]))
    return next((record["loss"] for record in records if "loss" in record), None)
