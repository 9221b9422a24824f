"""Randomness as a function, not a state: keys are folded from (seed, stream name, step, global example index).

Nothing here is ever saved, so nothing can be lost at a resume, and no plan, microbatch or device count changes a key.
"""

import hashlib

import jax
import jax.numpy as jnp


def stream(seed: int, name: str):
    """A typed PRNG key for one named use of randomness ("init", "dropout", ...).

    The name enters through sha256, so adding a stream never shifts another.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest[:4], "big"))


def example_keys(key, step, example):
    """One key per example: `example` is the global example number, uint32[B]; returns a key array of shape [B].

    Only the step and the example enter, never the position in a microbatch: splitting a batch changes no mask.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda index: jax.random.fold_in(step_key, index))(jnp.asarray(example, jnp.uint32))
