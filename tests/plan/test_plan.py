"""A plan is data: what the config asks for, written down, read back, and checked against the model's own tags."""

import json

import pytest
from flax import nnx

from aurora_train.config.schema import Core
from aurora_train.errors import UserError
from aurora_train.nn.stack import Segment, Stack
from aurora_train.plan.plan import Plan, make_plan


class Unit(nnx.Module):
    tags = ("query", "hidden")

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.params())


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(params=0)
        self.encoder = Stack(Unit, 4, rngs)
        self.decoder = nnx.List([Stack(Unit, 2, rngs)])


def planned(platform="cpu", devices=1, batch=24, **memory):
    config = Core(recipe="x", train={"batch": batch}, memory=memory)
    return make_plan(config, nnx.eval_shape(Model), platform=platform, num_devices=devices)


def test_a_plan_is_the_same_after_json():
    plan = Plan(4, 2, {"a": [Segment(0, 2, ("x", "y")), Segment(2, 4, ()), Segment(4, 5, None, True)]}, "because")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_every_stack_is_planned_by_its_path():
    plan = planned(accumulation=3)
    assert set(plan.stacks) == {"encoder", "decoder.0"} and (plan.microbatch, plan.accumulation) == (8, 3)
    assert plan.stacks["encoder"] == [Segment(0, 4, None, True)]


@pytest.mark.parametrize("save,expected", [("nothing", ()), ("all", None), (["hidden"], ("hidden",))])
def test_what_is_saved_is_what_the_config_says_and_what_recomputes_is_scanned(save, expected):
    assert planned(save=save).stacks["encoder"] == [Segment(0, 4, expected, expected is None)]
    assert planned(save=save, platform="gpu").stacks["encoder"] == [Segment(0, 4, expected, False)]


def test_left_to_itself_a_plan_keeps_the_tagged_tensors_of_a_gpu_and_everything_on_a_cpu():
    assert planned(platform="gpu").stacks["encoder"] == [Segment(0, 4, ("query", "hidden"), False)]
    assert planned(platform="gpu", unroll=True).stacks["encoder"][0].unroll


def test_a_tag_the_model_lacks_is_refused_with_those_it_has():
    with pytest.raises(UserError) as caught:
        planned(save=["hiden"])
    assert all(part in str(caught.value) for part in ("memory.save", "hiden", "query, hidden"))


@pytest.mark.parametrize("devices,accumulation", [(5, 1), (1, 7), (8, 2), (4, 16)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(devices, accumulation):
    with pytest.raises(UserError, match="train.batch") as caught:
        planned(batch=24, devices=devices, accumulation=accumulation)
    nearest = int(str(caught.value).rsplit(maxsplit=1)[-1])
    planned(batch=nearest, devices=devices, accumulation=accumulation)


def test_a_plan_with_a_gap_is_our_own_mistake():
    for cut in ([Segment(0, 1), Segment(2, 4)], [Segment(0, 3)], [Segment(1, 4)]):
        with pytest.raises(AssertionError):
            Plan(1, 1, {"encoder": cut, "decoder.0": [Segment(0, 2)]}).apply(Model())
