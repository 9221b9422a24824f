"""No damage to a checkpoint goes unseen, whatever file it hits: the run walks back to the step before, or says why not.

    pytest -m release tests/faults/test_damage.py      # 300 accidents; the default tier has 30
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter

import pytest
from kit import TINY, Aurora, events, final_hash

from aurora_train.checkpoint import durable
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.errors import UserError

SEED = 20261125
KINDS = ("bit", "cut", "zeros", "emptied", "missing", "longer")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, shared_cache):
    """A finished run of the tiny language model with four checkpoints, and its command line."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.yaml"
    config.write_text(TINY.format(corpus=corpus).replace("{every: 10}", "{every: 10, keep: 4}"))
    aurora = Aurora(folder, shared_cache)
    aurora.good("train", config, "--run", folder / "run")
    return aurora, folder / "run"


def damage(path, kind: str, draw: random.Random) -> bool:
    """One accident to one file; False where it would change nothing."""
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
        return True
    if kind == "longer":
        changed = content + bytes(draw.randrange(1, 100))
    elif kind == "bit" and content:
        at = draw.randrange(len(content))
        changed = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    elif kind == "zeros" and content:
        start = draw.randrange(len(content))
        stop = min(start + draw.randrange(1, 5000), len(content))
        changed = content[:start] + bytes(stop - start) + content[stop:]
    else:
        changed = b"" if kind == "emptied" else content[: draw.randrange(len(content) + 1)]
    path.write_bytes(changed)
    return changed != content


def accidents(run, tmp_path, number: int, seed: int) -> Counter:
    """That many accidents to the newest checkpoint, spread over every file of it and every kind. What they hit."""
    draw, hit = random.Random(seed), Counter()
    newest = run / "checkpoints" / "40"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    chosen = [(files[i % len(files)], KINDS[(i // len(files) + i) % len(KINDS)]) for i in range(number)]
    for file, kind in chosen:
        shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
        copy = tmp_path / "checkpoints" / "40" / file
        while not damage(copy, kind, draw):
            kind = draw.choice(KINDS)
        store = CheckpointStore(tmp_path / "checkpoints", tmp_path / ".trash")
        store.sweep()
        step, found = store.newest_intact()
        assert step == 30, f"{kind} of {file}: the newest intact step is said to be {step}"
        assert [one.step for one in found] == [40] and file.as_posix() in found[0].faults[0], (file, kind, found)
        assert found[0].moved_to.is_dir(), "set aside, not deleted"
        hit[kind] += 1
        shutil.rmtree(tmp_path / "checkpoints")
    assert len(hit) == len(KINDS) or number < len(KINDS)
    return hit


def test_thirty_accidents_to_the_newest_checkpoint_are_seen_and_walked_back_from(trained, tmp_path):
    hit = accidents(trained[1], tmp_path, 30, SEED)
    print(f"seed {SEED}: {sum(hit.values())} accidents detected and walked back from: {dict(hit)}")


@pytest.mark.release
def test_three_hundred_accidents_are_seen_and_walked_back_from(trained, tmp_path):
    hit = accidents(trained[1], tmp_path, 300, SEED + 1)
    print(f"seed {SEED + 1}: {sum(hit.values())} accidents detected and walked back from: {dict(hit)}")


def test_where_no_checkpoint_is_left_the_run_is_refused_and_each_damaged_file_named(trained, tmp_path):
    draw = random.Random(SEED + 2)
    shutil.copytree(trained[1] / "checkpoints", tmp_path / "checkpoints")
    named = []
    for step in (10, 20, 30, 40):
        folder = tmp_path / "checkpoints" / str(step)
        file = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != durable.MANIFEST))
        assert damage(file, "bit" if file.stat().st_size else "longer", draw)
        named.append(file.relative_to(folder).as_posix())
    with pytest.raises(UserError) as caught:
        CheckpointStore(tmp_path / "checkpoints", tmp_path / ".trash").newest_intact()
    assert all(name in str(caught.value) for name in named)


def test_a_real_resume_walks_back_says_what_it_lost_and_ends_in_the_same_bits(trained, tmp_path):
    aurora, run = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for step in (40, 30):  # the newest two, so that there is something to train again
        data = max((copy / "checkpoints" / str(step)).rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
        data.write_bytes(data.read_bytes()[:-7])
    assert aurora("verify", copy).returncode == 3
    resumed = aurora.good("resume", copy)
    assert "checkpoint 40 is damaged" in resumed.stderr and "checkpoint 30 is damaged" in resumed.stderr
    assert "going back to step 20" in resumed.stderr
    assert [event["step"] for event in events(copy, "walk_back")] == [40, 30]
    assert final_hash(copy) == final_hash(run)
    assert {p.name for p in (copy / "checkpoints").glob("damaged-*")} == {"damaged-30", "damaged-40"}
    assert aurora("verify", copy).returncode == 0
    listed = json.loads(aurora.good("checkpoints", copy, "--json").stdout)["checkpoints"]
    assert [row["step"] for row in listed if row["state"] == "whole"] == [10, 20, 30, 40]
    assert [row["step"] for row in listed if row["state"] == "set aside"] == [30, 40]


def test_a_run_whose_checkpoints_are_all_gone_is_refused_and_not_begun_again(trained, tmp_path):
    aurora, run = trained
    for finished in (True, False):
        copy = tmp_path / f"run-{finished}"
        shutil.copytree(run, copy)
        shutil.rmtree(copy / "checkpoints")
        if not finished:
            kept = [line for line in (copy / "events.jsonl").read_text().splitlines() if '"finish"' not in line]
            (copy / "events.jsonl").write_text("\n".join(kept) + "\n")
        before = (copy / "metrics.jsonl").read_bytes()
        done = aurora("resume", copy)
        assert done.returncode == 2 and "every checkpoint of this run is gone" in done.stderr, done.stderr[-2000:]
        assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_flipped_bit_in_a_finished_run_is_found_by_the_same_command(trained, tmp_path):
    aurora, run = trained
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    data = max((copy / "checkpoints" / "40").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    assert damage(data, "bit", random.Random(SEED + 3))
    resumed = aurora.good("resume", copy)
    assert "finished, but its newest checkpoint is damaged" in resumed.stderr
    assert final_hash(copy) == final_hash(run)
