"""The chain of a run by itself: kills, torn records, an edited log, two writers. Nothing is trained."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools.folders import make

from aurora_train.lineage import chain
from aurora_train.lineage.following import ChainedEvents, Follower, catch_up
from aurora_train.lineage.publish import of_config, without_folders
from aurora_train.lineage.verify import verify
from aurora_train.run import Run

WRITER = """
import sys
from aurora_train.lineage.following import ChainedEvents
from aurora_train.run import Run
with ChainedEvents(Run(sys.argv[1])) as events:
    print("begun", flush=True)
    for number in range(10**9):
        events.event("skip", number, loss=0.5, grad_norm=1.0)
"""


@pytest.fixture
def run(tmp_path) -> Run:
    make(tmp_path / "run", done=3, steps=3)
    return Run(tmp_path / "run")


def test_a_chain_has_the_record_of_each_event_and_file(run):
    catch_up(run)
    held = chain.lines(run.lineage)
    records = chain.read(run.lineage)
    assert [record["n"] for record in records] == list(range(len(records))) and records[0]["kind"] == "begin"
    assert [record["prev"] for record in records[1:]] == [chain.digest(line) for line in held[:-1]]
    events = [record for record in records if "event" in record]
    assert [record["event"] for record in events] == [chain.digest(line) for line in chain.lines(run.events)]
    assert {"config.yaml", "metrics.jsonl", "provenance.json"} <= records[-1]["files"].keys()
    before = run.lineage.read_bytes()
    catch_up(run)
    assert run.lineage.read_bytes() == before, "nothing happened, and nothing is added"


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_record_leaves_a_chain_that_goes_on(run):
    """Ten processes that write records as fast as they can are killed at an instant of the kernel's choice."""
    draw, environment = random.Random(0), {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(run.folder)], stdout=subprocess.PIPE,
                              env=environment) as process:  # fmt: skip
            assert process.stdout.readline() == b"begun\n"
            time.sleep(draw.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
    catch_up(run)
    events = [record["event"] for record in chain.read(run.lineage) if "event" in record]
    assert len(events) > 10 and events == [chain.digest(line) for line in chain.lines(run.events)]
    assert chain.faults(chain.lines(run.lineage)) == []


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_record_is_named_and_the_next_writer_goes_on_after_the_last_whole_one(run, cut):
    catch_up(run)
    whole = run.lineage.read_bytes()
    os.truncate(run.lineage, len(whole) - cut)
    assert any("ends with" in line and "no record" in line for line in verify(run.folder).faults)
    catch_up(run)
    assert chain.faults(chain.lines(run.lineage)) == []
    assert chain.read(run.lineage)[-1]["files"].keys() >= {"metrics.jsonl"}
    assert not any(chain.NAME in line for line in verify(run.folder).faults)


@pytest.mark.parametrize("torn", [bytes(40), bytes(40) + b'"prev": ""}\n', b"{}\n"[:1] + b"\n"])
def test_what_a_power_cut_leaves_at_the_end_is_removed_by_the_next_writer(run, torn):
    catch_up(run)
    whole = run.lineage.read_bytes()
    run.lineage.write_bytes(whole + torn)
    with ChainedEvents(run) as events:
        events.event("resume", 3)
    assert run.lineage.read_bytes().startswith(whole) and chain.faults(chain.lines(run.lineage)) == []
    assert chain.read(run.lineage)[-1]["kind"] == "resume"


def test_a_log_that_was_edited_between_two_processes_is_a_fault_for_ever_and_stops_no_run(run):
    catch_up(run)
    lines = run.events.read_bytes().splitlines(keepends=True)
    run.events.write_bytes(b"".join([lines[0].replace(b'"start"', b'"begin"'), *lines[1:]]))
    with ChainedEvents(run) as events:
        events.event("resume", 3)
    assert [record["kind"] for record in chain.read(run.lineage)][-2:] == ["departed", "resume"]
    assert any("was not what the chain had when the run went on" in line for line in verify(run.folder).faults)


def test_two_processes_write_one_chain(run):
    """A score and a training may happen at once: each reads what the other wrote."""
    one, other = Follower(run), ChainedEvents(run)
    for step in range(5):
        other.event("skip", step, loss=1.0, grad_norm=1.0)
        chain.add(run.lineage, [{"kind": "gate", "gate": "secrets", "passed": True, "says": [], "basis": {}}])
        one.go_on()
    other.close()
    assert chain.faults(chain.lines(run.lineage)) == []
    assert sum(record["kind"] == "skip" for record in chain.read(run.lineage)) == 5


def test_a_disk_that_takes_no_record_stops_nothing_and_the_chain_catches_up(run, monkeypatch):
    catch_up(run)

    def full(*_):
        raise OSError(28, "No space left on device")

    with ChainedEvents(run) as events:
        with monkeypatch.context() as patch:
            patch.setattr(chain, "locked", full)
            events.event("skip", 1, loss=1.0, grad_norm=1.0)
        events.event("skip", 2, loss=1.0, grad_norm=1.0)
    assert [one["step"] for one in chain.read(run.lineage) if one["kind"] == "skip"] == [1, 2]


def test_a_chain_names_no_folder_of_the_machine():
    assert without_folders("/home/me/data/rows.parquet") == "rows.parquet"
    assert without_folders("a (/home/me/x) + b (/srv/y z)") == "a (x) + b (y z)"
    assert without_folders(["language/tune", "hub:lab/tiny", "https://a.b/c", "4/5 of it"]) == [
        "language/tune", "hub:lab/tiny", "https://a.b/c", "4/5 of it"]  # fmt: skip
    shown = of_config({"energy": {"plug": "command: curl http://u:p@plug", "mode": "measure"}, "data": {"x": "/a/b"}})
    assert shown == {"energy": {"mode": "measure"}, "data": {"x": "b"}}


@pytest.mark.parametrize("edit", ["byte", "swap", "drop", "double", "garbage"])
def test_an_edited_chain_is_named_by_its_line(run, edit):
    catch_up(run)
    lines = chain.lines(run.lineage)
    changed = {
        "byte": [lines[0], lines[1].replace(b'"step": 0', b'"step": 1'), *lines[2:]],
        "swap": [lines[0], lines[2], lines[1], *lines[3:]], "drop": [lines[0], *lines[2:]],
        "double": [*lines[:2], *lines[1:]], "garbage": [lines[0], b"{}}\n", *lines[2:]],
    }[edit]  # fmt: skip
    assert changed != lines and chain.faults(lines) == []
    Path(run.lineage).write_bytes(b"".join(changed))
    found = chain.faults(changed)
    assert found and all(line.startswith("lineage.jsonl:") for line in found)
    assert {"byte": ":2: record 1", "swap": ":2: record 2", "drop": ":2: record 2", "double": ":3: record 1",
            "garbage": ":2 is no record"}[edit] in found[0], found  # fmt: skip
