"""A power cut at any moment takes no step that the run had called durable, and the run goes on to the same bits.

    pytest -m release -s tests/faults/test_power_cut.py    # 50 cuts and 10 resumes, all cuts, more failing syncs
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter

import disk_model
import powercut
import pytest
from disk_model import Disk, Image, replay
from killing import assert_same_run
from kit import TINY, Aurora, losses

from aurora_train.checkpoint import audit
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.errors import UserError
from aurora_train.record import metrics as logs

SEED = 20261125
# What the program was writing when the power went, and how often a cut is laid there.
KINDS = {"saving": 4, "giving up": 1, "metrics": 2, "events": 2, "other records": 2, "data and programs": 1}

WRITER = """
import os, sys
kept, lost = os.open("disk/kept", os.O_CREAT | os.O_WRONLY), os.open("disk/lost", os.O_CREAT | os.O_WRONLY)
os.write(kept, b"kept")
os.fsync(kept)
os.write(kept, b", and this is not")
os.write(lost, b"lost" * 1000)
root = os.open("disk", os.O_RDONLY)
os.fsync(root)
os.rename("disk/kept", "disk/renamed")
os.mkdir("disk/folder")
os.rename("disk/lost", "disk/folder/lost")
os.unlink("disk/renamed")
os.fsync(lost)
os.fsync(os.open("disk/folder", os.O_RDONLY))
"""


@pytest.fixture(scope="module")
def on_disk():
    """Skips where no such disk can be had."""
    if (why := powercut.why_not()) is not None:
        pytest.skip(why)


def drawn(disk: Disk, folder, number: int = 200) -> list[dict[str, bytes]]:
    """The files of that many images of one disk, each with its own draw."""
    images = [Image(disk, random.Random(seed)).make(folder / str(seed)) for seed in range(number)]
    return [{str(p.relative_to(i)): p.read_bytes() for p in i.rglob("*") if p.is_file()} for i in images]


def test_a_real_program_keeps_after_a_cut_what_it_synced_and_nothing_else(on_disk, tmp_path):
    log = powercut.on_such_a_disk([sys.executable, "-c", WRITER], tmp_path)
    names = [operation[0] for operation in log]
    assert names == ["create", "create", "write", "fsync", "write", "write", "fsyncdir", "rename", "mkdir", "rename",
                     "unlink", "fsync", "fsyncdir"]  # fmt: skip
    *_, (_, disk) = replay(log, [len(log)])
    image = Image(disk).make(tmp_path / "image")
    # `lost` lies in a folder whose own name was never synced; its old name is still durable, and so are its bytes.
    assert {p.name: p.read_bytes() for p in image.iterdir()} == {"kept": b"kept", "lost": b"lost" * 1000}


def test_of_what_was_not_synced_any_part_may_have_reached_the_disk(tmp_path):
    disk = Disk()
    for operation in (("create", 1, "log", 2), ("write", 2, 0, b"a" * 600), ("fsync", 2), ("fsyncdir", 1),
                      ("write", 2, 600, b"b" * 600), ("create", 1, "new", 3),
                      ("rename", 1, "log", 1, "moved")):  # fmt: skip
        disk.apply(operation)
    files = drawn(disk, tmp_path)
    assert {frozenset(found) for found in files} == {
        frozenset(names) for names in (("log",), ("moved",), ("log", "new"), ("moved", "new"))
    }  # a rename within a folder is whole: the file has one name, and is never gone
    contents = {found.get("log", found.get("moved")) for found in files}
    assert all(content[:600] == b"a" * 600 for content in contents), "what was synced is there"
    torn = {(len(content), content[600:1024].count(0) > 0, content[1024:].count(0) > 0) for content in contents}
    assert torn == {(600, False, False), (1200, False, False), (1200, True, False), (1200, False, True),
                    (1200, True, True)}  # fmt: skip


FAILING_SYNCS = [pytest.param("*/events.jsonl:3", marks=pytest.mark.slow)]
FAILING_SYNCS += [pytest.param(one, marks=pytest.mark.release)
                  for one in ("*/metrics.jsonl:2", "*/checkpoints/*:5", "*/checkpoints/*:40")]  # fmt: skip

# ---- the trainer on such a disk


CACHE = "disk/cache"  # in these words, which are part of the compiled programs' names


def command(config) -> tuple:
    return "train", config, "--run", "disk/run"


@pytest.fixture(scope="module")
def recorded(on_disk, tmp_path_factory, corpus):
    """(config, log, the run that nobody cut) of a run that wrote everything, its cache too, on such a disk."""
    folder = tmp_path_factory.mktemp("recorded")
    config = folder / "tiny.yaml"
    config.write_text(TINY.format(corpus=corpus))
    aurora = Aurora(folder, CACHE)
    log = powercut.on_such_a_disk(aurora.command(*command(config)), folder, aurora.environment())
    *_, (_, disk) = replay(log, [len(log)])
    return config, log, disk_model.now(disk, folder / "whole") / "run"


def kind_of(path: str) -> str:
    """What the program was doing when it changed this file."""
    if path.startswith("cache"):
        return "data and programs"
    parts = {"checkpoints": "saving", ".trash": "giving up", "metrics.jsonl": "metrics", "events.jsonl": "events"}
    return parts.get(path.removeprefix("run/").split("/")[0], "other records")


def spread(log, number: int, seed: int) -> dict[int, str]:
    """That many moments, each with what was being written: spread over the kinds of work by `KINDS`."""
    disk, places = Disk(), {}
    for cut, operation in enumerate(log, 1):
        disk.apply(operation)
        places.setdefault(kind_of(disk.path_of(operation)), []).append(cut)
    assert set(places) == set(KINDS), "every kind of work is in the log"
    draw, chosen = random.Random(seed), {}
    turns = [kind for kind, share in KINDS.items() for _ in range(share)]
    draw.shuffle(turns)
    while len(chosen) < number:
        kind = turns[len(chosen) % len(turns)]
        left = [cut for cut in places[kind] if cut not in chosen] or [c for c in range(len(log)) if c not in chosen]
        chosen[draw.choice(left)] = kind
    return dict(sorted(chosen.items()))


def claimed(disk: Disk) -> tuple[int, set[int]]:
    """(the newest step that the run had called saved, 0 for none; the steps that it had, and had not given up).

    As the world could know it: by the record of checkpoints and by the events, as they were written at that moment.
    """
    index = disk.read("run/checkpoints/index.json")
    there = set(json.loads(index)["committed"]) if index else set()
    events = [json.loads(line) for line in disk.read("run/events.jsonl").splitlines()]
    return max({0} | there | {event["step"] for event in events if event["event"] == "save"}), there


def what_is_lost(image, disk: Disk, undisturbed: list[tuple[int, float]]) -> str | None:
    """What a cut took that the run had called durable, or None. The image's folder of checkpoints is swept."""
    newest, there = claimed(disk)
    run = image / "run"
    for step in sorted(there):
        if faults := audit.step_faults(run / "checkpoints", step):
            return f"step {step} was called saved: {faults[0]}"
    store = CheckpointStore(run / "checkpoints", run / ".trash")
    store.sweep()
    try:
        step, damaged = store.newest_intact()
    except UserError as error:
        return f"refused: {error}"
    if damaged:
        return f"whole, and called damaged: {damaged[0]}"
    if (step or 0) < newest:
        return f"step {newest} was called saved, the newest intact one is {step}"
    if newest == 0 and not (run / "events.jsonl").exists():
        return None  # the run is begun again
    return what_is_wrong_with_logs(run, step or 0, undisturbed)


def what_is_wrong_with_logs(run, step: int, undisturbed: list[tuple[int, float]]) -> str | None:
    """What a resume from that step would find wrong with the logs, or None. It writes to them, as a resume does."""
    logs.set_aside(run / "metrics.jsonl", step, run / "aside.jsonl")
    found = losses(run) if step else []
    if found != undisturbed[:step]:
        return f"the log has not the {step} steps before the checkpoint"
    try:
        for log in (logs.EventLog(run / "events.jsonl"), logs.MetricsLog(run / "metrics.jsonl")):
            with log:
                log.write({"step": step + 1})
            assert logs.read(log.path)[-1] == {"step": step + 1}
    except UserError as error:
        return f"unreadable after one more record: {error}"
    return None


def image_of(disk: Disk, cut: int, variant: str, turn: int = 0) -> Image:
    """What a cut leaves: what was durable (strict), or some of the rest as well (adversarial), as drawn for it."""
    return Image(disk, random.Random(f"{SEED} {cut} {turn}") if variant == "adversarial" else None)


def cut_at(recorded, tmp_path, moments, variant: str, turns: int = 1) -> list[str]:
    """Cut the power at each moment, with `turns` draws of what is left; what was lost, one line each."""
    _, log, whole = recorded
    undisturbed, lost = losses(whole), []
    for cut, disk in replay(log, list(moments)):
        for turn in range(turns):
            image = image_of(disk, cut, variant, turn).make(tmp_path / "image")
            if found := what_is_lost(image, disk, undisturbed):
                lost.append(f"after operation {cut} of {len(log)}, {variant} {turn}: {found}")
            shutil.rmtree(image)
    return lost


def resume_at(recorded, tmp_path, moments, variant: str) -> None:
    """Cut, and give the disk to the same command: it ends as the run that nobody cut.

    What reached the disk of the prepared data and the compiled programs is used in the adversarial variant; in the
    strict one there is little, and they are lent from the whole run.
    """
    config, log, whole = recorded
    for cut, disk in replay(log, list(moments)):
        newest, _ = claimed(disk)
        folder = tmp_path / f"{variant}-{cut}"
        folder.mkdir()
        image_of(disk, cut, variant).make(folder / "disk")
        if variant == "strict":
            shutil.rmtree(folder / "disk" / "cache", ignore_errors=True)
            shutil.copytree(whole.parent / "cache", folder / "disk" / "cache")
        done = Aurora(folder, CACHE)(*command(config))
        assert done.returncode == 0, (cut, variant, done.stderr[-3000:])
        assert "damaged" not in done.stderr, (cut, variant, done.stderr[-3000:])
        assert_same_run(folder / "disk" / "run", whole)
        print(f"{variant}, cut after operation {cut} of {len(log)}, step {newest} called saved: the same bits")


def cut_and_resume(recorded, tmp_path, number: int, resumed: int, variant: str) -> None:
    moments = spread(recorded[1], number, SEED + number)
    lost = cut_at(recorded, tmp_path, moments, variant)
    print(f"{variant}: {len(moments)} cuts {dict(Counter(moments.values()))}, {len(lost)} lost something")
    assert not lost, "\n".join(lost)
    apart = number // resumed
    resume_at(recorded, tmp_path, list(moments)[apart // 2 :: apart], variant)


@pytest.mark.slow
def test_twelve_power_cuts_take_no_saved_step_and_the_run_goes_on_to_the_same_bits(recorded, tmp_path):
    cut_and_resume(recorded, tmp_path, 12, 2, "strict")
    assert cut_at(recorded, tmp_path, spread(recorded[1], 12, SEED), "adversarial") == []


@pytest.mark.slow
def test_a_record_that_a_cut_tore_is_not_in_the_way_of_the_next(recorded, tmp_path):
    logged = [cut for cut, operation in enumerate(recorded[1], 1) if operation[0] == "write"]
    moments = [cut for cut, disk in replay(recorded[1], logged)
               if disk.path_of(recorded[1][cut - 1]) == "run/events.jsonl"]  # fmt: skip
    assert len(moments) >= 6, "start, four saves, finish"
    assert cut_at(recorded, tmp_path, moments, "adversarial", turns=40) == []


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["fsync", "fsyncdir"])
def test_a_run_that_forgot_to_sync_files_or_folders_is_found_out(recorded, tmp_path, forgotten):
    config, log, whole = recorded
    unsynced = [operation for operation in log if operation[0] != forgotten]
    moments = list(range(len(unsynced) - 60, len(unsynced), 20))
    assert len(cut_at((config, unsynced, whole), tmp_path, moments, "strict")) == len(moments)


@pytest.mark.parametrize("failing", FAILING_SYNCS)
def test_a_sync_that_fails_once_and_then_succeeds_loses_nothing_to_a_later_cut(recorded, tmp_path, failing):
    """As Linux does it: after the failure the pages count as clean, and the next sync says yes without writing them."""
    config, _, whole = recorded
    aurora = Aurora(tmp_path, CACHE)
    log = powercut.on_such_a_disk(aurora.command(*command(config)), tmp_path, aurora.environment(), failing)
    (failed,) = (cut for cut, operation in enumerate(log) if operation[0] == "fsync_failed")
    assert cut_at((config, log, whole), tmp_path, range(failed, len(log) + 1, 3), "strict") == []
    *_, (_, disk) = replay(log, [len(log)])
    assert_same_run(disk_model.now(disk, tmp_path / "whole") / "run", whole)
    assert_same_run(Image(disk).make(tmp_path / "image") / "run", whole)


@pytest.mark.release
@pytest.mark.parametrize("variant", ["strict", "adversarial"])
def test_fifty_power_cuts_and_ten_resumes_change_no_bit(recorded, tmp_path, variant):
    cut_and_resume(recorded, tmp_path, 50, 10, variant)


@pytest.mark.release
@pytest.mark.parametrize(("variant", "turns"), [("strict", 1), ("adversarial", 2)])
def test_a_power_cut_after_any_operation_of_the_run_takes_no_saved_step(recorded, tmp_path, variant, turns):
    cuts = range(len(recorded[1]) + 1)
    lost = cut_at(recorded, tmp_path, cuts, variant, turns)
    print(f"{variant}: {len(cuts)} cuts, {turns * len(cuts)} disks, {len(lost)} lost something")
    assert not lost, "\n".join(lost)
