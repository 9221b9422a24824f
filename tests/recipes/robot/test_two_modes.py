"""Two right answers: flow matching takes either of them, and behaviour cloning runs between them into the disc.

`aurora train robot/two_modes` has the figures of all kinds; this is the same with fewer steps.
"""

import json

import numpy as np
import pytest

from aurora_train.cli.main import main

SMALLER = ["model.width=48", "train.batch=32", "optimizer.lr=2e-3", "evaluate.every=null", "evaluate.baselines=false",
           "score.gifs=0", "checkpoint.every=1000"]  # fmt: skip
STEPS = {"flow": 600, "cloning": 200}


@pytest.mark.release  # a minute of processor time
def test_flow_takes_either_way_and_cloning_neither(tmp_path, shared_cache, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    found = {}
    for kind, steps in STEPS.items():
        settings = [f"model.kind={kind}", f"train.steps={steps}", *SMALLER]
        assert main(["train", "robot/two_modes", *settings, "--run", kind, "--quiet"]) == 0, capsys.readouterr().err
        found[kind] = json.loads((tmp_path / kind / "scores.json").read_text())["score"]
    assert all(np.isfinite(found[kind]["latency_ms_p99"]) and found[kind]["episodes"] == 50 for kind in found)
    print({kind: one["success"] for kind, one in found.items()})
    assert found["flow"]["success"] >= 0.7 and found["cloning"]["success"] <= 0.6, found
