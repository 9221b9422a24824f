"""One tiny language run, trained in this process, serves every test of a verb that reads a run."""

from __future__ import annotations

import shutil

import pytest
import toy

from aurora_train.cli.main import main

LANGUAGE = """recipe: language_model
model: {{width: 16, layers: 1, heads: 2}}
data: {{source: {corpus}, sequence: 16, holdout_test: 0.2, holdout_validation: 0.2}}
train: {{steps: 4, batch: 4}}
checkpoint: {{every: 2, keep: 5}}
memory: {{unroll: false}}
evaluate: {{examples: 8, baselines: false}}
samples: {{count: 1, max_tokens: 4}}
"""


@pytest.fixture
def here(tmp_path, shared_cache, corpus, monkeypatch):
    """A folder with toy.yaml, language.yaml and a cache, which is the current one."""
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    toy.write(tmp_path)
    small = tmp_path / "corpus"
    small.mkdir()
    for path in sorted(corpus.iterdir(), key=lambda p: p.stat().st_size)[:12]:
        shutil.copyfile(path, small / path.name)
    (tmp_path / "language.yaml").write_text(LANGUAGE.format(corpus="corpus"))
    return tmp_path


@pytest.fixture(scope="session")
def language_run_once(tmp_path_factory, shared_cache, corpus):
    folder = tmp_path_factory.mktemp("language")
    (folder / "language.yaml").write_text(LANGUAGE.format(corpus=corpus))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(shared_cache))
        patch.chdir(folder)
        assert main(["train", "language.yaml", "--run", "run", "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def language_run(language_run_once, here):
    """A finished language run of 4 steps with checkpoints of 2 and 4, a copy of its own."""
    shutil.copytree(language_run_once, here / "run")
    return here / "run"
