"""What the tests of open models share: one folder with a tiny model, texts and configs, in which the runs lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit import in_process
from open_models import write_model, write_texts

CONFIG = """
recipe: language_model
data: {source: texts, sequence: 32, holdout_test: 0.3, holdout_validation: 0.0}
train: {steps: 2, batch: 4, precision: float32}
optimizer: {lr: 1e-2}
evaluate: {final: false}
checkpoint: {every: 2}
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with an open model `open` in bfloat16, the run `base` imported from it, `texts` and `tiny.yaml`. What a
    test adds has a name of its own."""
    folder = tmp_path_factory.mktemp("interop")
    write_model(folder / "open", dtype="bfloat16")
    write_texts(folder)
    (folder / "tiny.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert in_process("import", "open", "--to", "base") == 0
    return folder


@pytest.fixture
def here(home, shared_cache, monkeypatch) -> Path:
    """`home`, as the current folder."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    return home


@pytest.fixture(scope="session")
def adapted(home, shared_cache) -> Path:
    """The run `adapted` in `home`: adapters of every matrix over the run `base`, of rank-stabilised scale, trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("AURORA_CACHE", str(shared_cache))
        asked = ("model.from=base", 'model.lora={rank: 2, targets: ["*"], scaling: rank_stabilised}')
        assert in_process("train", "tiny.yaml", *asked, "--run", "adapted", "--quiet") == 0
    return home / "adapted"
