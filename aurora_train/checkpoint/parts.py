"""The parts of a checkpoint that several processes wrote: each wrote what it alone held of the state.

`30/` holds the parts of process 0, and `30/process-1/` those of process 1, sealed by its own manifest. The manifest of
`30/` lists the others' manifests, so a step counts once every part is in, and damage to any part is damage to the
step. A part is named by its leaf and the place of its first element, `params.head.kernel@0_512`; a leaf that one
process holds whole has no place. No mesh is recorded: leaves are put together for any number of processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from aurora_train.checkpoint import durable, layout, writer
from aurora_train.checkpoint.save_failed import SaveFailed
from aurora_train.errors import UserError
from aurora_train.files import sync
from aurora_train.machine import processes

SEALED, NOTHING, COMMITTED = "sealed", "nothing", "committed"  # what a process reports, else why it failed


class Piece(NamedTuple):
    """One stored array: the part of a leaf that begins at `start`."""

    folder: Path
    name: str
    start: tuple[int, ...]
    spec: Any

    @property
    def place(self) -> tuple[slice, ...]:
        """The part of its leaf that it is."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.spec.shape, strict=True))


def folder_of(process: int) -> str:
    """The name of the folder of a process's parts."""
    return f"process-{process}"


# ---- writing


class Writers:
    """The processes that write one run's state together, as one of them sees it. Their saves go in the same order.

    Each reports its part to process 0, which puts the parts into one folder and reports that the step counts, or why
    it does not.
    """

    def __init__(self, owners: tuple[int, ...]):
        self.others = [number for number in owners if number != 0]
        self._attempt = 0

    def begin(self) -> str:
        """The name of the next save."""
        self._attempt += 1
        return f"aurora/save/{self._attempt}"

    def agreed(self, decide: Callable[[], bool]) -> bool:
        """Process 0's decision, in every process that writes."""
        if not self.others:
            return decide()
        name = self.begin()
        if processes.leads():
            processes.post(f"{name}/0", json.dumps(decide()))
        return json.loads(processes.await_post(f"{name}/0"))

    def report(self, save: str, outcome: str) -> None:
        """Tell process 0, or if this is process 0 the others, how a save or a part of it went."""
        if self.others:
            processes.post(f"{save}/{processes.index()}", outcome)

    def collect(self, save: str, step: int, held: Path, target: Path) -> list[str]:
        """Move the parts that others wrote below `held` into `target`. Returns their folders' names.

        SaveFailed, once all have reported, if one of them could not write its part.
        """
        said = {number: processes.await_post(f"{save}/{number}") for number in self.others}
        wrong = [f"process {number}: {what}" for number, what in said.items() if what not in (SEALED, NOTHING)]
        if wrong:
            raise SaveFailed(step, wrong[0], held)
        folders = [folder_of(number) for number, what in said.items() if what == SEALED]
        for name in folders:
            (held / name / target.name).rename(target / name)
        sync(target)
        return folders

    def settle(self, save: str, step: int, held: Path) -> str:
        """What process 0 says of a save, such as the digest of what it sealed. SaveFailed if it does not count."""
        said = processes.await_post(f"{save}/0")
        if said.split()[0] != COMMITTED:
            raise SaveFailed(step, said, held)
        return said.split()[-1]


# ---- reading


def stored(folder: Path) -> dict[str, list[Piece]]:
    """The pieces of every leaf of one saved folder, by canonical name. Reads metadata only."""
    from orbax.checkpoint import v1 as ocp

    found: dict[str, list[Piece]] = {}
    for part in (folder, *(folder / name for name in durable.parts(folder))):
        for name, spec in dict(ocp.metadata(part).metadata).items():
            leaf, _, place = name.partition(layout.PART)
            start = tuple(map(int, place.split("_"))) if place else (0,) * len(spec.shape)
            found.setdefault(leaf, []).append(Piece(part, name, start, spec))
    return found


def shape_of(pieces: list[Piece]) -> Any:
    """Shape and dtype of the leaf that pieces are parts of; what Orbax says of it, if it is whole.

    UserError if they are not all of it.
    """
    if layout.PART not in pieces[0].name:
        return pieces[0].spec
    ends = [[a + n for a, n in zip(piece.start, piece.spec.shape, strict=True)] for piece in pieces]
    shape = tuple(map(max, zip(*ends, strict=True)))
    if sum(math.prod(piece.spec.shape) for piece in pieces) != math.prod(shape):
        raise UserError(
            f"a part of {pieces[0].name.partition(layout.PART)[0]} is missing", where=str(pieces[0].folder),
            hint="choose another step with --step, or let `aurora resume RUN` walk back to one",
        )  # fmt: skip
    return jax.ShapeDtypeStruct(shape, pieces[0].spec.dtype)


def load(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted leaves (abstract, with shardings) of one saved folder, as arrays, by canonical name."""
    if processes.count() > 1 or durable.parts(folder):
        return _load_pieces(stored(folder), wanted)
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Read by all threads at once, the host would hold a second state. The limit must exceed the largest leaf.
    largest = max(math.prod(spec.shape) * spec.dtype.itemsize for spec in wanted.values())
    context.memory.read_concurrent_bytes = largest + 4 * writer.PIECE_BYTES
    with context:
        return ocp.load(folder, wanted, checkpointable_name=writer.STATE)


def _load_pieces(found: dict[str, list[Piece]], wanted: dict[str, Any]) -> dict[str, Any]:
    """As `load`. Only pieces that this process needs are read, in groups of at most `writer.PIECE_BYTES`, each in
    memory of the host until its arrays are made."""
    out = {}
    for group in _groups(wanted):
        needed = {name: [piece for piece in found[name] if _is_needed(piece, wanted[name])] for name in group}
        arrays = {(piece.folder, piece.name): (piece, array) for piece, array in read(sum(needed.values(), []))}
        for name, pieces in needed.items():
            out[name] = _placed(wanted[name], [arrays.pop((piece.folder, piece.name)) for piece in pieces])
    return out


def _groups(wanted: dict[str, Any]) -> Iterator[list[str]]:
    group, held = [], 0
    for name, spec in wanted.items():
        size = math.prod(spec.shape) * spec.dtype.itemsize
        if group and held + size > writer.PIECE_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _places(spec) -> list[tuple[slice, ...]]:
    """The parts of a leaf that this process's devices hold."""
    sharding = getattr(spec, "sharding", None)
    if sharding is None:
        return [tuple(slice(0, n) for n in spec.shape)]
    held = sharding.addressable_devices_indices_map(spec.shape).values()
    return [whole(index, spec.shape) for index in held]


def whole(index, shape) -> tuple[slice, ...]:
    """A place as slices that have a start and a stop each."""
    return tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, shape, strict=True))


def _overlap(one, other) -> tuple[slice, ...] | None:
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return both if all(part.start < part.stop for part in both) else None


def _is_needed(piece: Piece, spec) -> bool:
    return any(_overlap(piece.place, place) is not None for place in _places(spec))


def read(pieces: list[Piece]) -> list[tuple[Piece, np.ndarray]]:
    """Pieces with their arrays, in memory of the host."""
    from orbax.checkpoint import v1 as ocp

    context, out = ocp.Context(), []
    context.pytree.loading.partial_load = True
    for folder in dict.fromkeys(piece.folder for piece in pieces):
        # An empty array stands for what is to be read: numpy in, numpy out.
        part = {p.name: p for p in pieces if p.folder == folder}
        into = {name: np.empty(p.spec.shape, p.spec.dtype) for name, p in part.items()}
        with context:
            loaded = ocp.load(folder, into, checkpointable_name=writer.STATE)
        out += [(part[name], array) for name, array in loaded.items()]
    return out


def filled(place: tuple[slice, ...], dtype, arrays: list[tuple[Piece, np.ndarray]]) -> np.ndarray:
    """A part of a leaf, put together from pieces of it."""
    out = np.empty([one.stop - one.start for one in place], dtype)
    for piece, array in arrays:
        both = _overlap(piece.place, place)
        if both is not None:
            out[_moved(both, place)] = array[_moved(both, piece.place)]
    return out


def _placed(spec, arrays: list[tuple[Piece, np.ndarray]]):
    def part(index):
        return filled(whole(index, spec.shape), spec.dtype, arrays)

    sharding = getattr(spec, "sharding", None)
    if sharding is None:
        return jax.numpy.asarray(part(tuple(slice(0, n) for n in spec.shape)))
    return jax.make_array_from_callback(spec.shape, sharding, part)


def _moved(place, origin) -> tuple[slice, ...]:
    """A place counted from the start of another."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(place, origin, strict=True))
