"""The canonical form of a state on disk: a flat dict of names, one leaf per layer, whatever plan or mesh wrote it.

Names are dotted paths: `params.blocks.units.0003.attention.query.kernel`. Conversion works leaf by leaf, so a restore
holds one state and one more leaf. A save copies the whole state to the host, because it is written while training
continues; where host and device share memory, that copy is a second state until the save is done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aurora_train.errors import UserError
from aurora_train.nn.stack import SEGMENTS, UNITS


class Entry(NamedTuple):
    """One leaf of a tree and the canonical names of what it holds: one name, or one per unit of a segment."""

    names: tuple[str, ...]
    stacked: bool
    leaf: Any


def entries(tree) -> Iterator[Entry]:
    """Every leaf of a pytree with its canonical names, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sizes: dict[tuple, dict[int, int]] = defaultdict(dict)
    for path, leaf in leaves:
        at = _segments_at(path)
        if at is not None:
            sizes[_text(path[:at])][int(_part(path[at + 1]))] = leaf.shape[0]
    for path, leaf in leaves:
        at = _segments_at(path)
        if at is None:
            yield Entry((".".join(_text(path)),), False, leaf)
            continue
        segment = int(_part(path[at + 1]))
        known = sizes[_text(path[:at])]
        start = sum(size for number, size in known.items() if number < segment)
        head, tail = ".".join((*_text(path[:at]), UNITS)), ".".join(_text(path[at + 2 :]))
        names = tuple(f"{head}.{start + j:04d}" + (f".{tail}" if tail else "") for j in range(leaf.shape[0]))
        yield Entry(names, True, leaf)


def snapshot(tree, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """A copy on the host of the leaves whose names are `wanted`. The device buffers may be donated when it returns."""
    flat: dict[str, np.ndarray] = {}
    for names, stacked, leaf in entries(tree):
        if not wanted(names[0]):
            continue
        host = _copied(leaf)
        flat.update(zip(names, host if stacked else [host], strict=True))
    return {name: np.asarray(array) for name, array in flat.items()}


def _copied(leaf) -> np.ndarray:
    """A leaf on the host, in memory of its own.

    `device_get` of a sharded array (jax 0.10) keeps a second copy inside the array for as long as the array lives, so
    its shards are copied one by one. On a CPU a shard and its numpy view share a buffer, which the next step
    overwrites; a numpy array made from a GPU's shard is already a copy, which the shard keeps, too, while it lives.
    """
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0] or leaf.addressable_shards[:1]
    if len(shards) == 1 and shards[0].device.platform != "cpu":
        return np.asarray(shards[0].data)
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in shards:
        whole[shard.index] = shard.data
    return whole


def abstract(tree, shardings) -> dict[str, jax.ShapeDtypeStruct]:
    """What a restore has to request: shapes, dtypes and shardings by canonical name."""
    flat = {}
    for (names, stacked, leaf), sharding in zip(entries(tree), jax.tree.leaves(shardings), strict=True):
        shape = leaf.shape[1:] if stacked else leaf.shape
        unit = _unit_sharding(sharding) if stacked else sharding
        flat.update({name: jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=unit) for name in names})
    return flat


def assemble(flat: dict[str, Any], tree, shardings):
    """Canonical arrays -> the pytree of `tree` (abstract), in its dtypes. Empties `flat` as it goes.

    Every leaf passes through a jitted copy with its sharding, because arrays straight from a restore may not be
    donatable and may be placed differently from those of a fresh start.
    """
    leaves = []
    for (names, stacked, leaf), sharding in zip(entries(tree), jax.tree.leaves(shardings), strict=True):
        parts = [flat.pop(name) for name in names]
        join = jax.jit(_stack if stacked else _copy, static_argnums=1, out_shardings=sharding)
        leaves.append(jax.block_until_ready(join(parts, leaf.dtype)))
        assert leaves[-1].shape == leaf.shape, names[0]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def difference(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Why a stored state cannot be restored as `wanted`, one line per leaf; [] if it can."""
    lines = [f"{name}: not in the checkpoint" for name in wanted if name not in stored]
    lines += [f"{name}: in the checkpoint, not in this model" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        have, want = stored[name], wanted[name]
        if tuple(have.shape) != tuple(want.shape) or jnp.dtype(have.dtype) != jnp.dtype(want.dtype):
            lines.append(f"{name}: {have.dtype}{list(have.shape)} stored, {want.dtype}{list(want.shape)} wanted")
    return sorted(lines)


def refuse_difference(stored, wanted, where: str) -> None:
    """Raise UserError naming every leaf that does not match."""
    lines = difference(stored, wanted)
    if lines:
        more = f"\n  ... and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise UserError("the checkpoint does not fit this model", where=where, why="\n  ".join(lines[:8]) + more)


def _stack(parts, dtype):
    return jnp.stack(parts).astype(dtype)


def _copy(parts, dtype):
    return jnp.copy(parts[0]).astype(dtype)


def _unit_sharding(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _segments_at(path) -> int | None:
    return next((at for at, entry in enumerate(path) if _part(entry) == SEGMENTS), None)


def _text(path) -> tuple[str, ...]:
    return tuple(_part(entry) for entry in path)


def _part(entry) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise AssertionError(entry)
