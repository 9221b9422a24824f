"""What `aurora checkpoints` and `aurora verify` say of a run's folder."""

import jax.numpy as jnp
import pytest

from aurora_train.checkpoint import audit, durable
from aurora_train.checkpoint.retention import reasons
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.tools import checkpoints

POLICY = {"keep": 2, "keep_every": 20, "best": 1}


@pytest.fixture
def saved(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", tmp_path / ".trash", **POLICY)
    store.sweep()
    for step in (10, 20, 30, 40):
        store.save(step, {"params": {"w": jnp.arange(500.0) + step}}, {"data_step": step})
        store.wait()
        store.attach_score(step, step / 10)
    store.close()
    return tmp_path / "checkpoints"


def states(saved):
    return {row["step"]: row["state"] for row in checkpoints.listing(saved, **POLICY)}


def test_each_checkpoint_is_listed_with_its_size_score_and_why_it_is_kept(saved):
    rows = checkpoints.listing(saved, **POLICY)
    assert [row["step"] for row in rows] == [10, 20, 30, 40] and {row["state"] for row in rows} == {"whole"}
    assert [row["kept"] for row in rows] == ["best", "every 20", "rolling", "newest, every 20"]
    assert [row["score"] for row in rows] == [1.0, 2.0, 3.0, 4.0]
    for row in rows:
        folder = saved / str(row["step"])
        assert row["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) > 2000


def test_what_is_missing_shorter_unfinished_or_set_aside_is_said(saved):
    (saved / "20" / durable.MANIFEST).unlink()
    data = max((saved / "30").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data.write_bytes(data.read_bytes()[:-1])
    (saved / "10").rename(saved / "damaged-10")
    (saved / "50.orbax-checkpoint-tmp-1").mkdir()
    rows = checkpoints.listing(saved, **POLICY)
    said = [(row["step"], row["state"].split(":")[0]) for row in rows]
    assert (20, "unfinished") not in said, "it was committed"
    assert (10, "set aside") in said and (10, "the folder is missing") in said and (50, "unfinished") in said
    assert any(step == 30 and "bytes, expected" in states(saved)[30] for step, _ in said)


def test_verify_reads_every_byte_and_tells_how_far_it_is(saved):
    told = []
    rows = checkpoints.verify(saved, [10, 20, 30, 40], lambda done, in_all: told.append((done, in_all)))
    assert not any(row["faults"] for row in rows)
    assert told[-1][0] == told[-1][1] == sum(row["bytes"] for row in rows)
    data = max((saved / "30").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    assert states(saved)[30] == "whole", "its size is what it was"
    assert [row["step"] for row in checkpoints.verify(saved, [20, 30]) if row["faults"]] == [30]
    assert audit.newest_fault(saved) is None and audit.newest_fault(saved / "none") == "no checkpoint is left"
    (saved / "index.json").unlink()
    assert checkpoints.verify(saved, [20])[-1]["faults"] == ["index.json: missing"]


def test_nothing_saved_is_an_empty_list(tmp_path):
    assert checkpoints.listing(tmp_path / "none", **POLICY) == [] and audit.committed(tmp_path / "none") == []


def test_reasons_are_given_for_what_is_kept_alone():
    assert reasons([1, 2, 3], {1: 5.0, 2: float("nan")}, keep=1, keep_every=None, best=1, lower_is_better=True) == {
        1: "best", 3: "newest",
    }  # fmt: skip
