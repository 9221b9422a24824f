"""A step that the planner cannot read is trained all the same, everything recomputed, and one line says so."""

import json

import pytest
import toy
from kit import losses
from test_planner import ROOM, planner, program

from aurora_train.cli.main import main
from aurora_train.errors import UserError
from aurora_train.nn.stack import Segment
from aurora_train.plan import residuals
from aurora_train.plan.report import one_line
from aurora_train.train.signals import Stopped

RECOMPUTED = {"a": [Segment(0, 4, ())]}


@pytest.fixture
def here(tmp_path, shared_cache, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    toy.write(tmp_path)
    return tmp_path


def unread(monkeypatch):
    """As from a release of jax that names a parameter of products otherwise, which jax 0.12 did to those of scans."""
    known = residuals.equation_flops

    def missing(equation):
        return equation.params["no such name"] if equation.primitive.name == "dot_general" else known(equation)

    monkeypatch.setattr(residuals, "equation_flops", missing)


@pytest.mark.slow
def test_train_and_plan_go_on_and_say_what_could_not_be_read(here, monkeypatch, capsys):
    unread(monkeypatch)
    said = "recomputes everything: the planner cannot read `dot_general` (KeyError: 'no such name', residuals.py:"
    assert main(["plan", "toy.yaml"]) == 0
    assert said in capsys.readouterr().out
    assert main(["train", "toy.yaml", "train.steps=3", "log.every=1", "--run", "unread"]) == 0
    assert [said in line for line in capsys.readouterr().err.splitlines() if line.startswith("plan: ")] == [True]
    plan = json.loads((here / "unread" / "plan.json").read_text())["plan"]
    assert [segment["save"] for segment in plan["stacks"]["stack"]] == [[]] and plan["compiled_bytes"]
    assert len(losses(here / "unread")) == 3 and (here / "unread" / "report.html").exists()


def test_the_largest_microbatch_that_fits_is_taken_and_the_smallest_unseen(monkeypatch):
    unread(monkeypatch)
    made = program()
    whole = planner(made).run()
    assert (whole.microbatch, whole.stacks) == (8, RECOMPUTED) and whole.compiled_bytes < ROOM
    assert "the planner cannot read `dot_general` (KeyError" in one_line(whole)
    search = planner(made, whole.compiled_bytes - 1)
    fits = search.run()
    assert fits.microbatch < 8 and fits.compiled_bytes <= search.budget and search.compiles <= 3
    after = planner(made).smaller(whole)  # an out-of-memory
    assert after.compiled_bytes <= 0.85 * whole.compiled_bytes
    unseen = planner(made, verify=False).run()
    assert (unseen.microbatch, unseen.accumulation, unseen.compiled_bytes) == (1, 8, None)
    with pytest.raises(UserError, match="no plan fits"):
        planner(made, 2**16).run()


def test_what_is_kept_stays_as_it_was_asked_for(monkeypatch):
    unread(monkeypatch)
    found = planner(program(memory={"save": ["hidden"], "accumulation": 2})).run()
    assert (found.microbatch, found.stacks) == (4, {"a": [Segment(0, 4, ("hidden",))]})
    assert "recomputes what memory.save leaves out: the planner cannot read" in one_line(found)


@pytest.mark.parametrize("mine", [ValueError("mine"), UserError("mine"), Stopped("mine"), MemoryError("mine")])
@pytest.mark.parametrize("verify", [True, False])
def test_what_the_model_or_a_signal_raises_is_not_the_planners_to_hide(mine, verify):
    def call(model, x):
        raise mine

    with pytest.raises(type(mine), match="mine") as caught:
        planner(program(call=call), verify=verify).run()
    assert caught.value is mine and caught.value.__context__ is None


def test_flops_that_cannot_be_counted_are_not_known(monkeypatch):
    made = program()
    plan = planner(made).run()
    assert made.product_flops(plan) > 0
    monkeypatch.setattr("aurora_train.plan.flops._product_flops", lambda equation: equation.params["no such"])
    assert made.product_flops(plan) is None
