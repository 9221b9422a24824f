"""Trained arrays and their logical axis names.

Every kernel is stored 2-D as (in, out) in float32, with names for the meaning of its axes ("embed", "mlp", "heads",
...). Only `mesh.py` knows which device axis a name is sharded over; a layer never does.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_train.nn.nf4 import CODES, SCALES


def kernel(rngs: nnx.Rngs, shape: tuple[int, int], names: tuple[str, str], gain: float = 1.0) -> nnx.Param:
    """float32[in, out], normal with standard deviation gain / sqrt(in) (LeCun et al. 1998)."""
    return named(jax.random.normal(rngs.params(), shape, jnp.float32) * (gain * shape[0] ** -0.5), names)


def table(rngs: nnx.Rngs, shape: tuple[int, int], names: tuple[str, str]) -> nnx.Param:
    """float32[rows, width], looked up by row; normal with standard deviation 0.02 (GPT-2)."""
    return named(jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02, names)


def zeros(size: int, name: str) -> nnx.Param:
    return named(jnp.zeros(size, jnp.float32), (name,))


def ones(size: int, name: str) -> nnx.Param:
    return named(jnp.ones(size, jnp.float32), (name,))


def parameter_count(tree) -> int:
    """The number of scalars in a nested dict of parameters: two per byte of 4-bit codes, none for their scales."""
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = str(getattr(path[-1], "key", path[-1]))
        count += 0 if name.endswith(SCALES) else leaf.size * (2 if name.endswith(CODES) else 1)
    return count


def named(value: jax.Array, names: tuple[str, ...]) -> nnx.Param:
    """`eager_sharding=False`: the names are logical, so flax must not look them up in a mesh."""
    assert value.ndim == len(names), (value.shape, names)
    return nnx.Param(value, out_sharding=names, eager_sharding=False)
