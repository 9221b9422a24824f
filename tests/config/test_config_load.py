"""A config says what its text says: layers, types, derived values, hashes, and the way to disk and back."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aurora_train.config import (
    config_class,
    config_hash,
    diff,
    dump,
    flat,
    json_schema,
    load,
    load_resolved,
    parse_bytes,
)
from aurora_train.config.schema import Core
from aurora_train.config.yaml import Mark, parse, plain_scalar, write, write_scalar
from aurora_train.errors import UserError
from aurora_train.recipe import Derived


def scalar(text):
    return parse(text, lambda line, column: Mark("test", line, column)).value


@pytest.mark.parametrize("text, value", [
    ("3e-4", 3e-4), ("1E5", 1e5), (".5", 0.5), ("-.5e1", -5.0), ("1.", 1.0), ("no", "no"), ("on", "on"), ("yes", "yes"),
    ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("010", 10), ("0o17", 15), ("0x1F", 31),
    ("1_000", "1_000"), ("12:30:00", "12:30:00"), ("2001-01-01", "2001-01-01"), ("'3'", "3"), ('"true"', "true"),
    ("=", "="), ("-.inf", -math.inf), ("1e", "1e"), ("+5", 5),
])
def test_scalars_follow_yaml_1_2(text, value):
    found = scalar(text)
    assert found == value and type(found) is type(value)


def test_file_overrides_and_defaults_are_layered(folder):
    config = load("a.yaml", ["train.batch=4", "optimizer.schedule.name=wsd", "train.batch=8", "optimizer.lr=1"])
    assert (config.train.steps, config.train.batch, config.train.seed) == (10, 8, 0)
    assert config.optimizer.schedule.name == "wsd" and config.optimizer.lr == 1.0
    assert config.name == "a" and config.source.name == "a.yaml" and config.recipe == "tiny.py"
    assert config.recipe_class.__name__ == "Tiny" and not config.recipe_bundled


def test_an_override_may_be_a_mapping_and_merges(folder):
    config = load("a.yaml", ["optimizer={name: lion, schedule: {warmup: 3}}", "optimizer.schedule.final=0"])
    assert config.optimizer.name == "lion" and config.optimizer.schedule.warmup == 3
    assert config.optimizer.schedule.final == 0.0


def test_extends_lies_underneath(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "b.yaml").write_text("extends: ../a.yaml\ntrain: {batch: 5}\n")
    config = load("sub/b.yaml")
    assert (config.train.steps, config.train.batch, config.name) == (10, 5, "b")


def test_values_can_not_be_changed_after_loading(folder):
    config = load("a.yaml")
    with pytest.raises(ValidationError):
        config.train.steps = 3


def test_derived_values_fill_only_what_the_user_left_unset(folder):
    config = load("a.yaml", ["model.size=d2", "optimizer.schedule.warmup=7"])
    assert config.model.width == 128 and config.optimizer.schedule.warmup == 7
    assert config.derived == [Derived("model.width", 128, "64 x depth", "nanochat")]


def test_a_later_versions_new_keys_do_not_move_the_runs_of_this_one():
    assert config_hash(load("quickstart"))[:8] == "29a23576"  # since 2026-11-26; README.md shows it
    assert config_hash(load("quickstart", ["data.mix={}", "train.forms=auto"]))[:8] == "29a23576"
    assert config_hash(load("quickstart", ["model.lora={rank: 8}"])) != config_hash(load("quickstart"))


def test_keys_of_earlier_versions_that_ask_for_what_is_always_done_are_taken_out():
    """A run's config.yaml names every key, so a run of such a version could not be resumed otherwise."""
    config = load("quickstart", ["memory.fuse_update=false", "train.forms={linear: auto, units: auto}"])
    assert config == load("quickstart") and "fuse_update" not in dump(config)


def test_a_run_that_asked_for_what_is_gone_is_read_and_not_gone_on_with(tmp_path):
    wanted = [("fuse_update", "memory:\n", "memory:\n  fuse_update: true\n"),
              ("train.forms.norm", "  forms: auto\n", "  forms:\n    norm: plain\n"),
              ("log.online", "log:\n", "log:\n  online: true\n")]  # fmt: skip
    text = dump(load("quickstart"))
    for name, old, new in wanted:
        assert text.count(old) == 1
        (tmp_path / "config.yaml").write_text(text.replace(old, new))
        assert load_resolved(tmp_path) == load("quickstart")
        for overrides in ([], ["train.seed=1"]):
            with pytest.raises(UserError, match=name):
                load_resolved(tmp_path, overrides, reading=False)


def test_the_sink_that_used_the_network_by_a_key_of_its_own_is_named_by_its_new_name(tmp_path):
    text = dump(load("quickstart", ["log.sinks=[wandb]"]))
    for before, after in (("true", "wandb-online"), ("false", "wandb"), ("null", "wandb")):
        (tmp_path / "config.yaml").write_text(text.replace("log:\n", f"log:\n  online: {before}\n"))
        for reading in (True, False):
            assert load_resolved(tmp_path, reading=reading).log.sinks == [after]


def test_the_hash_follows_everything_but_free_keys_and_the_name(folder):
    base = config_hash(load("a.yaml"))
    (folder / "copy.yaml").write_text((folder / "a.yaml").read_text().replace("steps: 10", "steps: 10 # same"))
    assert config_hash(load("copy.yaml")) == base == config_hash(load("a.yaml", ["train.seed=0", "optimizer.lr=0.001"]))
    for free in ("log.every=3", "checkpoint.every=7", "name=other", "train.stop_after_minutes=3"):
        assert config_hash(load("a.yaml", [free])) == base
    for kept in ("train.seed=1", "train.steps=11", "optimizer.lr=2e-3", "mesh.fsdp=2", "data.path=y"):
        assert config_hash(load("a.yaml", [kept])) != base


def test_the_hash_follows_the_code_of_a_users_recipe(folder):
    base = config_hash(load("a.yaml"))
    (folder / "tiny.py").write_text((folder / "tiny.py").read_text() + "\n# another program\n")
    assert config_hash(load("a.yaml")) != base


def test_diff_names_each_changed_key_and_its_resume_class(folder):
    changed = load("a.yaml", ["train.steps=20", "log.every=3", "memory.accumulation=2", "model.width=4"])
    changes = diff(load("a.yaml"), changed)
    assert set(changes) == {
        ("train.steps", 10, 20, "warned"), ("log.every", 10, 3, "free"), ("memory.accumulation", "auto", 2, "elastic"),
        ("model.width", 8, 4, "frozen"),
    }


def test_a_run_folder_loads_without_the_original_recipe(folder):
    config = load("a.yaml", ["model.size=d1"])
    (folder / "run" / "code").mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text(dump(config))
    (folder / "run" / "code" / "tiny.py").write_bytes((folder / "tiny.py").read_bytes())
    (folder / "tiny.py").unlink()
    again = load_resolved(folder / "run", ["log.every=3"])
    assert diff(config, again) == [("log.every", 10, 3, "free")]
    assert config_hash(again) == config_hash(config) and again.derived == []


def test_a_users_recipe_is_announced_with_its_hash(folder, capsys):
    config = load("a.yaml")
    assert f"recipe tiny.py sha256 {config.recipe_sha256}" in capsys.readouterr().err


def test_two_loads_give_one_class(folder):
    assert load("a.yaml").recipe_class is load("a.yaml").recipe_class
    assert type(load("a.yaml")) is type(load("a.yaml"))


def test_json_schema_says_what_a_key_means_and_what_a_resume_may_do(folder):
    schema = json_schema(config_class(load("a.yaml").recipe_class))
    steps = schema["$defs"]["Train"]["properties"]["steps"]
    assert steps["resume"] == "warned" and "steps" in steps["description"] and steps["minimum"] == 1
    assert "from" in schema["$defs"]["Init"]["properties"] and "model" in schema["properties"]
    json.dumps(schema)


def test_every_core_field_has_help_and_there_are_few(folder):
    leaves = flat(load("a.yaml"))
    core = [key for key in leaves if key.split(".")[0] in Core.model_fields]
    assert len(core) <= 72

    def walk(model):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                walk(inner)
            else:
                assert field.description and field.json_schema_extra["resume"], name

    walk(Core)


def test_sizes_in_bytes():
    assert parse_bytes("96GB") == 96 * 10**9 and parse_bytes("1.5GiB") == 3 * 2**29 and parse_bytes("512 MiB") == 2**29
    for wrong in ("96", "GB", "-1GB", "0GB", "96gb", "1iB"):
        with pytest.raises(ValueError):
            parse_bytes(wrong)


def texts(max_size=None):
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=max_size)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False)
    | texts(12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(texts(6), VALUES, min_size=1, max_size=4))
@settings(deadline=None, max_examples=150)
def test_whatever_is_written_reads_back_the_same(tree):
    assert repr(scalar(write(tree))) == repr(tree)


@given(texts())
@settings(deadline=None)
def test_an_unquoted_word_is_never_mistaken_for_a_number(text):
    written = write_scalar(text)
    assert written.startswith('"') or plain_scalar(written) == text


@given(
    steps=st.integers(1, 10**12), seed=st.integers(0, 2**63 - 1), lr=st.floats(1e-30, 1e30), path=texts(20),
    clip=st.none() | st.floats(1e-12, 1e12), mixture=st.dictionaries(texts(5), st.floats(-1e9, 1e9), max_size=3),
    save=st.sampled_from(["auto", "all", "nothing"]) | st.lists(st.text("abc_0", max_size=4), max_size=3),
    unroll=st.sampled_from(["auto", True, False]), shape=st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dumped_config_loads_back_equal(folder, steps, seed, lr, path, clip, mixture, save, unroll, shape):
    given_tree = {
        "recipe": "tiny.py", "data": {"path": path, "mixture": mixture, "shape": list(shape)},
        "train": {"steps": steps, "seed": seed}, "optimizer": {"lr": lr, "clip": clip},
        "memory": {"save": save, "unroll": unroll},
    }
    (folder / "h.yaml").write_text(write(given_tree), encoding="utf-8")
    config = load("h.yaml")
    (folder / "back.yaml").write_text(dump(config), encoding="utf-8")
    back = load("back.yaml")
    assert back == config and diff(config, back) == [] and config_hash(back) == config_hash(config)
    assert config.data.path == path and config.optimizer.lr == lr and config.data.shape == shape


def test_a_prefix_with_dots_is_one_prefix(folder):
    parts = {"a.b": str(folder / "x"), "policy": str(folder / "y")}
    assert load("a.yaml", ["init.a.b=x", "init.policy=y"]).init.parts == parts


def test_a_key_of_an_earlier_version_that_asked_for_nothing_is_left_out(folder):
    text = (folder / "a.yaml").read_text()
    (folder / "old.yaml").write_text(text + "log: {online: false}\n")
    assert load("old.yaml") == load("a.yaml", ["name=old"])
