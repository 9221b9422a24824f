"""What cannot be read is refused before any work: one message that names the file, the key or the tensor."""

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from open_models import VOCABULARY, settings_of, weights_of, write_model
from safetensors.numpy import load_file, save_file

from aurora_train.errors import UserError
from aurora_train.interop import families
from aurora_train.interop.kept import facts_of
from aurora_train.interop.placing import matched, shape_of
from aurora_train.interop.source import OpenModel, digest, is_model, open_source


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "m")
    return tmp_path / "m"


def opened(folder):
    found = matched(open_source(folder))
    return found, facts_of(found.source, found.family.model_type)


def edit(folder, **changed):
    path = folder / "config.json"
    config = {name: value for name, value in (json.loads(path.read_text()) | changed).items() if value is not ...}
    path.write_text(json.dumps(config))


def weights(folder, change):
    arrays = weights_of("qwen3", settings_of("qwen3"))
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def cut(folder, share=0.5):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shard(folder, *, lost=False, index=True, extra=False):
    names = sorted(arrays := weights_of("qwen3", settings_of("qwen3")))
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    (folder / "model.safetensors").unlink()
    for file, held in parts.items():
        save_file({name: arrays[name] for name in held}, folder / file)
    listed = {name: file for file, held in parts.items() for name in held}
    listed |= {"model.ghost.weight": "model-00001-of-00002.safetensors"} if extra else {}
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    if lost:
        (folder / "model-00002-of-00002.safetensors").unlink()


def tokenizer(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def float8(folder):
    array = np.zeros((4, 4), ml_dtypes.float8_e4m3fn)
    save_file({"model.norm.weight": array}, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"
BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), r"not valid JSON.*|config\.json:1:"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds no mapping"),
    "no model_type": (lambda f: edit(f, model_type=...), "names no `model_type`"),
    "unknown architecture": (
        lambda f: edit(f, model_type="qwen4_moe"), r"not supported[\s\S]*the nearest that is: qwen"),
    "a key is missing": (lambda f: edit(f, hidden_size=...), "config.json has no `hidden_size`"),
    "no vocabulary": (lambda f: edit(f, vocab_size=...), "config.json has no `vocab_size`"),
    "another activation": (lambda f: edit(f, hidden_act="relu"), r"`hidden_act: relu` is not supported"),
    "biases": (lambda f: edit(f, attention_bias=True), r"`attention_bias: True` is not supported"),
    "heads do not fit": (lambda f: edit(f, num_key_value_heads=3), "describes no model: .*kv_heads"),
    "rotary of another type": (
        lambda f: edit(f, rope_parameters={"rope_type": "dynamic", "factor": 2}), "rotary positions of type 'dynamic'"),
    "rotary key missing": (lambda f: edit(f, rope_parameters={"rope_type": "linear"}), "of type linear lack 'factor'"),
    "a size is a text": (lambda f: edit(f, num_hidden_layers="2"), "`num_hidden_layers` is '2', which is not a number"),
    "a size is negative": (lambda f: edit(f, intermediate_size=-3), "describes no model: mlp_width"),
    "rotary value is a text": (
        lambda f: edit(f, rope_parameters={"rope_type": "linear", "factor": "x"}), "of type linear cannot be read"),
    "longrope of another head": (
        lambda f: edit(f, max_position_embeddings=64, rope_parameters={
            "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
            "original_max_position_embeddings": 32}),
        "longrope has 1 factors, but 6 pairs of a head turn"),
    "layer types are no list": (lambda f: edit(f, layer_types="full_attention"), "which is not a list"),
    "layer of an unknown type": (lambda f: edit(f, layer_types=["chunked"] * 2), "layer 0 is of type 'chunked'"),
    "too few layer types": (lambda f: edit(f, layer_types=["full_attention"]), "names 1 layers"),
    "FP8": (lambda f: edit(f, quantization_config={"quant_method": "fp8"}), "the weights are stored in FP8"),
    "bitsandbytes": (lambda f: edit(f, quantization_config={"quant_method": "bitsandbytes"}), "in bitsandbytes"),
    "AWQ": (lambda f: edit(f, quantization_config={"quant_method": "awq"}), "stored in AWQ"),
    "GPTQ": (lambda f: edit(f, quantization_config={"quant_method": "gptq"}), "stored in GPTQ"),
    "FP8 without a word": (float8, "model.norm.weight is stored in FP8"),
    "codes without a word": (
        lambda f: weights(f, lambda w: w.update({Q: w[Q].astype(np.int8)})), f"{Q} is stored in the dtype int8"),
    "pickle": (pickled, "pytorch_model.bin is a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors here"),
    "cut short": (cut, "not a whole safetensors file"),
    "cut in its header": (lambda f: cut(f, 0.001), "not a whole safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "a shard is lost": (lambda f: shard(f, lost=True), "names the file model-00002-of-00002.safetensors, which is not"),
    "shards without index": (lambda f: shard(f, index=False), "there are 2 safetensors files and no"),
    "index names a ghost": (lambda f: shard(f, extra=True), "model.ghost.weight is only in the index"),
    "tensor missing": (lambda f: weights(f, lambda w: w.pop(Q)), f"{Q}: missing"),
    "tensor extra": (
        lambda f: weights(f, lambda w: w.update({"model.x.weight": w[Q]})), "model.x.weight: not part of this"),
    "tensor reshaped": (
        lambda f: weights(f, lambda w: w.update({Q: w[Q][:-1].copy()})),
        rf"{Q}: of shape \[47, 32\], where .* \[48, 32\]"),
    "vocabulary of another size": (lambda f: edit(f, vocab_size=VOCABULARY + 1), "model.embed_tokens.weight: of shape"),
    "tokenizer of another size": (
        lambda f: tokenizer(f, lambda t: t["added_tokens"].extend(
            t["added_tokens"][0] | {"id": 257 + i, "content": f"<{i}>"} for i in range(60))),
        r"the tokenizer has 317 ids, and the embedding 288 rows"),
    "added tokens with a gap": (
        lambda f: tokenizer(f, lambda t: t["added_tokens"].append(
            t["added_tokens"][0] | {"id": 270, "content": "<x>"})),
        "the added token '<x>' has the id 270 in the file and 257 once loaded"),
    "layers are null": (lambda f: edit(f, num_hidden_layers=None), "config.json has no `num_hidden_layers`"),
    "layers are no whole number": (lambda f: edit(f, num_hidden_layers=2.0), "which is not a whole number of at least"),
    "theta is a text": (lambda f: edit(f, rope_parameters=..., rope_theta="x"), "`rope_theta` is 'x', which is not a"),
    "theta is a text inside": (lambda f: edit(f, rope_parameters={"rope_theta": "x"}), "rope_theta is 'x'"),
    "stretching is a text": (lambda f: edit(f, rope_scaling="linear"), "`rope_scaling` is 'linear', which is not a"),
    "rotary parameters are a list": (lambda f: edit(f, rope_parameters=[1]), r"`rope_parameters` is \[1\], which"),
    "model type is a list": (lambda f: edit(f, model_type=["qwen3"]), "`model_type` is .*, which is not a text"),
    "architectures are a number": (lambda f: edit(f, architectures=5), "`architectures` is 5, which is not a list"),
    "end is a text": (lambda f: edit(f, eos_token_id="</s>"), "`eos_token_id` is .*, which are no ids"),
    "beginning is a text": (lambda f: edit(f, bos_token_id="<s>"), "`bos_token_id` is '<s>', which is no id"),
    "index of numbers": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": [1]}}'),
        r"weight_map of a.weight is \[1\], which names no file"),
    "rank of a head": (
        lambda f: weights(f, lambda w: w.update({
            name: np.zeros(4, np.float32) for name in ("lm_head.weight", "model.embed_tokens.weight")})),
        r"model.embed_tokens.weight: of shape \[4\]"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "there is no tokenizer.json"),
    "another tokenizer": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "tokenizer.model is here, which is not read"),
    "tokenizer is not one": (lambda f: (f / "tokenizer.json").write_text('{"a": 1}'), "not a readable tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_with_what_is_wrong_and_where(case, folder):
    change, said = BAD[case]
    change(folder)
    with pytest.raises(UserError) as fault:
        opened(folder)
    assert re.search(said, str(fault.value)), str(fault.value)
    assert str(folder) in str(fault.value)


@pytest.mark.parametrize("name, changed", [
    ("gemma3", {"query_pre_attn_scalar": 0}), ("gemma3", {"query_pre_attn_scalar": "16"}),
    ("gemma3", {"sliding_window_pattern": 0}), ("qwen3_5", {"full_attention_interval": 0}),
    ("smollm3", {"no_rope_layer_interval": 0}), ("smollm3", {"no_rope_layers": 4}),
])  # fmt: skip
def test_a_value_that_no_layer_can_have_is_refused_by_its_key(name, changed):
    with pytest.raises(UserError, match=f"`{next(iter(changed))}` is "):
        shape_of(OpenModel(Path("config.json"), "hf", settings_of(name, **changed), {}))


def shape(**config):
    return shape_of(OpenModel(Path("config.json"), "hf", config, {}))[1]


def test_a_null_is_a_value_and_not_the_default():
    gemma = settings_of("gemma2")
    assert shape(**{name: gemma[name] for name in gemma if name != "attn_logit_softcapping"}).attention_softcap == 50
    assert shape(**gemma | {"attn_logit_softcapping": None}).attention_softcap is None
    qwen = shape(**settings_of("qwen2", num_key_value_heads=None))
    assert qwen.num_kv_heads == qwen.heads


def test_what_the_text_part_of_a_vision_model_leaves_out_is_the_published_code_s():
    """The config.json of Gemma 3 4B, as published: its text part states what differs from the class."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    config = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text, "vision_config": {}}
    found = shape(**config)
    assert (found.width, found.layers, found.heads, found.num_kv_heads, found.dim_per_head) == (2560, 34, 8, 4, 256)
    assert families.vocabulary(config, "") == 262208 and families.text_config(config)["bos_token_id"] == 2
    with pytest.raises(UserError, match="config.json has no `vocab_size`"):
        families.vocabulary(text, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, family in families.known().items() if family.sparse])
def test_an_empty_text_part_reads_as_transformers_reads_it(name):
    mapping = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    theirs = mapping[name]().to_dict()
    sparse = {"model_type": "vision", "text_config": {"model_type": name}}
    assert families.essence(shape(**sparse)) == families.essence(shape(**theirs))
    ours = families.text_config(sparse)
    assert {key: theirs.get(key) for key in families.known()[name].sparse} == {
        key: ours[key] for key in families.known()[name].sparse}


@pytest.mark.parametrize("adds, separator", [(None, "<|endoftext|>"), (True, "<x>"), (False, "<|endoftext|>")])
def test_documents_begin_with_what_the_tokenizer_begins_a_text_with(adds, separator, folder):
    tokenizer(folder, lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 257, "content": "<x>"}))
    settings = {"bos_token": "<x>", "eos_token": "<|endoftext|>"} | ({} if adds is None else {"add_bos_token": adds})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _, facts = opened(folder)
    assert json.loads(facts["tokenizer_config.json"])["eos_token"] == separator


def test_a_whole_folder_and_a_sharded_one_hold_the_same(folder):
    one, facts = opened(folder)
    arrays = {name: one.read(name) for name in one.shapes}
    shard(folder)
    other, _ = opened(folder)
    assert all(np.array_equal(other.read(name), array) for name, array in arrays.items())
    assert facts["origin"]["licence"] == "apache-2.0" and facts["vocabulary"] == VOCABULARY


def test_a_flag_that_says_tied_is_no_proof(tmp_path):
    arrays = write_model(tmp_path / "tied", tie_word_embeddings=True)
    assert matched(open_source(tmp_path / "tied")).config.tied
    head = {"lm_head.weight": arrays["model.embed_tokens.weight"]}
    save_file(arrays | head, tmp_path / "tied" / "model.safetensors")
    assert matched(open_source(tmp_path / "tied")).config.tied, "stored twice, and equal"
    save_file(arrays | {"lm_head.weight": head["lm_head.weight"] + 1}, tmp_path / "tied" / "model.safetensors")
    found = matched(open_source(tmp_path / "tied"))
    assert not found.config.tied and np.array_equal(found.read("head").T, head["lm_head.weight"] + 1)


@pytest.mark.parametrize("beginning", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_vision_model_is_taken_and_the_rest_is_named(beginning, tmp_path):
    arrays = write_model(tmp_path / "m", "gemma3")
    text = settings_of("gemma3")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    named = {name.replace("model.", beginning, 1): array for name, array in arrays.items()}
    save_file(named | {"vision_tower.x.weight": np.zeros((2, 2), np.float32)}, tmp_path / "m" / "model.safetensors")
    found = matched(open_source(tmp_path / "m"))
    assert found.beside == ["vision_tower.x.weight"] and found.family.model_type == "gemma3_text"
    assert np.array_equal(found.read("embedding"), arrays["model.embed_tokens.weight"])


def adapter(tmp_path, *, name="model.layers.0.self_attn.q_proj", zero=False, half=False, **config):
    """A PEFT adapter of rank 2 over the folder `m`. Returns (folder, the change it makes)."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    rng = np.random.default_rng(0)
    down, up = (rng.normal(size=size).astype(np.float32) for size in ((2, 32), (48, 2)))
    up *= not zero
    arrays = {f"base_model.model.{name}.lora_A.weight": down} | (
        {} if half else {f"base_model.model.{name}.lora_B.weight": up})
    save_file(arrays, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "../m"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder, up @ down


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_added_to_its_base(rslora, folder, tmp_path):
    path, change = adapter(tmp_path, use_rslora=rslora)
    found, _ = opened(path)
    base, _ = opened(folder)
    scale = 8 / 2**0.5 if rslora else 4
    name = "stack.units.0000.attention.query"
    np.testing.assert_allclose(found.read(name), base.read(name) + scale * change.T, rtol=1e-5, atol=1e-5)
    others = [one for one in base.shapes if one != name]
    assert is_model(path) and not is_model(tmp_path)
    assert found.source.kind == "peft" and all(np.array_equal(found.read(one), base.read(one)) for one in others)


def test_the_digest_of_an_adapter_covers_its_base(folder, tmp_path):
    path, _ = adapter(tmp_path)
    before = digest(path)
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert digest(path) != before


def test_an_adapter_is_not_added_to_codes(folder, tmp_path):
    weights(folder, lambda w: w.update({Q: w[Q].astype(np.int8)}))
    path, _ = adapter(tmp_path)
    with pytest.raises(UserError, match=f"{Q} is stored in the dtype int8"):
        opened(path)


BAD_ADAPTERS = {
    "another type": ({"peft_type": "IA3"}, "of type 'IA3' is not supported"),
    "no rank": ({"r": None}, "names no rank"),
    "DoRA": ({"use_dora": True}, "`use_dora: true` is not supported"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "`modules_to_save: "),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights: \"pissa_niter_4\"` is not supported"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens: "),
    "QA-LoRA": ({"use_qalora": True}, "`use_qalora: true` is not supported"),
    "its own base": ({"base_model_name_or_path": "../adapter"}, "the adapter's base is the adapter itself"),
    "no base": ({"base_model_name_or_path": None}, "names no base"),
    "base elsewhere": ({"base_model_name_or_path": "owner/name"}, "base owner/name is not here"),
    "a name that leads nowhere": ({"name": "layers.0.q"}, "belongs to no tensor of the base"),
    "half of it": ({"half": True}, "has only lora_A"),
    "it changes nothing": ({"zero": True}, "every lora_B is zero"),
    "an alpha of text": ({"lora_alpha": "8"}, r'`lora_alpha` of .*q_proj is "8", which is no number above zero'),
    "an infinite alpha": ({"lora_alpha": float("inf")}, "`lora_alpha` of .*q_proj is Infinity, which is no number"),
    "a truth of text": ({"use_rslora": "false"}, '`use_rslora` is "false", which is not true or false'),
    "one module for a list": ({"modules_to_save": "lm_head"}, '`modules_to_save` is "lm_head", which is not a list'),
    "no pattern": ({"rank_pattern": {"q_proj(": 2}}, "`rank_pattern` holds what is no regular expression"),
    "a list of patterns": ({"alpha_pattern": ["q_proj"]}, "`alpha_pattern` is not a mapping"),
    "a rank of its own": ({"rank_pattern": {"layers.0.self_attn.q_proj": 3}}, "where rank 3 means"),
    "another rank": ({"r": 4}, r"lora_A of .* is of shape \[2, 32\], where rank 4 means \[4, 32\]"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused(case, folder, tmp_path):
    changed, said = BAD_ADAPTERS[case]
    path, _ = adapter(tmp_path, **changed)
    with pytest.raises(UserError, match=said):
        opened(path)


def with_whole(path, **arrays):
    """Add tensors that are stored whole to an adapter."""
    held = load_file(path / "adapter_model.safetensors")
    whole = {f"base_model.model.{name}.weight": array for name, array in arrays.items()}
    save_file(held | whole, path / "adapter_model.safetensors")


def test_a_module_that_was_trained_as_a_whole_takes_the_place_of_the_bases(folder, tmp_path):
    path, _ = adapter(tmp_path, modules_to_save=["lm_head"])
    head = np.random.default_rng(1).normal(size=(VOCABULARY, 32)).astype(np.float32)
    with_whole(path, lm_head=head)
    assert np.array_equal(opened(path)[0].read("head"), head.T)


@pytest.mark.parametrize("rows,said", [(VOCABULARY + 2, "over a base with other rows"), (VOCABULARY, None)])
def test_an_embedding_that_was_widened_is_refused_and_one_that_was_not_is_taken(rows, said, folder, tmp_path):
    path, _ = adapter(tmp_path)
    table = np.ones((rows, 32), np.float32)
    with_whole(path, **{"model.embed_tokens": table})
    if said is None:
        assert np.array_equal(opened(path)[0].read("embedding"), table)
    else:
        with pytest.raises(UserError, match=said):
            opened(path)


def test_the_adapters_of_a_tied_base_that_are_said_to_be_one_must_be_equal(tmp_path):
    write_model(tmp_path / "m", tie_word_embeddings=True)
    path, rng = tmp_path / "adapter", np.random.default_rng(0)
    path.mkdir()
    down, up = (rng.normal(size=size).astype(np.float32) for size in ((2, VOCABULARY), (32, 2)))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "../m"}
    (path / "adapter_config.json").write_text(json.dumps(config | {"ensure_weight_tying": True}))
    for move, said in ((0, None), (1, "what is stored for embedding and head differs")):
        table, head = "base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head.lora_"
        arrays = {f"{table}A": down, f"{table}B": up, f"{head}A.weight": np.ascontiguousarray(up.T) + move,
                  f"{head}B.weight": np.ascontiguousarray(down.T)}  # fmt: skip
        save_file(arrays, path / "adapter_model.safetensors")
        if said is None:
            found, base = opened(path)[0], opened(tmp_path / "m")[0]
            wanted = base.read("embedding") + 4 * (up @ down).T
            assert found.config.tied
            np.testing.assert_allclose(found.read("embedding"), wanted, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(UserError, match=said):
                opened(path)


def test_adapters_that_name_each_other_as_base_are_refused_as_a_circle(folder, tmp_path):
    path, _ = adapter(tmp_path)
    for one, base in (("a", "../b"), ("b", "../c"), ("c", "../a"), ("d", "../b")):
        shutil.copytree(path, tmp_path / one)
        (tmp_path / one / "adapter_config.json").write_text(json.dumps(
            {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": base}))  # fmt: skip
    for one, circle in (("a", "a -> b -> c -> a"), ("d", "b -> c -> a -> b")):
        for read in (open_source, digest):
            with pytest.raises(UserError, match=circle):
                read(tmp_path / one)


def test_an_adapter_over_an_adapter_is_added_to_its_sum(folder, tmp_path):
    path, change = adapter(tmp_path)
    shutil.copytree(path, tmp_path / "second")
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": "../adapter"}))  # fmt: skip
    found, base, name = opened(tmp_path / "second")[0], opened(folder)[0], "stack.units.0000.attention.query"
    np.testing.assert_allclose(found.read(name), base.read(name) + 8 * change.T, rtol=1e-5, atol=1e-5)
