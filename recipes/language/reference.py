"""What a reference model says of prepared rows: computed once, before training, and kept in a file beside the data.

The file is a sha256 followed by the float32 numbers of the rows done so far. It is replaced as a whole every few
seconds, so a pass that is killed continues where it was; and as rows always come in the same batches, the numbers are
those of a pass that was never killed. Two processes that need the same file wait for each other.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aurora_train.data.prepared import locked
from aurora_train.errors import UserError
from aurora_train.files import write_atomically
from aurora_train.machine.memory import give_back_freed

log = logging.getLogger("aurora_train")

ROWS = 8  # examples at a time, always: another batch may round otherwise, and what is kept must not depend on settings
_KEEP_EVERY_SECONDS = 10.0
_HASH_BYTES = 32


def in_batches(source) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(how many of its examples are new, batch) over a whole source, each of `ROWS` examples.

    The last batch is filled up with the last example, so that only one shape is compiled.
    """
    for start in range(0, len(source), ROWS):
        yield min(ROWS, len(source) - start), source.take(np.minimum(np.arange(start, start + ROWS), len(source) - 1))


def measured(file: Path, sources: list, predictor: Callable[[], Callable], progress: Callable) -> list[np.ndarray]:
    """The numbers of each source's examples: float32[examples, 2] each, read from `file` or computed and kept there.

    Args:
        file: named by everything that decides the numbers.
        predictor: called if any are missing; `predict(batch) -> float32[B, 2]`.

    Raises UserError for numbers that are not finite, and for a folder that cannot be written.
    """
    total = sum(map(len, sources))
    known = _read(file, total)
    if len(known) < total:
        with locked(file.with_suffix(".lock"), progress):
            known = _completed(file, sources, _read(file, total), predictor, progress)
    return np.split(known, np.cumsum([len(source) for source in sources])[:-1])


def _completed(file: Path, sources: list, known: np.ndarray, predictor: Callable, progress: Callable) -> np.ndarray:
    total, what = sum(map(len, sources)), "log-probabilities of the reference"
    if len(known) == total:
        return known
    progress(len(known), total, what)
    predict, parts, kept = predictor(), [known], time.monotonic()
    done = 0
    for source in sources:
        for count, batch in in_batches(source):
            done += count
            if done <= len(known):
                continue
            numbers = np.asarray(predict(batch), np.float32)[:count]
            if not np.isfinite(numbers).all():
                raise UserError(
                    f"the reference gives example {done - count + int(np.argmin(np.isfinite(numbers).all(1)))} of the "
                    "prepared data a probability that is not finite", where="init.from",
                    hint="the weights that the run starts from hold numbers that are not finite, or overflow in "
                    "train.precision",
                )  # fmt: skip
            parts.append(numbers)
            progress(done, total, what)
            if time.monotonic() - kept > _KEEP_EVERY_SECONDS:
                _write(file, np.concatenate(parts))
                kept = time.monotonic()
    known = np.concatenate(parts)
    _write(file, known)
    del predict  # and the model with it, before the run's own is made
    give_back_freed()
    return known


def _write(file: Path, numbers: np.ndarray) -> None:
    content = np.ascontiguousarray(numbers, "<f4").tobytes()
    write_atomically(file, hashlib.sha256(content).digest() + content)


def _read(file: Path, total: int) -> np.ndarray:
    """The numbers that are there; none if the file does not exist or is damaged, which is said."""
    try:
        whole = file.read_bytes()
    except FileNotFoundError:
        return np.empty((0, 2), np.float32)
    content = whole[_HASH_BYTES:]
    if hashlib.sha256(content).digest() != whole[:_HASH_BYTES] or len(content) > total * 8:
        log.warning("%s is damaged; the log-probabilities of the reference are computed again", file)
        return np.empty((0, 2), np.float32)
    return np.frombuffer(content, "<f4").reshape(-1, 2).astype(np.float32)
