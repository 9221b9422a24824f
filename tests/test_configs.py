"""Every bundled config loads, opens with its command, and trains two steps once it is shrunk."""

import itertools
import json
import math
import re

import pytest
from chats import TEMPLATE
from kit import NEEDED_TO_RUN, bundled_configs, losses

from aurora_train import bundled
from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.config.find_recipe import load_recipe
from aurora_train.errors import UserError
from aurora_train.interop import families
from aurora_train.interop.placing import our_shapes, their_shapes
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.tools.sizes import NAMED

SHRUNK = ["train.steps=2", "train.batch=4", "memory.accumulation=1", "memory.unroll=false", "evaluate.examples=4",
          "evaluate.before=false", "evaluate.final=false", "checkpoint.every=2"]
# What makes each recipe small; a new recipe adds its line here.
SMALL = {
    "language_model": ["model.width=16", "model.heads=2", "model.layers=2", "data.max_documents=60",
                       "data.holdout_validation=0.2", "data.sequence=16", "data.tokenizer={kind: byte}"],
    "neural/decoding": ["model.width=8", "model.heads=2", "model.layers=1", "data.simulated_trials=20",
                        "data.simulated_units=5"],
    "neural/masked": ["model.width=8", "model.heads=2", "model.layers=1", "data.simulated_trials=20",
                      "data.simulated_units=8"],
    "vision/digits": ["model.channels=4"],
    "driving/motion": ["model.width=8", "model.heads=2", "model.layers=1", "model.relation=4", "model.tokens=24",
                       "data.simulated_maps=2", "data.simulated_held_out=1", "data.simulated_scenes=1",
                       "data.agents=4", "data.pieces=8"],
    "language/classify": ["model.width=16", "model.heads=2", "model.layers=1", "data.sequence=16",
                          "data.tokenizer={kind: byte}"],
    "language/tune": ["model.width=16", "model.heads=2", "model.layers=1", "data.tokenizer={kind: byte}"],
    "language/prefer": [],  # always from a model that exists
    "robot/policy": ["model.width=16", "model.heads=2", "model.layers=1", "model.decoder_layers=1", "data.episodes=4",
                     "data.validation=0.3"],
}
OWN = {"language/smollm2": ["model.lora.rank=2", "data.sequence=16", "data.max_documents=60", "train.batch=1"]}
OWN |= {f"language/smollm2_{how}": ["data.max_rows=60", "data.holdout_validation=0.2", "train.batch=1", *smaller]
        for how, smaller in {"sft": [], "lora": ["model.lora.rank=2"], "qlora": ["model.lora.rank=2"]}.items()}
OWN["language/smollm2_dpo"] = ["data.max_rows=16", "data.holdout_validation=0.2", "train.batch=1", "model.lora.rank=2"]
# A published shape that names no model, and so has no tokenizer: small, with random weights and bytes,
# all of which are trained.
TUNED = {"language/qwen3-8b_qlora": ("rtx-5090", "dgx-spark"), "language/32b_lora": ("dgx-spark", "dgx-station"),
         "language/70b_qlora": ("dgx-spark", "dgx-station")}  # fmt: skip
OWN |= dict.fromkeys(TUNED, [
    "model.width=64", "model.heads=2", "model.kv_heads=1", "model.head_dim=32", "model.layers=1", "model.mlp_width=64",
    "model.lora=null", "data.tokenizer={kind: byte}", "data.template=chat.jinja", "data.sequence=256",
    "data.max_rows=60", "data.holdout_validation=0.2", "evaluate.every=2", "samples.max_tokens=4",
])  # fmt: skip
# A published shape, small: the size stays, and what a width of 16 cannot have is overruled.
OWN |= {f"language/{size}": [*SMALL["language_model"], "model.kv_heads=1", "model.mlp_width=32"] for size in NAMED}
KITS = {"language_model": {"language"}, "language/classify": {"language"}, "language/tune": {"language"},
        "language/prefer": {"language"},
        "neural/decoding": {"neural"}, "neural/masked": {"neural"}, "robot/policy": {"robot"},
        "driving/motion": {"driving"}}
CONFIGS = bundled.configs()
FIRST_TUNED = next(iter(TUNED))
# Also in the slow tier alone: the tests of these recipes train them, too.
LONG = (FIRST_TUNED, "driving/motion", "robot/two_modes", "language/classify", "neural/decoding")
# Shrunk, they are much alike: a release trains each of them.
ALIKE = (*(f"language/{size}" for size in [*NAMED][1:]), *(name for name in TUNED if name != FIRST_TUNED))


def shrunk() -> list:
    """The configs to train, each with the marks of its tier."""
    params = bundled_configs(pytest.mark.slow, also=LONG, needed=NEEDED_TO_RUN)
    return [pytest.param(*one.values, marks=[*one.marks, pytest.mark.release]) if one.values[0] in ALIKE else one
            for one in params]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_opens_with_a_comment_that_has_its_command(name):
    comment = re.match(r"(?:#.*\n)+", CONFIGS[name].read_text())[0]
    named = [bundled.config_file(found) for found in re.findall(r"aurora train (\S+)", comment)]
    assert CONFIGS[name] in named
    assert len(bundled.first_line(CONFIGS[name])) > 20


def test_a_kit_is_no_recipe():
    assert set(bundled.recipes()) == set(SMALL)


@pytest.mark.parametrize("name", shrunk())
def test_a_shrunk_config_trains_and_keeps_all_of_its_code(name, tmp_path, shared_cache, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    recipe = load(name).recipe
    assert recipe in SMALL, f"tests/test_configs.py does not know how to make {recipe} small"
    small = OWN.get(name, SMALL[recipe])
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    status, said = main(["train", name, *SHRUNK, *small, "--run", "run", "--quiet"]), capsys.readouterr().err
    if name == "robot/push_pixels" and "MuJoCo cannot draw on this machine" in said:
        pytest.skip("no software renderer")
    assert status == 0, said
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]
    code, recorded = tmp_path / "run" / "code", json.loads((tmp_path / "run" / "provenance.json").read_text())
    kept = load_recipe(code / bundled.recipes()[recipe].name, bundled_one=False)
    assert kept.sha256 == recorded["recipe"]["sha256"], "what was hashed, and nothing less, was kept"
    assert {*kept.beside, kept.file.name} == {path.relative_to(code).as_posix() for path in code.rglob("*.py")}
    assert {path.partition("/")[0] for path in kept.beside} == KITS.get(recipe, set())


@pytest.mark.parametrize("size", [
    size if size in ("125m", "8b") else pytest.param(size, marks=pytest.mark.release) for size in NAMED
])  # fmt: skip
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


@pytest.mark.parametrize(("name", "machine"), [
    pytest.param(name, machine, marks={("language/qwen3-8b_qlora", "rtx-5090"): [],
                                       ("language/70b_qlora", "dgx-station"): pytest.mark.slow}
                 .get((name, machine), pytest.mark.release)) for name, machines in TUNED.items() for machine in machines
])  # fmt: skip
def test_a_tuning_config_is_planned_without_weights_as_its_comment_says(name, machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))  # rates that someone measured would give another time
    comment = re.match(r"(?:#.*\n)+", CONFIGS[name].read_text())[0]
    assert f"aurora plan {name} --machine {TUNED[name][0]} " in comment
    assert tuple(re.findall(r"^#   (\S+) +[\d.]+ GB of", comment, re.MULTILINE)) == TUNED[name]
    said = re.search(rf"^#   {machine} +([\d.]+) GB of ([\d.]+) GB, ([\d,]+) steps of", comment, re.MULTILINE)
    assert main(["plan", name, "--machine", machine, "--no-compile", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["predicted_bytes"] / 1e9 == pytest.approx(float(said[1]), rel=0.05)
    assert plan["predicted_bytes"] <= plan["budget_bytes"] == pytest.approx(float(said[2]) * 1e9, rel=0.01)
    assert load(name).train.steps == int(said[3].replace(",", ""))


# What the published config.json of each model says of its shape.
_QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
          "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False, "rope_scaling": None,
          "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False,
          "sliding_window": None}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
PUBLISHED = {
    "language/qwen3-8b_qlora": _QWEN3 | {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
                                         "intermediate_size": 12288, "max_window_layers": 36},
    "language/32b_lora": _QWEN3 | {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64,
                                   "intermediate_size": 25600, "max_window_layers": 64},
    "language/70b_qlora": {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "rope_scaling": _LLAMA3, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    },
}  # fmt: skip


def write_headers(folder, settings: dict) -> None:
    """A Hugging Face folder of the real one's size. Its weights are a hole in the file: only the header is read."""
    table = families.of(settings, str(folder))
    shape = DecoderConfig(**families.read_shape(settings, table, str(folder)))
    shapes = their_shapes(table, our_shapes(shape, settings["vocab_size"]), shape.heads)
    ends = itertools.accumulate((2 * math.prod(size) for size in shapes.values()), initial=0)
    header = {key: {"dtype": "BF16", "shape": list(size), "data_offsets": list(span)}
              for (key, size), span in zip(shapes.items(), itertools.pairwise(ends), strict=True)}  # fmt: skip
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * sum(map(math.prod, shapes.values())))


@pytest.mark.parametrize("name", TUNED)
def test_a_tuning_config_starts_from_the_published_model_and_from_no_other_shape(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_headers(tmp_path / "real", PUBLISHED[name])
    config, alone = load(name, ["model.from=real"]), load(name)
    assert config.init.from_ == str(tmp_path / "real") and alone.init.from_ is None
    assert config.model.model_dump(exclude={"from_"}) == alone.model.model_dump(exclude={"from_"})
    assert alone.data.tokenizer.vocab == PUBLISHED[name]["vocab_size"]
    write_headers(tmp_path / "other", PUBLISHED[name] | {"intermediate_size": 512})
    with pytest.raises(UserError) as caught:
        load(name, ["model.from=other"])
    assert "model.mlp_width" in str(caught.value.where)
    assert main(["train", name, "--run", "run", "--quiet"]) == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert "error: model.from: " in error and "model.from=hub:owner/name" in error
