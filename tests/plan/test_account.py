"""The account of a step's memory: its arguments, and the levers that save what they say."""

import pytest
from test_planner import LENGTH, WIDTH, program

from aurora_train.nn.stack import Segment
from aurora_train.plan import account
from aurora_train.plan.plan import Plan


def levers(**sections) -> dict[str, int]:
    made = program(**sections)
    return {row["setting"]: row["saves_bytes"] for row in account.levers(made, made.blueprint(made.simplest_plan()))}


def test_levers_save_what_they_say_and_those_pulled_are_not_offered():
    def held(**optimizer):
        made = program(optimizer=optimizer)
        return sum(account.arguments(made, made.blueprint(made.simplest_plan())).values())

    offered, base = levers(), held()
    assert list(offered) == sorted(offered, key=lambda s: -offered[s])
    assert offered["optimizer.moments=bfloat16"] == pytest.approx(base - held(moments="bfloat16"), rel=0.05)
    gradients = 2 * account.parameter_bytes(program()) / 4
    assert offered["optimizer.master=bfloat16"] == pytest.approx(base - held(master="bfloat16") + gradients, rel=0.05)
    assert levers(optimizer={"ema": 0.9})["optimizer.ema=null"] == pytest.approx(held(ema=0.9) - base, rel=0.05)
    pulled = levers(optimizer={"moments": "int8", "master": "bfloat16"})
    assert not {"optimizer.moments=int8", "optimizer.master=bfloat16"} & pulled.keys()


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_lever_of_8_bit_moments_saves_what_it_says(moments):
    def held(moments):
        made = program(optimizer={"moments": moments})
        return account.arguments(made, made.blueprint(made.simplest_plan()))["optimizer"]

    offered = levers(optimizer={"moments": moments}).get("optimizer.moments=int8", 0)
    assert offered == pytest.approx(max(held(moments) - held("int8"), 0), rel=0.1)


def test_arguments_are_the_states_own_bytes():
    made = program(optimizer={"ema": 0.9})
    plan = made.simplest_plan()
    found = account.arguments(made, made.blueprint(plan))
    parameters = (4 * 2 * 4 * WIDTH * WIDTH + WIDTH * WIDTH) * 4
    assert found["parameters"] == found["average"] == parameters == account.parameter_bytes(made)
    assert 2 * parameters <= found["optimizer"] < 2 * parameters + 64
    assert found["batch"] == 8 * (LENGTH * WIDTH + LENGTH + 1) * 4 and found["frozen"] == 0
    small = program()
    compiled = small.compile(Plan(8, 1, {"a": [Segment(0, 4, None, True)]})).memory_analysis()
    of_it = account.arguments(small, small.blueprint(small.simplest_plan()))
    assert sum(of_it.values()) == pytest.approx(compiled.argument_size_in_bytes, abs=64)
