"""Offload: what waits in the processor's memory is what the planner says, and is asked for where it frees something."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from aurora_train.compat import jaxprs_in_params, scan_parts
from aurora_train.config import config_class, load
from aurora_train.config.find_recipe import find_recipe
from aurora_train.errors import UserError
from aurora_train.machine.rates import assumed
from aurora_train.machine.table import known_machines
from aurora_train.machine.targets import find_machine
from aurora_train.nn.saving import UNIT_INPUT
from aurora_train.nn.stack import Segment
from aurora_train.plan import offload, verify
from aurora_train.plan.plan import Plan
from aurora_train.plan.planner import Planner
from aurora_train.plan.residuals import offloaded, trace_stack_unit
from aurora_train.tools.report_plan import segments
from aurora_train.train.rehearsal import rehearse

LAYERS, BATCH = 4, 16
TARGET = find_machine("gh200")


def rehearsal(machine="gh200", layers=LAYERS, **memory):
    recipe = find_recipe("language_model", Path()).cls
    tree = {
        "recipe": "language_model",
        "model": {"width": 256, "layers": layers, "heads": 4, "mlp_width": 1024},
        "data": {"sequence": 512, "tokenizer": {"kind": "byte"}},
        "train": {"batch": BATCH, "precision": "bfloat16"},
        "memory": memory,
        "mesh": {"data": 1},
    }
    config = config_class(recipe).model_validate_json(json.dumps(tree))
    return rehearse(config, recipe(config, Path()), target=find_machine(machine) if machine else None)


def planned(budget, machine="gh200", **memory) -> Plan:
    program = rehearsal(machine, **memory)
    return Planner(program, budget, "a test", machine, assumed(TARGET.row), verify=False).run()


def graph_of(program):
    ((_, call),) = program.stack_calls().items()
    with program.here():
        return trace_stack_unit(*call)


def host_bytes(jaxpr) -> int:
    """Of what the loops of a jaxpr stack in the processor's memory."""
    found = 0
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            found += host_bytes(inner)
        if equation.primitive.name == "scan":
            stacked = equation.outvars[scan_parts(equation.params)[1] :]
            found += sum(v.aval.size * v.aval.dtype.itemsize for v in stacked if "Host" in str(v.aval.memory_space))
    return found


@pytest.mark.parametrize(
    "save, moved", [((), (UNIT_INPUT,)), ((), ("mlp_up",)), (("attn_flash",), ("mlp_up", "query", UNIT_INPUT))]
)
def test_the_step_stacks_on_the_host_what_the_planner_counts(save, moved):
    program = rehearsal()
    graph = graph_of(program)
    score = graph.score((*save, *(tag for tag in moved if tag != UNIT_INPUT)))
    told = offloaded(score, moved, graph.kept_by_name(score.save))
    assert told.saved_bytes + told.offloaded_bytes == score.saved_bytes and set(told.save) == set(save)
    traced, _ = program.trace(Plan(BATCH, 1, {"stack": [Segment(0, LAYERS, save, offload=moved)]}))
    assert host_bytes(traced.jaxpr.jaxpr) == told.offloaded_bytes * LAYERS * BATCH > 0


@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="the extra [plan] is not installed")
@pytest.mark.slow
def test_the_compiler_puts_it_there_and_the_device_is_rid_of_it():
    layers = 24
    program = rehearsal(layers=layers)
    kept, moved = (
        verify.compiled_bytes(program.compile(Plan(BATCH, 1, {"stack": [Segment(0, layers, (), offload=tags)]})))
        for tags in ((), (UNIT_INPUT,))
    )
    inputs = layers * BATCH * 512 * 256 * 2
    assert kept.host == 0 and moved.host == pytest.approx(inputs, rel=0.01)
    # The rest of the plan is packed anew, so not to the byte; the copy in hand is one unit's.
    assert inputs / 4 < kept.peak - moved.peak < 1.25 * inputs


@pytest.mark.slow
def test_auto_fits_where_nothing_else_does_and_the_plan_says_what_is_moved():
    least = _least()
    with pytest.raises(UserError, match="no plan fits"):
        planned(least, accumulation=1)
    plan = planned(least, offload="auto", accumulation=1)
    (segment, *_) = plan.stacks["stack"]
    assert UNIT_INPUT in segment.offload and plan.predicted_bytes <= least
    assert plan.details["host_bytes"] > 0
    assert "offload unit_input" in segments(plan.stacks["stack"])[0]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).stacks == plan.stacks


def _least() -> int:
    """A little less than the smallest plan needs that offloads nothing."""
    with pytest.raises(UserError) as caught:
        planned(1000, accumulation=1)
    return int(float(str(caught.value).split("needs ")[1].split(" MB")[0]) * 1e6)  # of it a margin is kept free


def test_with_room_auto_moves_nothing():
    plan = planned(10**11, offload="auto")
    assert all(not segment.offload for segment in plan.stacks["stack"])
    assert plan.details["host_bytes"] == 0


def test_named_tags_are_moved_whatever_else_is_kept():
    plan = planned(10**11, offload=["mlp_up"])
    assert all(segment.offload == ("mlp_up",) and "mlp_up" not in segment.save for segment in plan.stacks["stack"])
    fixed = planned(10**11, offload=["mlp_up"], save=["mlp_up", "query"])
    assert fixed.stacks["stack"] == [Segment(0, LAYERS, ("query",), False, ("mlp_up",))]


@pytest.mark.parametrize("fixed", [{}, {"save": "nothing"}])
def test_what_the_processors_memory_has_no_room_for_is_not_moved(fixed):
    def of(**memory):
        program = dataclasses.replace(rehearsal(**memory, accumulation=1), host_bytes=1000)
        return Planner(program, _least(), "a test", "gh200", assumed(TARGET.row), verify=False)

    with pytest.raises(UserError, match=r"memory\.offload.*no room.*16\.8 MB of 1\.00 kB"):
        of(**fixed, offload=["unit_input"]).run()
    with pytest.raises(UserError, match="no plan fits"):
        of(offload="auto").run()


@pytest.mark.parametrize("machine", ["dgx-spark", None])
def test_shared_memory_refuses_named_tags_and_auto_leaves_it(machine):
    with pytest.raises(UserError, match="share their memory"):
        planned(10**10, machine, offload=["mlp_up"])
    plan = planned(10**10, machine, offload="auto")
    assert all(not segment.offload for segment in plan.stacks["stack"])


def test_an_unknown_tag_names_those_that_can_be_moved():
    with pytest.raises(UserError, match="mlp_pu") as caught:
        planned(10**10, offload=["mlp_pu"])
    assert "mlp_up" in str(caught.value) and "unit_input" in str(caught.value) and "attn_flash" not in str(caught.value)


@pytest.mark.parametrize("other", ["save=all", "save=nothing", "unroll=true"])
def test_what_leaves_nothing_to_choose_is_refused_when_the_config_is_loaded(other):
    with pytest.raises(UserError, match=r"memory\.offload"):
        load("quickstart", ["memory.offload=auto", f"memory.{other}", "optimizer.clip=null"])


def test_a_tag_that_keeps_nothing_is_refused():
    for fixed in ({}, {"save": "nothing"}):
        with pytest.raises(UserError, match="'mlp_out'.*frees nothing"):
            planned(10**11, offload=["mlp_out"], **fixed)


def test_a_fixed_plan_costs_what_the_same_plan_costs_when_it_is_found():
    found = planned(10**11, offload=["mlp_up"], accumulation=2)
    save = list(found.stacks["stack"][0].save)
    fixed = planned(10**11, offload=["mlp_up"], save=save, accumulation=2)
    assert fixed.stacks == found.stacks
    for name in ("host_bytes", "time"):
        assert fixed.details[name] == found.details[name]
    assert fixed.details["host_bytes"] == LAYERS * BATCH // 2 * 512 * 1024 * 2


def test_the_input_of_layers_is_a_lever_where_it_frees_something():
    assert "memory.offload=[unit_input]" in [lever["setting"] for lever in planned(10**11).details["levers"]]
    here = planned(10**11, "dgx-spark").details["levers"]
    assert "memory.offload=[unit_input]" not in [lever["setting"] for lever in here]


def test_every_known_device_with_memory_of_its_own_has_a_link():
    for row in known_machines().values():
        assert (row.link is None) == row.unified, row.name
        assert (assumed(row).link is None) == row.unified


def test_a_stack_offers_its_input_and_its_own_tags():
    program = rehearsal()
    ((stack, *_),) = program.stack_calls().values()
    assert offload.tags_of(stack)[0] == UNIT_INPUT and "attn_flash" not in offload.tags_of(stack)
