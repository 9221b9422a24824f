"""The adapters of a run go out as PEFT reads them, and come back over the same base as the same model."""

import json
import shutil

import jax
import numpy as np
import pytest
from kit import in_process as aurora
from open_models import VOCABULARY, settings_of, weights_of, write_model
from safetensors.numpy import load_file

from aurora_train.errors import UserError
from aurora_train.interop import proof
from aurora_train.interop.by_layer import log_probabilities
from aurora_train.interop.kept import facts_of
from aurora_train.interop.peft_export import over_base
from aurora_train.interop.placing import matched
from aurora_train.interop.result import Adapters, Result
from aurora_train.interop.source import open_source
from aurora_train.nn import nf4

KERNELS = ("query", "key", "value", "out", "gate", "up", "down")
TIED = {"tie_word_embeddings": True}
ROWS = [np.arange(3, 40, dtype=np.int32)]


def with_adapters(path, targets=KERNELS, stabilised=False) -> Result:
    """What a run over a model in a folder would give away, with random adapters of rank 3."""
    base, rng = matched(open_source(path)), np.random.default_rng(0)
    chosen = [name for name, shape in base.shapes.items() if name.split(".")[-1] in targets and len(shape) == 2]
    assert chosen
    pairs = {name: tuple((rng.normal(size=size) / 8).astype(np.float32) for size in
                         ((base.shapes[name][0], 3), (3, base.shapes[name][1]))) for name in chosen}  # fmt: skip

    def merged(name):
        scale = 6 / (3**0.5 if stabilised else 3)
        return base.read(name) + (0 if name not in pairs else scale * (pairs[name][0] @ pairs[name][1]))

    record = {"run": "r", "sequence": 64, "parent": {"from": str(path), "step": None}}
    adapters = Adapters(3, 6.0, tuple(pairs), pairs.__getitem__, base.read, stabilised)
    facts = facts_of(base.source, base.family.model_type)
    return Result(base.config, base.vocabulary, base.shapes, merged, facts, record, adapters=adapters)


def written(result, folder):
    write, kept = over_base(result, None)
    folder.mkdir()
    write(result, folder, kept)
    return kept


# Separate kernels; joined along the outputs; the same, stored as (in, out); heads in turn with a gate; linear layers.
FAMILIES = {"qwen3": KERNELS, "phi3": ("query", "value", "up"), "gpt2": KERNELS, "qwen3_5": KERNELS}
# Embedding and head apart, scaled by the root of the rank; one table for both, under two names; with a scale; gates.
TABLES = {
    "llama3": ((*KERNELS, "embedding", "head"), {}), "qwen3": (("embedding",), TIED),
    "gpt2": ((*KERNELS, "embedding"), {}), "gemma3": (("query", "embedding"), TIED),
    "qwen3_5": ((*KERNELS, "out_gate", "head"), {}),
}  # fmt: skip
_SLOW = ("gemma3", "qwen3_5")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in TABLES])
def test_adapters_of_embedding_and_head_come_back_as_the_same_model(name, tmp_path):
    targets, settings = TABLES[name]
    write_model(tmp_path / "base", name, **settings)
    result = with_adapters(tmp_path / "base", targets, stabilised=True)
    assert result.config.tied == ("head" not in targets)
    written(result, tmp_path / "out")
    found = matched(open_source(tmp_path / "out"))
    assert found.shapes == result.shapes and found.config == result.config
    for one in result.shapes:
        np.testing.assert_allclose(found.read(one), result.read(one), rtol=1e-5, atol=1e-6)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    arrays = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert said["use_rslora"] and said["fan_in_fan_out"] == (name == "gpt2")
    if "embedding" in targets:
        table = "transformer.wte" if name == "gpt2" else "model.embed_tokens"
        assert arrays[f"base_model.model.{table}.lora_embedding_A"].shape == (3, VOCABULARY)
        assert table.split(".")[-1] in said["target_modules"]
    assert arrays["base_model.model.lm_head.lora_B.weight"].shape == (VOCABULARY, 3)
    assert "lm_head" in said["target_modules"]


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_come_back_over_their_base_as_the_same_model(name, tmp_path):
    write_model(tmp_path / "base", name)
    result = with_adapters(tmp_path / "base", FAMILIES[name])
    assert written(result, tmp_path / "out") == "float32"
    found = matched(open_source(tmp_path / "out"))
    for one in result.shapes:
        np.testing.assert_allclose(found.read(one), result.read(one), rtol=1e-5, atol=1e-6)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["fan_in_fan_out"] == (name == "gpt2") and said["r"] == 3
    joined = {"phi3": {"self_attn.qkv_proj": 6}, "gpt2": {"attn.c_attn": 9},
              "qwen3_5": {"linear_attn.in_proj_qkv": 9}}  # fmt: skip
    assert said["rank_pattern"] == joined.get(name, {})
    assert said["alpha_pattern"] == {end: 2.0 * rank for end, rank in said["rank_pattern"].items()}
    arrays = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(array.dtype == np.float32 for array in arrays.values())


def test_an_adapter_over_another_base_is_refused_by_the_tensor(tmp_path):
    write_model(tmp_path / "base")
    result = with_adapters(tmp_path / "base")
    other = matched(open_source(tmp_path / "base"))
    changed = result._replace(adapters=result.adapters._replace(
        stored=lambda name: other.read(name) + (name == "stack.units.0001.attention.key")))  # fmt: skip
    with pytest.raises(UserError, match=r"the run's stack\.units\.0001\.attention\.key is not that of the base"):
        over_base(changed, None)


def test_a_base_that_was_rounded_to_4_bits_is_held_to_its_codes(tmp_path):
    write_model(tmp_path / "base", hidden_size=64, intermediate_size=64)
    result = with_adapters(tmp_path / "base")
    base, kernel = matched(open_source(tmp_path / "base")), "stack.units.0000.mlp.up"
    codes = tuple(map(np.asarray, jax.jit(nf4.encode)(base.read(kernel))))
    for kept, said in ((codes, None), ((codes[0] ^ 1, codes[1]), "the run's stack.units.0000.mlp.up")):
        stored = {kernel: kept}
        run = result._replace(adapters=result.adapters._replace(
            stored=lambda name, stored=stored: stored[name] if name in stored else base.read(name)))  # fmt: skip
        if said is None:
            assert over_base(run, None)[1] == "nf4"
        else:
            with pytest.raises(UserError, match=said):
                over_base(run, None)


def test_a_base_that_peft_names_otherwise_is_refused(tmp_path):
    arrays = write_model(tmp_path / "base", "gemma3")
    result = with_adapters(tmp_path / "base")
    text = settings_of("gemma3")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert arrays.keys() == weights_of("gemma3", text).keys()
    with pytest.raises(UserError, match="the text part of a larger model"):
        over_base(result, None)


def test_adapters_that_went_on_from_adapters_are_written_over_the_first_base(tmp_path):
    write_model(tmp_path / "open")
    result = with_adapters(tmp_path / "open")
    first, beside = tmp_path / "first", dict.fromkeys(("recipe", "base", "licence", "step"), None) | {"data": {}}
    first.mkdir()
    (first / "provenance.json").write_text(json.dumps({"parent": {**result.record["parent"], "digest": "0"}}))
    result = result._replace(record=result.record | beside | {"parent": {"from": str(first), "step": 4, "digest": "1"}})
    (first / "config.yaml").write_text("model: {width: 32}\n")
    with pytest.raises(UserError, match="were trained over step 4"):
        over_base(result, None)
    (first / "config.yaml").write_text("model: {lora: {rank: 3}}\n")
    write, kept = over_base(result, None)
    (tmp_path / "out").mkdir()
    proof.prove(result, write(result, tmp_path / "out", kept), tmp_path / "out", kept, None)
    shutil.move(tmp_path / "open", tmp_path / "public")
    with pytest.raises(UserError, match="is not here") as refused:
        over_base(result, None)
    assert "--base DIR" in str(refused.value)
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "../public"}
    file.write_text(json.dumps(config))
    assert proof.repeat(tmp_path / "out")["faults"] == []
    file.write_text(json.dumps(config | {"lora_alpha": 7.0}))
    faults = proof.repeat(tmp_path / "out")["faults"]
    assert "adapter_config.json was changed or is missing" in faults and "log-probabilities differ" in faults[-1]


@pytest.fixture
def run(here, adapted):
    """The current folder has a model `open`, the run `base` imported from it, and adapters over that, `adapted`."""


@pytest.mark.slow
def test_a_run_with_adapters_goes_out_as_peft_and_is_proved(here, capsys, run):
    assert aurora("export", "adapted", "--to", "peft", "--format", "peft", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["proof"] == "round trip" and "every adapter over its base is the run's;" in said["says"]
    config = json.loads((here / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(here / "open") and config["r"] == 2
    assert {"embed_tokens", "lm_head", "self_attn.q_proj"} <= set(config["target_modules"]) and config["use_rslora"]
    assert not (here / "peft" / "model.safetensors").exists() and (here / "peft" / "tokenizer.json").is_file()
    assert "library_name: \"peft\"" in (here / "peft" / "README.md").read_text()
    assert aurora("verify", "peft") == 0
    assert aurora("generate", "peft", "--max-tokens", 2) == 0
    assert aurora("import", "peft", "--to", "back") == 0
    assert aurora("export", "back", "--to", "back-hf", "--dtype", "float32") == 0
    assert aurora("export", "adapted", "--to", "whole", "--merge", "--dtype", "float32") == 0
    back, merged = (matched(open_source(here / one)) for one in ("back-hf", "whole"))
    for name in merged.shapes:
        np.testing.assert_allclose(back.read(name), merged.read(name), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked,said",
    {
        "both": (("adapted", "--merge"), "--merge adds them to the base"),
        "a dtype": (("adapted", "--dtype", "bfloat16"), "adapters are float32"),
        "a library": (("adapted", "--verify", "transformers"), "compared with a Hugging Face folder only"),
        "a run without": (("base",), "this run trained no adapters"),
        "no such base": (("adapted", "--base", "nowhere"), "there is no such folder"),
    }.values(),
)
def test_what_cannot_go_out_as_peft_is_refused(asked, said, here, capsys, run):
    assert aurora("export", asked[0], "--to", "none", "--format", "peft", *asked[1:]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not (here / "none").exists()


@pytest.mark.slow
def test_a_base_that_moved_is_named_and_held_to_what_the_run_kept(here, capsys, run):
    shutil.copytree(here / "open", here / "moved")
    assert aurora("export", "adapted", "--to", "elsewhere", "--format", "peft", "--base", "moved") == 0
    config = json.loads((here / "elsewhere" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(here / "moved")
    write_model(here / "other", dtype="bfloat16", intermediate_size=96)
    assert aurora("export", "adapted", "--to", "none", "--format", "peft", "--base", "other") == 2
    assert "of another shape" in capsys.readouterr().err
    assert aurora("export", "adapted", "--to", "none", "--base", "moved", "--merge") == 2
    assert "--format hf writes the whole model" in capsys.readouterr().err


CASES = {name: (name, targets, {}, False) for name, targets in FAMILIES.items()} | {
    f"{name}, tables": (name, *case, True) for name, case in TABLES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_another_library_reads_an_adapter_alike(case, tmp_path):
    """By PEFT itself if it is installed, else by transformers with B A added to each module as PEFT's paper says."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, targets, settings, stabilised = CASES[case]
    if stabilised:
        pytest.importorskip("peft")
    write_model(tmp_path / "base", name, **settings)
    result = with_adapters(tmp_path / "base", targets, stabilised)
    written(result, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    try:
        from peft import PeftModel
    except ImportError:
        _add(torch, model, tmp_path / "out")
    else:
        model = PeftModel.from_pretrained(model, tmp_path / "out")
        held = {name for name, _ in model.named_parameters(remove_duplicate=False) if "lora_" in name}
        assert len(held) == len(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(ROWS[0][None].astype(np.int64))).logits[0]
    theirs = torch.log_softmax(logits, -1).numpy()
    ours = log_probabilities(result.config, result.read, ROWS)[0]
    # In float32 the linear layers' sums differ from transformers': 0.9e-4 without adapters, 3.7e-4 with.
    np.testing.assert_allclose(ours, theirs, atol=1e-3 if name == "qwen3_5" else 1e-4)


# What PEFT is asked for, and whether our model of it is tied.
MADE = {
    "both, apart": ("llama3", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}, False),
    "tied, one adapter": ("qwen3", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tied, the embedding alone": ("qwen3", {"target_modules": ["embed_tokens", "up_proj"]}, False),
    "tied, the head alone": ("qwen3", {"target_modules": ["lm_head"]}, False),
    "ranks of their own": ("llama3", {"target_modules": ["embed_tokens", "down_proj", "lm_head"], "use_rslora": True,
                                      "rank_pattern": {"embed_tokens": 2, "layers.0.mlp.down_proj": 5},
                                      "alpha_pattern": {"lm_head": 3.0}}, False),
    "trained as a whole": ("llama3", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}, False),
    "a whole embedding, tied": ("qwen3", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "a whole embedding, kept tied": ("qwen3", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"],
                                               "ensure_weight_tying": True}, True),
    "GPT-2": ("gpt2", {"target_modules": ["c_attn", "wte", "lm_head"], "fan_in_fan_out": True}, False),
    "all linear": ("gemma3", {"target_modules": "all-linear"}, True),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", MADE)
def test_an_adapter_made_by_peft_comes_in_as_the_same_model(case, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    name, asked, tied = MADE[case]
    write_model(tmp_path / "base", name, **(TIED if name == "qwen3" else {}))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **asked))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(torch.randn(parameter.shape) / 8)
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(ROWS[0][None].astype(np.int64))).logits[0]
    found = matched(open_source(tmp_path / "out"))
    assert found.config.tied == tied
    ours = log_probabilities(found.config, found.read, ROWS)[0]
    np.testing.assert_allclose(ours, torch.log_softmax(logits, -1).numpy(), atol=1e-4)


def _add(torch, model, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    arrays = load_file(folder / "adapter_model.safetensors")
    for key in (key for key in arrays if ".lora_A." in key):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        up, down = arrays[key.replace("lora_A", "lora_B")], arrays[key]
        change = torch.from_numpy(config["lora_alpha"] / config["r"] * (up @ down))  # a joined module's ratio is alike
        with torch.no_grad():
            model.get_parameter(f"{module}.weight").add_(change.T if config["fan_in_fan_out"] else change)
