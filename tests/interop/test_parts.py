"""What a vision checkpoint holds beside its text model goes through an import and an export unchanged."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from kit import in_process as aurora
from open_models import settings_of, write_model
from safetensors.numpy import load_file, save_file

from aurora_train.interop.parts import with_parts
from aurora_train.interop.placing import matched
from aurora_train.interop.result import result_of
from aurora_train.interop.source import open_source
from aurora_train.loading import unread

PIXELS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
BESIDE = {
    "vision_tower.patches.weight": PIXELS.astype(ml_dtypes.bfloat16), "vision_tower.odd.weight": PIXELS,
    "multi_modal_projector.scale": PIXELS[0].astype(np.float16),
    # As a batch normalisation and a table of positions store them: a single number, whole numbers, flags.
    "vision_tower.bn.num_batches_tracked": np.array(7), "vision_tower.scale": np.array(0.5, ml_dtypes.bfloat16),
    "vision_tower.position_ids": np.arange(6).reshape(1, 6), "vision_tower.seen": np.array([True, False, True]),
}  # fmt: skip


def write_vision(folder, beginning="language_model.model."):
    """A tiny Gemma 3 with the names and the config of a vision checkpoint. Returns its tensors."""
    arrays = write_model(folder, "gemma3", dtype="bfloat16")
    config = {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "image_token_index": 7,
        "text_config": settings_of("gemma3"), "vision_config": {"model_type": "siglip_vision_model"}, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text('{"size": 224}')
    named = {name.replace("model.", beginning, 1): array for name, array in arrays.items()} | BESIDE
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return named


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_vision(tmp_path / "open")
    assert aurora("import", "open", "--to", "run") == 0
    return tmp_path


def test_an_export_is_the_checkpoint_that_came_in_to_the_bit(here, capsys):
    assert aurora("export", "run", "--to", "out") == 0
    before, after = (load_file(here / side / "model.safetensors") for side in ("open", "out"))
    assert before.keys() == after.keys()
    for one in before:
        assert before[one].tobytes() == after[one].tobytes() and before[one].dtype == after[one].dtype
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"] and config["image_token_index"] == 7
    assert config["vision_config"] == {"model_type": "siglip_vision_model"}
    assert config["text_config"]["model_type"] == "gemma3_text" and config["eos_token_id"] == 1
    assert (here / "out" / "preprocessor_config.json").read_text() == '{"size": 224}'
    assert "7 tensors of other parts of its base (" in (here / "out" / "README.md").read_text()
    assert aurora("verify", "out") == 0


@pytest.mark.slow
def test_an_export_is_itself_a_source_and_another_dtype_leaves_the_other_parts_alone(here):
    assert aurora("export", "run", "--to", "out") == 0
    assert aurora("import", "out", "--to", "again") == 0
    assert aurora("export", "again", "--to", "twice") == 0  # the run's source is now the export
    assert (here / "twice" / "model.safetensors").read_bytes() == (here / "out" / "model.safetensors").read_bytes()
    assert aurora("export", "run", "--to", "wide", "--dtype", "float32") == 0
    wide = load_file(here / "wide" / "model.safetensors")
    assert all(wide[one].tobytes() == array.tobytes() for one, array in BESIDE.items())
    assert wide["language_model.model.norm.weight"].dtype == np.float32


def test_an_open_vision_model_goes_out_whole_without_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = write_vision(tmp_path / "open")
    assert aurora("export", "open", "--to", "out") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "open" / "model.safetensors").read_bytes()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == before.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "7 tensors of other parts of its base (" in card and "Started from: `open` (sha256 " in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_config"]
    assert aurora("verify", "out") == 0


@pytest.mark.parametrize("case", [pytest.param("gone", marks=pytest.mark.slow), "changed"])
def test_parts_that_cannot_be_copied_are_left_out_and_the_card_says_why(case, here, caplog):
    if case == "gone":
        shutil.move(here / "open", here / "moved")
        said = "open is no longer where the run began with it"
    else:
        path = here / "open" / "model.safetensors"
        save_file(load_file(path) | {"vision_tower.odd.weight": PIXELS + 1}, path)
        said = "the files of open are no longer those with which the run began"
    assert aurora("export", "run", "--to", "out") == 0
    assert said in caplog.text and f"were left out: {said}." in (here / "out" / "README.md").read_text()
    assert not any(name in BESIDE for name in load_file(here / "out" / "model.safetensors"))
    assert json.loads((here / "out" / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]


def test_a_format_that_does_not_hold_them_leaves_them_out(here, caplog):
    with unread("run", by="export") as found:
        result = result_of(found)
    left = with_parts(result, fits="--format gguf does not hold them")
    assert left.parts is None
    assert "(multi_modal_projector.scale, ...) were left out: --format gguf" in left.record["parts"]
    assert "are left out: --format gguf does not hold them" in caplog.text
    assert with_parts(result).parts.tensors.keys() == BESIDE.keys()


def test_heads_that_predict_further_tokens_are_copied_beside_a_text_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = write_model(tmp_path / "open", dtype="bfloat16", mtp_num_hidden_layers=1)
    arrays |= {"mtp.layers.0.weight": PIXELS}
    save_file(arrays, tmp_path / "open" / "model.safetensors", metadata={"format": "pt"})
    assert aurora("import", "open", "--to", "run") == 0 and aurora("export", "run", "--to", "out") == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == arrays.keys() and all(after[one].tobytes() == arrays[one].tobytes() for one in arrays)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mtp_num_hidden_layers"] == 1
    assert matched(open_source(tmp_path / "out")).beside == ["mtp.layers.0.weight"]


@pytest.mark.slow
def test_transformers_loads_the_exported_vision_checkpoint_whole(tmp_path, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "open", "gemma3")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=settings_of("gemma3"), vision_config=vision, mm_tokens_per_image=1)
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "open")
    assert aurora("import", "open", "--to", "run") == 0
    assert aurora("export", "run", "--to", "out", "--dtype", "float32", "--verify", "transformers") == 0
    again, loading = transformers.Gemma3ForConditionalGeneration.from_pretrained("out", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    states = [{name: value for name, value in one.state_dict().items()} for one in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name].to(value.dtype)) for name, value in states[0].items())
