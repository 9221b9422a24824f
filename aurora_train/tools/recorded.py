"""What the files of a run folder hold, for the report and for comparisons. Neither jax nor a recipe is imported."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from aurora_train.files import read_json
from aurora_train.record import metrics as logs
from aurora_train.run import Run
from aurora_train.tools.runs import settings


@dataclass(frozen=True)
class Recorded:
    """`settings` by key; `steps` are the records with a loss, `evaluations` those of evaluations, with their step."""

    run: Run
    settings: dict[str, Any]
    steps: list[dict]
    evaluations: list[dict]
    events: list[dict]
    scores: dict
    provenance: dict

    @classmethod
    def of(cls, run: Run) -> Recorded:
        """Read a run folder; {} and [] stand for files that do not exist. UserError for a damaged file."""
        records = logs.read(run.metrics)
        return cls(
            run, settings(run.config), [record for record in records if "loss" in record],
            [{"step": r["step"], **r["evaluation"]} for r in records if isinstance(r.get("evaluation"), dict)],
            logs.read(run.events), read_json(run.scores, {}), read_json(run.provenance, {}),
        )  # fmt: skip

    @property
    def headline(self) -> str | None:
        """The name of the score that the recipe puts first."""
        return self.scores.get("headline")

    @property
    def score(self) -> dict:
        return self.scores.get("score", {})

    @property
    def targets(self) -> float:
        return sum(record.get("tokens", 0) for record in self.steps)

    @property
    def validation_losses(self) -> list[float]:
        return [one["loss"] for one in self.evaluations if one.get("loss") is not None]

    @property
    def seconds(self) -> float | None:
        """Seconds that the recorded steps took, or None if none is recorded.

        `seconds` counts from the first step of each process, so the last values of all processes are added up."""
        known = [record["seconds"] for record in self.steps if record.get("seconds") is not None]
        lasts = [now for now, after in itertools.pairwise([*known, 0.0]) if after < now]
        return sum(lasts) if known else None

    def recent_loss(self) -> tuple[float, int] | None:
        """(mean, number) of the finite losses in the last twentieth of the steps, at least ten: one alone is noise."""
        last = [record["loss"] for record in self.steps[-max(len(self.steps) // 20, 10) :]]
        last = [loss for loss in last if np.isfinite(loss)]
        return (float(np.mean(last)), len(last)) if last else None


def series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), float64[N] each, from the records that have a number of this name."""
    pairs = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
    array = np.array(pairs, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]
