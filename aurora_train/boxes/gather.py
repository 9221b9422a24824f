"""Checkpoints of boxes that share no disk (`checkpoint.gather`): process 0 writes all parts, and reads for all.

What is on disk is what several processes write to a shared one (`checkpoint/parts.py`): process 0 fetches the parts of
the others leaf by leaf while it writes them, and seals each. Back, every process asks for what its devices hold. The
others keep no run folder: process 0 sends them the small files of the run when they start.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import threading
from pathlib import Path

import jax
import numpy as np

from aurora_train import run as runs
from aurora_train.boxes.courier import Courier, Depot, fetched
from aurora_train.checkpoint import audit, durable, frozen, layout, parts
from aurora_train.checkpoint.following import FollowedStore
from aurora_train.checkpoint.layout import Unread
from aurora_train.checkpoint.save_failed import SaveFailed
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.errors import UserError
from aurora_train.files import sync
from aurora_train.machine import processes

_OFFERED = "offered"
_PLACE = "aurora/gather"


def refuse_unshared(run: runs.Run) -> None:
    """UserError if the processes do not see one run folder, in which all of them write and read checkpoints."""
    try:
        processes.refuse_unlike("run folder", run.holder())
    except UserError as error:
        raise UserError(
            "the processes do not share the run folder: each would save a part of the state where no other finds it",
            where=str(run.folder), why=error.what,
            hint="name a folder on a disk that all machines see with --run, or let process 0 write for all: "
            "checkpoint.gather=true (docs/scale.md)",
        ) from None  # fmt: skip


@contextlib.contextmanager
def leading(run: runs.Run):
    """The run of process 0, whose checkpoints hold what it fetches from the others."""
    depot = Depot(processes.address(), _Shelf(run).answer)
    processes.post(_PLACE, json.dumps(depot.place))
    try:
        yield GatheringRun(run.folder, depot)
    finally:
        depot.close()


@contextlib.contextmanager
def following(run: runs.Run, folder):
    """The run of another process, in a temporary folder, with what process 0 sends."""
    courier = Courier(json.loads(processes.await_post(_PLACE)))
    try:
        yield GatheredRun(run, folder, courier)
    finally:
        courier.close()


class GatheringRun(runs.Run):
    """A run whose process 0 this is."""

    def __init__(self, folder, depot: Depot):
        super().__init__(folder)
        self._depot = depot

    def store(self, owners: tuple[int, ...], **policy) -> CheckpointStore:
        """Its checkpoints."""
        return _GatheringStore(self.checkpoints, self.trash, depot=self._depot, owners=owners, **policy)


class GatheredRun(runs.FollowedRun):
    """A run of which nothing is on this machine's disk but a temporary copy of the record."""

    def __init__(self, leaders: runs.Run, folder, courier: Courier):
        runs.Run.__init__(self, folder)
        self._leaders, self._courier = leaders, courier
        self._known, archive = courier.files()
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(self.folder, filter="data")
        if self._known["saved"] and self._known["step"] == 0:
            raise UserError(
                "an imported run begins with its own weights, which are on process 0's machine only",
                where="checkpoint.gather", hint="copy its folder to every machine, and train a config with init.from",
            )  # fmt: skip

    checkpoints = property(lambda self: self.folder / "checkpoints")

    def step(self) -> int:
        """The newest step that process 0 had saved when this process started."""
        return self._known["step"]

    def has_checkpoint(self) -> bool:
        """Whether there was any."""
        return self._known["saved"]

    def store(self, owners: tuple[int, ...], **policy) -> CheckpointStore:
        """Its checkpoints, read and written by process 0."""
        return _OfferingStore(self.checkpoints, self.trash, courier=self._courier, owners=owners, **policy)


# ---- process 0


class _Shelf:
    """Answers what the other processes ask of a run."""

    def __init__(self, run: runs.Run):
        self._run, self._store = run, CheckpointStore(run.checkpoints, run.trash)
        self._lock = threading.Lock()
        self._stored: tuple[object, dict] = (None, {})  # of one folder
        self._leaf: tuple[object, list] = (None, [])  # the newest that was read: devices ask for parts of the same one

    def answer(self, request: dict, channel) -> None:
        """Send the answer to one request on its channel."""
        match request["ask"]:
            case "files":
                archive = self._packed()
                channel.send({"step": self._run.step(), "saved": self._run.has_checkpoint(), "bytes": len(archive)},
                             archive)  # fmt: skip
            case "steps":
                channel.send({"steps": sorted(audit.sealed_steps(self._run.checkpoints))})
            case "record":
                channel.send(self._store.record(request["step"]))
            case "shapes":
                shapes = self._store.shapes(request["step"])
                channel.send({name: [list(s.shape), str(np.dtype(s.dtype))] for name, s in shapes.items()})
            case "array":
                with self._lock:
                    part = self._part(request["step"], request["name"], request["place"])
                channel.send({"shape": list(part.shape), "dtype": str(part.dtype)}, part)

    def _packed(self) -> bytes:
        run, out = self._run, io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as packed:
            for path in (run.config, run.provenance, run.plan, run.metrics, run.events, run.facts):
                if path.exists():
                    packed.add(path, path.name)
        return out.getvalue()

    def _part(self, step: int, name: str, place: list) -> np.ndarray:
        folder = self._run.checkpoints / (frozen.FOLDER if frozen.is_frozen(name) else str(step))
        key = folder, durable.manifest(folder).get("digest")
        if self._stored[0] != key:
            self._stored = key, parts.stored(folder)
        if self._leaf[0] != (key, name):
            self._leaf = (None, [])  # released before the next one is read
            self._leaf = (key, name), parts.read(self._stored[1][name])
        wanted = tuple(slice(*pair) for pair in place)
        return parts.filled(wanted, self._leaf[1][0][1].dtype, self._leaf[1])


class _GatheringStore(CheckpointStore):
    """Process 0's store, which writes what the others offer."""

    def __init__(self, folder: Path, trash: Path, *, depot: Depot, owners: tuple[int, ...], **policy):
        super().__init__(folder, trash, owners=owners, **policy)
        self.writers = _Fetching(owners, depot)

    def _refuse_full_disk(self, step: int, num_bytes: int) -> None:
        """The parts of the others are about as large."""
        super()._refuse_full_disk(step, num_bytes * (1 + len(self.writers.others)))


class _Fetching(parts.Writers):
    def __init__(self, owners: tuple[int, ...], depot: Depot):
        super().__init__(owners)
        self._depot = depot

    def collect(self, save: str, step: int, held: Path, target: Path) -> list[str]:
        """Write the parts that the others offer into `target`. Returns their folders' names. SaveFailed as its base."""
        said = {number: processes.await_post(f"{save}/{number}") for number in self.others}
        wrong = [f"process {number}: {what}" for number, what in said.items() if what not in (_OFFERED, parts.NOTHING)]
        offers = {number: self._depot.offered(f"{save}/{number}") for number, what in said.items() if what == _OFFERED}
        try:
            if wrong:
                raise SaveFailed(step, wrong[0], held)
            for number, channel in offers.items():
                self._write(target / parts.folder_of(number), step, fetched(channel))
                channel.send({"get": None})
        finally:
            for channel in offers.values():
                channel.close()
        sync(target)
        return [parts.folder_of(number) for number in offers]

    def report(self, save: str, outcome: str) -> None:
        """Tell the others how a save went; if it failed, nobody fetches what they offer for it."""
        super().report(save, outcome)
        if outcome.split()[0] != parts.COMMITTED:
            self._depot.refuse(save)

    def _write(self, folder: Path, step: int, offered: dict) -> None:
        flat = {name: Unread(leaf) for name, leaf in offered.items()}
        frozen.write(folder, flat)
        if folder.parent.name == frozen.FOLDER:
            frozen.seal(folder, flat, None, [])
        else:
            durable.seal(folder, {"step": step})


# ---- the others


class _OfferingStore(FollowedStore):
    """A store of which nothing is on this machine: process 0 writes what is offered, and sends what is asked for."""

    def __init__(self, folder: Path, trash: Path, *, courier: Courier, owners: tuple[int, ...], **policy):
        super().__init__(folder, trash, owners=owners, **policy)
        self.writers, self._courier = _Offering(owners), courier

    def steps(self) -> list[int]:
        """Sealed steps on process 0's disk, ascending."""
        return self._courier.ask("steps")["steps"]

    def record(self, step: int) -> dict:
        """What a checkpoint's manifest records besides its files."""
        return self._courier.ask("record", step=step)

    def shapes(self, step: int) -> dict:
        """Shape and dtype of every stored leaf by canonical name, the frozen ones included."""
        listed = self._courier.ask("shapes", step=step)
        return {name: jax.ShapeDtypeStruct(tuple(s), jax.numpy.dtype(dtype)) for name, (s, dtype) in listed.items()}

    # ---- inside

    def _load(self, step: int, wanted: dict) -> dict:
        return {name: self._array(step, name, spec) for name, spec in wanted.items()}

    def _array(self, step: int, name: str, spec):
        known: dict[str, np.ndarray] = {}

        def part(index) -> np.ndarray:
            place = [[piece.start, piece.stop] for piece in parts.whole(index, spec.shape)]
            if (key := str(place)) not in known:
                known[key] = self._courier.array(step=step, name=name, place=place).astype(spec.dtype, copy=False)
            return known[key]

        sharding = getattr(spec, "sharding", None)
        if sharding is None:
            return jax.numpy.asarray(part(tuple(slice(0, n) for n in spec.shape)))
        return jax.make_array_from_callback(spec.shape, sharding, part)

    def _refuse_full_disk(self, step: int, num_bytes: int) -> None:
        """Process 0 looks at its own disk."""

    def _discard(self, step: int) -> None:
        """Nothing is here."""

    def _begin(self, step: int, flat: dict):
        return self._offer(self.writers.name, flat)

    def _finish(self, step: int, response, record, name: str) -> int:
        with self._told(name, later=False), self._reported(step):
            if response:
                response.result()
        self.writers.settle(name, step, self._part)
        return step

    def _frozen_written(self, step: int, tree, name: str) -> str:
        with self._told(name, later=False), self._reported(step):
            if offer := self._offer(name, layout.unread(tree, frozen.is_frozen)):
                offer.result()
        return self.writers.settle(name, step, self._part)

    def _offer(self, name: str, flat: dict):
        offer = self._courier.offer(f"{name}/{processes.index()}", flat) if flat else None
        self.writers.report(name, _OFFERED if offer else parts.NOTHING)
        return offer


class _Offering(parts.Writers):
    """Reports once how a part of a save went: that it is offered, or why not."""

    def __init__(self, owners: tuple[int, ...]):
        super().__init__(owners)
        self.name, self._reported = "", set()

    def begin(self) -> str:
        """The name of the next save."""
        self.name = super().begin()
        return self.name

    def report(self, save: str, outcome: str) -> None:
        """Tell process 0, the first time, how a part of a save went."""
        if save not in self._reported:
            self._reported.add(save)
            super().report(save, outcome)
