"""What a run with adapters trained beside them, as a whole, goes out as PEFT's `modules_to_save`, over a named base."""

import json

import numpy as np
import pytest
from open_models import write_model
from safetensors.numpy import load_file, save_file

from aurora_train.errors import UserError
from aurora_train.interop.by_layer import log_probabilities
from aurora_train.interop.kept import facts_of
from aurora_train.interop.peft_export import over_base
from aurora_train.interop.placing import matched
from aurora_train.interop.result import Adapters, Result
from aurora_train.interop.source import open_source

ROWS = [np.arange(3, 40, dtype=np.int32)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def trained(path, whole=()) -> Result:
    """A run over the model in a folder: an adapter of rank 2 on the first query, and the parameters `whole` changed."""
    base, rng, query = matched(open_source(path)), np.random.default_rng(0), "stack.units.0000.attention.query"

    def drawn(*shape):
        return (rng.normal(size=shape) / 8).astype(np.float32)

    pair = drawn(base.shapes[query][0], 2), drawn(2, base.shapes[query][1])
    changed = {name: base.read(name) + drawn(*base.shapes[name]) for name in whole}

    def stored(name):
        return changed[name] if name in changed else base.read(name)

    def merged(name):
        return stored(name) + (2 * (pair[0] @ pair[1]) if name == query else 0)

    record = {"run": "r", "sequence": 64, "parent": {"from": str(path), "step": None}}
    facts = facts_of(base.source, base.family.model_type)
    adapters = Adapters(2, 4.0, (query,), lambda name: pair, stored)
    return Result(base.config, base.vocabulary, base.shapes, merged, facts, record, adapters=adapters)


def written(result, folder):
    write, kept = over_base(result, None)
    folder.mkdir()
    write(result, folder, kept)
    return json.loads((folder / "adapter_config.json").read_text())


# The family, what is trained as a whole, settings, and the modules' names. GPT-2 is tied, and its norm has a bias.
WHOLE = {
    "head and norm": ("llama3", ("head", "final_norm.scale"), {}, ["lm_head", "model.norm"]),
    "a tied embedding": ("qwen3", ("embedding",), {"tie_word_embeddings": True}, ["model.embed_tokens"]),
    "GPT-2": ("gpt2", ("embedding", "positions", "final_norm.bias"), {},
              ["transformer.ln_f", "transformer.wpe", "transformer.wte"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_what_was_trained_as_a_whole_comes_back_over_its_base(case, tmp_path):
    name, whole, settings, modules = WHOLE[case]
    write_model(tmp_path / "base", name, **settings)
    result = trained(tmp_path / "base", whole)
    said = written(result, tmp_path / "out")
    assert said["modules_to_save"] == modules and said.get("ensure_weight_tying", False) == result.config.tied
    found = matched(open_source(tmp_path / "out"))
    assert found.config == result.config
    for one in result.shapes:
        np.testing.assert_allclose(found.read(one), result.read(one), rtol=1e-6, atol=1e-7)
    if result.config.tied:
        held = load_file(tmp_path / "out" / "adapter_model.safetensors")
        held["base_model.model.lm_head.weight"] += 1
        save_file(held, tmp_path / "out" / "adapter_model.safetensors")
        with pytest.raises(UserError, match="what is stored for embedding and head differs"):
            open_source(tmp_path / "out")


def test_a_base_of_a_hub_is_named_as_the_hub_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "cache" / "hub" / "models--lab--tiny" / "snapshots" / COMMIT
    base.parent.mkdir(parents=True)
    write_model(base)
    said = written(trained(base), tmp_path / "out")
    assert (said["base_model_name_or_path"], said["revision"]) == ("lab/tiny", COMMIT)
    assert said["modules_to_save"] is None and str(tmp_path) not in json.dumps(said)
    assert open_source(tmp_path / "out").kind == "peft"
    result = trained(base)
    result.record["parent"] |= {"hub": "lab/tiny", "revision": COMMIT}
    (tmp_path / "cache").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"hub:lab/tiny@{COMMIT} is on the network, and the network is off"):
        over_base(result, None)
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "moved"))
    base = tmp_path / "moved" / base.relative_to(tmp_path / "cache")
    result = result._replace(adapters=trained(base).adapters)
    assert over_base(result, None)[1] == over_base(result, f"hub:lab/tiny@{COMMIT}")[1] == "float32"
    (tmp_path / "lab" / "tiny").mkdir(parents=True)  # PEFT would take this folder for the base
    assert written(trained(base), tmp_path / "again")["base_model_name_or_path"] == str(base)


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE)
def test_peft_reads_what_was_trained_as_a_whole_alike(case, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    name, whole, settings, _ = WHOLE[case]
    write_model(tmp_path / "base", name, **settings)
    result = trained(tmp_path / "base", whole)
    written(result, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(ROWS[0][None].astype(np.int64))).logits[0]
    ours = log_probabilities(result.config, result.read, ROWS)[0]
    np.testing.assert_allclose(ours, torch.log_softmax(logits, -1).numpy(), atol=1e-4)
