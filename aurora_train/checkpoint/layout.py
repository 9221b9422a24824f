"""The canonical form of a state on disk: a flat dict of names, one leaf per layer, whatever plan or mesh wrote it.

Names are dotted paths: `params.blocks.units.0003.attention.query.kernel`. Conversion works leaf by leaf, so a restore
holds one state and one more leaf. A save that is written while training continues copies the whole state to the host
(`snapshot`); one that is written while training waits reads leaf by leaf (`unread`), for which there is always room.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aurora_train import mesh as meshes
from aurora_train.errors import UserError
from aurora_train.nn.stack import SEGMENTS, UNITS

PART = "@"  # between the name of a leaf and the place of a part of it, which one of several processes holds


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


@dataclass(frozen=True)
class Unread:
    """One canonical leaf of a state that is still where it was computed. `unit`: which unit of a stacked leaf it is."""

    leaf: Any
    unit: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape on disk."""
        return tuple(self.leaf.shape) if self.unit is None else tuple(self.leaf.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Its dtype on disk."""
        return np.dtype(self.leaf.dtype)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """A copy on the host, in memory of its own.

        On a CPU, a view of the device's buffer would do, but a buffer with a view is not donated. From a GPU, shards
        pass through a temporary array, because an array of jax keeps the numpy array that was made of it.
        """
        if not isinstance(self.leaf, jax.Array):
            return np.array(self.leaf if self.unit is None else self.leaf[self.unit])
        shards = list({str(shard.index): shard for shard in self.leaf.addressable_shards}.values())
        if len(shards) == 1 and shards[0].device.platform != "cpu":
            return self._part(shards[0].data)
        whole = np.empty(self.shape, self.dtype)
        for shard in shards:
            whole[shard.index if self.unit is None else shard.index[1:]] = self._part(shard.data)
        return whole

    def _part(self, data: jax.Array) -> np.ndarray:
        if data.platform() == "cpu":
            return np.asarray(data) if self.unit is None else np.asarray(data)[self.unit]
        return np.asarray(_whole(data) if self.unit is None else _unit(data, self.unit))


def unread(tree, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Unread]:
    """The leaves whose names are `wanted`, by canonical name; nothing is copied or moved.

    Of what several processes hold, the parts that this one saves.
    """
    flat: dict[str, Unread] = {}
    for names, stacked, leaf in entries(tree):
        for place, held in _saved_here(leaf, stacked) if wanted(names[0]) else ():
            flat.update((name + place, Unread(held, unit if stacked else None)) for unit, name in enumerate(names))
    return flat


def snapshot(tree, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """A copy on the host of what `unread` returns. The device buffers may be donated when it returns."""
    flat: dict[str, np.ndarray] = {}
    for names, stacked, leaf in entries(tree):
        for place, held in _saved_here(leaf, stacked) if wanted(names[0]) else ():
            whole = Unread(held).read()  # a stacked leaf is moved once and divided here, not once for each unit
            parts = map(np.asarray, whole) if stacked else [whole]
            flat.update(zip((name + place for name in names), parts, strict=True))
    return flat


def each_whole(tree) -> Iterator[tuple[str, np.ndarray]]:
    """Every canonical leaf in the order of names, on the host, one at a time. Every process has to ask for all."""
    flat = {}
    for names, stacked, leaf in entries(tree):
        flat.update((name, (leaf, unit if stacked else None)) for unit, name in enumerate(names))
    for name, (leaf, unit) in sorted(flat.items()):
        if isinstance(leaf, jax.Array) and not meshes.is_here(leaf.sharding, leaf.shape):
            leaf, unit = meshes.brought_here(leaf, unit), None
        yield name, Unread(leaf, unit).read()


def _saved_here(leaf, stacked: bool) -> list[tuple[str, Any]]:
    """(the place in its name, the array) of each part of a leaf that this process saves."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return [("", leaf)]
    parts = []
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            starts = [part.indices(n)[0] for part, n in zip(shard.index, leaf.shape, strict=True)][int(stacked) :]
            is_part = shard.data.shape != leaf.shape
            parts.append((PART + "_".join(map(str, starts)) if is_part else "", shard.data))
    return parts


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

    A function in the place of an array is called when the array is needed: a stacked leaf of such parts is filled part
    by part, so that memory never holds the parts beside it. Every leaf passes through a jitted copy with its sharding,
    because arrays straight from a restore may not be donatable and may be placed differently from those of a fresh
    start.
    """
    leaves = []
    for (names, stacked, leaf), sharding in zip(entries(tree), jax.tree.leaves(shardings), strict=True):
        parts = [flat.pop(name) for name in names]
        if stacked and callable(parts[0]):
            leaves.append(_filled(parts, leaf, sharding))
        else:
            join = jax.jit(_stack if stacked else _copy, static_argnums=1, out_shardings=sharding)
            parts = [part() if callable(part) else part for part in parts]
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


def _filled(parts: list[Callable[[], Any]], leaf, sharding):
    """A stacked leaf of parts that are read one after the other."""
    # Compiled, zeros are made where they stay; and XLA updates a slice in place, where `at[].set` takes a copy.
    whole = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    put = jax.jit(_with_part, donate_argnums=0, out_shardings=sharding)
    for at, read in enumerate(parts):
        whole = jax.block_until_ready(put(whole, read(), at))  # else a part is read before the last one is released
    return whole


def _with_part(whole, part, at):
    return jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), at, 0)


def _stack(parts, dtype):
    return jnp.stack(parts).astype(dtype)


def _copy(parts, dtype):
    return jnp.copy(parts[0]).astype(dtype)


_whole = jax.jit(jnp.copy)
_unit = jax.jit(lambda data, unit: jax.lax.dynamic_index_in_dim(data, unit, keepdims=False))


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
