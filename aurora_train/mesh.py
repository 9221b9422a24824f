"""Maps logical axis names to a device mesh and shardings by one table of rules. Parameters never name a device axis.

There are three mesh axes: `data` (batch only), `fsdp` (batch, and parameters with their optimizer state) and `tensor`
(parameters and the activations made with them, but not the batch: Shoeybi et al. 2019). The compiler adds what has to
be communicated (GSPMD, Xu et al. 2021). A dimension that the mesh does not divide is kept whole on every device, and
`kept_whole` lists such parameters for the log; for heads and hidden widths, which `tensor` is there to cut, it is
refused.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aurora_train.errors import UserError
from aurora_train.machine import processes
from aurora_train.machine.profile import choose_devices

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# Logical axis -> mesh axis. Each kernel has one axis named `embed`, and the other is what `tensor` cuts.
RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "value_heads": "tensor",
    "mlp": "tensor",
    "norm": None,
    "layers": None,
}
_MAY_STAY_WHOLE = ("embed", "vocab", "value_heads")  # the other dimensions that `tensor` cuts, it must divide


def make_mesh(data: int, fsdp: int, tensor: int = 1) -> Mesh:
    """A mesh over the devices of all processes; `data` -1 takes what the others leave. UserError if it does not fit.

    Neighbouring devices share a `tensor` group, then an `fsdp` group, so that what communicates most is closest.
    """
    devices, _ = choose_devices(jax.devices())
    available, each = len(devices), fsdp * tensor
    if data == -1:
        data = max(available // each, 1)
    wanted = data * each
    if wanted > available:
        raise UserError(
            f"mesh {{data: {data}, fsdp: {fsdp}, tensor: {tensor}}} needs {wanted} devices and this machine has "
            f"{available}",
            where="mesh",
            hint="use `mesh: {data: -1, fsdp: 1, tensor: 1}` to take all of them",
        )
    if processes.count() > 1:
        _refuse_uneven(wanted, devices)
    return mesh_of(np.asarray(devices[:wanted]), data, fsdp, tensor)


def asked(section) -> Mesh:
    """The mesh of a config's `mesh` section."""
    return make_mesh(section.data, section.fsdp, section.tensor)


def _refuse_uneven(wanted: int, devices: list) -> None:
    """UserError if the processes have unequal numbers of devices, or the mesh leaves some of them out."""
    many = processes.count()
    counts = [sum(device.process_index == index for device in devices) for index in range(many)]
    if len(set(counts)) > 1:
        raise UserError(
            f"the processes have unequal numbers of devices: {', '.join(map(str, counts))}", where="mesh",
            why="each takes an equal part of every step", hint="start each with as many devices as the others",
        )  # fmt: skip
    if wanted != len(devices):
        raise UserError(
            f"a mesh of {wanted} devices leaves out some of the {len(devices)} of these {many} processes",
            where="mesh", hint="mesh.data=-1 takes all that fsdp and tensor leave",
        )  # fmt: skip


def is_here(sharding, shape: tuple[int, ...]) -> bool:
    """Whether this process's devices hold the whole of an array of this shape."""
    held = {str(index) for index in sharding.addressable_devices_indices_map(shape).values()}
    return len(held) * math.prod(sharding.shard_shape(shape)) == math.prod(shape)


def brought_here(leaf, unit: int | None = None):
    """A leaf that several processes hold, or one unit of it, whole on every device. All of them have to ask for it."""
    everywhere = replicated(leaf.sharding.mesh)
    if unit is None:
        return jax.jit(jnp.copy, out_shardings=everywhere)(leaf)
    take = jax.jit(jax.lax.dynamic_index_in_dim, static_argnames="keepdims", out_shardings=everywhere)
    return take(leaf, unit, keepdims=False)


def local_mesh(mesh: Mesh) -> Mesh:
    """This process's part of a mesh."""
    return mesh if processes.count() == 1 else Mesh(mesh.local_mesh.devices, AXES, axis_types=(AxisType.Auto,) * 3)


def local_view(tree):
    """A pytree of arrays of several processes as arrays of this one, cut as they are over this process's devices.

    What this process holds whole is the same buffers; the rest is brought here leaf by leaf, which takes room for it,
    and every process has to ask for it.
    """
    if processes.count() == 1:
        return tree

    def view(leaf):
        place = NamedSharding(local_mesh(leaf.sharding.mesh), leaf.sharding.spec)
        if is_here(leaf.sharding, leaf.shape):
            parts = [shard.data for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape, place, parts)
        return jax.device_put(brought_here(leaf).addressable_data(0), place)

    return jax.tree.map(view, tree)


def owners(tree, shardings) -> tuple[int, ...]:
    """The processes that save a part of a pytree: for every part, the first that holds it."""
    found = {0}
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        first: dict[str, int] = {}
        for device, index in sharding.devices_indices_map(leaf.shape).items():
            first.setdefault(str(index), device.process_index)
        found.update(first.values())
    return tuple(sorted(found))


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


def mesh_of(devices: np.ndarray, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The mesh of as many devices as the axes have together; of one device by default."""
    return Mesh(np.asarray(devices).reshape(data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts a mesh cuts the batch. The devices of a tensor group work on the same examples."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading (example) axis over all devices."""
    return NamedSharding(mesh, BATCH)


def rows(mesh: Mesh) -> NamedSharding | None:
    """How activations with a row for each example are cut; None on one device, where nothing may be said of it."""
    return batch_sharding(mesh) if mesh.devices.size > 1 else None


def spec(shape: tuple[int, ...], names: tuple[str | None, ...] | None, mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter. Unknown logical names are kept whole; a mesh axis is used at most once."""
    parts: list[str | None] = []
    for size, name in zip(shape, names or (None,) * len(shape), strict=True):
        axis = RULES.get(name)
        fits = axis is not None and axis not in parts and size % mesh.shape[axis] == 0
        parts.append(axis if fits else None)
    return PartitionSpec(*parts) if any(parts) else PartitionSpec()


def parameter_shardings(state, mesh: Mesh) -> dict:
    """A nested dict like `nnx.to_pure_dict(state)` with a NamedSharding for each Variable of an nnx State.

    UserError for heads or hidden widths that the tensor axis does not divide.
    """
    _refuse_undivided(state, mesh)

    def sharding(variable):
        names = variable.get_metadata().get("out_sharding")
        return variable.replace(NamedSharding(mesh, spec(_shape(variable), names, mesh)))

    return nnx.to_pure_dict(jax.tree.map(sharding, state, is_leaf=_is_variable))


def _is_variable(leaf) -> bool:
    return isinstance(leaf, nnx.Variable)


def _shape(variable) -> tuple[int, ...]:
    return variable.get_value().shape if hasattr(variable, "get_value") else variable.shape


def _undivided(state, mesh: Mesh):
    """(dotted name, size, logical name, mesh axis) of every dimension that its axis would cut and does not divide."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_variable)
    for path, variable in leaves:
        name, shape = ".".join(str(getattr(key, "key", key)) for key in path), _shape(variable)
        for size, logical in zip(shape, variable.get_metadata().get("out_sharding") or (), strict=False):
            axis = RULES.get(logical)
            if axis is not None and size % mesh.shape[axis] and len(shape) >= 2:
                yield name, size, logical, axis


def _refuse_undivided(state, mesh: Mesh) -> None:
    tensor = mesh.shape["tensor"]
    # The scales of a coded kernel have a 64th of its inputs: what does not divide is kept whole.
    cut = [one for one in _undivided(state, mesh) if one[2] not in _MAY_STAY_WHOLE and not one[0].endswith("_scale")]
    if cut:
        name, size, _, _ = cut[0]
        common = math.gcd(*(size for _, size, _, _ in cut))
        nearest = next(n for n in range(tensor, 0, -1) if common % n == 0)
        raise UserError(
            f"mesh.tensor={tensor} does not divide the {size} of {name}", where="mesh.tensor",
            why="heads and hidden widths are cut into equal parts",
            hint=f"mesh.tensor={nearest} divides them, or a model of other sizes",
        )  # fmt: skip


def kept_whole(state, mesh: Mesh) -> dict[str, list[str]]:
    """For each mesh axis, the dotted names of the matrices of an nnx State that it would cut and does not divide."""
    whole: dict[str, list[str]] = {}
    for name, _, _, axis in _undivided(state, mesh):
        whole.setdefault(axis, []).append(name)
    return whole


def bytes_per_device(tree) -> dict[str, int]:
    """Bytes of a pytree of jax Arrays that each device holds."""
    held: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[str(shard.device)] = held.get(str(shard.device), 0) + shard.data.nbytes
    return held
