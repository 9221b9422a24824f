"""What is read of jax's own descriptions means the same under every release that pyproject.toml admits."""

import jax
import jax.numpy as jnp
import pytest

from aurora_train.compat import is_unreadable, jaxprs_in_params, open_jaxpr, scan_parts
from aurora_train.errors import UserError
from aurora_train.train.signals import Stopped

KERNEL = jnp.eye(3)


def turns(x, rows):
    """Two values are carried, one array is scanned, one is the same in every turn."""

    def turn(carry, row):
        x, total = carry
        return (jnp.tanh(x @ KERNEL + row["a"]), total + row["b"]), x.sum()

    (x, total), kept = jax.lax.scan(turn, (x, jnp.zeros(())), rows)
    return x.sum() + total + kept.sum()


def scans(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from scans(inner)


@pytest.mark.parametrize("how", [lambda f: f, jax.grad, jax.jit, jax.checkpoint, lambda f: jax.grad(jax.checkpoint(f))])
def test_the_operands_of_a_scan_are_what_stays_what_is_carried_and_what_is_scanned(how):
    found = list(scans(jax.make_jaxpr(how(turns))(jnp.ones(3), {"a": jnp.ones((4, 3)), "b": jnp.ones(4)}).jaxpr))
    assert found
    for equation in found:
        consts, carry = scan_parts(equation.params)
        avals = [v.aval for v in equation.invars]
        body = open_jaxpr(equation.params["jaxpr"])
        assert [a.shape for a in avals[: consts + carry]] == [v.aval.shape for v in body.invars[: consts + carry]]
        assert [a.shape for a in avals[consts + carry :]] == [(4, *v.aval.shape) for v in body.invars[consts + carry :]]
        assert [v.aval.shape for v in equation.outvars[:carry]] == [a.shape for a in avals[consts : consts + carry]]
        assert all(v.aval.shape[0] == 4 for v in equation.outvars[carry:])
    forward = found[0]
    assert scan_parts(forward.params)[1] >= 2 and len(forward.invars) - sum(scan_parts(forward.params)) >= 2


def test_what_we_raise_on_purpose_and_refused_memory_are_no_faults_of_reading():
    assert all(map(is_unreadable, (KeyError("num_consts"), AttributeError("x"), NotImplementedError(), ValueError())))
    assert not any(map(is_unreadable, (UserError("x"), Stopped(), MemoryError(), jax.errors.JaxRuntimeError("x"))))
