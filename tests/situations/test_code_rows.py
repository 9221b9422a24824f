"""A run's code is on record: what it imports from beside itself is kept, and a change is seen. Rows H7 and H8."""

from __future__ import annotations

import json
import shutil

import pytest
import toy
from kit import events
from kit import in_process as aurora

import aurora_train

BLOCKS = "import helpers.deep\n\nSCALE = helpers.deep.SCALE\n"


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, shared_cache):
    """A toy run whose recipe imports a module and a package from beside itself. Read it only."""
    folder = tmp_path_factory.mktemp("code")
    toy.write(folder)
    (folder / "blocks.py").write_text(BLOCKS)
    (folder / "helpers").mkdir()
    (folder / "helpers" / "__init__.py").write_text("")
    (folder / "helpers" / "deep.py").write_text("SCALE = 2\n")
    (folder / "stranger.py").write_text("raise AssertionError('nobody imports this')\n")
    text = (folder / "toy.py").read_text()
    lazily = '        from blocks import SCALE\n\n        return Rows(len(split) * SCALE, rows, *harm)'
    assert "        return Rows(len(split), rows, *harm)" in text
    (folder / "toy.py").write_text(text.replace("        return Rows(len(split), rows, *harm)", lazily))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(shared_cache))
        patch.chdir(folder)
        assert aurora("train", "toy.yaml", "train.steps=2", "--run", "run", "--quiet") == 0
    return folder


@pytest.fixture
def here(trained_once, tmp_path, shared_cache, monkeypatch):
    shutil.copytree(trained_once, tmp_path / "w")
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def test_what_a_recipe_imports_from_beside_itself_is_kept_hashed_and_its_own(here, capsys, monkeypatch):
    kept = {path.relative_to(here / "run" / "code").as_posix() for path in (here / "run" / "code").rglob("*.py")}
    assert kept == {"toy.py", "blocks.py", "helpers/__init__.py", "helpers/deep.py"}
    for name in ("blocks.py", "toy.py"):
        (here / name).unlink()
    shutil.rmtree(here / "helpers")
    assert aurora("resume", "run", "train.steps=3", "--quiet") == 0, "a run needs nothing from where it was started"
    # The same name in the folder of another recipe is that recipe's own.
    other = here / "other"
    toy.write(other)
    (other / "blocks.py").write_text("SCALE = 7\n")
    text = (other / "toy.py").read_text().replace("Rows(len(split), rows", "Rows(len(split) * blocks.SCALE, rows")
    (other / "toy.py").write_text(text.replace("import numpy as np\n", "import numpy as np\n\nimport blocks\n", 1))
    monkeypatch.chdir(other)
    assert aurora("train", "toy.yaml", "train.steps=1", "--run", "run", "--quiet") == 0
    data = {json.loads((at / "run" / "provenance.json").read_text())["data"]["fingerprint"] for at in (here, other)}
    assert len(data) == 2


@pytest.mark.parametrize("name", ["helpers/deep.py", pytest.param("toy.py", marks=pytest.mark.slow)])
def test_H8_changed_code_is_said_by_a_read_and_refused_by_a_resume(name, here, capsys):
    file = here / "run" / "code" / name
    before = json.loads((here / "run" / "provenance.json").read_text())["recipe"]["sha256"]
    file.write_text(file.read_text() + "\n# another version\n")
    aurora_train.load("run")
    assert aurora("evaluate", "run", "--quiet") == 0
    assert "is not the code that this run was trained with" in capsys.readouterr().err
    loaded, seen = events(here / "run", "other_code")
    assert seen["before"] == before != seen["after"] and [loaded["by"], seen["by"]] == ["load", "evaluate"]
    assert aurora("resume", "run", "train.steps=3", "--quiet") == 2
    said = capsys.readouterr().err
    assert "the recipe's code has changed since this run began" in said and "--allow-change code" in said
    assert aurora("resume", "run", "train.steps=3", "--allow-change", "code", "--quiet") == 0
    record = json.loads((here / "run" / "provenance.json").read_text())
    assert record["recipe"]["sha256"] == seen["after"] and record["allowed_changes"][0]["key"] == "code"
    assert aurora("resume", "run", "train.steps=4", "--quiet") == 0, "what was allowed is not asked for again"


def test_H7_a_mended_score_is_given_to_a_finished_run_and_recorded(here, capsys):
    better = (here / "toy.py").read_text().replace('return {"mse":', 'return {"halved": 0.5, "mse":')
    (here / "mended.py").write_text(better)
    assert aurora("evaluate", "run", "--recipe", "mended.py", "--quiet", "--json") == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["headline"] == "halved" and "is not the code" in out.err
    scored_by = json.loads((here / "run" / "scores.json").read_text())["recipe_sha256"]
    assert scored_by == events(here / "run", "other_code")[-1]["after"]
    assert "halved" not in (here / "run" / "code" / "toy.py").read_text(), "the run keeps the code it was trained with"


def test_H7_an_allowed_change_that_is_none_is_refused_with_the_way_that_works(here, capsys):
    assert aurora("resume", "run", "train.steps=3", "--allow-change", "recipe", "--quiet") == 2
    said = capsys.readouterr().err
    assert "`recipe` has not changed" in said and "--allow-change code" in said
