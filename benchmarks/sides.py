"""The sides of a comparison, each a process of its own: a script that answers on stdin, and an `aurora train`.

Standard library alone: a peer's script may run where nothing of ours is installed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path


class Ended(SystemExit):
    """A side ended before it had anything to answer. Uncaught, its last words end the benchmark."""

    @property
    def words(self) -> str:
        """One line: aurora's own error, or the last that says something, as a traceback's does."""
        lines = [line.strip() for line in str(self.code).splitlines() if line.strip()]
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (told or lines or ["it said nothing"])[-1]


def peak_rss(pid: int) -> int:
    """Bytes: VmHWM of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Side:
    """A process that says ready, and then answers each line with a line: to seconds, with those of a step.

    `python` and `environment` are the script's own where it needs others; `stderr`: a file, else ours.
    """

    def __init__(self, *command: str, python: str = sys.executable, environment=None, stderr: Path | None = None):
        self._command, self._stderr = command, stderr
        with open(stderr or os.devnull, "w") as words:
            self._process = subprocess.Popen(
                [python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **(environment or {})}, stderr=words if stderr else None,
            )  # fmt: skip
        if (line := self._process.stdout.readline()) != "ready\n":
            self.close()
            raise Ended(line.strip() or self._last_words())

    def _last_words(self) -> str:
        said = self._stderr.read_text().strip() if self._stderr else ""
        return said or f"{' '.join(self._command)[:200]} failed"

    def ask(self, line: object) -> str:
        """The answer to one line."""
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self._last_words()) from None
        if not (answer := self._process.stdout.readline()):
            raise Ended(self._last_words())
        return answer.strip()

    def run(self, seconds: float) -> float:
        """Seconds a step."""
        return float(self.ask(seconds))

    def peak_rss(self) -> int:
        """Bytes."""
        return peak_rss(self._process.pid)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def in_turns(ours, peers: dict, seconds: float, rounds: int) -> dict:
    """Let every side run for `seconds` in each round: {"seconds", "best", "ratio", "ratios"}.

    "seconds" are medians of those of a step by side, "best" is the faster peer, and ratios are its seconds over ours of
    the same round: above 1 we are faster. "ratio" is their median.
    """
    took: dict[str, list[float]] = {side: [] for side in ("ours", *peers)}
    for _ in range(rounds):
        for name, side in {"ours": ours, **peers}.items():
            took[name].append(side.run(seconds))
    medians = {side: statistics.median(values) for side, values in took.items()}
    best = min(peers, key=medians.get)
    ratios = [theirs / mine for theirs, mine in zip(took[best], took["ours"], strict=True)]
    return {"seconds": medians, "best": best, "ratio": statistics.median(ratios), "ratios": ratios}


def _end_with_parent() -> None:
    """In a child before it begins: a benchmark that is killed leaves no training behind, stopped or running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def language_config(model: dict, *, sequence: int, batch: int, vocabulary: int | None, precision: str) -> dict:
    """A whole config: real text, every step logged, nothing saved or evaluated. `vocabulary` None is bytes."""
    tokenizer = {"kind": "byte"} if vocabulary is None else {"kind": "bpe", "vocab": vocabulary}
    return {
        "recipe": "language_model", "model": model,
        "data": {"source": "python-stdlib", "tokenizer": tokenizer, "sequence": sequence},
        "train": {"batch": batch, "steps": 10**6, "precision": precision},
        "optimizer": {"name": "adamw"}, "log": {"every": 1}, "checkpoint": {"every": 10**6},
        "evaluate": {"every": None},
    }  # fmt: skip


class Training:
    """An `aurora train` of a config, which it writes into `folder` as case.yaml, and what its log says so far."""

    def __init__(self, config: dict, folder: Path, environment=None):
        (folder / "case.yaml").write_text(json.dumps(config))
        self.run_folder, self._stderr = folder / "run", folder / "stderr"
        command = [sys.executable, "-m", "aurora_train", "train", str(folder / "case.yaml"), "--run"]
        with self._stderr.open("w") as words:
            self._process = subprocess.Popen(
                [*command, str(self.run_folder)], stdout=subprocess.DEVNULL, stderr=words,
                env={**os.environ, **(environment or {})}, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def records(self) -> list[dict]:
        """Those of metrics.jsonl that carry a time."""
        metrics = self.run_folder / "metrics.jsonl"
        if not metrics.exists():
            return []
        # The last line may still be in the making.
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [record for line in lines if "time" in (record := json.loads(line))]

    def remarks(self, *about: str) -> list[str]:
        """What it said of the attention ("attention"), of the plan ("plan"), ..."""
        heads = tuple(f"{what}: " for what in about)
        return [line for line in self._stderr.read_text().splitlines() if line.startswith(heads)]

    def wait(self, count: int) -> list[dict]:
        """So many records, or more. Raises Ended where the process does before."""
        while len(found := self.records()) < count:
            if self._process.poll() is not None:
                raise Ended(f"aurora train ended: {self._stderr.read_text()[-2000:]}")
            time.sleep(0.05)
        return found

    def peak_rss(self) -> int:
        """Bytes."""
        return peak_rss(self._process.pid)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
