"""A run of a language model that was resumed with another length, and its export, both signed: trained once."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit import in_process

CONFIG = """recipe: language_model
model: {{width: 16, layers: 1, heads: 2}}
data: {{source: {corpus}, sequence: 16, holdout_test: 0.2, holdout_validation: 0.2}}
train: {{steps: 4, batch: 4}}
checkpoint: {{every: 2, keep: 5}}
memory: {{unroll: false}}
evaluate: {{examples: 8, baselines: false}}
samples: {{count: 1, max_tokens: 4}}
"""


@pytest.fixture(scope="session")
def lab(tmp_path_factory, shared_cache, corpus) -> SimpleNamespace:
    """`folder` with the signed `run`, which started from `base`, its signed export `out`, and the keys `lab.pem` and
    `lab.pub`. To be copied, and not changed."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(corpus, folder / "corpus")
    (folder / "corpus" / "LICENSE").write_text("Permission is hereby granted.\n")
    (folder / "tiny.yaml").write_text(CONFIG.format(corpus="corpus"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AURORA_CACHE", str(shared_cache))
        base = ("train.steps=2", "evaluate.final=false", "samples.count=0", "--run", "base")
        assert in_process("train", "tiny.yaml", *base, "--quiet") == 0
        assert in_process("train", "tiny.yaml", "init.from=base", "--run", "run", "--quiet") == 0
        assert in_process("resume", "run", "train.steps=6", "--quiet") == 0
        assert in_process("lineage", "--new-key", "lab.pem") == 0
        assert in_process("lineage", "run", "--sign", "lab.pem") == 0
        assert in_process("export", "run", "--to", "out", "--sign", "lab.pem") == 0
    return SimpleNamespace(folder=folder, run=folder / "run", out=folder / "out", key=folder / "lab.pub")


@pytest.fixture
def signed(lab, tmp_path) -> SimpleNamespace:
    """A copy of both that a test may change."""
    for name in ("run", "out"):
        shutil.copytree(getattr(lab, name), tmp_path / name)
    return SimpleNamespace(run=tmp_path / "run", out=tmp_path / "out", key=Path(lab.key))
