"""The checkpoints of a run: durable, verified, walked back from, and kept by our rules."""

import json
import random
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from aurora_train import mesh as meshes
from aurora_train.checkpoint import durable, layout, writer
from aurora_train.checkpoint.reading import Deleted, opened, reading, refuse_damage, require_step
from aurora_train.checkpoint.store import CheckpointStore, Damage, SaveFailed
from aurora_train.errors import UserError


def tree(step):
    return {"step": jnp.int32(step), "params": {"w": jnp.full((16, 16), float(step)), "b": jnp.arange(5.0) + step}}


def shardings():
    return jax.tree.map(lambda _: meshes.replicated(meshes.make_mesh(1, 1)), tree(0))


def open_store(folder, **policy):
    return CheckpointStore(folder / "checkpoints", folder / ".trash", **policy)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    """Three checkpoints: 10, 20, 30."""
    folder = tmp_path_factory.mktemp("saved")
    store = open_store(folder)
    store.sweep()
    for step in (10, 20, 30):
        store.save(step, tree(step), {"data_step": step + 1})
    store.close()
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    shutil.copytree(saved_once, tmp_path / "run")
    return tmp_path / "run"


def restored(folder, step):
    store = open_store(folder)
    back = store.restore(step, jax.eval_shape(lambda: tree(0)), shardings())
    store.close()
    return back


def assert_is(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, tree(step))


def test_what_was_saved_comes_back(saved_once):
    store = open_store(saved_once)
    assert store.steps() == [10, 20, 30] and store.record(20) == {"format": 1, "step": 20, "data_step": 21}
    assert store.newest_intact() == (30, [])
    for step in (10, 30):
        assert_is(restored(saved_once, step), step)


def wide(step):
    """A state with a stack, a frozen part, a leaf of the host, and one that lies on every device there is."""
    units = {"kernel": jnp.full((3, 8, 4), step + 0.5, jnp.bfloat16), "scale": jnp.arange(3.0)}
    spread = jax.NamedSharding(jax.make_mesh((jax.device_count(),), ("fsdp",)), jax.P("fsdp"))
    params = {"stack": {"segments": {0: units}}, "table": jax.device_put(jnp.arange(32.0).reshape(8, 4) + step, spread)}
    frozen = {"base": jnp.arange(7, dtype=jnp.uint8)}
    return {"step": jnp.int32(step), "params": params, "frozen": frozen, "host": np.ones(3)}


def test_a_save_in_place_writes_the_same_checkpoint_as_one_that_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PIECE_BYTES", 100)  # several pieces, and leaves that are larger than one
    monkeypatch.setattr(layout, "snapshot", lambda *_: pytest.fail("a copy of the state was made"))
    inside = open_store(tmp_path / "in place")
    inside.sweep()
    inside.save(5, wide(5), {"data_step": 6}, copy=False)
    inside.close()
    monkeypatch.undo()
    copied = open_store(tmp_path / "copied")
    copied.sweep()
    copied.save(5, wide(5), {"data_step": 6})
    copied.close()
    folders = [tmp_path / name / "checkpoints" for name in ("in place", "copied")]
    for part in ("5", "frozen"):
        assert [durable.faults(folder / part) for folder in folders] == [[], []]
        mine, theirs = ((folder / part / "state" / "_METADATA").read_bytes() for folder in folders)
        assert mine == theirs
        mine, theirs = (json.loads((folder / part / "_CHECKPOINT_METADATA").read_bytes()) for folder in folders)
        assert mine["item_handlers"] == theirs["item_handlers"]
        mine, theirs = (ocp.load(folder / part, checkpointable_name="state") for folder in folders)  # by Orbax alone
        assert mine.keys() == theirs.keys() and len(mine) == (9 if part == "5" else 1)
        for name, array in mine.items():
            assert (array.dtype, array.tobytes()) == (theirs[name].dtype, theirs[name].tobytes()), name


def test_a_save_waits_for_the_one_before_and_none_is_skipped(tmp_path):
    store = open_store(tmp_path)
    store.sweep()
    for step in range(1, 6):
        store.save(step, tree(step), {})
        assert store.steps() == list(range(1, step)) or store.steps() == list(range(1, step + 1))
    assert store.wait() == 5 and store.wait() is None and store.finished() is None
    assert store.steps() == [1, 2, 3, 4, 5]
    assert all(durable.faults(store.folder / str(step)) == [] for step in store.steps())
    store.close()
    assert not any(thread.name.startswith("seal") for thread in threading.enumerate())


def damage(path, draw):
    """One accident to one file; says which."""
    content = path.read_bytes()
    kind = draw.choice(["bit", "cut", "emptied", "missing"] if content else ["missing"])
    if kind == "bit":
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()
    return kind


def test_forty_random_accidents_in_any_file_are_each_seen_and_walked_back_from(saved_once, tmp_path):
    draw, kinds, names = random.Random(20261122), set(), set()
    files = sorted(p.relative_to(saved_once) for p in (saved_once / "checkpoints" / "30").rglob("*") if p.is_file())
    for number in range(40):
        run = tmp_path / str(number)
        shutil.copytree(saved_once, run)
        target = files[number % len(files)]
        before = (run / target).read_bytes()
        kind = damage(run / target, draw)
        store = open_store(run)
        store.sweep()
        step, damaged = store.newest_intact()
        assert step == 20, f"{kind} of {target} passed for intact"
        assert [one.step for one in damaged] == [30] and target.name in damaged[0].faults[0]
        assert damaged[0].moved_to.is_dir() and not (run / "checkpoints" / "30").exists()
        assert before is not None
        kinds.add(kind)
        names.add(target.name)
    assert kinds == {"bit", "cut", "emptied", "missing"} and len(names) > 3
    assert_is(restored(run, 20), 20)


def break_one(folder, step):
    path = next(p for p in sorted((folder / "checkpoints" / str(step)).rglob("*")) if p.is_file() and p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")


def test_a_damaged_checkpoint_that_was_set_aside_is_still_there_after_the_next_start(saved):
    break_one(saved, 30)
    break_one(saved, 20)
    step, damaged = open_store(saved).newest_intact()
    assert step == 10 and [one.step for one in damaged] == [30, 20]
    store = open_store(saved)
    store.sweep()
    assert all(one.moved_to.is_dir() for one in damaged) and store.steps() == [10]


def test_a_second_damaged_checkpoint_of_a_step_is_set_aside_beside_the_first(saved, saved_once):
    for _ in range(2):
        shutil.copytree(saved_once / "checkpoints" / "30", saved / "checkpoints" / "30", dirs_exist_ok=True)
        break_one(saved, 30)
        assert open_store(saved).newest_intact()[0] == 20
    assert sorted(p.name for p in (saved / "checkpoints").glob("damaged-*")) == ["damaged-30", "damaged-30-2"]


def test_where_no_checkpoint_is_intact_nothing_moves_and_each_is_named(saved):
    for step in (10, 20, 30):
        break_one(saved, step)
    before = sorted(p.relative_to(saved) for p in saved.rglob("*"))
    with pytest.raises(UserError) as caught:
        open_store(saved).newest_intact()
    assert all(f"{step}: " in str(caught.value) for step in (10, 20, 30)) and "--fresh" in str(caught.value)
    assert sorted(p.relative_to(saved) for p in saved.rglob("*")) == before


def test_readers_refuse_damage_and_name_the_other_steps(saved):
    break_one(saved, 30)
    store = open_store(saved)
    with pytest.raises(UserError, match="step 30 is damaged") as caught:
        refuse_damage(store, 30)
    assert "10, 20" in str(caught.value)
    refuse_damage(store, 20)
    assert store.steps() == [10, 20, 30]


def test_a_step_that_is_not_there_is_said_with_those_that_are(saved, tmp_path):
    assert require_step(open_store(saved), None, "x") == 30
    with pytest.raises(UserError, match="no checkpoint of step 11") as caught:
        require_step(open_store(saved), 11, "x")
    assert "10, 20, 30" in str(caught.value)
    with pytest.raises(UserError, match="no checkpoint yet"):
        require_step(open_store(tmp_path / "none"), None, "x")


def test_a_state_of_other_shapes_is_refused_before_anything_is_read(saved):
    store = open_store(saved)
    other = {"step": jnp.int32(0), "params": {"w": jnp.zeros((16, 8)), "c": jnp.zeros(5)}}
    with pytest.raises(UserError) as caught:
        store.restore(30, jax.eval_shape(lambda: other), jax.tree.map(lambda _: shardings()["step"], other))
    said = str(caught.value)
    assert "params.w: float32[16, 16] stored, float32[16, 8] wanted" in said
    assert "params.c: not in the checkpoint" in said and "params.b: in the checkpoint" in said
    store.close()


def test_what_a_crash_left_is_swept_and_sealed_steps_stay(saved):
    folder = saved / "checkpoints"
    (folder / "40").mkdir()
    (folder / "40" / "half").write_text("x")
    (folder / "50.orbax-checkpoint-tmp").mkdir()
    (saved / ".trash" / "5").mkdir(parents=True)
    open_store(saved).sweep()
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["10", "20", "30"]
    assert not (saved / ".trash").exists()


def test_a_checkpoint_that_vanished_is_missed(saved):
    shutil.rmtree(saved / "checkpoints" / "30")
    store = open_store(saved)
    store.sweep()
    assert store.newest_intact() == (20, [Damage(30, ["the folder is missing"], None)])
    assert open_store(saved).newest_intact() == (20, []), "it is said once"


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe", None])
def test_a_damaged_record_is_set_aside_and_nothing_is_thrown_away_for_it(saved, content):
    ledger = saved / "checkpoints" / "index.json"
    if content is None:
        content = ledger.read_bytes().replace(b"20", b"21")
    ledger.write_bytes(content)
    (saved / "checkpoints" / "30" / durable.MANIFEST).unlink()
    store = open_store(saved)
    store.sweep()
    step, damaged = store.newest_intact()
    assert step == 20 and [one.step for one in damaged] == [None, 30]
    assert all(one.moved_to.exists() for one in damaged) and damaged[0].moved_to.read_bytes() == content
    assert open_store(saved).newest_intact() == (20, []) and store.ledger.read().committed == {10, 20}


def test_every_step_is_on_record_until_it_is_given_up(tmp_path):
    store = open_store(tmp_path, keep=2)
    store.sweep()
    for step in (1, 2, 3):
        store.save(step, tree(step), {})
        store.wait()
        store.attach_score(step, -float(step), lower_is_better=False)
        store.retain()
    assert store.ledger.read().committed == {1, 2, 3} == set(store.steps())
    store.best = 0
    assert store.retain() == [1]
    assert store.ledger.read() == (frozenset({2, 3}), {1: -1.0, 2: -2.0, 3: -3.0}, None, False)
    store.close()


def test_where_a_full_disk_has_no_room_to_strike_a_step_out_removing_it_makes_some(saved):
    store = open_store(saved, keep=1, best=0)
    strike, refused = store.ledger.strike, []

    def short_of_room(steps):
        if (saved / "checkpoints" / "10").exists():
            refused.append(steps)
            raise UserError("cannot write: No space left on device")
        strike(steps)

    store.ledger.strike = short_of_room
    assert store.retain() == [10, 20] and refused == [[10, 20]]
    assert store.steps() == [30] and store.ledger.read().committed == {30}


# ---- retention, against a model of it

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.none()),
        st.tuples(st.just("score"), st.floats(allow_nan=True, allow_infinity=True)),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS, keep=st.integers(1, 3), keep_every=st.none() | st.integers(1, 4), best=st.integers(0, 2),
       lower=st.booleans())
def test_retention_keeps_the_newest_the_round_and_the_best_and_nothing_else(
    tmp_path_factory, operations, keep, keep_every, best, lower
):
    folder = tmp_path_factory.mktemp("retention")
    store = open_store(folder, keep=keep, keep_every=keep_every, best=best)
    present, scores, step = [], {}, 0
    for name, score in operations:
        if name == "save":
            step += 1
            (store.folder / str(step)).mkdir(parents=True)
            durable.seal(store.folder / str(step), {"step": step})
            present.append(step)
        elif step:
            store.attach_score(step, score, lower_is_better=lower)
            scores[step] = score
        else:
            continue
        ranked = sorted(
            (s for s in present if np.isfinite(scores.get(s, np.nan))),
            key=lambda s: scores[s] if lower else -scores[s],
        )
        kept = {*present[-keep:], *ranked[:best], *(s for s in present if keep_every and s % keep_every == 0)}
        assert store.retain() == [s for s in present if s not in kept]
        present = [s for s in present if s in kept]
        assert store.steps() == present
    assert not any((folder / ".trash").glob("*"))


def test_a_save_that_failed_in_the_background_is_told_once(tmp_path):
    """Orbax keeps the error and raises it when it is closed, too."""
    store = open_store(tmp_path)
    store.sweep()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes of one file
    try:
        store.save(10, tree(10) | {"more": jnp.arange(4096.0)}, {"data_step": 11})
        with pytest.raises(SaveFailed, match="File too large"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.close()
    assert store.steps() == []


def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_the_next(saved):
    """As a trainer does it: the next one is sealed, and then this one is moved away."""
    store, trainer, read = open_store(saved), open_store(saved), []

    def read_it(step):
        read.append(step)
        shapes = store.shapes(step)  # Orbax lists the steps now
        if step == 30:
            trainer.save(40, tree(40), {})
            trainer.wait()
            shutil.rmtree(saved / "checkpoints" / "30")
        return store.restore_some(step, {"step": shapes["step"]})["step"]

    assert opened(store, None, "the run", read_it) == (40, 40) and read == [30, 40]
    with pytest.raises(Deleted, match="the checkpoint of step 20 was deleted while it was read"):
        opened(store, 20, "the run", lambda step: shutil.rmtree(saved / "checkpoints" / "20") or store.shapes(step))
    with pytest.raises(ZeroDivisionError), reading(store, 40):  # which has nothing to do with it
        1 / 0  # noqa: B018
    trainer.close()
    store.close()
