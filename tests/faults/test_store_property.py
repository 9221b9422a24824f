"""Whatever happens to a folder of checkpoints, what is restored is one that was committed, and the newest such.

Each example is a history of saves, crashes and accidents; a model says what must come back. The folders hold a few
bytes in the place of Orbax's files: what is tested is how they are sealed, recorded, missed and walked past.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.checkpoint import durable
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.errors import UserError

ACCIDENTS = ("bit", "cut", "unlisted", "folder gone", "nothing")
EVENTS = st.one_of(
    st.tuples(st.just("save"), st.sampled_from(["whole", "killed early", "killed late"])),
    st.tuples(st.just("accident"), st.sampled_from(ACCIDENTS), st.integers(0, 4)),
    st.tuples(st.just("record"), st.sampled_from(["cut", "gone", "bit"])),
    st.tuples(st.just("restart")),
)


class History:
    """The folder, and beside it what is known of each step: True for intact, False for damaged."""

    def __init__(self, folder: Path):
        self.folder, self.step, self.known = folder / "checkpoints", 0, {}
        self.store = CheckpointStore(self.folder, folder / ".trash", keep=100)
        self.store.sweep()

    def save(self, how: str) -> None:
        self.step += 1
        path = self.folder / str(self.step)
        (path / "state").mkdir(parents=True)
        (path / "state" / "data").write_bytes(bytes(range(64)) + bytes([self.step]))
        if how == "killed early":
            return
        durable.seal(path, {"step": self.step})
        if how == "whole":
            self.store.ledger.commit(self.step)
        self.known[self.step] = True

    def accident(self, kind: str, which: int) -> None:
        if not self.known or kind == "nothing":
            return
        step = sorted(self.known, reverse=True)[which % len(self.known)]
        path = self.folder / str(step)
        data = path / "state" / "data"
        if not data.exists() or (kind == "unlisted" and not durable.is_sealed(path)):
            return
        listed = step in self.store.ledger.read().committed
        if kind == "bit":
            content = data.read_bytes()
            data.write_bytes(bytes([(content[0] + 1) % 256]) + content[1:] if content else b"x")
        elif kind == "cut":
            data.write_bytes(data.read_bytes()[:-1])
        elif kind == "unlisted":
            (path / durable.MANIFEST).unlink()
        else:
            shutil.rmtree(path)
        # What was neither sealed nor on record, or is neither any more, nobody can know of.
        self.known[step] = False if listed or kind in ("bit", "cut") else None

    def record(self, kind: str) -> None:
        path = self.store.ledger.path
        if not path.exists():
            return
        content = path.read_bytes()
        if kind == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-3] if kind == "cut" else content.replace(b"d", b"e", 1))

    def restart(self) -> None:
        """A new process: what it restores is what the model says, and what it sets aside is what was damaged."""
        self.store = CheckpointStore(self.folder, self.folder.parent / ".trash", keep=100)
        self.store.sweep()
        intact = [step for step, good in self.known.items() if good]
        try:
            found, damaged = self.store.newest_intact()
        except UserError:
            assert not intact and any(good is not True for good in self.known.values())
            self.known = {}
            shutil.rmtree(self.folder)
            self.store.sweep()
            return
        assert found == max(intact, default=None), (found, self.known)
        for damage in damaged:
            assert damage.step is None or self.known.get(damage.step) is not True, damage
            assert damage.moved_to is None or damage.moved_to.exists()
        self.known = {step: good for step, good in self.known.items() if step <= (found or 0)}


@settings(max_examples=100, deadline=None)
@given(history=st.lists(EVENTS, min_size=5, max_size=25))
def test_what_comes_back_was_committed_and_is_the_newest_such(history):
    with tempfile.TemporaryDirectory() as folder:
        run = History(Path(folder))
        for name, *arguments in history:
            getattr(run, name)(*arguments)
        run.restart()
        run.restart()
