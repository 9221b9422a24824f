"""The planner on real steps of small models: what it chooses fits once compiled, and what cannot fit is refused."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from aurora_train.config.schema import Core
from aurora_train.errors import UserError
from aurora_train.machine.rates import Rates
from aurora_train.nn import param
from aurora_train.nn.stack import Segment, Stack
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import COMPILES, Planner
from aurora_train.plan.report import CAUSES
from aurora_train.recipe import Loss, Recipe
from aurora_train.train.rehearsal import rehearse

WIDTH, LENGTH, ROOM = 32, 16, 10**9
RATES = Rates({"float32": 1e11}, 1e10, 1e-4, "measured", "2026-01-01", "a processor")


class Unit(nnx.Module):
    tags = ("hidden",)

    def __init__(self, rngs):
        self.up = param.kernel(rngs, (WIDTH, 4 * WIDTH), ("embed", "mlp"))
        self.down = param.kernel(rngs, (4 * WIDTH, WIDTH), ("mlp", "embed"))

    def __call__(self, x, context, index, keys=None, cache=None):
        hidden = checkpoint_name(jax.nn.gelu(x @ self.up[...]), "hidden")
        return x + hidden @ self.down[...], cache


class Untagged(Unit):
    tags = ()

    def __call__(self, x, context, index, keys=None, cache=None):
        return x + jax.nn.gelu(x @ self.up[...]) @ self.down[...], cache


class Model(nnx.Module):
    """Stacks by name: a unit and how many of it."""

    def __init__(self, rngs, stacks):
        self.embedding = param.kernel(rngs, (WIDTH, WIDTH), ("embed", None))
        for name, (unit, number) in stacks.items():
            setattr(self, name, Stack(unit, number, rngs))


class Rows(Recipe):
    """A model of given stacks, and what is done with it, as an objective."""

    def __init__(self, config, stacks, call, couples):
        super().__init__(config, Path())
        self.stacks, self.call, self.couples = stacks, call, couples

    def shapes(self):
        return {
            "x": jax.ShapeDtypeStruct((LENGTH, WIDTH), "float32"), "weights": jax.ShapeDtypeStruct((LENGTH,), "float32")
        }  # fmt: skip

    def model(self, rngs):
        return Model(rngs, self.stacks)

    def loss(self, model, batch, key):
        error = jnp.square(self.call(model, batch["x"] @ model.embedding[...])).mean(-1)
        return Loss((error * batch["weights"]).sum(), batch["weights"].sum())

    def flops_per_target(self, num_parameters):
        return 6.0 * num_parameters


def through_a(model, x):
    return model.a(x, None)[0]


ONE = {"a": (Unit, 4)}


def program(stacks=ONE, call=through_a, couples="example", **sections):
    tree = {"recipe": "x", "train": {"batch": 8, "precision": "float32"}, "mesh": {"data": 1}}
    config = Core.model_validate(tree | {k: tree.get(k, {}) | v for k, v in sections.items()})
    return rehearse(config, Rows(config, stacks, call, couples))


def planner(program, budget=ROOM, **how) -> Planner:
    return Planner(program, int(budget), "so much was given", "a processor", **how)


@functools.cache
def usual():
    """The step of one stack with what is known of it: nothing is traced or compiled twice in these tests."""
    return {"program": program(), "compiled": {}}


def again(budget=ROOM, **how) -> Planner:
    """A planner of the usual step."""
    known = usual()
    search = planner(known["program"], budget, compiled=known["compiled"], **how)
    search.estimate = known.setdefault("estimate", search.estimate)
    return search


@functools.cache
def full() -> int:
    """Compiled bytes of the step that keeps everything."""
    return again().compile(Plan(8, 1, {"a": [Segment(0, 4, None, True)]}))


@functools.cache
def least() -> int:
    """Compiled bytes of one example at a time with everything recomputed."""
    return again().compile(Plan(1, 8, {"a": [Segment(0, 4, ())]}))


def check(plan: Plan, batch: int, budget: int, units: dict[str, int]) -> None:
    """What holds of every plan that was verified."""
    assert plan.microbatch * plan.accumulation == batch
    assert plan.compiled_bytes <= budget == plan.budget_bytes
    assert set(plan.stacks) == set(units)
    for path, cut in plan.stacks.items():
        assert [s.start for s in cut] == [0, *(s.stop for s in cut[:-1])] and cut[-1].stop == units[path]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    causes = plan.details["by_cause"]
    assert sum(causes.values()) == plan.predicted_bytes and set(causes) == set(CAUSES)


# ---- what is chosen


def test_where_there_is_room_everything_is_kept_and_nothing_is_searched():
    search = again()
    plan = search.run()
    check(plan, 8, ROOM, {"a": 4})
    assert plan.stacks == {"a": [Segment(0, 4, None, True)]} and plan.accumulation == 1
    assert search.compiles <= 1 and (plan.machine, plan.platform) == ("a processor", "cpu")


@pytest.mark.parametrize("share", [0.55, pytest.param(0.75, marks=pytest.mark.slow)])
def test_the_chosen_plan_fits_once_compiled(share):
    told = []
    search = again(share * full(), rates=RATES, progress=lambda *step: told.append(step))
    plan = search.run()
    check(plan, 8, int(share * full()), {"a": 4})
    assert search.compiles <= COMPILES and "(compiled)" in plan.reason and "so much was given" in plan.reason
    assert told == [(done, COMPILES, "compiling a plan for a processor") for done in range(search.compiles)]
    details = plan.details
    assert sum(row["chosen"] for row in details["pareto"]) == 1 and details["largest_microbatch"] >= plan.microbatch
    faster = details["next_faster"]
    assert faster is None or faster["seconds"] > 0 and faster["microbatch"] * faster["accumulation"] == 8
    assert details["time"]["step_seconds"] > 0 and details["time"]["tokens"] == 1000 * 8 * LENGTH


def test_what_just_fits_is_found_and_what_just_does_not_is_refused():
    plan = again(1.003 * least()).run()
    check(plan, 8, int(1.003 * least()), {"a": 4})
    search = again(0.95 * least())
    with pytest.raises(UserError) as caught:
        search.run()
    message = str(caught.value)
    for part in ("memory.budget", "no plan fits a processor", "so much was given", "optimizer.moments=bfloat16 saves"):
        assert part in message
    assert search.compiles <= COMPILES


def test_what_does_not_fit_beside_the_copy_of_a_save_gets_its_memory_and_saves_in_place():
    few, more = int(0.9 * least()), int(1.003 * least())
    plan = again(few, beside_copy=few, budget_in_place=(more, "less a piece")).run()
    check(plan, 8, more, {"a": 4})
    assert plan.saves_in_place and "less a piece" in plan.reason
    with pytest.raises(UserError, match="less a piece"):
        again(few, beside_copy=few, budget_in_place=(few, "less a piece")).run()
    roomy = again(beside_copy=int(ROOM), budget_in_place=(more, "less a piece")).run()
    assert not roomy.saves_in_place and roomy.budget_bytes == int(ROOM)


def test_the_search_for_saves_in_place_goes_on_from_what_is_compiled_already():
    how = {"beside_copy": 0, "budget_in_place": (full(), "less a piece"), "compiles": COMPILES - 2}
    search = planner(usual()["program"], 0.97 * least(), **how)
    plan = search.run()
    assert search.compiles == COMPILES, "a plan more may be faster, but four are compiled in all"
    assert plan.saves_in_place and plan.compiled_bytes in search.compiled.values()


def test_a_run_that_saves_in_place_gets_a_smaller_plan_that_saves_in_place():
    how = {"beside_copy": 1000, "budget_in_place": (int(0.9 * full()), "less a piece")}
    plan = again(1000, **how).smaller(Plan(8, 1, {"a": [Segment(0, 4, None, True)]}, compiled_bytes=full()))
    assert plan.saves_in_place and plan.compiled_bytes <= 0.85 * full() and "out-of-memory" in plan.reason


def test_what_waits_in_the_processors_memory_may_leave_no_room_for_the_copy_of_a_save():
    assert not again(verify=False, offload_beside_copy=0).run().saves_in_place
    assert again(verify=False, offload_beside_copy=-1).run().saves_in_place


def test_nothing_is_compiled_where_nothing_can_fit():
    search = planner(program(), 1000)
    with pytest.raises(UserError, match=r"memory\.budget"):
        search.run()
    assert search.compiles == 0


@pytest.mark.slow
def test_what_was_kept_because_of_its_estimate_is_let_go_where_compiling_says_otherwise():
    made = program(optimizer={"moments": "int8", "ema": 0.9})
    budget = 2.3 * planner(made, verify=False).run().predicted_bytes
    assert planner(made, budget).run().compiled_bytes <= budget


def test_a_search_comes_out_the_same_every_time():
    plans = [again(0.55 * full(), verify=False).run() for _ in range(2)]
    assert plans[0].work == plans[1].work and plans[0].predicted_bytes == plans[1].predicted_bytes


def test_without_compiling_the_estimate_decides_and_the_plan_says_so():
    search = again(0.5 * full(), verify=False)
    plan = search.run()
    assert plan.compiled_bytes is None and search.compiles == 0 and plan.predicted_bytes <= 0.5 * full()
    assert "(not compiled)" in plan.reason and "nothing was compiled" in plan.details["not_verified"][0]


def test_what_is_compiled_later_is_not_compiled_now():
    search = again(compiled_later=True)
    assert search.run().compiled_bytes is None and search.compiles == 0


def test_what_a_cut_keeps_and_its_gradients_come_on_top_of_what_every_plan_needs():
    search = again()
    nothing, hidden = (search.estimated(Plan(4, 2, {"a": [Segment(0, 4, save)]})).bytes for save in ((), ("hidden",)))
    assert hidden - nothing == 4 * 4 * LENGTH * 4 * WIDTH * 4, "units, examples, one tensor in float32"
    arguments = sum(search.estimate.arguments.values())
    inputs, weights = 4 * 4 * LENGTH * WIDTH * 4, 4 * 2 * 4 * WIDTH * WIDTH * 4
    assert nothing > arguments + inputs + weights


# ---- less than before


@pytest.mark.release
def test_each_smaller_plan_needs_clearly_less_until_there_is_none():
    search = again(0.8 * full())
    plan, seen = search.run(), []
    while plan is not None:
        seen.append(plan.compiled_bytes)
        assert len(seen) < 9
        plan = again(0.8 * full()).smaller(plan)
    assert len(seen) >= 2 and all(b <= 0.85 * a for a, b in itertools.pairwise(seen))
    assert seen[-1] <= least() / 0.85


def test_a_smaller_plan_is_one_that_compiles_to_less():
    plan = again(0.8 * full()).smaller(Plan(8, 1, {"a": [Segment(0, 4, None, True)]}, compiled_bytes=full()))
    assert plan.compiled_bytes <= 0.8 * full() and "out-of-memory" in plan.reason
    assert again().smaller(Plan(1, 8, {"a": [Segment(0, 4, ())]}, compiled_bytes=least())) is None


@pytest.mark.slow
def test_the_time_of_planning_is_not_negative():
    search = planner(program(), 0.8 * full())
    assert search.smaller(Plan(8, 1, {}, compiled_bytes=full())).details["planning_seconds"] >= 0


# ---- models of every make


def through_both(model, x):
    return model.b(model.a(x, None)[0], None)[0]


MODELS = {
    "no stack": ({}, lambda model, x: jnp.tanh(x), {}),
    "no tags": ({"a": (Untagged, 4)}, through_a, {}),
    "one unit": ({"a": (Unit, 1)}, through_a, {}),
    "two stacks": ({"a": (Unit, 4), "b": (Untagged, 3)}, through_both, {}),
    "called twice": (ONE, lambda model, x: through_a(model, through_a(model, x)), {}),
    "never called": ({"a": (Unit, 4), "b": (Unit, 2)}, through_a, {}),
    "a number in the context": (ONE, lambda model, x: model.a(x, {"scale": 2.0})[0], {}),
    "a batch of one": (ONE, through_a, {"train": {"batch": 1}}),
    "a prime batch": (ONE, through_a, {"train": {"batch": 5}}),
    "an average": (ONE, through_a, {"optimizer": {"ema": 0.9}}),
    "low precision": (ONE, through_a, {"train": {"precision": "bfloat16"}, "optimizer": {"master": "bfloat16"}}),
    "8-bit moments": (ONE, through_a, {"optimizer": {"moments": "int8"}}),
    "muon": (ONE, through_a, {"optimizer": {"name": "muon"}}),
}  # fmt: skip


@pytest.mark.parametrize("stacks,call,sections", MODELS.values(), ids=MODELS)
def test_every_model_gets_a_plan_for_less_than_everything(stacks, call, sections):
    made = program(stacks, call, **sections)
    units = {name: number for name, (_, number) in stacks.items()}
    batch = made.config.train.batch
    search = planner(made, verify=False)
    smallest = Plan(1, batch, {name: [Segment(0, number, ())] for name, number in units.items()})
    everything = Plan(batch, 1, {name: [Segment(0, number)] for name, number in units.items()})
    few, many = search.estimated(smallest).bytes, search.estimated(everything).bytes
    budget = int(max(1.05 * few, (few + many) / 2))
    plan = planner(made, budget, verify=False).run()
    assert plan.predicted_bytes <= budget and plan.microbatch * plan.accumulation == batch
    assert set(plan.stacks) == set(units)
    made.blueprint(plan)  # it can be applied
    assert json.loads(json.dumps(plan.details)) == plan.details
    with pytest.raises(UserError, match=r"memory\.budget"):
        planner(made, 0.3 * few, verify=False).run()


def test_a_model_with_its_own_random_state_gets_a_plan():
    class Noisy(Rows):
        def model(self, rngs):
            model = super().model(rngs)
            model.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(dropout=1))
            return model

    config = program().config
    call = lambda model, x: model.dropout(through_a(model, x))  # noqa: E731
    assert planner(rehearse(config, Noisy(config, ONE, call, "example")), verify=False).run().predicted_bytes > 0


def test_a_model_without_stacks_is_planned_by_its_microbatch_alone():
    made = program({}, lambda model, x: jnp.tanh(jnp.tanh(x) @ jnp.ones((WIDTH, 64 * WIDTH))).sum(-1, keepdims=True))
    whole = planner(made).run()
    plan = planner(made, 0.6 * whole.compiled_bytes).run()
    check(plan, 8, int(0.6 * whole.compiled_bytes), {})
    assert plan.accumulation > 1 and plan.details["tensors"] == {}


# ---- what is asked for


@pytest.mark.parametrize("couples", ["microbatch", "global"])
def test_a_loss_that_couples_examples_is_not_split_for_memory(couples):
    made = program(couples=couples)
    plan = planner(made, 0.75 * full(), verify=False).run()
    assert (plan.microbatch, plan.accumulation) == (8, 1)
    with pytest.raises(UserError, match=r"memory\.budget"):
        planner(made, 0.3 * full(), verify=False).run()


def test_a_number_of_microbatches_that_was_asked_for_is_kept():
    plan = planner(program(memory={"accumulation": 4}), 0.6 * full(), verify=False).run()
    assert (plan.microbatch, plan.accumulation) == (2, 4)


@pytest.mark.parametrize("save,segment", [(["hidden"], Segment(0, 4, ("hidden",))), ("nothing", Segment(0, 4, ()))])
def test_a_save_set_that_was_asked_for_is_kept_and_compiled(save, segment):
    plan = planner(program(memory={"save": save})).run()
    assert plan.stacks == {"a": [segment]} and plan.compiled_bytes > 0
    tight = planner(program(memory={"save": save}), 1000, verify=False).run()
    assert tight.stacks == plan.stacks and "more than the budget" in tight.reason


def test_what_is_left_to_the_planner_beside_a_save_set_is_still_chosen():
    made = program(memory={"save": ["hidden"]})
    search = planner(made, verify=False)
    whole, half = (search.estimated(Plan(8 // n, n, {"a": [Segment(0, 4, ("hidden",))]})).bytes for n in (1, 2))
    plan = planner(made, (whole + half) / 2, verify=False).run()
    assert plan.accumulation > 1 and plan.predicted_bytes <= plan.budget_bytes


def test_microbatches_that_were_asked_for_of_a_coupled_loss_are_refused_when_it_is_planned():
    for accumulation_of in ({"accumulation": 2}, {"accumulation": 2, "save": "nothing"}):
        with pytest.raises(UserError, match=r"memory\.accumulation"):
            planner(program(couples="global", memory=accumulation_of), verify=False).run()


def test_a_tag_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"memory\.save"):
        planner(program(memory={"save": ["hiden"]})).run()


@pytest.mark.parametrize("batch", [6, 8, 10])
def test_only_divisors_of_a_batch_are_candidates(batch):
    candidates = planner(program(train={"batch": batch}), 10**6, verify=False)._space().all()
    assert candidates and all(c.microbatch * c.accumulation == batch for c in candidates)
