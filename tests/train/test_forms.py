"""The forms of operations in a whole run: every trace takes those that the config asks for, and the run says so."""

import json

import pytest
from kit import events

from aurora_train.cli.main import main
from aurora_train.nn import norms, plain


@pytest.fixture
def traced(monkeypatch):
    """The names of the forms that norms were traced in, the toy's one operation."""
    found, own = [], norms._normalise

    def noted(form, *arguments):
        found.append(form.__name__.rsplit(".", 2)[-1 if form is plain else -2])
        return own(form, *arguments)

    monkeypatch.setattr(norms, "_normalise", noted)
    return found


@pytest.mark.parametrize("wish,taken", [([], "cpu"), (["train.forms=plain"], "plain")])
def test_plan_step_evaluation_and_score_take_one_form_which_is_printed(wish, taken, here, traced, capsys):
    assert main(["train", "toy.yaml", "--run", "run", "train.steps=2", "evaluate.every=1", *wish]) == 0
    assert set(traced) == {taken} and len(traced) >= 3  # the step, the evaluation, the score
    printed = capsys.readouterr().err
    assert ("operations in their plain forms, as train.forms asks\n" in printed) == bool(wish)
    assert wish or "operations" not in printed
    assert json.loads((here / "run" / "plan.json").read_text())["plan"]["details"]["forms"] == taken


@pytest.mark.slow
def test_a_run_may_go_on_in_another_form_and_says_so(finished, traced, capsys):
    assert main(["resume", "run", "train.steps=32", "train.forms=plain"]) == 0
    assert set(traced) == {"plain"}
    assert "changed train.forms: 'auto' -> 'plain' (the same maths" in capsys.readouterr().err
    (override,) = events(finished, "override")
    assert ["train.forms", "auto", "plain", "elastic"] in override["changes"]


def test_a_plan_for_a_script_tells_the_forms_it_was_made_for(here, capsys):
    assert main(["plan", "toy.yaml", "train.forms=plain", "--json", "--no-compile"]) == 0
    assert json.loads(capsys.readouterr().out)["forms"] == "plain"
