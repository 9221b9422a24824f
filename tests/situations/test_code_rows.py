"""A run's code is on record: what it imports from beside itself is kept, and a change is seen. Rows H7 and H8."""

from __future__ import annotations

import json
import os
import py_compile
import shutil

import pytest
import toy
from kit import events
from kit import in_process as aurora

import aurora_train
from aurora_train import bundled
from aurora_train.config.find_recipe import load_recipe
from aurora_train.config.recipe_code import files_beside

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


@pytest.mark.parametrize("name", [pytest.param("helpers/deep.py", marks=pytest.mark.slow),
                                  pytest.param("toy.py", marks=pytest.mark.release)])  # fmt: skip
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


def test_a_bundled_recipe_has_only_the_modules_of_its_kit_that_it_imports():
    """A change of the classifier is no change of the language model."""
    code = {name: set(files_beside(path)) for name, path in bundled.recipes().items()}
    writes, reads = code["language_model"], code["language/classify"]
    assert {"language/__init__.py", "language/corpus.py", "language/store.py", "language/ngram.py"} < writes
    assert {"language/labelled.py", "language/class_scores.py", "language/tokenizers.py"} < reads
    assert not {"language/classify.py", "language/labelled.py", "language/class_scores.py"} & writes
    assert not {"language/windows.py", "language/store.py"} & reads
    for path in bundled.recipes_folder().rglob("*.py"):
        text = path.read_text()
        assert "import_module" not in text and "__import__" not in text, f"{path.name}: an import that is not followed"


def test_every_form_of_import_is_followed_and_a_users_package_is_whole(tmp_path):
    files = {
        "mine.py": "from . import a\nfrom .b import X\nimport json, numpy\nif X:\n  import kit.part\n",
        "a.py": "try:\n  import c\nexcept ImportError: pass\n", "b.py": "def f():\n  with x:\n    from d import *\n",
        "c.py": "", "d.py": "", "json.py": "", "unused.py": "",
        "kit/__init__.py": "", "kit/part.py": "from ..e import f\nfrom .other import g\n", "kit/other.py": "",
        "e.py": "", "kit/computed.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(files_beside(tmp_path / "mine.py")) == files.keys() - {"mine.py", "json.py", "unused.py"}


MINE = """
from part import NUMBER

from aurora_train.config import Section
from aurora_train.recipe import Recipe


class Mine(Recipe):
    Config = Section
    number = NUMBER
"""


def test_a_users_module_runs_as_it_is_written_whatever_bytecode_is_cached(tmp_path):
    part = tmp_path / "part.py"
    part.write_text("NUMBER = 1\n")
    py_compile.compile(str(part))
    before = part.stat()
    part.write_text("NUMBER = 2\n")
    os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "mine.py").write_text(MINE)
    assert load_recipe(tmp_path / "mine.py", False).cls.number == 2


@pytest.mark.parametrize("name", ["language/classify", "language_model"])
def test_a_bundled_recipe_and_a_copy_of_it_find_their_kit_from_anywhere(name, aurora, tmp_path):
    config = {"language/classify": "classify", "language_model": "quickstart"}[name]
    aurora.good("check", config)
    aurora.good("recipes", "copy", name, "mine")
    assert "recipe: " + name.rpartition("/")[2] + ".py" in aurora.good("check", f"mine/{config}.yaml").stdout
