"""Real kills at chosen moments of a real run: each life of the process is ended in one phase of its work.

A phase is recognised from outside, by what the process has written so far, and the kill comes after a random part of
that phase's time in the undisturbed run. Nothing inside the trainer knows that it is being watched.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from kit import Aurora, evaluations, events, final_hash, losses

from aurora_train.checkpoint import durable

PHASES = ("prepare", "compile", "resumed", "step", "save", "evaluate", "last step", "score")
_POLL_S = 0.001


@dataclass
class Tally:
    """What a series of kills came to."""

    kills: dict[str, int] = field(default_factory=dict)
    missed: int = 0  # the process ended, or went past the phase, before the kill came
    finished_runs: list[Path] = field(default_factory=list)
    failed_restarts: list[str] = field(default_factory=list)


class Killer:
    """Runs `aurora train CONFIG` again and again in one run folder, killing each life in the phase it is told."""

    def __init__(self, aurora: Aurora, config: Path, steps: int, seed: int):
        self.aurora, self.config, self.steps = aurora, config, steps
        self.random = random.Random(seed)
        self.tally = Tally()
        self._number = 0
        self.run = self._next_run()

    def _next_run(self) -> Path:
        self._number += 1
        return self.aurora.folder / f"killed-{self._number}"

    def life(self, phase: str | None) -> None:
        """One process, killed in `phase`; None lets it live to its end."""
        log = self.aurora.folder / "stderr.txt"
        with open(log, "w") as stderr:
            pipes = {"stdout": subprocess.DEVNULL, "stderr": stderr}
            process = self.aurora.forked("train", self.config, "--run", self.run, **pipes)
        if phase is not None and self._wait_for(phase, process, log):
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.tally.kills[phase] = self.tally.kills.get(phase, 0) + 1
            return
        status = process.wait(timeout=300)
        if status != 0:
            self.tally.failed_restarts.append(log.read_text()[-2000:])
        elif phase is not None:
            self.tally.missed += 1
        if status == 0:
            self.tally.finished_runs.append(self.run)
            self.run = self._next_run()

    def _wait_for(self, phase: str, process, log: Path) -> bool:
        """Whether the process is alive in `phase`, some random part of the phase later."""
        reached = getattr(self, "_" + phase.replace(" ", "_"))
        known = self._known()
        # How far into the phase: a save takes some 50 ms here, a step some 5 ms, compiling and starting seconds.
        spans = {"prepare": 3.0, "reference": 1.5, "compile": 1.5, "resumed": 0.3, "save": 0.15, "score": 1.0,
                 "recording": 0.3, "decoding": 0.3, "simulation": 0.3, "forecasting": 0.3}  # fmt: skip
        while process.poll() is None:
            if reached(log, known):
                time.sleep(self.random.uniform(0, spans.get(phase, 0.01)))
                return process.poll() is None
            time.sleep(_POLL_S)
        return False

    def _known(self) -> dict:
        return {
            "step": self._logged(),
            "after": self.random.randint(1, max(self.steps // 4, 2)),
            "folders": self._checkpoints(),
            "evaluations": self._size_of_evaluations(),
        }

    # ---- phases, as seen from outside

    def _prepare(self, log, known):
        return True

    def _reference(self, log, known):
        return "log-probabilities of the reference" in log.read_text()

    def _recording(self, log, known):
        return "demonstrations in" in log.read_text()

    def _decoding(self, log, known):
        return "reading episodes" in log.read_text()

    def _simulation(self, log, known):
        return "episodes in simulation" in log.read_text()

    def _forecasting(self, log, known):
        return "forecasting" in log.read_text()

    def _compile(self, log, known):
        return "compiling ..." in log.read_text()

    def _resumed(self, log, known):
        return "training examples: " in log.read_text()

    def _step(self, log, known):
        return self._logged() >= known["step"] + known["after"] or self._logged() >= self.steps - 1

    def _save(self, log, known):
        return bool(self._checkpoints() - known["folders"])

    def _evaluate(self, log, known):
        return self._size_of_evaluations() > known["evaluations"] or self._logged() >= self.steps

    def _last_step(self, log, known):
        return self._logged() >= self.steps - 1

    def _score(self, log, known):
        return "scoring" in log.read_text()

    def _logged(self) -> int:
        try:
            text = (self.run / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return 0
        lines = [line for line in text.split(b"\n")[:-1] if b'"loss"' in line and b"evaluation" not in line]
        return json.loads(lines[-1])["step"] if lines else 0

    def _checkpoints(self) -> set[str]:
        try:
            return set(os.listdir(self.run / "checkpoints"))
        except FileNotFoundError:
            return set()

    def _size_of_evaluations(self) -> int:
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b'"evaluation"')
        except FileNotFoundError:
            return 0


def schedule(kills: int, seed: int) -> list[str]:
    """Phases of the kills: every phase as often as any other, in random order."""
    order = random.Random(seed)
    phases: list[str] = []
    while len(phases) < kills:
        phases += order.sample(PHASES, len(PHASES))
    return phases[:kills]


def kill_again_and_again(aurora: Aurora, config: Path, steps: int, phases: list[str], seed: int) -> Tally:
    """Kill in each phase once, one kill a life, then let the last run finish. A missed phase is tried again."""
    killer = Killer(aurora, config, steps, seed)
    for phase in phases:
        before = sum(killer.tally.kills.values())
        for _ in range(4):
            killer.life(phase)
            if sum(killer.tally.kills.values()) > before or killer.tally.failed_restarts:
                break
    if killer.run.exists():
        killer.life(None)
    return killer.tally


def assert_kills_change_no_bit(
    aurora: Aurora, config: Path, steps: int, phases: list[str], seed: int, undisturbed: Path
) -> None:
    """Kill a run in each of the phases; what finishes is the run that was never killed."""
    tally = kill_again_and_again(aurora, config, steps, phases, seed)
    print(f"seed {seed}: {sum(tally.kills.values())} kills {tally.kills}, {tally.missed} missed their phase")
    assert not tally.failed_restarts, tally.failed_restarts[0]
    assert sum(tally.kills.values()) == len(phases)
    assert tally.finished_runs
    for run in tally.finished_runs:
        assert_same_run(run, undisturbed)


def assert_whole(run: Path, undisturbed: Path) -> None:
    """The other run's, to the bit, and no byte of its checkpoints is damaged."""
    assert_same_run(run, undisturbed)
    steps = sorted(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
    assert steps[-1] == losses(undisturbed)[-1][0]
    assert [durable.faults(run / "checkpoints" / str(step)) for step in steps] == [[]] * len(steps)


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """The loss log (no hole, no repeat), the evaluations and the final state are the other run's, to the bit."""
    assert losses(run) == losses(undisturbed)
    assert evaluations(run) == evaluations(undisturbed)
    assert final_hash(run) == final_hash(undisturbed)
    assert len(events(run, "finish")) == 1
