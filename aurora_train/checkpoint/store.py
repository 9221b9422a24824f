"""The checkpoints of one run: asynchronous saves through Orbax, sealed, verified at restore, and retained by our rules.

Retention is ours because a score is attached only after the evaluation that follows the save. A checkpoint is moved
to the trash before it is deleted, so that a crash during deletion never leaves half of one under its own name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from aurora_train.checkpoint import durable, frozen, layout, ledger, parts, writer
from aurora_train.checkpoint.audit import ASIDE, sealed_steps, step_faults
from aurora_train.checkpoint.ledger import Ledger
from aurora_train.checkpoint.retention import reasons
from aurora_train.checkpoint.save_failed import SaveFailed, system_error
from aurora_train.errors import UserError
from aurora_train.files import NO_SPACE, sync

MARGIN_BYTES = 1 << 20  # what Orbax and the manifest write in addition to the arrays

class Damage(NamedTuple):
    """A checkpoint, or the record of checkpoints (`step` is None), whose bytes differ from those that were saved.

    `moved_to` is None if there was nothing left to set aside.
    """

    step: int | None
    faults: list[str]
    moved_to: Path | None

    def __str__(self) -> str:
        what = "the record of checkpoints" if self.step is None else f"checkpoint {self.step}"
        return f"{what} is damaged ({self.faults[0]})" + (f"; moved to {self.moved_to}" if self.moved_to else "")


class CheckpointStore:
    """Checkpoints under `folder`, one subfolder per step. The run's lock guarantees that there is only one writer."""

    def __init__(
        self, folder: Path, trash: Path, *, keep: int = 2, keep_every: int | None = None, best: int = 1,
        owners: tuple[int, ...] = (0,),
    ):  # fmt: skip
        """`owners`: the processes that write a part of every checkpoint; this is the store of process 0."""
        self.folder, self.trash = folder, trash
        self.writers = parts.Writers(owners)
        self.keep, self.keep_every, self.best = keep, keep_every, best
        self.ledger = Ledger(folder)
        self._orbax, self.outdated = None, False  # outdated: Orbax lists a step whose save was undone
        self._sealer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="seal")
        self._pending: Future | None = None
        self._unsettled: set[int] = set()  # steps whose save failed after a manifest may have been written
        self._frozen: str | None = None  # digest of the frozen parameters, once written or restored here

    # ---- reading

    def steps(self) -> list[int]:
        """Sealed steps, ascending."""
        return sorted(sealed_steps(self.folder))

    def scores(self) -> dict[int, float]:
        """Score by step, where one was attached."""
        return self.ledger.read().scores

    def record(self, step: int) -> dict:
        """What a checkpoint's manifest records besides its files."""
        manifest = json.loads((self.folder / str(step) / durable.MANIFEST).read_text())
        return {key: value for key, value in manifest.items() if key not in ("files", "digest")}

    def newest_intact(self) -> tuple[int | None, list[Damage]]:
        """The newest step whose every byte verifies; newer ones are damaged and are set aside, never deleted.

        (None, []) if nothing was ever saved. UserError if there are checkpoints but none is intact, or if the frozen
        parameters that they share are damaged.
        """
        entries, bad = self.ledger.read(), {}
        intact = None
        for step in sorted({*self.steps(), *self._lost(entries)}, reverse=True):
            lines = step_faults(self.folder, step)
            if not lines:
                self.refuse_frozen_damage(step)
                intact = step
                break
            bad[step] = lines
        if bad and intact is None:
            raise UserError(
                "every checkpoint of this run is damaged",
                where=str(self.folder),
                why="\n  ".join(f"{step}: {lines[0]}" for step, lines in bad.items()),
                hint="restore one from a copy, or start over with `aurora train CONFIG --fresh` (this run is kept)",
            )
        damages = [Damage(step, lines, self._set_aside(step)) for step, lines in bad.items()]
        if entries.fault:
            moved_to = self.ledger.begin_anew(self.steps())
            return intact, [Damage(None, [f"{ledger.NAME}: {entries.fault}"], moved_to), *damages]
        self.ledger.strike(bad)
        return intact, damages

    def _lost(self, entries) -> set[int]:
        """Steps that were, or may have been, committed and no longer have a manifest."""
        unsealed = {int(p.name) for p in self._folders() if not durable.is_sealed(p)}
        gone = {step for step in entries.committed if not (self.folder / str(step)).is_dir()}
        return gone | (unsealed if entries.fault else unsealed & entries.committed)

    def _folders(self) -> list[Path]:
        return [p for p in self.folder.iterdir() if p.name.isdigit()] if self.folder.is_dir() else []

    def restore(self, step: int, tree, shardings) -> Any:
        """The state saved at `step` as the pytree `tree` (abstract) with its shardings. UserError if it differs."""
        wanted = layout.abstract(tree, shardings)
        layout.refuse_difference(self.shapes(step), wanted, where=str(self.folder / str(step)))
        self._frozen = self._frozen_digest(step)
        return layout.assemble(self._load(step, wanted), tree, shardings)

    def restore_some(self, step: int, wanted: dict[str, Any], stored: dict[str, Any] | None = None) -> dict[str, Any]:
        """Only the named leaves, by canonical name. `stored`: the `shapes` of this step, if they are known."""
        stored = self.shapes(step) if stored is None else stored
        layout.refuse_difference({n: s for n, s in stored.items() if n in wanted}, wanted, str(self.folder))
        return self._load(step, wanted)

    def shapes(self, step: int) -> dict[str, Any]:
        """Shape and dtype of every stored leaf by canonical name, including the frozen ones."""
        digest = self._frozen_digest(step)
        if digest is not None:
            frozen.refuse_other(self.folder / frozen.FOLDER, digest)
        folders = [self.folder / str(step)] + ([] if digest is None else [self.folder / frozen.FOLDER])
        return {name: parts.shape_of(found) for folder in folders for name, found in parts.stored(folder).items()}

    def refuse_frozen_damage(self, step: int) -> None:
        """Raise UserError if the frozen parameters that a checkpoint needs are missing or damaged."""
        digest = self._frozen_digest(step)
        if digest is not None:
            frozen.refuse_damage(self.folder / frozen.FOLDER, digest)

    # ---- writing

    def sweep(self) -> None:
        """Remove what a crash left behind: unfinished saves and the trash."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lost = {str(step) for step in self._lost(self.ledger.read())}
        for path in self.folder.iterdir():
            ours = path.name.isdigit() or path.name == frozen.FOLDER
            kept = path.name.startswith(ASIDE) or path.name in lost or (ours and durable.is_sealed(path))
            if path.is_dir() and not kept:
                self._delete(path)
        shutil.rmtree(self.trash, ignore_errors=True)

    def save(self, step: int, tree, record: dict, *, copy: bool = True, first: Callable[[], None] = lambda: None):
        """Copy the state to the host and write it in the background, after waiting for the previous save to finish.

        Without `copy` it blocks until the state is written, and takes the memory of one piece instead of a second
        state; only hashing and syncing are left to the background. Frozen parameters are written only by the first save
        of a run, in this way. `first` is called before anything is written, and may raise SaveFailed.
        """
        self.wait()
        name = self.writers.begin()
        with self._told(name, later=True):
            first()
            with self._reported(step):
                self._take_back(step)
            record = {**record, **self._write_frozen(step, tree, name)}
            flat = (layout.snapshot if copy else layout.unread)(tree, lambda name: not frozen.is_frozen(name))
            self._refuse_full_disk(step, sum(leaf.nbytes for leaf in flat.values()))
            with self._reported(step):
                response = self._begin(step, flat)
                if response and not copy:
                    response.result()
            self._pending = self._sealer.submit(self._finish, step, response, record, name)

    def _begin(self, step: int, flat: dict):
        response = self._checkpointer().save_checkpointables_async(step, {writer.STATE: flat}, force=True)
        assert response is not None, "Orbax skipped a save"
        return response

    @contextlib.contextmanager
    def _told(self, name: str, *, later: bool):
        """In this context, the processes that wait for this part of the save `name` are told why it failed.

        All of them learn it when they wait for the save; with `later`, it is raised only then here as well.
        """
        try:
            yield
        except SaveFailed as error:
            self.writers.report(name, error.reason)
            if not (later and self.writers.others):
                raise
            self._pending = Future()
            self._pending.set_exception(error)

    def _refuse_full_disk(self, step: int, num_bytes: int) -> None:
        """Checked before anything is written: if the disk fills later, the array writer's threads print tracebacks."""
        with self._reported(step):
            free, needed = shutil.disk_usage(self.folder).free, num_bytes + MARGIN_BYTES
        if free < needed:
            raise SaveFailed(
                step, os.strerror(errno.ENOSPC), self.folder, needed=needed, no_space=True,
                why=f"it needs {needed:,} bytes and {free:,} are free",
            )  # fmt: skip

    def _finish(self, step, response, record, name) -> int:
        with self._told(name, later=False), self._reported(step):
            response.result()
            inside = self.writers.collect(name, step, self.folder, self.folder / str(step))
            self._unsettled.add(step)
            durable.seal(self.folder / str(step), {"step": step, **record}, inside)
            self.ledger.commit(step)
            self._unsettled.discard(step)
        self.writers.report(name, parts.COMMITTED)
        return step

    def _take_back(self, step: int) -> None:
        """Undo a save that failed after its manifest or its entry was written: unsynced data may be lost."""
        if step not in self._unsettled:
            return
        self.ledger.strike([step])
        path = self.folder / str(step)
        if path.exists():
            self._delete(path)
        self._unsettled.discard(step)

    def _write_frozen(self, step: int, tree, name: str) -> dict:
        """The manifest's entry for the frozen parameters; {} if there are none. Stores them if that is still to do."""
        if not any(frozen.is_frozen(entry.names[0]) for entry in layout.entries(tree)):
            return {}
        if self._frozen is None:
            self._frozen = self._frozen_written(step, tree, f"{name}/frozen")
        return {"frozen": self._frozen}

    def _frozen_written(self, step: int, tree, name: str) -> str:
        flat, folder = layout.unread(tree, frozen.is_frozen), self.folder / frozen.FOLDER
        content = None if self.writers.others else frozen.content_of(flat)  # nobody sees all of what is in parts
        with self._told(name, later=False):
            with self._reported(step):
                if folder.exists():  # left by an attempt that was killed before its first checkpoint
                    self._delete(folder)
                digest = content and frozen.shared(folder, content)
            if digest is None:
                self._refuse_full_disk(step, sum(leaf.nbytes for leaf in flat.values()))
                with self._reported(step):
                    frozen.write(folder, flat)
                    inside = self.writers.collect(name, step, self.folder, folder)
                    digest = frozen.seal(folder, flat, content, inside)
        self.writers.report(name, f"{parts.COMMITTED} {digest}")
        return digest

    @contextlib.contextmanager
    def _reported(self, step: int):
        """In this context a system error becomes a SaveFailed, and the partly written save is removed."""
        try:
            yield
        except (OSError, ValueError, UserError) as error:
            # The array writer reports the system's errors as ValueError, with the reason in its text.
            reason = getattr(error, "strerror", None) or system_error(str(error)) or getattr(error, "reason", None)
            if isinstance(error, TimeoutError):  # raised by Orbax's own shorter waits, without an errno
                reason = reason or "it did not end in time"
            if reason is None:
                raise
            self._discard(step)
            no_space = any(os.strerror(code) in reason for code in NO_SPACE)  # perhaps after another process's name
            raise SaveFailed(step, reason, self.folder, needed=MARGIN_BYTES, no_space=no_space) from error

    def _discard(self, step: int) -> None:
        """Remove the remains of an unfinished save: the next one needs the space."""
        with contextlib.suppress(OSError, UserError):  # the next attempt tries again and reports the error
            self._take_back(step)
        self.outdated = True
        for path in self.folder.glob(f"{step}*"):
            if path.name.split(".")[0] == str(step) and not durable.is_sealed(path):
                shutil.rmtree(path, ignore_errors=True)

    def make_room(self, needed: int) -> list[int]:
        """Delete rolling checkpoints, oldest first, until `needed` bytes are free. Returns their steps.

        The newest is never deleted, nor are those that `keep_every` or `best` keep.
        """
        given_up = []
        for step in self.spare():
            if shutil.disk_usage(self.folder).free >= needed and given_up:
                break
            self._give_up([step])
            given_up.append(step)
        return given_up

    def spare(self) -> list[int]:
        """The steps that `make_room` may delete, oldest first."""
        entries = self.ledger.read()
        return [step for step in self.steps() if step not in self._kept(self.steps(), entries, 1)]

    def _kept(self, steps: list[int], entries, keep: int) -> dict[int, str]:
        return reasons(
            steps, entries.scores, keep=keep, keep_every=self.keep_every, best=self.best,
            lower_is_better=entries.lower_is_better,
        )  # fmt: skip

    def _give_up(self, steps: list[int]) -> None:
        """Strike the steps from the ledger, then delete them. On a full disk deletion comes first, to make room."""
        try:
            self.ledger.strike(steps)
            struck = True
        except UserError:
            struck = False
        for step in steps:
            self._delete(self.folder / str(step))
        if not struck:
            self.ledger.strike(steps)

    def finished(self) -> int | None:
        """The step of a save that has become durable since the last call, or None. Raises the save's own error."""
        if self._pending is None or not self._pending.done():
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def wait(self) -> int | None:
        """Block until the running save is durable. Returns its step, or None if no save was running."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def attach_score(self, step: int, score: float, *, lower_is_better: bool = True) -> None:
        """Remember the evaluation of a saved step."""
        self.ledger.attach_score(step, score, lower_is_better=lower_is_better)

    def retain(self) -> list[int]:
        """Delete all but the newest `keep`, every `keep_every`-th and the `best` by score. Returns those deleted."""
        steps, entries = self.steps(), self.ledger.read()
        kept = self._kept(steps, entries, self.keep)
        given_up = [step for step in steps if step not in kept]
        self._give_up(given_up)
        return given_up

    def close(self) -> None:
        """Wait for the running save and shut down Orbax's threads."""
        self.wait()
        self._sealer.shutdown()
        self._close_orbax()

    # ---- inside

    def _frozen_digest(self, step: int) -> str | None:
        return self.record(step).get("frozen")

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        """The named leaves, read from a checkpoint and from the frozen folder."""
        loaded = {}
        for folder, holds_frozen in ((str(step), False), (frozen.FOLDER, True)):
            part = {name: spec for name, spec in wanted.items() if frozen.is_frozen(name) == holds_frozen}
            loaded |= parts.load(self.folder / folder, part) if part else {}
        return loaded

    def _close_orbax(self) -> None:
        orbax, self._orbax = self._orbax, None
        already_reported = (OSError, ValueError) if self.outdated else ()  # errors of the save that failed
        with contextlib.suppress(*already_reported):
            if orbax is not None:
                orbax.close()

    def _checkpointer(self):
        if self.outdated:
            self._close_orbax()
        self.outdated = False
        if self._orbax is None:
            self._orbax = writer.checkpointer(self.folder)
        return self._orbax

    def _delete(self, path: Path) -> None:
        target = self.trash / path.name
        try:
            self.trash.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
        except OSError as error:
            if error.errno not in (*NO_SPACE, errno.EXDEV):
                raise
            # The disk has no room for a new name, or the checkpoints lie on a disk of their own. Without its manifest
            # the folder does not count as a checkpoint either.
            (path / durable.MANIFEST).unlink(missing_ok=True)
            target = path
        sync(self.folder)
        shutil.rmtree(target, ignore_errors=True)

    def _set_aside(self, step: int) -> Path | None:
        if not (self.folder / str(step)).is_dir():
            return None
        target = self.folder / f"{ASIDE}{step}"
        number = 1
        while target.exists():
            number += 1
            target = self.folder / f"{ASIDE}{step}-{number}"
        (self.folder / str(step)).rename(target)
        sync(self.folder)
        return target
