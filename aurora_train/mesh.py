"""Maps logical axis names to a device mesh and shardings by one table of rules. Parameters never name a device axis.

There are two mesh axes: `data` (batch only) and `fsdp` (batch, and parameters with their optimizer state). A dimension
that the mesh does not divide is kept whole on every device; `kept_whole` lists such parameters for the log.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aurora_train.errors import UserError
from aurora_train.machine import processes
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
    """A mesh over the devices of all processes; `data` -1 takes what `fsdp` leaves. UserError if it does not fit.

    Every process has the same number of devices and holds the whole state. `fsdp` stays within one process, so that
    one process can write a checkpoint, and each can read it, without communication.
    """
    devices, _ = choose_devices(jax.devices())
    available = len(devices)
    if data == -1:
        data = max(available // fsdp, 1)
    wanted = data * fsdp
    if wanted > available:
        raise UserError(
            f"mesh {{data: {data}, fsdp: {fsdp}}} needs {wanted} devices and this machine has {available}",
            where="mesh",
            hint="use `mesh: {data: -1, fsdp: 1}` to take all of them",
        )
    if processes.count() > 1:
        _refuse_uneven(wanted, fsdp, devices)
    return mesh_of(np.asarray(devices[:wanted]).reshape(data, fsdp))


def _refuse_uneven(wanted: int, fsdp: int, devices: list) -> None:
    """UserError if a process would hold only a part of the state, or no part of the batch."""
    many = processes.count()
    each = len(devices) // many
    held = {sum(device.process_index == index for device in devices) for index in range(many)}
    if held != {each} or wanted != len(devices) or each % fsdp:
        raise UserError(
            f"a mesh of {wanted} devices with fsdp {fsdp} does not divide evenly over {many} processes",
            where="mesh",
            why=f"they have {len(devices)} devices, and each process has to hold the whole state on its own",
            hint=f"mesh.data=-1, and for mesh.fsdp a number that divides the {each} of one process",
        )


def local(shardings):
    """The same shardings over this process's part of their mesh."""
    if processes.count() == 1:
        return shardings

    def here(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(local_mesh(sharding.mesh), sharding.spec)

    return jax.tree.map(here, shardings)


def local_mesh(mesh: Mesh) -> Mesh:
    """This process's part of a mesh."""
    return mesh if processes.count() == 1 else mesh_of(mesh.local_mesh.devices)


def local_view(tree):
    """A pytree of arrays of several processes, as arrays on this process's devices only: the same buffers, no copy.

    Every leaf must be whole within each process, which is true of a state and not of a batch.
    """
    if processes.count() == 1:
        return tree

    def view(leaf):
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, local(leaf.sharding), parts)

    return jax.tree.map(view, tree)


def shared_view(tree, shardings):
    """The inverse of `local_view`: every process contributes its own, equal, part."""
    if processes.count() == 1:
        return tree

    def view(leaf, sharding):
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    return jax.tree.map(view, tree, shardings)


def checksum(tree) -> str:
    """A hex checksum over the bits of a pytree of this process's arrays; computed on the device, in one pass."""

    def of(leaf):
        leaf = leaf.astype("uint8") if leaf.dtype == bool else leaf
        bits = jax.lax.bitcast_convert_type(leaf.reshape(-1), f"uint{8 * leaf.dtype.itemsize}").astype("uint32")
        return (bits * (2 * jax.lax.iota("uint32", bits.size) + 1)).sum(dtype="uint32")

    sums = jax.jit(lambda leaves: [of(leaf) for leaf in leaves if leaf.size])(jax.tree.leaves(tree))
    return np.asarray(jax.device_get(sums), np.uint32).tobytes().hex()


def put(tree, sharding: NamedSharding):
    """Arrays with this sharding, from host arrays (or typed keys) that every process has whole."""
    if processes.count() == 1:
        return jax.device_put(tree, sharding)

    def place(array):
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(array)), impl=jax.random.key_impl(array))
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


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
    """Bytes of a pytree of jax Arrays that each device holds."""
    held: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[str(shard.device)] = held.get(str(shard.device), 0) + shard.data.nbytes
    return held
