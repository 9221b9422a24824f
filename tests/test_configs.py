"""Every bundled config loads, opens with its command, and trains two steps once it is shrunk."""

import json
import re

import pytest
from kit import bundled_configs, losses

from aurora_train import bundled
from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.config.find_recipe import load_recipe
from aurora_train.nn.sizes import NAMED

SHRUNK = ["train.steps=2", "train.batch=4", "memory.accumulation=1", "memory.unroll=false", "evaluate.examples=4",
          "evaluate.before=false", "evaluate.final=false", "checkpoint.every=2"]
# What makes each recipe small; a new recipe adds its line here.
SMALL = {
    "language_model": ["model.width=16", "model.heads=2", "model.layers=2", "data.max_documents=60",
                       "data.holdout_validation=0.2", "data.sequence=16", "data.tokenizer={kind: byte}"],
    "neural_decoding": ["model.width=8", "model.heads=2", "model.layers=1", "data.simulated_trials=20",
                        "data.simulated_units=5"],
    "vision/digits": ["model.channels=4"],
    "language/classify": ["model.width=16", "model.heads=2", "model.layers=1", "data.sequence=16",
                          "data.tokenizer={kind: byte}"],
    "language/tune": ["model.width=16", "model.heads=2", "model.layers=1", "data.tokenizer={kind: byte}"],
    "language/prefer": [],  # always from a model that exists
}
OWN = {"language/smollm2": ["model.lora.rank=2", "data.sequence=16", "data.max_documents=60", "train.batch=1"]}
OWN |= {f"language/smollm2_{how}": ["data.max_rows=60", "data.holdout_validation=0.2", "train.batch=1", *smaller]
        for how, smaller in {"sft": [], "lora": ["model.lora.rank=2"], "qlora": ["model.lora.rank=2"]}.items()}
OWN["language/smollm2_dpo"] = ["data.max_rows=16", "data.holdout_validation=0.2", "train.batch=1", "model.lora.rank=2"]
# A published shape, small: the size stays, and what a width of 16 cannot have is overruled.
OWN |= {f"language/{size}": [*SMALL["language_model"], "model.kv_heads=1", "model.mlp_width=32"] for size in NAMED}
KITS = {"language_model": {"language"}, "language/classify": {"language"}, "language/tune": {"language"},
        "language/prefer": {"language"},
        "neural_decoding": {"neural"}}
CONFIGS = bundled.configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_opens_with_a_comment_that_has_its_command(name):
    comment = re.match(r"(?:#.*\n)+", CONFIGS[name].read_text())[0]
    named = [bundled.config_file(found) for found in re.findall(r"aurora train (\S+)", comment)]
    assert CONFIGS[name] in named
    assert len(bundled.first_line(CONFIGS[name])) > 20


def test_a_kit_is_no_recipe():
    assert set(bundled.recipes()) == set(SMALL)


@pytest.mark.parametrize("name", bundled_configs(pytest.mark.slow))
def test_a_shrunk_config_trains_and_keeps_all_of_its_code(name, tmp_path, shared_cache, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    recipe = load(name).recipe
    assert recipe in SMALL, f"tests/test_configs.py does not know how to make {recipe} small"
    small = OWN.get(name, SMALL[recipe])
    assert main(["train", name, *SHRUNK, *small, "--run", "run", "--quiet"]) == 0, capsys.readouterr().err
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]
    code, recorded = tmp_path / "run" / "code", json.loads((tmp_path / "run" / "provenance.json").read_text())
    kept = load_recipe(code / bundled.recipes()[recipe].name, bundled_one=False)
    assert kept.sha256 == recorded["recipe"]["sha256"], "what was hashed, and nothing less, was kept"
    assert {*kept.beside, kept.file.name} == {path.relative_to(code).as_posix() for path in code.rglob("*.py")}
    assert {path.partition("/")[0] for path in kept.beside} == KITS.get(recipe, set())


@pytest.mark.parametrize("size", NAMED)
def test_a_pretraining_config_is_planned_for_its_machine_as_its_comment_says(size, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))  # rates that someone measured would give another time
    name = f"language/{size}"
    comment = " ".join(re.match(r"(?:#.*\n)+", CONFIGS[name].read_text())[0].replace("#", " ").split())
    machine = re.search(rf"aurora plan {name} --machine (\S+)", comment)[1]
    planned = r"Planned and not measured .*?: on an? .*? ([\d.]+) GB of ([\d.]+) GB, ([\d,]+) steps"
    peak, budget, steps = re.search(planned, comment).groups()
    assert main(["plan", name, "--machine", machine, "--no-compile", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["predicted_bytes"] / 1e9 == pytest.approx(float(peak), rel=0.05)
    assert plan["predicted_bytes"] <= plan["budget_bytes"] == pytest.approx(float(budget) * 1e9, rel=0.01)
    assert load(name).train.steps == int(steps.replace(",", ""))
    assert not (tmp_path / "data").exists(), "a plan needs no data"
