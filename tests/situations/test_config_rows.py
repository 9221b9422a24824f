"""Rows of what users and public reports found wrong with configs, sizes, schedules and defaults: one test for each."""

import random
import re

import pytest
from kit import evaluations, events

from aurora_train.check.remarks import remarks_on_data, remarks_on_losses
from aurora_train.cli.main import main
from aurora_train.config import load, load_resolved
from aurora_train.errors import UserError
from aurora_train.machine.precision import settled
from aurora_train.machine.targets import machine_names
from aurora_train.run import Run

TINY = """recipe: language_model
model: {width: 32, layers: 1, heads: 2}
data: {source: txt, sequence: 32, holdout_test: 0.1, holdout_validation: 0.1}
train: {steps: 8, batch: 4}
evaluate: {final: false, examples: 8}
samples: {count: 0}
log: {every: 4}
"""
WORDS = "the of and to in is that for on are with his they be this have from one had by word but not what all".split()


@pytest.fixture
def here(tmp_path, monkeypatch, shared_cache):
    """tiny.yaml and sixty small documents in a folder, which is the current one."""
    draw = random.Random(0)
    (tmp_path / "txt").mkdir()
    for number in range(60):
        (tmp_path / "txt" / f"d{number:03}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(60)))
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(capsys, *arguments, status=0):
    """What `aurora check` says of tiny.yaml."""
    assert main(["check", "tiny.yaml", *arguments]) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


# ---- sizes and what is written beside them


def test_M6_a_size_on_the_command_line_wins_over_widths_in_the_file_and_says_so(here, capsys):
    said = checked(capsys, "model.size=125m")
    config = load("tiny.yaml", ["model.size=125m"])
    assert (config.model.width, config.model.layers, config.model.heads) == (768, 12, 12)
    for part in ("size 125m replaces", "model.width = 32 (tiny.yaml:2:16)", "model.layers = 1 (tiny.yaml:2:28)"):
        assert part in said
    assert config.train.steps == 8, "what the file says of the training stays"


@pytest.mark.parametrize("order", [1, -1])
def test_M6_a_width_on_the_command_line_wins_over_the_size_beside_it(here, order):
    config = load("tiny.yaml", ["model.size=d2", "model.width=96"][::order])
    assert (config.model.width, config.model.layers, config.model.heads) == (96, 2, 1)
    assert config.overruled == [
        "size d2 replaces model.layers = 1 (tiny.yaml:2:28), model.heads = 2 (tiny.yaml:2:38)",
        "model.width = 96 on the command line overrules size d2, which has 128",
    ]


def test_M6_a_width_in_the_file_wins_over_the_size_in_it_and_that_is_said(here, capsys):
    (here / "tiny.yaml").write_text(TINY.replace("width: 32, layers: 1", "size: d2, width: 64"))
    assert "model.width = 64 at tiny.yaml:2:26 overrules size d2, which has 128" in checked(capsys)
    assert load("tiny.yaml").model.width == 64 and load("tiny.yaml").model.layers == 2
    assert checked(capsys, "model.size=d4").count("overrules") == 0


def test_M6_a_size_wins_over_widths_of_the_file_that_is_extended(here):
    (here / "over.yaml").write_text("extends: tiny.yaml\nmodel: {size: d2}\n")
    config = load("over.yaml")
    assert (config.model.width, config.model.layers) == (128, 2) and "replaces" in config.overruled[0]


def test_M6_a_published_size_is_whole_over_a_file_of_another_family():
    model = load("quickstart", ["model.size=8b"]).model
    assert (model.rope_theta, model.tied, model.qk_norm, model.activation) == (500_000.0, False, False, "swiglu")
    assert load("quickstart", ["model.size=8b", "model.qk_norm=true"]).model.qk_norm


@pytest.mark.parametrize("overrides, width, heads", [
    (["model.width=null"], 384, 2), (["model.width=null", "model.size=d2"], 128, 1),
    (["model.width=~", "model.layers=null", "model.heads=null"], 384, 6),
])  # fmt: skip
def test_M6_null_unsets(here, overrides, width, heads):
    config = load("tiny.yaml", overrides)
    assert (config.model.width, config.model.heads) == (width, heads)


def test_M6_null_is_a_value_where_it_says_something_and_nothing_at_all_is_a_mistake(here, capsys):
    config = load("tiny.yaml", ["optimizer.clip=null", "train.rewind_after=null", "train=null"])
    assert config.optimizer.clip is None and config.train.rewind_after == 5 and config.train.steps == 1000
    assert load("tiny.yaml", ["model.size=d2", "model.kv_heads=null"]).model.kv_heads == 1
    assert "model.width: must be a whole number; got nothing" in checked(capsys, "model.width=", status=2)
    assert "data.tokenizer.kind" in checked(capsys, "data.tokenizer.kind=", status=2)


# ---- remarks


def test_M7_epochs_a_large_batch_and_few_held_out_documents_are_remarked_on(here):
    def remarks(*overrides):
        config = load("tiny.yaml", overrides)
        recipe = config.recipe_class(config, here / "cache")
        recipe.prepare(lambda *_: None)
        return remarks_on_data(config, recipe.data("train"))

    (few,) = remarks()
    assert re.match(r"documents held out: \d+ for validation, fewer than 30", few)
    many, few = remarks("train.steps=1000")
    assert re.match(r"\d+ epochs: 1,000 batches of 4 .* 10 times would be train.steps=\d+", many) and few
    batch, many, few = remarks("train.batch=1000000", "evaluate.final=true")
    assert "a batch of 1,000,000 takes each of the" in batch and "epochs" in many
    assert "for test and" in few and "data.holdout_test and data.holdout_validation" in few
    assert remarks("data.holdout_validation=0.9", "data.holdout_test=0")[-1:] == [], "enough are held out"


def test_losses_that_do_not_fall_are_remarked_on():
    falling, dead = [6.0 - 0.1 * n for n in range(20)], [2.5, 90.0, 40.0, *[5.9965] * 17]
    assert remarks_on_losses(falling, 1e-3) == remarks_on_losses(dead[:7], 1e6) == []
    (remark,) = remarks_on_losses(dead, 1e6)
    assert "2.5 in the first step and 5.997 in the last 5; optimizer.lr=1e+06 may be too large" in remark
    assert remarks_on_losses([5.9965] * 20, 1e6), "nothing learned is no better"


@pytest.mark.parametrize("settings, share", [
    ("train.steps=20 optimizer.schedule.warmup=500", "3.8 %"),
    ("train.steps=20 optimizer.schedule.name=constant optimizer.schedule.warmup=500", "4 %"),
    ("train.steps=20 optimizer.schedule.name=wsd optimizer.schedule.warmup=15 optimizer.schedule.decay=0.5", "67 %"),
    ("train.steps=1000000000 optimizer.schedule.warmup=2000000000", "50 %"),
])  # fmt: skip
def test_R20_a_warm_up_that_never_reaches_the_peak_is_remarked_on(here, capsys, settings, share):
    said = checked(capsys, *settings.split())
    assert f"the learning rate reaches {share} of optimizer.lr" in said, said.splitlines()[:4]


@pytest.mark.parametrize("settings", [
    "train.steps=20 optimizer.schedule.warmup=10",
    "train.steps=20 optimizer.schedule.name=wsd optimizer.schedule.warmup=10 optimizer.schedule.decay=0.5",
    "train.steps=1", "optimizer.schedule.name=constant train.steps=5 optimizer.schedule.warmup=5",
])  # fmt: skip
def test_R20_one_that_does_is_not(here, capsys, settings):
    assert "the learning rate reaches" not in checked(capsys, *settings.split())


# ---- what check finds


@pytest.mark.parametrize("start, says", [
    ("/nowhere/at/all", "there is no run folder"), ("tiny.yaml/x", "there is no run folder"),
    ("txt", "not a run folder"),
])  # fmt: skip
def test_M13_check_refuses_a_start_that_is_not_there(here, capsys, start, says):
    assert says in checked(capsys, f"init.from={start}", status=2)


def test_M13_check_finds_every_mistake_at_once(here, capsys):
    said = checked(capsys, "memory.offload=auto", "memory.save=nothing", "memory.accumulation=3", "train.bf16_ends=1",
                   "evaluate.final=true", "data.holdout_test=0", status=2)  # fmt: skip
    assert said.startswith("error: 4 errors in tiny.yaml")
    for key in ("memory.offload", "train.bf16_ends", "tiny.yaml:4:26: train.batch", "data.holdout_test"):
        assert key in said


LEARNED = ["model.positions=learned", "model.max_length=32"]


def test_R7_samples_beyond_learned_positions_are_refused_by_name_or_cut(here, capsys):
    said = checked(capsys, *LEARNED, "samples.count=1", "samples.max_tokens=32", status=2)
    assert "samples.max_tokens" in said and "samples.max_tokens=31" in said
    assert load("tiny.yaml", [*LEARNED, "samples.count=1"]).samples.max_tokens == 31
    assert load("tiny.yaml", ["samples.count=1"]).samples.max_tokens == 256
    assert load("tiny.yaml", ["model.size=125m", "samples.count=1"]).samples.max_tokens == 256


# ---- precision


def test_M8_the_precision_is_the_machines_where_nobody_chose_one(here, capsys):
    config = load("tiny.yaml")
    assert config.train.precision == "auto" and settled(config).train.precision == "float32"
    assert {settled(config, machine=name).train.precision for name in machine_names()} == {"bfloat16"}
    asked = load("tiny.yaml", ["train.precision=float32"])
    assert settled(asked, machine="dgx-spark") is asked
    assert "auto is float32 on this machine" in checked(capsys)
    assert "auto is" not in checked(capsys, "train.precision=fp8")
    with pytest.raises(AssertionError):
        _ = config.train.dtype


# ---- one run, trained in this process


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_cache):
    """A run whose best evaluation is neither at a step that is due for a save nor at the last one."""
    folder = tmp_path_factory.mktemp("trained")
    draw = random.Random(0)
    (folder / "txt").mkdir()
    for number in range(60):
        (folder / "txt" / f"d{number:03}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(60)))
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(shared_cache))
        patch.chdir(folder)
        assert main(COMMAND) == 0
        yield folder


COMMAND = ["train", "tiny.yaml", "memory.accumulation=1", "memory.save=all", "train.steps=18", "checkpoint.every=4",
           "checkpoint.keep=1", "evaluate.every=5", "optimizer.lr=0.03", "optimizer.schedule.warmup=9",
           "--run", "run", "--quiet"]  # fmt: skip


def test_R9_the_best_is_kept_where_it_was_measured(trained):
    known = dict(evaluations(trained / "run"))
    best = min(known, key=known.get)
    saved = {int(path.name) for path in (trained / "run" / "checkpoints").iterdir() if path.name.isdigit()}
    assert set(known) == {5, 10, 15, 18} and saved == {best, 18}
    assert {event["step"] for event in events(trained / "run", "save")} >= {4, 5, 8, 12, 16, 18}


def test_M8_the_first_start_writes_what_auto_stood_for_and_the_run_keeps_it(trained, capsys):
    written = load_resolved(trained / "run")
    assert written.train.precision == "float32"
    config = load("tiny.yaml")
    assert settled(config, Run(trained / "run")).train.precision == "float32"
    assert main(COMMAND) == 0 and "finished at step 18" in capsys.readouterr().out
    assert main([*COMMAND, "train.precision=bfloat16"]) == 2 and "train.precision" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["M9", "R19"])
def test_an_extension_says_the_rate_before_and_after_and_how_to_keep_it(trained, row):
    from aurora_train.check.intent import for_resume, rate_after

    name = {"M9": "cosine", "R19": "wsd"}[row]
    changes = ["train.steps=24"] if row == "M9" else ["train.steps=24", f"optimizer.schedule.name={name}"]
    config, run, _ = for_resume("run", changes)
    said = rate_after(run, config)
    assert re.match(
        r"learning rate: 0\.003 at step 18, 0\.0\d+ at step 19; add optimizer\.schedule\.extend=18 ", said
    ), said
    config, run, _ = for_resume("run", ["train.steps=24", "optimizer.schedule.extend=18"])
    assert rate_after(run, config) == "learning rate: 0.003 at step 18, 0.003 at step 19"
    config, run, _ = for_resume("run", ["log.every=7"])
    assert rate_after(run, config) is None


def test_R18_the_schedule_has_its_final_value_at_the_last_step():
    import numpy as np

    from aurora_train.config.schema import Schedule
    from aurora_train.learning_rate import rate

    for name in ("wsd", "cosine", "linear"):
        shape = Schedule(name=name, final=0.01)
        assert rate(19, 1e-3, shape, 20) == pytest.approx(1e-5, rel=1e-5)
        longer = rate(np.arange(40), 1e-3, shape.model_copy(update={"extend": 20}), 40)
        np.testing.assert_array_equal(longer[:20], rate(np.arange(20), 1e-3, shape, 20))
        np.testing.assert_array_equal(longer[20:], longer[19])


def test_an_unknown_override_of_the_new_key_is_refused(here):
    with pytest.raises(UserError, match="at least 1"):
        load("tiny.yaml", ["optimizer.schedule.extend=0"])
