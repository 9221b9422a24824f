"""GGUF files: what is written comes back, in the names and the order that llama.cpp knows; broken files are refused."""

import re
import struct

import numpy as np
import pytest
from tiny_sources import CHATML, CONFIGS, ROWS, bpe, exact, source_of, tensor_of

from aurora_train.errors import UserError
from aurora_train.interop.gguf import open_gguf
from aurora_train.interop.gguf.file import READABLE, GgufFile
from aurora_train.interop.gguf.model import as_halves
from aurora_train.interop.gguf.names import ARCHITECTURES
from aurora_train.interop.gguf.write import FORMATS, write_gguf
from aurora_train.interop.placing import matched, shape_of

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_comes_back_with_its_shape_its_weights_its_tokenizer_and_its_template(name, tmp_path):
    source = source_of(name)
    assert write_gguf(source, tmp_path / "m.gguf", "f16", "m") == []
    back = matched(open_gguf(tmp_path / "m.gguf"))
    assert back.config == shape_of(source)[1] and back.vocabulary == ROWS
    assert back.source.tensors.keys() == source.tensors.keys()
    for one, tensor in source.tensors.items():
        np.testing.assert_array_equal(back.source.tensors[one].whole(), tensor.whole(), one)
    assert back.source.chat_template == CHATML and back.source.licence == "apache-2.0"
    assert back.source.eos_ids == (2, 0)
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_keeps_a_value_as_well_as_it_says(format, tmp_path):
    arrays = {one: np.random.RandomState(7).standard_normal(tensor.shape).astype(np.float32)
              for one, tensor in source_of("qwen3").tensors.items()}  # fmt: skip
    source = source_of("qwen3", arrays)
    write_gguf(source, tmp_path / "m.gguf", format, "m")
    name = "model.layers.1.mlp.up_proj.weight"
    error = np.abs(open_gguf(tmp_path / "m.gguf").tensors[name].whole() - arrays[name])
    largest = {"f16": 2e-3, "bf16": 1.6e-2, "q8_0": 2e-2, "q4_0": 0.6}[format]
    assert 0 < error.max() < largest and error.mean() > error.max() / 50


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_llama_cpp(name):
    architecture = ARCHITECTURES[name]
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    known = gguf.get_tensor_name_map(kind, 2)
    tops = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in architecture.top.items()}
    blocks = {f"blk.1.{theirs}.weight": f"{architecture.prefix}1.{ours}.weight"
              for theirs, ours in architecture.block.items()}  # fmt: skip
    for theirs, ours in {**tops, **blocks}.items():
        assert known.get_name(ours, (".weight",)) == theirs
        assert architecture.hf_name(theirs) == ours and architecture.gguf_name(ours) == theirs


def test_rows_of_a_llama_are_in_the_order_of_llama_cpp(tmp_path):
    source = source_of("llama")
    write_gguf(source, tmp_path / "m.gguf", "f16", "m")
    query = source.tensors["model.layers.0.self_attn.q_proj.weight"].whole()
    # What llama.cpp's converter does to a query of 4 heads: halves of a head become neighbours.
    converted = query.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    np.testing.assert_array_equal(GgufFile(tmp_path / "m.gguf").read("blk.0.attn_q.weight"), converted)
    assert sorted(as_halves(64, 4)) == list(range(64))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_some_rows_of_a_tensor_are_those_rows_of_the_whole(name, tmp_path):
    write_gguf(source_of(name), tmp_path / "m.gguf", "q8_0", "m")
    for one, tensor in open_gguf(tmp_path / "m.gguf").tensors.items():
        whole = tensor.whole()
        assert whole.flags["C_CONTIGUOUS"] and whole.dtype == np.float32
        np.testing.assert_array_equal(tensor.read(3, 40), whole[3:40], one)


@pytest.mark.parametrize("kind", READABLE)
def test_every_quantisation_is_read_as_llama_cpps_package_reads_it(kind, tmp_path):
    quantisation = gguf.GGMLQuantizationType[kind]
    shape = gguf.quant_shape_to_byte_shape((8, 512), quantisation)
    stored = np.random.RandomState(3).randint(0, 60, shape).astype(np.uint8)  # bytes below 0x7c make no NaN
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("first", np.ones(5, np.float32))
    writer.add_tensor("second", stored, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = next(one for one in gguf.GGUFReader(tmp_path / "one.gguf").tensors if one.name == "second")
    wanted = gguf.dequantize(np.array(expected.data), quantisation).astype(np.float32).reshape(8, 512)
    file = GgufFile(tmp_path / "one.gguf")
    np.testing.assert_array_equal(file.read("second"), wanted)
    np.testing.assert_array_equal(file.read("second", slice(2, 5)), wanted[2:5])
    assert np.abs(wanted).max() > 0


def test_rows_without_a_token_are_filled_and_left_out_again(tmp_path):
    write_gguf(source_of("llama"), tmp_path / "m.gguf", "f16", "m")
    tokens = GgufFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == ROWS and tokens[-1] == "[PAD299]"
    import tokenizers

    back = tokenizers.Tokenizer.from_str(open_gguf(tmp_path / "m.gguf").tokenizer)
    assert back.get_vocab() == tokenizers.Tokenizer.from_str(bpe()).get_vocab()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    write_gguf(source_of("llama"), path, "f16", "m")
    return path.read_bytes()


def patched(old: bytes, new: bytes):
    """The file with one thing changed, which is there once."""

    def change(content: bytes) -> bytes:
        assert content.count(old) >= 1 and len(old) == len(new)
        return content.replace(old, new, 1)

    return change


def text(name: str) -> bytes:
    """A text as the file holds it: its length first."""
    return struct.pack("<Q", len(name)) + name.encode()


def kind_of(tensor: str, number: int):
    """The file with another quantisation at a matrix: after its name, the number of axes and two axes."""

    def change(content: bytes) -> bytes:
        at = content.index(text(tensor)) + len(text(tensor)) + 4 + 16
        return content[:at] + struct.pack("<I", number) + content[at + 4 :]

    return change


BROKEN = {
    "empty": (lambda content: b"", "not a GGUF file"),
    "a zip": (patched(b"GGUF", b"PK\x03\x04"), "not a GGUF file"),
    "version 1": (patched(b"GGUF\x03", b"GGUF\x01"), "version 1"),
    "big-endian": (patched(b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03"), "big-endian"),
    "cut in the header": (lambda content: content[:20], "truncated"),
    "cut in the metadata": (lambda content: content[:400], "truncated: the file ends within a key"),
    "cut in the tensors": (lambda content: content[:-40_000], "truncated: the tensor"),
    "an impossible length": (
        patched(text("general.name") + b"\x08\0\0\0\x01\0\0\0", text("general.name") + b"\x08\0\0\0\x01\0\0\x7f"),
        "truncated: the file ends within",
    ),
    "a value of no type": (patched(text("general.name") + b"\x08", text("general.name") + b"\x4d"), "unknown type 77"),
    "a key twice": (patched(text("general.name"), text("general.type")), "is there twice"),
    "an unknown quantisation": (kind_of("blk.0.ffn_up.weight", 99), "unknown number 99"),
    "IQ4_XS": (kind_of("blk.0.ffn_up.weight", 23), "blk.0.ffn_up.weight is stored as IQ4_XS"),
    "an unknown architecture": (patched(text("llama"), text("lhama")), "the nearest is llama"),
    "a tensor of nobody": (patched(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "blk.1.ffn_xx.weight"),
    "no layers": (patched(b"llama.block_count", b"llama.block_coxnt"), "the metadata lacks llama.block_count"),
    "no pre-tokenizer known": (patched(text("smollm"), text("smxllm")), "'smxllm'"),
    "another kind of tokenizer": (patched(text("gpt2"), text("bert")), "WordPiece"),
    "no merges": (patched(b"ggml.merges", b"ggml.mxrges"), "the metadata lacks tokenizer.ggml.merges"),
    "an end that is no token": (
        patched(text("tokenizer.ggml.eos_token_id") + b"\x04\0\0\0\x02\0",
                text("tokenizer.ggml.eos_token_id") + b"\x04\0\0\0\x02\x09"),
        "eos_token_id is 2306",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_ends_in_one_message_that_names_it(what, good, tmp_path):
    change, says = BROKEN[what]
    path = tmp_path / "broken.gguf"
    path.write_bytes(change(good))
    with pytest.raises(UserError) as caught:
        open_gguf(path)
    assert says in str(caught.value) and "broken.gguf" in str(caught.value)


@pytest.mark.parametrize("key, value, says", [
    ("llama.attention.head_count", "4", "llama.attention.head_count is '4', of type str"),
    ("llama.rope.scaling.type", 3, "llama.rope.scaling.type is 3, of type int"),
    ("general.architecture", ["llama"], "the architecture ['llama'] cannot be read"),
    ("llama.embedding_length", [64, 65], "differs from layer to layer"),
    ("tokenizer.ggml.tokens", 7, "of another kind than its key means"),
])  # fmt: skip
def test_a_value_of_another_kind_is_refused(key, value, says, good, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(good)
    file = GgufFile(tmp_path / "m.gguf")
    file.metadata[key] = value
    monkeypatch.setattr("aurora_train.interop.gguf.model.GgufFile", lambda path: file)
    with pytest.raises(UserError, match=re.escape(says)):
        open_gguf(tmp_path / "m.gguf")


def test_a_part_of_a_split_file_is_refused_with_how_to_join_it(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_uint16("split.no", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="part 2 of 3"):
        open_gguf(tmp_path / "part.gguf")


@pytest.mark.parametrize(
    "name,change,says",
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar: 32"),
        ("gemma3", {"rope_local_base_freq": 5e4}, "rope_local_base_freq"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers"),
        ("llama", {"model_type": "stablelm"}, "'stablelm'"),
        ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_what_llama_cpp_would_assume_otherwise_is_refused_by_text(name, change, says, tmp_path):
    source = source_of(name)
    source.config.update(change)
    with pytest.raises(UserError) as caught:
        write_gguf(source, tmp_path / "m.gguf", "f16", "m")
    assert says in str(caught.value) and not list(tmp_path.iterdir())


def test_values_beyond_float16_fail_the_export_and_name_the_tensor(tmp_path):
    arrays = {one: tensor.whole() for one, tensor in source_of("llama").tensors.items()}
    arrays["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e6
    with pytest.raises(UserError, match="model.layers.1.mlp.down_proj.weight"), np.errstate(over="ignore"):
        write_gguf(source_of("llama", arrays), tmp_path / "m.gguf", "f16", "m")
    assert not list(tmp_path.iterdir())


def test_rows_that_are_no_whole_blocks_are_said_and_stored_as_float16(tmp_path):
    arrays = {one: tensor.whole() for one, tensor in source_of("llama").tensors.items()}
    for layer in range(2):
        arrays[f"model.layers.{layer}.mlp.down_proj.weight"] = exact((64, 100), layer)
        for name in ("gate", "up"):
            arrays[f"model.layers.{layer}.mlp.{name}_proj.weight"] = exact((100, 64), layer)
    source = source_of("llama", arrays)
    source.config["intermediate_size"] = 100
    (remark,) = write_gguf(source, tmp_path / "m.gguf", "q4_0", "m")
    assert "blk.0.ffn_down.weight" in remark
    assert GgufFile(tmp_path / "m.gguf").tensors["blk.0.ffn_down.weight"].quantisation == "F16"


def test_a_head_of_its_own_stays_one_and_a_tied_one_is_not_written(tmp_path):
    for name, has in (("llama", True), ("qwen2", False)):
        write_gguf(source_of(name), tmp_path / f"{name}.gguf", "f16", name)
        assert ("output.weight" in GgufFile(tmp_path / f"{name}.gguf").tensors) is has
        assert matched(open_gguf(tmp_path / f"{name}.gguf")).config.tied is not has
    assert tensor_of(np.ones((2, 2))).whole().sum() == 4


def test_a_file_that_is_missing_or_a_folder_is_one_message(tmp_path):
    for name in ("none.gguf", "folder.gguf"):
        (tmp_path / "folder.gguf").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="cannot be read"):
            open_gguf(tmp_path / name)


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    for name in ("llama", "qwen3"):
        write_gguf(source_of(name), tmp_path / "m.gguf", "f16", "m")
        assert open_gguf(tmp_path / "m.gguf").config["model_type"] == name
