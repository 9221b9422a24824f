"""`aurora plan` hands over what it was asked, shows what it gets, and docs/memory.md works as written."""

import json
import re
import shlex
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.nn.stack import Segment
from aurora_train.plan.plan import Plan

DOC = Path(__file__).parents[2] / "docs" / "memory.md"
GB = 10**9
BYTES = {"parameters": 2 * GB, "saved": 5 * GB}
PLAN = Plan(
    4, 2, {"stack": [Segment(0, 3, ("hidden",))]}, "by hand", "NVIDIA GB10", "gpu", 10 * GB, 7 * GB, 8 * GB, None,
    {
        "by_cause": BYTES, "largest_microbatch": 8,
        "pareto": [{"microbatch": 4, "bytes": 7 * GB, "recompute_flops": 1e12, "chosen": True}],
    },
)  # fmt: skip


@pytest.fixture
def planner(monkeypatch):
    """A planner and a table of capacities that write down what they were asked: the real ones have their own tests."""
    made = types.SimpleNamespace(plan=PLAN, asked=[])

    def plan_config(config, recipe, *, machine, devices=None, budget=None, verify=True, progress=None):
        made.asked.append({"config": config, "recipe": recipe, "machine": machine, "devices": devices,
                           "budget": budget, "verify": verify})  # fmt: skip
        progress(0, None, "searching")
        return made.plan

    def capacity(machine, progress, *, verify=False):
        return {"machine": machine, "rows": [{"training": "LoRA", "parameters": 32}]}

    monkeypatch.setattr("aurora_train.train.planning.plan_config", plan_config)
    monkeypatch.setattr("aurora_train.tools.capacity.capacity", capacity)
    return made


def said(arguments, capsys):
    capsys.readouterr()
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_page_begins_with_the_verdict_and_a_pipe_gets_no_colours(here, planner, capsys):
    out = said(["plan", "toy.yaml"], capsys)
    assert out.startswith("fits: 8.0 GB of 10.0 GB on DGX Spark (GB10) (compiled); microbatch 4 x accumulation 2")
    assert "\x1b" not in out and "saved activations" in out
    (asked,) = planner.asked
    assert (asked["machine"], asked["budget"], asked["verify"]) == (None, None, True)
    assert type(asked["recipe"]).__name__ == "Toy" and asked["recipe"].config is asked["config"]


def test_what_the_options_say_reaches_the_planner(here, planner, capsys):
    options = ["--machine", "dgx-spark", "--devices", "2", "--budget", "96GB", "--no-compile"]
    said(["plan", "toy.yaml", "train.batch=16", "model.layers=2", *options], capsys)
    (asked,) = planner.asked
    assert (asked["machine"], asked["devices"], asked["budget"], asked["verify"]) == ("dgx-spark", 2, 96 * GB, False)
    assert (asked["config"].train.batch, asked["config"].model.layers) == (16, 2)


def test_a_script_gets_one_document_and_nothing_else(here, planner, capsys):
    assert main(["plan", "toy.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert "searching" not in err and told["largest_microbatch"] == 8
    names = ("machine", "budget_bytes", "predicted_bytes", "compiled_bytes", "microbatch", "accumulation", "stacks")
    assert [told[name] for name in names[:6]] == ["NVIDIA GB10", 10 * GB, 7 * GB, 8 * GB, 4, 2]
    cut = {"start": 0, "stop": 3, "save": ["hidden"], "unroll": False, "offload": []}
    assert told["stacks"] == {"stack": [cut]}


def test_the_picture_is_drawn_where_it_was_asked_for(here, planner, capsys):
    said(["plan", "toy.yaml", "--pareto", "a/choice.svg"], capsys)
    assert "this plan" in (here / "a" / "choice.svg").read_text()


def test_what_a_machine_holds_is_shown_without_a_config(planner, capsys):
    assert re.search(r"LoRA +32", said(["plan", "--capacity", "--machine", "dgx-spark"], capsys))
    told = json.loads(said(["plan", "--capacity", "--machine", "dgx-spark", "--json"], capsys))
    assert told["machine"] == "dgx-spark" and planner.asked == []


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["toy.yaml", "--budget", "96"], ["--budget", "96GB"]),
        (["toy.yaml", "train.stps=3"], ["train.stps", "steps"]),
        ([], ["a plan needs a config", "--capacity"]),
        (["toy.yaml", "--capacity"], ["CONFIG", "--capacity"]),
        (["--capacity", "--budget", "9GB"], ["--budget", "one run"]),
        (["toy.yaml", "--pareto", "no.svg"], ["--pareto", "nothing to draw"]),
    ],
)
def test_a_mistake_is_one_message_with_exit_2(arguments, says, here, planner, capsys):
    planner.plan = Plan(4, 2)
    assert main(["plan", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "Traceback" not in err
    for part in says:
        assert part in err, err


def test_a_real_plan_is_shown_and_read_by_a_script(here, capsys):
    told = json.loads(said(["plan", "toy.yaml", "--json", "--no-compile"], capsys))
    assert told["microbatch"] * told["accumulation"] == 8 and told["predicted_bytes"] > 0
    assert told["compiled_bytes"] is None
    assert said(["plan", "toy.yaml", "--no-compile"], capsys).startswith("fits: ")


# ---- docs/memory.md


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), re.DOTALL)


def commands():
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words[:2] == ["aurora", "plan"]]


def test_every_plan_of_the_document_can_be_asked_for(here, planner, capsys):
    assert len(commands()) >= 6
    for words in commands():
        said(words, capsys)
    assert (here / "choice.svg").is_file()


def test_the_documents_model_keeps_what_its_names_say():
    (source,) = blocks("python")
    doc = {}
    exec(compile(source, "tagged.py", "exec"), doc)

    def products(save):
        model = doc["Net"](nnx.Rngs(params=jax.random.key(0)))
        model.stack.cut((Segment(0, 12, save),))
        graph, state = nnx.split(model)
        loss = jax.grad(lambda state, x: nnx.merge(graph, state)(x).sum())
        return str(jax.make_jaxpr(loss)(state, jnp.ones((2, 64)))).count("dot_general")

    assert model_tags(doc) == ("up", "rest")
    assert products(("up", "rest")) == products(("rest",)) == products(()) - 1


def model_tags(doc):
    return doc["Net"](nnx.Rngs(params=jax.random.key(0))).stack.tags


@pytest.mark.parametrize("setting", sorted(set(re.findall(r"`((?:(?:\w+\.)+\w+=\w+ ?)+)`", DOC.read_text()))))
def test_every_setting_of_the_document_is_one(setting, here):
    load("quickstart", setting.split())
