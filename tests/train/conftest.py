"""Toy runs for the trainer's tests, trained in this process: the first one pays for importing jax, no other does."""

from __future__ import annotations

import shutil

import pytest
import toy

from aurora_train.cli.main import main


@pytest.fixture(autouse=True)
def cached(shared_cache, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with toy.py and toy.yaml, which is the current one."""
    toy.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory, shared_cache):
    """The folder of an undisturbed toy run of 30 steps, saved at 10, 20 and 30. Read it only."""
    folder = tmp_path_factory.mktemp("finished")
    toy.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(shared_cache))
        patch.chdir(folder)
        assert main(["train", "toy.yaml", "--run", "run", "--quiet"]) == 0
    return folder / "run"


@pytest.fixture
def finished(finished_once, here):
    """A copy of it beside its config, to be treated as one likes."""
    shutil.copytree(finished_once, here / "run")
    return here / "run"
