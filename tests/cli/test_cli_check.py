"""The command line without training: help, check, schema, recipes; what they print, import and return."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from kit import NEEDED

from aurora_train import bundled
from aurora_train.cli.main import main
from aurora_train.config import load

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("check", "schema", "recipes", "recipes list", "recipes show", "recipes copy")
RECIPE = '''"""A recipe of one field."""
from aurora_train.config import Section, setting
from aurora_train.recipe import Derived, Recipe


class Data(Section):
    rows: int = setting(3, resume="warned", help="rows of data")


class Mine(Recipe):
    class Config(Section):
        data: Data = Data()

    @classmethod
    def derive(cls, given):
        return [Derived("train.batch", 2 * 3, "2 x rows", "ours")]

    @classmethod
    def check(cls, config):
        if config.train.seed == 130:
            raise KeyboardInterrupt
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(RECIPE)
    (tmp_path / "a.yaml").write_text("recipe: mine.py\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def aurora(*arguments, before=(), **how):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *before, "-m", "aurora_train.cli.main", *arguments], env=environment, text=True, **how
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    assert f"Example: aurora {verb}" in capsys.readouterr().out


def test_help_lists_the_verbs(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in ("check", "schema", "recipes")) and "Example: aurora train" in out


def test_version_is_one_line(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("aurora_train ")


def test_a_mistyped_verb_or_option_is_said_with_exit_2(folder, capsys):
    assert main(["chek", "a.yaml"]) == 2
    assert main(["check", "a.yaml", "--jsn"]) == 2
    assert main(["check"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_what_check_prints_is_itself_the_config(folder, capsys):
    assert main(["check", "a.yaml", "optimizer.lr=5e-4", "--no-rehearse"]) == 0
    out = capsys.readouterr().out
    assert "# derived train.batch = 6: 2 x rows (ours)" in out
    (folder / "again.yaml").write_text(out)
    assert load("again.yaml") == load("a.yaml", ["optimizer.lr=5e-4"])


def test_check_as_json_says_the_same(folder, capsys):
    assert main(["check", "a.yaml", "--json", "--no-rehearse"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["config"]["train"]["batch"] == 6 and re.fullmatch("[0-9a-f]{64}", said["hash"])
    assert said["derived"] == [{"key": "train.batch", "value": 6, "formula": "2 x rows", "source": "ours"}]


def test_an_interrupt_exits_130(folder):
    assert main(["check", "a.yaml", "train.seed=130"]) == 130


def test_a_closed_pipe_is_quiet(folder):
    reader, writer = os.pipe()
    os.close(reader)
    done = aurora("check", "a.yaml", "--no-rehearse", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


QUICK = [["--help"], ["check", "a.yaml", "--no-rehearse"], ["schema"], ["recipes", "list"]]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_the_quick_verbs_import_neither_jax_nor_flax(folder, arguments):
    done = aurora(*arguments, before=["-X", "importtime"], capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "aurora_train" in imported and not imported & {"jax", "jaxlib", "flax", "torch", "datasets"}


CHECK_EACH = """
import sys
from aurora_train.cli.main import main
for name in sys.argv[1:]:
    assert main(["check", name]) == 0, name
    print(name, *sorted(sys.modules.keys() & {"jax", "jaxlib", "flax", "torch", "datasets"}), file=sys.stderr)
"""


def test_checking_a_bundled_config_imports_neither_jax_nor_flax():
    names = [name for name in bundled.configs() if NEEDED.get(name) is None or find_spec(NEEDED[name])]
    command, environment = [sys.executable, "-c", CHECK_EACH, *names], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.splitlines() == names, "a name is followed by what its check has imported"


def test_nothing_phones_home_unless_asked(folder):
    script = (
        "import os; from aurora_train.cli.main import main; main(['--version']); print(os.environ['HF_HUB_OFFLINE'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], text=True, capture_output=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "1"


def test_schema_of_a_users_recipe_has_its_fields(folder, capsys):
    assert main(["schema", "mine.py"]) == 0
    schema = json.loads(capsys.readouterr().out)
    rows = schema["$defs"]["Data"]["properties"]["rows"]
    assert rows["description"] == "rows of data" and rows["resume"] == "warned"
    assert schema["additionalProperties"] is False


def test_schema_without_a_recipe_leaves_room_for_its_sections(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "optimizer" in schema["properties"] and schema["additionalProperties"] is True


@pytest.mark.parametrize("recipe", bundled.recipes())
def test_list_and_show_know_every_bundled_recipe(recipe, capsys):
    assert main(["recipes", "list", "--json"]) == 0
    row = next(row for row in json.loads(capsys.readouterr().out) if row["recipe"] == recipe)
    assert row["about"] and all(row["configs"].values())
    assert main(["recipes", "show", recipe]) == 0
    assert capsys.readouterr().out == bundled.recipes()[recipe].read_text()


@pytest.mark.parametrize("recipe", bundled.recipes())
def test_a_copied_recipe_is_the_users_own_and_is_never_overwritten(recipe, tmp_path, capsys):
    target = tmp_path / "lab"
    assert main(["recipes", "copy", recipe, str(target)]) == 0
    file = target / f"{recipe.rpartition('/')[2]}.py"
    file.write_text(file.read_text() + "\n# mine\n")
    for path in target.glob("*.yaml"):
        if "from: package:" in path.read_text():  # needs weights that may not be installed
            continue
        config = load(path)
        assert config.recipe == file.name and not config.recipe_bundled
    assert main(["recipes", "copy", recipe, str(target)]) == 2
    assert "--force" in capsys.readouterr().err and "# mine" in file.read_text()
    assert main(["recipes", "copy", recipe, str(target), "--force"]) == 0
    assert "# mine" not in file.read_text()


def test_an_unknown_recipe_is_said_with_what_there_is(tmp_path, capsys):
    assert main(["recipes", "copy", "neural/decodin", str(tmp_path)]) == 2
    assert "did you mean `neural/decoding`?" in capsys.readouterr().err
    assert main(["recipes", "show", "zzz"]) == 2
