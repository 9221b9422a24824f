"""The logs keep every bit, survive a kill at any instant, and give up only what a crash tore."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_train.errors import UserError
from aurora_train.record.metrics import EventLog, MetricsLog, decode, encode, read, scalars, set_aside


def fill(path, steps):
    with MetricsLog(path) as log:
        for step in steps:
            log.write({"step": step, "loss": 1 / step})


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_float_comes_back_with_the_same_bits(value):
    line = encode({"step": 1, "loss": value})
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = decode(line)["loss"]
    assert (math.isnan(value) and math.isnan(back)) or np.float64(value).tobytes() == np.float64(back).tobytes()


@settings(max_examples=100, deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_a_float32_of_the_device_comes_back_with_the_same_bits(value):
    number = np.float32(value)
    assert np.float32(decode(encode({"loss": number}))["loss"]).tobytes() == number.tobytes()


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "'NaN", "''-Infinity", "nan", "'", "NaN "])
def test_text_that_looks_like_a_number_stays_text(text):
    record = {"text": text, "list": [text, math.inf]}
    assert decode(encode(record)) == record


def test_text_with_newlines_and_lone_surrogates_stays_one_line():
    record = {"event": "note", "text": "a\nb\u2028c\ud800"}
    assert encode(record).count(b"\n") == 1
    assert decode(encode(record)) == record


def test_a_torn_last_line_is_left_out_and_the_next_record_is_not_glued_to_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, [1, 2])
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [record["step"] for record in read(path)] == [1, 2]
    fill(path, [3])
    assert [record["step"] for record in read(path)] == [1, 2, 3]


def test_a_last_line_whose_beginning_never_reached_the_disk_is_dropped_before_the_next_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, [1, 2, 3])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + bytes(7) + lines[2][7:])
    assert [record["step"] for record in read(path)] == [1, 2]
    fill(path, [3, 4])
    assert [record["step"] for record in read(path)] == [1, 2, 3, 4]


def test_a_log_cut_at_any_byte_reads_as_its_whole_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, [1, 2, 3])
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        assert [record["step"] for record in read(path)] == list(range(1, content[:length].count(b"\n") + 1))


def test_damage_inside_the_log_is_named_by_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\ngarbage\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl:2"):
        read(path)
    with pytest.raises(UserError, match="metrics.jsonl:2"):
        set_aside(path, 2, tmp_path / "aside.jsonl")


def test_a_missing_log_has_no_records(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []
    assert set_aside(tmp_path / "metrics.jsonl", 0, tmp_path / "aside.jsonl") == 0


def test_later_records_are_set_aside_and_nothing_is_lost(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside.jsonl"
    fill(path, range(1, 11))
    before = path.read_bytes()
    assert set_aside(path, 6, aside) == 4
    assert path.read_bytes() + aside.read_bytes() == before
    assert set_aside(path, 6, aside) == 0
    fill(path, [7, 8])
    assert set_aside(path, 7, aside) == 1
    assert [record["step"] for record in read(aside)] == [7, 8, 9, 10, 8]


def test_unreadable_blocks_that_a_power_failure_leaves_at_the_end_are_set_aside(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside.jsonl"
    fill(path, [1, 2, 3])
    with open(path, "ab") as file:
        file.write(b"\0" * 64 + b'\n{"step": 4}\n\0\0')
    assert set_aside(path, 2, aside) == 3
    assert [record["step"] for record in read(path)] == [1, 2]


def test_setting_aside_again_after_a_kill_between_the_two_files_adds_nothing_twice(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside.jsonl"
    fill(path, range(1, 6))
    whole = path.read_bytes()
    set_aside(path, 3, aside)
    moved = aside.read_bytes()
    path.write_bytes(whole)  # as the disk is when the kill came before the log was replaced
    set_aside(path, 3, aside)
    assert aside.read_bytes() == moved


KILLED_AT_CALL = """
    import os, signal, sys
    from aurora_train.record.metrics import set_aside

    def ended(left):  # the status of a child that is killed at so many file operations
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        def count(event, arguments):
            nonlocal left
            if event in ("open", "os.rename", "os.mkdir"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        set_aside(sys.argv[1], 3, sys.argv[2])
        os._exit(0)

    for line in sys.stdin:
        print(ended(int(line)), flush=True)
"""


def test_set_aside_killed_at_each_file_operation_leaves_the_old_log_or_the_new_one(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside.jsonl"
    fill(path, range(1, 6))
    whole = path.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:3])
    code, kills = textwrap.dedent(KILLED_AT_CALL), 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", code, str(path), str(aside)], **pipes)
    for call in range(1, 40):
        path.write_bytes(whole)
        aside.unlink(missing_ok=True)
        print(call, file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        assert path.read_bytes() in (whole, kept)
        set_aside(path, 3, aside)
        assert path.read_bytes() + aside.read_bytes() == whole
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    server.communicate(timeout=60)
    assert kills >= 4


def test_records_written_before_kill_9_are_all_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = f"""
    import os, signal
    from aurora_train.record.metrics import MetricsLog
    log = MetricsLog({str(path)!r})
    for step in range(1, 101):
        log.write({{"step": step}})
    os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert [record["step"] for record in read(path)] == list(range(1, 101))


def test_on_a_full_disk_records_wait_and_a_sync_says_so():
    log = MetricsLog("/dev/full")
    log.write({"step": 1})
    with pytest.raises(UserError, match="No space left"):
        log.sync()
    assert EventLog("/dev/full").event("save_failed", 1)["step"] == 1


def test_records_that_waited_for_room_are_written_once_and_in_order(tmp_path, monkeypatch):
    room, real = [0], os.write

    def short_of_room(descriptor, content):
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, bytes(content)[: room[0]])
        room[0] -= written
        return written

    with MetricsLog(tmp_path / "m.jsonl") as log:
        monkeypatch.setattr(os, "write", short_of_room)
        for step, free in ((1, 7), (2, 0), (3, 20), (4, 10**6)):
            room[0] = free
            log.write({"step": step})
        log.sync()
    monkeypatch.undo()
    assert [record["step"] for record in read(tmp_path / "m.jsonl")] == [1, 2, 3, 4]


def test_events_carry_their_time_and_sinks_get_every_record(tmp_path):
    seen = []

    class Memory:
        def write(self, record):
            seen.append(record)

        def close(self):
            seen.append("closed")

    with EventLog(tmp_path / "events.jsonl", [Memory()]) as log:
        log.event("save", 100, path="x")
    record = read(tmp_path / "events.jsonl")[0]
    assert record["event"] == "save" and record["step"] == 100 and record["time"].endswith("+00:00")
    assert seen == [record, "closed"]


def test_scalars_are_named_by_their_path():
    assert scalars({"step": 3, "loss": 1.5, "evaluation": {"loss": 2}, "note": "x", "flag": True}) == {
        "loss": 1.5, "evaluation/loss": 2,
    }  # fmt: skip


def test_a_log_that_cannot_be_made_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/metrics.jsonl"):
        MetricsLog(os.path.join(tmp_path, "file", "metrics.jsonl"))
