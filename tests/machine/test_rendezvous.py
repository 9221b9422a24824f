"""Processes that must not train together end before the first of them touches a device: with one message, the same in
each, within their time-out. Real sockets; a process is a thread here, or one of its own where it needs a network."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from kit import free_address

from aurora_train.errors import UserError
from aurora_train.machine import unlike
from aurora_train.machine.place import Place
from aurora_train.machine.rendezvous import meet

SECONDS = 1.5


def facts(**changes) -> dict:
    plain = {"versions": {"jax": "0.10.2", "python": "3.11.7"}, "code": {"recipe": "aa"}, "command": {"replan": False},
             "config": {"optimizer.lr": 0.01, "train.seed": 0}, "environment": {}, "clock": time.time()}  # fmt: skip
    return plain | changes


def all_meet(places, everyones_facts, seconds=SECONDS) -> list:
    """What each process got: what it knows after the meeting, or the text of its error."""
    results = [None] * len(places)

    def one(number):
        try:
            results[number] = meet(places[number], everyones_facts[number], seconds)
        except UserError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


def places(count: int = 2, address: str | None = None, job: str = "") -> list[Place]:
    address = address or free_address()
    return [Place(index, count, (address,), job) for index in range(count)]


def test_processes_that_agree_know_each_other_and_where_jax_shall_meet():
    met = all_meet(places(3), [facts()] * 3)
    assert len({one.coordinator for one in met}) == 1 and {one.address for one in met} == {"127.0.0.1"}
    assert [sorted(one.connections) for one in met] == [[1, 2], [0], [0]]
    met[2].connections[0].send({"kind": "pace"})
    assert met[0].connections[2].answer(5) == {"kind": "pace"}


UNLIKE = {
    "jax": (facts(versions={"jax": "0.11.0", "python": "3.11.7"}), "differ in their versions", "0.10.2 and 0.11.0"),
    "python": (facts(versions={"jax": "0.10.2", "python": "3.12.1"}), "differ in their versions", "3.11.7 and 3.12.1"),
    "a missing package": (facts(versions={"jax": "0.10.2"}), "differ in their versions", "3.11.7 and none"),
    "the recipe's code": (facts(code={"recipe": "bb"}), "differ in their code", "recipe: aa and bb"),
    "the config": (facts(config={"optimizer.lr": 0.02, "train.seed": 0}), "config", "optimizer.lr: 0.01 and 0.02"),
    "the command": (facts(command={"replan": True}), "differ in their command", "replan: False and True"),
    "XLA's flags": (facts(environment={"XLA_FLAGS": "--x"}), "environment variables", "XLA_FLAGS: none and --x"),
    "a clock ahead": (facts(clock=900.0), "s ahead of that of process 0", "they may differ by 30 s"),
    "a clock behind": (facts(clock=-900.0), "s behind that of process 0", "they may differ by 30 s"),
    "trouble of its own": (facts(trouble="data.source: no such file"), "cannot take part", "data.source: no such file"),
}


@pytest.mark.parametrize("mistake", UNLIKE)
def test_every_process_hears_what_one_of_them_has_otherwise(mistake, monkeypatch):
    theirs, what, why = UNLIKE[mistake]
    everyones = [facts(), facts(), theirs]
    if "clock" in mistake:
        monkeypatch.setattr("aurora_train.machine.rendezvous.time", Clock(theirs["clock"]))
        theirs = facts(clock=time.time() + theirs["clock"])
        everyones = [facts(), theirs, theirs]
    said = all_meet(places(3), everyones)
    assert said[0] == said[1] == said[2] and what in said[0] and why in said[0]
    assert "process " in said[0] and socket.gethostname().partition(".")[0] in said[0]


class Clock:
    """The module `time` where the clocks of all but process 0 are wrong: they are threads of one machine here."""

    def __init__(self, ahead: float):
        self.ahead, self.monotonic, self.sleep = ahead, time.monotonic, time.sleep

    def time(self) -> float:
        follows = sys._getframe(1).f_code.co_name == "_follow"
        return time.time() + (self.ahead if follows else 0)


def test_one_that_does_not_come_is_named():
    began = time.monotonic()
    (said,) = all_meet(places(3)[:1], [facts()])
    assert "processes 1, 2 of 3 did not come" in said and "waited 1.5 s" in said
    assert time.monotonic() - began < 2 * SECONDS


def test_where_nobody_listens_the_reason_is_given():
    said = all_meet(places(2)[1:], [facts()])
    assert "process 0 does not answer" in said[0] and "nothing listens there" in said[0]
    said = all_meet([Place(1, 2, ("no-such-machine.invalid:1234",))], [facts()])
    assert "this machine does not know that name" in said[0]


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (said,) = all_meet(places(2, f"127.0.0.1:{port}")[:1], [facts()])
    assert f"port {port} is in use on this machine" in said


def test_an_address_that_is_not_of_process_0s_machine_is_named():
    (said,) = all_meet([Place(0, 2, ("127.300.0.1:1234",))], [facts()])
    assert "cannot listen at 127.300.0.1:1234" in said


def test_something_else_that_answers_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        def answer():
            connection, _ = other.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        (said,) = all_meet(places(2, f"127.0.0.1:{other.getsockname()[1]}")[1:], [facts()])
    assert "something else than a run of aurora_train answers" in said


HELLO = {"hello": "aurora_train rendezvous 1", "job": "", "index": 1, "count": 2, "host": "h", "door": 1,
         "address": "127.0.0.1", "facts": {}}  # fmt: skip
STRANGERS = {
    "a browser": b"GET / HTTP/1.1\r\n\r\n",
    "deep JSON": b"[" * 50_000 + b"\n",
    "a list": b"[1]\n",
    "half a hello": b'{"hello": "aurora_train rendezvous 1", "job": ""}\n',
    "a hello of other types": json.dumps(HELLO | {"index": [1]}).encode() + b"\n",
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_does_not_disturb_a_meeting(stranger):
    team = places(2)
    results = []
    leader = threading.Thread(target=lambda: results.append(meet(team[0], facts(), 10)), daemon=True)
    leader.start()
    other = connected(team[0].addresses[0])
    other.sendall(STRANGERS[stranger])
    results.append(meet(team[1], facts(), 10))
    leader.join(10)
    assert len(results) == 2
    with contextlib.suppress(ConnectionResetError):
        assert other.recv(10) == b""


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    for _ in range(200):
        try:
            return socket.create_connection((host, int(port)))
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_a_process_of_another_job_is_sent_away_and_the_job_goes_on():
    address = free_address()
    mine, theirs = places(2, address, "slurm 1.0"), places(2, address, "slurm 2.0")
    results = []
    leader = threading.Thread(target=lambda: results.append(meet(mine[0], facts(), 20)), daemon=True)
    leader.start()
    (said,) = all_meet(theirs[1:], [facts()], seconds=10)
    assert "belongs to another start" in said and "this process is of slurm 2.0" in said
    assert "slurm 1.0" not in said  # what `aurora launch` puts there is only for its own
    results.append(meet(mine[1], facts(), 10))
    leader.join(10)
    assert len(results) == 2


@pytest.mark.parametrize(
    ("second", "what"),
    [(Place(1, 3), "as one of 3 processes, process 0 as one of 2"), (Place(0, 2), "is in use")],
)
def test_wrong_numbers_are_named(second, what):
    first = places(2)[0]
    said = all_meet([first, second._replace(addresses=first.addresses)], [facts()] * 2)
    assert any(what in one for one in said)


def test_a_number_that_no_process_of_the_run_has_is_named():
    first, second = places(2)
    said = all_meet([first, second._replace(index=5)], [facts()] * 2)
    assert said[0] == said[1] and "process number 5" in said[0]


def test_two_with_one_number_hear_of_each_other():
    first, second, _ = places(3)
    said = all_meet([first, second, second], [facts()] * 3)
    assert said[0] == said[1] == said[2] and "two processes are number 1" in said[0]


def test_an_interface_that_is_not_here_is_named(monkeypatch):
    nothing = {"command": {}, "config": {}, "code": {}, "versions": {}, "folders": []}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "nosuch7")
        with pytest.raises(UserError, match=f"{variable}: there is no network interface `nosuch7` here"):
            unlike.facts_of(**nothing)
        monkeypatch.setenv(variable, "lo")
    assert unlike.facts_of(**nothing)["address"] == "127.0.0.1"


def test_a_full_disk_of_one_process_ends_all(tmp_path, monkeypatch):
    status = os.statvfs(tmp_path)
    monkeypatch.setattr(unlike, "_ENOUGH_BYTES", (status.f_bavail + 1) * status.f_frsize * 2)
    with pytest.raises(UserError, match="the disk is full") as full:
        unlike.facts_of(command={}, config={}, code={}, versions={}, folders=[tmp_path / "cache"])
    said = all_meet(places(2), [facts(), {"trouble": str(full.value)}])
    assert said[0] == said[1] and "process 1" in said[0] and "the disk is full" in said[0]


# ---- networks of their own

NETWORK = shutil.which("ip") and os.geteuid() == 0 and subprocess.run(
    ["unshare", "-n", "ip", "link", "add", "name", "a", "type", "veth", "peer", "name", "b"], capture_output=True
).returncode == 0
needs_networks = pytest.mark.skipif(not NETWORK, reason="needs root and network namespaces")

MEMBER = """
import json, sys, time
from aurora_train.errors import UserError
from aurora_train.machine.place import Place
from aurora_train.machine.rendezvous import meet
index, address, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
try:
    print(json.dumps(meet(Place(index, 2, (address,)), json.loads(sys.argv[4]), seconds).address))
except UserError as error:
    print(error)
"""


@pytest.fixture
def boxes():
    """Two networks joined by a cable: 10.77.0.1 and 10.77.0.2, and a second cable: 10.78.0.1 and 10.78.0.2."""
    names = [f"aurora{os.getpid()}{letter}" for letter in "ab"]
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for net, cable in ((77, "fast"), (78, "slow")):
            subprocess.run(["ip", "-n", names[0], "link", "add", "name", cable, "type", "veth", "peer", "name", cable,
                            "netns", names[1]], check=True)  # fmt: skip
            for number, name in enumerate(names, 1):
                address = f"10.{net}.0.{number}/24"
                subprocess.run(["ip", "-n", name, "address", "add", address, "dev", cable], check=True)
                subprocess.run(["ip", "-n", name, "link", "set", cable, "up"], check=True)
                subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name])


def python_in(box: str) -> list[str]:
    return ["ip", "netns", "exec", box, sys.executable]


def member(python: list[str], program: str, index: int, address: str, seconds: float, facts=None) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = ["-c", program, str(index), address, str(seconds), json.dumps(facts or {})]
    return subprocess.Popen([*python, *arguments], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def both_meet(boxes, address, seconds=4, facts_of=({}, {})) -> list[str]:
    team = [member(python_in(box), MEMBER, index, address, seconds, facts_of[index])
            for index, box in enumerate(boxes)]  # fmt: skip
    return [process.communicate(timeout=60)[0] for process in team]


@needs_networks
def test_boxes_find_the_addresses_by_which_they_reach_each_other(boxes):
    assert both_meet(boxes, "10.78.0.1:7001", 20) == ['"10.78.0.1"\n', '"10.78.0.2"\n']


@needs_networks
def test_packets_that_are_dropped_are_named(boxes):
    subprocess.run(["ip", "-n", boxes[0], "route", "add", "blackhole", "10.77.0.2/32"], check=True)
    said = both_meet(boxes, "10.77.0.1:7001")
    assert "process 1 of 2 did not come" in said[0]
    assert "no answer at all (a firewall or another network drops the packets)" in said[1]


@needs_networks
def test_an_interface_that_the_other_box_cannot_reach_is_named(boxes):
    subprocess.run(["ip", "-n", boxes[1], "address", "add", "10.79.0.2/24", "dev", "lo"], check=True)
    subprocess.run(["ip", "-n", boxes[0], "route", "add", "blackhole", "10.79.0.0/24"], check=True)
    said = both_meet(boxes, "10.77.0.1:7001", 20, ({}, {"address": "10.79.0.2"}))
    assert said[0] == said[1] and "cannot reach process 1" in said[0] and "at 10.79.0.2" in said[0]
    assert "name the interface that links them" in said[0]


MEETS = MEMBER.partition("try:")[0] + """
from aurora_train.machine.line import Line
line = Line(meet(Place(index, 2, (address,)), {}, seconds), index)
"""
STAYS = MEETS + 'print("met", flush=True)\ntime.sleep(60)\n'


def joined_in_boxes(boxes) -> list[subprocess.Popen]:
    team = [member(python_in(box), STAYS, index, "10.77.0.1:7001", 20) for index, box in enumerate(boxes)]
    assert [process.stdout.readline() for process in team] == ["met\n", "met\n"]
    return team


@needs_networks
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_by_the_other_within_seconds(boxes, killed):
    team = joined_in_boxes(boxes)
    began = time.monotonic()
    team[killed].kill()
    _, said = team[1 - killed].communicate(timeout=30)
    assert team[1 - killed].returncode == 69 and time.monotonic() - began < 10
    assert f"process {killed} (" in said and "is lost" in said and "Traceback" not in said


@needs_networks
@pytest.mark.slow
def test_a_cut_cable_ends_both_within_30_seconds(boxes):
    team = joined_in_boxes(boxes)
    began = time.monotonic()
    subprocess.run(["ip", "-n", boxes[0], "link", "set", "fast", "down"], check=True)
    said = [process.communicate(timeout=40)[1] for process in team]
    assert time.monotonic() - began < 30
    assert [process.returncode for process in team] == [69, 69]
    assert "process 1 (" in said[0] and "process 0 (" in said[1] and all("is lost" in one for one in said)


LEAVES = MEETS + """
import threading
heard = threading.Event()
line.heard = lambda process, message: heard.set() if message["kind"] == "busy" else None
if index == 1:
    for _ in range(20):  # the other may not listen yet
        line.tell("busy")
        time.sleep(0.1)
    line.part()
else:
    assert heard.wait(20)
    while line._connections:
        time.sleep(0.05)
    print("still here")
"""


def test_a_process_that_is_done_is_not_lost():
    address = free_address()
    team = [member([sys.executable], LEAVES, index, address, 20) for index in range(2)]
    assert [process.communicate(timeout=60)[0] for process in team] == ["still here\n", ""]
    assert [process.returncode for process in team] == [0, 0]
