"""The canonical form on disk: the same names and bits whatever the cut of a stack."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_train import mesh as meshes
from aurora_train.checkpoint import layout
from aurora_train.errors import UserError

CUTS = (((0, 6),), ((0, 2), (2, 6)), ((0, 1), (1, 3), (3, 6)))


def state(cut, wide=False):
    """A small state with a stack cut as told: parameters, moments as optax nests them, and a count."""
    draw = np.random.default_rng(0)
    kernel = jnp.asarray(draw.standard_normal((6, 4, 8 if wide else 6)), jnp.float32)
    bias = jnp.asarray(draw.standard_normal((6, 3)), jnp.bfloat16)
    count = jnp.arange(6, dtype=jnp.int32)
    table = jnp.asarray(draw.standard_normal((5, 4)), jnp.float32)

    def pieces(tree):
        return {"segments": {i: jax.tree.map(lambda a, r=r: a[slice(*r)], tree) for i, r in enumerate(cut)}}

    return {
        "step": jnp.int32(7),
        "params": {"embedding": table, "blocks": pieces({"mlp": {"kernel": kernel}, "bias": bias})},
        "opt_state": {"rest": (jnp.ones(3),), "stacks": {"blocks": pieces(({"count": count}, kernel * 2))}},
    }


def shardings(tree):
    return jax.tree.map(lambda _: meshes.replicated(meshes.make_mesh(1, 1)), tree)


GOLDEN = [
    "opt_state.rest.0",
    "opt_state.stacks.blocks.units.0000.0.count",
    "opt_state.stacks.blocks.units.0000.1",
    "params.blocks.units.0000.bias",
    "params.blocks.units.0000.mlp.kernel",
    "params.embedding",
    "step",
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_names_on_disk_are_one_per_layer_and_never_change(cut):
    flat = layout.snapshot(state(cut))
    assert sorted(name for name in flat if "units" not in name or "units.0000" in name) == GOLDEN
    assert {name.split("units.")[1][:4] for name in flat if "units" in name} == {f"000{i}" for i in range(6)}
    assert flat["params.blocks.units.0003.mlp.kernel"].shape == (4, 6)


def test_parts_that_are_read_when_they_are_needed_give_the_same_bits_and_are_released_one_by_one():
    """No part is read before the one before it is in its place, so that none waits beside the leaf that it is of."""
    whole, made, most = state(CUTS[1]), [], []

    def reader(array):
        def read():
            most.append(sum(reference() is not None for reference in made))
            part = jnp.asarray(array)
            made.append(weakref.ref(part))
            return part

        return read

    flat = {name: reader(array) for name, array in layout.snapshot(whole).items()}
    back = layout.assemble(flat, jax.eval_shape(lambda: whole), shardings(whole))
    assert not flat and max(most) <= 1
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(back), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("written", CUTS, ids=str)
@pytest.mark.parametrize("read", CUTS, ids=str)
def test_what_one_cut_writes_another_reads_to_the_bit(written, read):
    flat, target = layout.snapshot(state(written)), state(read)
    back = layout.assemble(flat, jax.eval_shape(lambda: target), shardings(target))
    assert jax.tree.structure(back) == jax.tree.structure(target) and not flat
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(target), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_a_snapshot_does_not_see_what_happens_to_the_buffers_after_it():
    tree = {"w": jnp.arange(4.0)}
    flat = layout.snapshot(tree)
    jax.block_until_ready(jax.jit(lambda t: {"w": t["w"] * 0 - 1}, donate_argnums=0)(tree))
    np.testing.assert_array_equal(flat["w"], [0, 1, 2, 3])


def test_what_is_asked_of_a_restore_is_what_a_snapshot_holds():
    tree = state(CUTS[1])
    wanted, flat = layout.abstract(jax.eval_shape(lambda: tree), shardings(tree)), layout.snapshot(tree)
    assert layout.difference(flat, wanted) == [] and list(wanted) and wanted.keys() == flat.keys()


def test_leaves_that_do_not_fit_are_named_together_in_one_message():
    wanted, stored = (layout.snapshot(state(CUTS[0], wide)) for wide in (False, True))
    del stored["params.embedding"]
    stored["params.lost"] = np.zeros(3)
    with pytest.raises(UserError) as caught:
        layout.refuse_difference(stored, wanted, "runs/a")
    said = str(caught.value)
    assert "runs/a" in said
    assert "opt_state.stacks.blocks.units.0000.1: float32[4, 8] stored, float32[4, 6] wanted" in said
    assert "more" in said and len(said.splitlines()) < 14
    lines = layout.difference(stored, wanted)
    assert "params.embedding: not in the checkpoint" in lines
    assert "params.lost: in the checkpoint, not in this model" in lines and len(lines) == 14
