"""Tests compile quickly, and those marked `optimized` as a run does; the processes that they start do the same."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

COUNT = """
import jax, jax.numpy as jnp
from jax._src import compiler
print(compiler.get_compile_options(1, 1).executable_build_options.debug_options.xla_backend_optimization_level)
"""


def level_in_a_process(environment) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def level_here() -> int:
    from jax._src import compiler

    return compiler.get_compile_options(1, 1).executable_build_options.debug_options.xla_backend_optimization_level


def test_a_test_and_its_processes_compile_quickly(aurora):
    assert (quick.NO_EMITTERS in aurora.environment().get("XLA_FLAGS", "")) == quick.knows_emitters()
    assert level_here() == level_in_a_process(aurora.environment()) == 0


@pytest.mark.optimized
def test_a_marked_test_and_its_processes_compile_as_a_run_does(aurora):
    assert quick.settings() == {} and "XLA_FLAGS" not in aurora.environment()
    assert level_here() == level_in_a_process(aurora.environment()) > 0


@pytest.mark.parametrize("how", ["quickly", pytest.param("as a run does", marks=pytest.mark.optimized)])
def test_both_kinds_of_programs_compute_the_same(how):
    x = np.linspace(-2.0, 2.0, 64, dtype=np.float32)
    found = jax.jit(lambda x: (jnp.tanh(x) * jnp.exp(-x)).sum())(x)
    np.testing.assert_allclose(found, (np.tanh(x) * np.exp(-x)).sum(), rtol=1e-5)
