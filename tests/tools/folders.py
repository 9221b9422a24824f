"""Run folders as training leaves them, written by the trainer's own writers, without training."""

from __future__ import annotations

import json
from pathlib import Path

from aurora_train.record.metrics import EventLog, MetricsLog

CONFIG = """recipe: {recipe}
name: toy
model:
  width: 16
data:
  source: "/some where/rows.parquet"
  mix: {{}}
train:
  steps: {steps}
  batch: {batch}
optimizer:
  lr: {lr}
log:
  sinks: []
"""


def make(
    folder: Path, *, done: int = 30, steps: int = 30, lr: float = 0.01, batch: int = 8, recipe: str = "toy.py",
    score: tuple | None = ("mse", 0.5), data: str = "f" * 64,
) -> Path:  # fmt: skip
    """A run that took `done` of `steps` steps, finished where that is all of them."""
    (folder / "checkpoints" / str(done) / "state").mkdir(parents=True)
    (folder / "checkpoints" / str(done) / "manifest.aurora.json").write_text("{}")
    (folder / "checkpoints" / str(done) / "state" / "bytes").write_bytes(bytes(1000))
    (folder / ".lock").write_text("process 1 on nowhere")
    (folder / "config.yaml").write_text(CONFIG.format(recipe=recipe, steps=steps, batch=batch, lr=lr))
    (folder / "provenance.json").write_text(json.dumps({"data": {"fingerprint": data}}))
    with MetricsLog(folder / "metrics.jsonl") as log, EventLog(folder / "events.jsonl") as events:
        events.event("start", 0)
        for step in range(1, done + 1):
            log.write({"step": step, "loss": 3 * lr / step, "lr": lr, "tokens": 7, "skipped": 0})
            if step % 10 == 0:
                log.write({"step": step, "evaluation": {"loss": 4 * lr / step}})
        if done == steps:
            events.event("finish", done)
        else:
            events.event("stop", done, by="SIGINT")
    if score is not None:
        record = {"headline": score[0], "better": "min", "score": {score[0]: score[1]}, "baselines": {}, "step": done}
        (folder / "scores.json").write_text(json.dumps(record))
    return folder
