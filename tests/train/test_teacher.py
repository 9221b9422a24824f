"""A teacher kept as it was beside a student that is trained: what it costs, and where its parameters come from."""

import json
import shutil

import jax
import numpy as np
import pytest
from kit import events

from aurora_train import facts
from aurora_train import load as load_run
from aurora_train.checkpoint import layout
from aurora_train.cli.main import main
from aurora_train.config import load
from aurora_train.nn.stack import named_stacks
from aurora_train.plan import account
from aurora_train.plan.estimate import Estimate
from aurora_train.run import Run
from aurora_train.train.session import open_session

PAIR = '''"""A small net learns what the toy run's net says."""
import jax.numpy as jnp
import toy
from flax import nnx

from aurora_train.recipe import Loss


class Both(nnx.Module):
    def __init__(self, config, rngs):
        self.student = toy.make_model(config.model_copy(update={"width": 24, "layers": 2}), rngs)
        self.teacher = toy.make_model(config, rngs)

    def __call__(self, x, keys=None):
        return self.student(x, keys)


class Pair(toy.Toy):
    def model(self, rngs):
        return Both(self.config.model, rngs)

    def trainable(self, path):
        return path.startswith("student.")

    def loss(self, model, batch, key):
        errors = jnp.square(model(batch["x"], key) - model.teacher(batch["x"])).mean(-1)
        return Loss(errors.sum(), jnp.float32(len(errors)))
'''
SETTINGS = ["recipe=pair.py", "train.steps=6", "checkpoint.every=2", "checkpoint.keep=9", "evaluate.every=null"]


@pytest.fixture
def pair(finished):
    """A folder with pair.py beside toy.py and toy.yaml, and `run`, the teacher."""
    (finished.parent / "pair.py").write_text(PAIR)
    return finished.parent


def opened(folder, *overrides):
    return open_session(load(folder / "toy.yaml", [*SETTINGS, *overrides]), Run(folder / "new"), lambda *_: None)


def products(jaxpr, width: int) -> int:
    """Matrix products with an axis of that width, loops and calls looked into."""
    count = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        count += equation.primitive.name == "dot_general" and any(width in shape for shape in shapes)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda one: hasattr(one, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            count += products(inner, width) if hasattr(inner, "eqns") else 0
    return count


def test_a_frozen_teacher_costs_no_gradient_and_no_moments_and_the_plan_knows(pair):
    session = opened(pair, "init.teacher=run", "memory.unroll=false", "memory.accumulation=1")
    state, program = session.blueprint.state, session.program
    assert all(name.startswith("student.") for name in layout.snapshot(session.fresh().params))
    assert not any("teacher" in jax.tree_util.keystr(path)
                   for path, _ in jax.tree_util.tree_leaves_with_path((state.opt_state, state.extra)))  # fmt: skip
    assert account.arguments(program, session.blueprint)["frozen"] == account.tree_bytes(state.frozen) > 0
    stacks = named_stacks(program.model())
    assert account.unit_gradient_bytes(stacks["teacher.stack"], session.mesh) == 0
    assert account.unit_gradient_bytes(stacks["student.stack"], session.mesh) == 4 * (24 * 48 * 2 + 48 + 24 * 2)
    assert list(Estimate(program).graphs) == ["student.stack"], "nothing of the teacher is kept for a backward pass"
    jaxpr = program.trace(session.plan)[0].jaxpr.jaxpr
    # 32 is the teacher's hidden width and 48 the student's: two products forward, and none or four backward.
    assert products(jaxpr, 32) == 2 and products(jaxpr, 48) >= 6
    session.store.close()


@pytest.mark.slow
def test_it_lies_on_disk_once_for_all_checkpoints_and_is_the_run_that_it_came_from(pair, capsys):
    assert main(["train", "toy.yaml", *SETTINGS, "init.teacher=run", "--run", "new"]) == 0
    assert "the parameters under `teacher` start from" in capsys.readouterr().err
    folder = pair / "new" / "checkpoints"
    seal = json.loads((folder / "frozen" / "manifest.aurora.json").read_text())["digest"]
    steps = [path for path in folder.iterdir() if path.name.isdigit()]
    assert len(steps) == 3
    assert {json.loads((path / "manifest.aurora.json").read_text())["frozen"] for path in steps} == {seal}
    student, teacher = load_run(pair / "new"), load_run(pair / "run")
    held = layout.snapshot(student.state.frozen)
    for name, array in layout.snapshot(teacher.state.params).items():
        np.testing.assert_array_equal(held[f"teacher.{name}"], array, err_msg=name)
    (record,) = json.loads((pair / "new" / "provenance.json").read_text())["parents"]
    assert record["prefix"] == "teacher" and record["step"] == 30
    (event,) = events(pair / "new", "init")
    assert event["parents"] == [record]
    # A run of the pair gives its own parts: the teacher where it had one.
    (pair / "new").rename(pair / "both")
    session = opened(pair, "init.teacher=both", "init.student=both")
    again = layout.snapshot(session.fresh())
    for part, held in (("params", student.state.params), ("frozen", student.state.frozen)):
        for name, array in layout.snapshot(held).items():
            np.testing.assert_array_equal(again[f"{part}.{name}"], array, err_msg=name)
    session.store.close()


def test_a_prefix_that_the_model_lacks_and_facts_that_clash_are_each_one_message(pair, capsys):
    assert main(["train", "toy.yaml", *SETTINGS, "init.teachr=run", "--run", "new", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "no parameters under `teachr`" in said and "did you mean `teacher`?" in said and "Traceback" not in said
    shutil.copytree(pair / "run", pair / "other")
    for name, scale in (("run", 1.0), ("other", 2.0)):
        facts.write(Run(pair / name).facts, {"scale": scale})
    both = ["init.teacher=run", "init.student=other"]
    assert main(["train", "toy.yaml", *SETTINGS, *both, "--run", "new", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert str(pair / "run") in said and str(pair / "other") in said and "`scale`" in said
    assert main(["train", "toy.yaml", *SETTINGS, *both, "init.facts=techer", "--run", "new", "--quiet"]) == 2
    assert "did you mean `teacher`?" in capsys.readouterr().err


def test_a_model_of_which_nothing_is_trained_is_refused(pair, capsys):
    (pair / "pair.py").write_text(PAIR.replace('"student."', '"studnt."'))
    assert main(["train", "toy.yaml", *SETTINGS, "--run", "new", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "nothing of this model is trained" in said and "pair.py:" in said and "Traceback" not in said
