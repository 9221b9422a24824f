"""A plan counts what samples and scores that write texts hold beside the state, and refuses what would not fit."""

import jax
import pytest
from flax import nnx

from aurora_train.config import load
from aurora_train.errors import UserError
from aurora_train.generate.sampler import Generator
from aurora_train.train.planning import planner_here
from aurora_train.train.rehearsal import rehearse

CONFIG = """
recipe: language_model
model: {width: 64, layers: 2, heads: 2, window: 32}
data: {sequence: 128, tokenizer: {kind: byte}}
train: {batch: 8, precision: float32}
mesh: {data: 1}
samples: {count: 3, max_tokens: 60, prompts: ["abc", "defghij"]}
"""


def test_the_bytes_that_a_plan_counts_for_samples_are_those_that_making_them_holds(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    config = load(tmp_path / "small.yaml")
    program = rehearse(config, config.recipe_class(config, tmp_path))
    counted = program.writing()
    assert (counted["texts"], counted["length"]) == (3, 96)  # the longer prompt, what begins a text, and the tokens

    model = program.recipe.model(nnx.Rngs(0))
    generator = Generator(model, ())
    generator.generate_batch([[1] * 8] * 3, 60)
    engine = generator._engine
    held = (engine._weights, engine._caches, engine._logits, engine._knobs._seen)
    assert counted["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(held))

    planner = planner_here(config, program.recipe, program=program, verify=False)
    plan = planner.run()
    assert plan.details["writing"] == counted
    planner.budget = sum(planner.estimate.arguments.values()) + counted["bytes"]
    planner._refuse_writing(plan)
    planner.budget -= 1
    with pytest.raises(UserError, match="3 texts of 96 tokens") as caught:
        planner._refuse_writing(plan)
    assert caught.value.where == "samples.count" and "samples.max_tokens" in caught.value.hint
