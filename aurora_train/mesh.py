"""Logical axis names -> device mesh and shardings. One table of rules; a parameter never names a device axis itself.

Two mesh axes today: `data` (batch only) and `fsdp` (batch, and parameters with their optimizer state). A dimension
that the mesh does not divide is kept whole on every device; `kept_whole` names those, so that the log can say so.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aurora_train.errors import UserError
from aurora_train.machine.profile import choose_devices

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)

# Logical axis -> mesh axis. Each kernel has one axis named `embed`, so that one is cut and the others stay whole.
RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "vocab": None,
    "heads": None,
    "kv_heads": None,
    "mlp": None,
    "norm": None,
    "layers": None,
}


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh over the local devices; `data` -1 takes what `fsdp` leaves. Raises UserError where it does not fit."""
    devices, _ = choose_devices(jax.local_devices())
    available = len(devices)
    if data == -1:
        data = max(available // fsdp, 1)
    wanted = data * fsdp
    if wanted > available:
        raise UserError(
            f"mesh {{data: {data}, fsdp: {fsdp}}} needs {wanted} devices and this machine has {available}",
            where="mesh",
            hint="use `mesh: {data: -1, fsdp: 1}` to take all there are",
        )
    return mesh_of(np.asarray(devices[:wanted]).reshape(data, fsdp))


def mesh_of(devices: np.ndarray) -> Mesh:
    """The mesh of an array of devices [data, fsdp]."""
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading (example) axis over all devices."""
    return NamedSharding(mesh, BATCH)


def spec(shape: tuple[int, ...], names: tuple[str | None, ...] | None, mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter. Unknown logical names are kept whole; a mesh axis is used at most once."""
    if not names:
        return PartitionSpec()
    parts, used = [], set()
    for size, name in zip(shape, names, strict=True):
        axis = RULES.get(name)
        fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
        parts.append(axis if fits else None)
        if fits:
            used.add(axis)
    return PartitionSpec(*parts)


def parameter_shardings(state, mesh: Mesh) -> dict:
    """A nested dict like `nnx.to_pure_dict(state)` with a NamedSharding for each Variable of an nnx State."""

    def sharding(variable):
        names = variable.get_metadata().get("out_sharding")
        shape = variable.get_value().shape if hasattr(variable, "get_value") else variable.shape
        return variable.replace(NamedSharding(mesh, spec(shape, names, mesh)))

    return nnx.to_pure_dict(jax.tree.map(sharding, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def kept_whole(shardings) -> list[str]:
    """Dotted names of the matrices that no mesh axis divides."""
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return [
        ".".join(str(getattr(key, "key", key)) for key in path)
        for path, sharding in leaves
        if len(sharding.spec) >= 2 and not any(sharding.spec)
    ]


def bytes_per_device(tree) -> dict[str, int]:
    """Bytes that each device really holds of a pytree of jax Arrays."""
    held: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[str(shard.device)] = held.get(str(shard.device), 0) + shard.data.nbytes
    return held
