"""The decoder's config: what it refuses and says, what follows from what, and the size dial."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from aurora_train.errors import UserError
from aurora_train.nn.decoder_config import DecoderConfig
from aurora_train.tools.sizes import NAMED, derive_from_size

REFUSED = [
    ({"width": 100, "heads": 6}, "heads (6) must divide width (100); heads: 5 would"),
    ({"heads": 6, "kv_heads": 4}, "kv_heads (4) must divide heads (6); kv_heads: 3 would"),
    ({"width": 63, "heads": 7}, "head_dim (9) must be even"),
    ({"layers": 5, "window": 8, "window_pattern": ["local", "global"]}, "layers (5) must be a multiple of the 2"),
    ({"layers": 4, "window_pattern": ["local", "global"]}, "window is not set"),
    ({"norm": "layernorm", "norm_offset": True}, "norm_offset belongs to rmsnorm"),
    ({"loss_chunk": -1}, "loss_chunk is a number of tokens"),
    ({"rope_scaling": {"kind": "llama3", "low_freq_factor": 4.0}}, "must exceed low_freq_factor"),
    ({"dropout": 1.0}, "less than 1"),
    ({"width": -3}, "greater than or equal to 1"),
    ({"vocab": 100}, "Extra inputs are not permitted"),
]


@pytest.mark.parametrize("settings,message", REFUSED)
def test_a_shape_that_cannot_be_is_refused_with_what_would_work(settings, message):
    with pytest.raises(ValidationError) as caught:
        DecoderConfig(**settings)
    assert message in str(caught.value)


def test_sizes_follow_from_the_width_where_they_are_not_set():
    config = DecoderConfig(width=384, heads=6)
    assert (config.dim_per_head, config.num_kv_heads, config.hidden_width) == (64, 6, 1024)
    assert DecoderConfig(activation="gelu").hidden_width == 4 * 384
    assert DecoderConfig(mlp_width=100).hidden_width == 100


def test_the_shapes_of_published_models_have_their_published_counts():
    gpt2 = DecoderConfig(
        width=768, layers=12, heads=12, activation="gelu_tanh", norm="layernorm", bias="all", positions="learned"
    )
    assert gpt2.num_parameters(50257) == 124_439_808
    llama3 = DecoderConfig(width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, tied=False)
    assert llama3.num_parameters(128256) == 8_030_261_248
    gemma2 = DecoderConfig(
        width=2304, layers=26, heads=8, kv_heads=4, head_dim=256, mlp_width=9216, activation="geglu", post_norm=True
    )
    assert gemma2.num_parameters(256000) == 2_614_341_888


def derived(size, given=None, **settings):
    return {d.key: d for d in derive_from_size(size, given or {}, **settings)}


def section(found):
    model, scaling = {}, {}
    for key, one in found.items():
        if key.startswith("model.rope_scaling."):
            scaling[key.removeprefix("model.rope_scaling.")] = one.value
        elif key.startswith("model."):
            model[key.removeprefix("model.")] = one.value
    return model | ({"rope_scaling": scaling} if scaling else {})


# Parameters as their publishers count them, with the vocabulary they have: GPT-3's tables beside its 2,048 positions
# (Brown et al. 2020 round to 125M and 350M), Llama's from the weights of their files.
@pytest.mark.parametrize("size, vocab, parameters", [
    ("125m", 50257, 125_226_240), ("350m", 50257, 355_871_744), ("1b", 128256, 1_235_814_400),
    ("3b", 128256, 3_212_749_824), ("8b", 128256, 8_030_261_248),
])  # fmt: skip
def test_a_named_size_has_the_parameters_of_the_published_model(size, vocab, parameters):
    assert DecoderConfig.model_validate(section(derived(size))).num_parameters(vocab) == parameters


def test_a_named_size_is_the_published_model_whole():
    small, gpt, llama, old = (DecoderConfig.model_validate(section(derived(s))) for s in ("1b", "125m", "3b", "8b"))
    for one in (small, llama):
        scaling = one.rope_scaling
        assert (one.rope_theta, one.tied, scaling.kind, scaling.factor) == (500_000.0, True, "llama3", 32.0)
        assert (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length) == (1.0, 4.0, 8192)
    assert (old.rope_theta, old.tied, old.rope_scaling.kind, old.dim_per_head) == (500_000.0, False, "none", 128)
    assert all((m.activation, m.norm, m.norm_eps, m.bias) == ("swiglu", "rmsnorm", 1e-5, "none") for m in (llama, old))
    assert (gpt.positions, gpt.max_length, gpt.norm, gpt.bias) == ("learned", 2048, "layernorm", "all")
    assert gpt.tied and gpt.activation == "gelu_tanh" and gpt.hidden_width == 3072


def test_a_part_of_a_published_model_can_be_set_and_the_rest_stays():
    model = {"rope_scaling": {"factor": 8.0}, "tied": False}
    found = derived("1b", {"model": model})
    assert "model.rope_scaling.factor" not in found and "model.tied" not in found
    assert found["model.rope_scaling.kind"].value == "llama3" and found["train.steps"].value > 1


def test_a_depth_decides_shape_batch_steps_and_rate_each_with_formula_and_source():
    found = derived("d12", vocab_size=32768, sequence=2048)
    values = {key: d.value for key, d in found.items()}
    assert values["model.layers"] == 12 and values["model.width"] == 768 and values["model.heads"] == 6
    assert values["train.batch"] * 2048 == 2**19 and values["optimizer.lr"] == 6e-4
    parameters = DecoderConfig(width=768, layers=12, heads=6).num_parameters(32768)
    assert values["train.steps"] == round(20 * parameters / 2**19)
    assert all(d.formula and d.source for d in found.values())


def test_deeper_models_get_lower_rates_and_no_smaller_batches():
    small, large = derived("d6"), derived("d24")
    assert small["optimizer.lr"].value > large["optimizer.lr"].value
    assert small["train.batch"].value < large["train.batch"].value
    assert derived("d6", {"optimizer": {"name": "muon"}})["optimizer.lr"].value == pytest.approx(8.49e-4, rel=1e-3)


@pytest.mark.parametrize("size", [*NAMED, "d1", "d5", "d6", "d20"])
def test_every_size_makes_a_sound_config(size):
    found = derived(size)
    DecoderConfig.model_validate(section(found) | {"size": size})
    assert found["train.steps"].value >= 1 and found["train.batch"].value >= 1


def test_what_the_user_set_stays_and_enters_the_formulas():
    given = {"model": {"width": 512, "heads": 8}, "train": {"batch": 4}, "optimizer": {"lr": 1e-3}}
    found = derived("d6", given, vocab_size=4096, sequence=256)
    assert set(found) == {"model.layers", "model.kv_heads", "model.head_dim", "model.mlp_width", "train.steps"}
    parameters = DecoderConfig(width=512, layers=6, heads=8).num_parameters(4096)
    assert found["train.steps"].value == round(20 * parameters / (4 * 256))


def test_a_value_that_is_wrong_anyway_is_left_to_the_configs_own_check():
    assert derive_from_size("d6", {"model": {"width": "wide"}}) == []
    assert "train.steps" not in derived("d6", {"model": {"heads": 7}})


def test_an_unknown_size_names_those_there_are():
    with pytest.raises(UserError, match="125m") as caught:
        derive_from_size("7b", {})
    assert caught.value.where == "model.size"


def test_the_config_imports_no_jax():
    code = (
        "import sys, aurora_train.nn.decoder_config, aurora_train.tools.sizes;"
        "print([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
