"""A mesh of one device costs nothing."""

import re

import babble
import jax
import pytest
from pieces import rehearsed

from aurora_train.config import load
from aurora_train.nn.stack import Segment
from aurora_train.train.state import frozen_as_argument


def instructions(text: str) -> list[str]:
    """The instructions of a compiled program, named in their order, without the lines of Python that they come from."""
    lines = [line for line in text.splitlines() if line.startswith(("  ", "ENTRY", "%"))]
    marks = r",? (metadata|frontend_attributes|sharding)=\{.*?\}(?=,|$)| stack_frame_id=\d+"
    noise = rf"(?<=parameter\(\d)\).*|(?<=parameter\(\d\d)\).*|{marks}"
    order: dict[str, int] = {}
    number = lambda found: f"%{order.setdefault(found[0], len(order))}"  # noqa: E731
    return [re.sub(r"%[\w.-]+", number, re.sub(noise, "", line)) for line in lines]


@pytest.mark.slow
def test_the_compiled_step_of_a_mesh_of_one_is_that_without_a_mesh(tmp_path, monkeypatch):
    babble.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load("babble.yaml", ["model.layers=3", "model.attention=reference"])
    program, plan = rehearsed(config, [Segment(0, 3, ())], accumulation=1)
    with_mesh, (_, state) = program.compile(plan).as_text(), program.trace(plan)
    with program.here():
        step = frozen_as_argument(program.step(plan, program.blueprint(plan)))
        batch = program.batch(config.train.batch)
        alone = jax.jit(step, donate_argnums=0).lower(state._replace(frozen={}), state.frozen, batch).compile()
    assert len(instructions(with_mesh)) > 100
    assert instructions(alone.as_text()) == instructions(with_mesh)
