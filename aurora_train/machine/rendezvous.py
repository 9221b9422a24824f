"""The processes of a run meet before any of them touches a device: what would go wrong later is refused here, by name.

Process 0 listens at the address that the launcher gave; the others connect and say what they are about to do (config,
versions, clock, ...). Process 0 compares, all try to reach each other, and every process hears the same verdict: a list
of addresses to go on with, or one fault for all of them. The messages are JSON, one a line, and come before jax does,
because jax ends a process that cannot join with a crash. Like jax's own coordinator, this is for a network whose
machines are trusted. The connections stay: `machine/line.py` watches them.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import select
import socket
import sys
import time
from dataclasses import dataclass

from aurora_train.errors import UserError
from aurora_train.machine.place import Place
from aurora_train.machine.unlike import fault_among

_HELLO = "aurora_train rendezvous 1"
_KINDS = {"job": str, "index": int, "count": int, "host": str, "door": int, "address": str, "facts": dict}
_LINGER_SECONDS = 10  # that process 0 waits with a fault for those who have not come yet
_REACH_SECONDS = 10  # that a process tries to reach another one
_QUIET_SECONDS = 3  # of waiting before a process says what it is waiting for
_MOST_BYTES = 1 << 24


def join_seconds() -> float:
    """How long processes wait for each other at the start: AURORA_JOIN_SECONDS, or two minutes.

    With a cold file system, imports may take long.
    """
    text = os.environ.get("AURORA_JOIN_SECONDS", "120")
    try:
        return float(text)
    except ValueError:
        raise UserError(f"AURORA_JOIN_SECONDS={text!r} is not a number", where="environment") from None


class Connection:
    """A socket on which each line is one JSON document. `read` gives those that are complete, and None at the end."""

    def __init__(self, sock: socket.socket):
        self.socket, self._rest = sock, b""
        sock.settimeout(_REACH_SECONDS)

    def send(self, message: dict) -> None:
        """Send a message; OSError if the other side has gone."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list | None:
        """The messages that have arrived; None if the other side has closed. ValueError if it speaks something else."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MOST_BYTES:
            raise ValueError("a line without an end")
        return [json.loads(line) for line in lines]

    def answer(self, seconds: float) -> dict | None:
        """The next message; None if there is none within `seconds`. ConnectionError if the other side has closed."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.socket], [], [], min(left, 0.5))[0]:
                messages = self.read()
                if messages is None:
                    raise ConnectionResetError("closed")
                if messages:
                    return messages[0]
        return None


@dataclass
class Met:
    """What all processes know after they have met.

    `hosts`: the machine of each process; `address`: by which the others reach this one; `coordinator`: (host, port)
    where jax shall meet; `connections`: by process, to all others in process 0, to process 0 in the others.
    """

    hosts: list[str]
    address: str
    coordinator: tuple[str, int]
    connections: dict[int, Connection]


def meet(place: Place, facts: dict, seconds: float | None = None) -> Met:
    """Meet the other processes. Every process raises the same UserError if one of them must not take part.

    `facts` are compared between all; see `machine/unlike.py`. A fact "trouble" is why this process cannot take part.
    """
    seconds = join_seconds() if seconds is None else seconds
    hello = {"hello": _HELLO, "job": place.job, "index": place.index, "count": place.count, "facts": facts,
             "host": socket.gethostname()}  # fmt: skip
    with socket.create_server(("", 0)) as door:  # the others try whether they get here
        hello["door"] = door.getsockname()[1]
        return _lead(place, hello, seconds) if place.index == 0 else _follow(place, hello, seconds)


# ---- process 0


def _lead(place: Place, hello: dict, seconds: float) -> Met:
    guests: dict[int, tuple[Connection, dict]] = {}
    with _listener(place, hello["facts"]) as listener:
        fault = _gather(place, hello, listener, guests, seconds)
    connections = {index: connection for index, (connection, _) in guests.items()}
    if fault is None:
        hellos = [hello, *(guests[index][1] for index in range(1, place.count))]
        mine = hello["facts"].get("address") or _main_address(connections)
        addresses = [mine, *(_outside(guests[index][1]["address"], mine) for index in range(1, place.count))]
        hosts = _named([hello["host"] for hello in hellos])
        doors = [[address, hello["door"]] for address, hello in zip(addresses, hellos, strict=True)]
        _tell(connections, {"doors": doors, "hosts": hosts})
        fault = _unreached(_closed_doors(doors, 0), connections, hosts)
    if fault is not None:
        _tell(connections, {"fault": fault})
        for connection in connections.values():
            connection.socket.close()
        raise UserError(**fault)
    port = _free_port()
    _tell(connections, {"port": port})
    return Met(hosts, mine, (mine, port), connections)


def _listener(place: Place, facts: dict) -> socket.socket:
    host, _, port = place.addresses[0].rpartition(":")
    host = host.strip("[]")
    inside = host in ("localhost", "") or host.startswith("127.")
    try:
        if inside or not socket.has_dualstack_ipv6():
            return socket.create_server((host if inside else "", int(port)), backlog=place.count)
        return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=place.count)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UserError(f"cannot listen at {place.addresses[0]}: {error.strerror}", where="process 0",
                            hint="the address has to be one of process 0's machine") from error  # fmt: skip
        raise UserError(
            f"port {port} is in use on this machine ({socket.gethostname()})", where="process 0",
            why="the processes of a run meet there",
            hint=f"`ss -ltnp sport = :{port}` shows by whom; take another port",
        ) from error  # fmt: skip


def _gather(place: Place, hello: dict, listener, guests: dict, seconds: float) -> dict | None:
    """Let the others in until all are there. Returns the fault that ends the run, if there is one."""
    began, fault, deadline, said = time.monotonic(), _trouble([hello]), time.monotonic() + seconds, False
    unknown: list[Connection] = []
    if fault:
        deadline = began + min(seconds, _LINGER_SECONDS)
    while len(guests) < place.count - 1 and (left := deadline - time.monotonic()) > 0:
        if not said and time.monotonic() - began > _QUIET_SECONDS and fault is None:
            said = _say(place, seconds, f"{place.count - 1 - len(guests)} more at {place.addresses[0]}")
        sockets = [listener, *(connection.socket for connection in unknown)]
        for ready in select.select(sockets, [], [], min(left, 0.5))[0]:
            if ready is listener:
                unknown.append(Connection(listener.accept()[0]))
                continue
            connection = next(one for one in unknown if one.socket is ready)
            message = _first_message(connection)
            if message == []:
                continue
            unknown.remove(connection)
            found = _let_in(place, message, connection, guests)
            if found and fault is None:
                fault, deadline = found, min(deadline, time.monotonic() + _LINGER_SECONDS)
    for connection in unknown:
        connection.socket.close()
    missing = sorted({*range(1, place.count)} - guests.keys())
    if fault is None and missing:
        return _absent(place, missing, seconds)
    return fault or fault_among({0: hello, **{index: said for index, (_, said) in guests.items()}})


def _first_message(connection: Connection):
    """The first message of a stranger: [] if it is not complete yet, None if it is no hello."""
    try:
        messages = connection.read()
    except (OSError, ValueError, RecursionError):
        return None
    return messages and messages[0]


def _is_hello(message) -> bool:
    """Whether a message of a stranger is what a process of a run says first."""
    return (isinstance(message, dict) and message.get("hello") == _HELLO
            and all(isinstance(message.get(key), kind) for key, kind in _KINDS.items()))  # fmt: skip


def _let_in(place: Place, message, connection: Connection, guests: dict) -> dict | None:
    """Take one process in. Returns a fault for all; a stranger is sent away and is no fault."""
    if not _is_hello(message):
        connection.socket.close()
        return None
    if message["job"] != place.job:
        with contextlib.suppress(OSError):
            connection.send({"fault": {
                "what": f"process 0 at {place.addresses[0]} belongs to another start", "where": "rendezvous",
                "why": f"this process is of {message['job'] or 'a start by hand'}",
                "hint": "take another port",
            }})  # fmt: skip
        connection.socket.close()
        return None
    message["clock_ahead"] = message["facts"].get("clock", 0) and message["facts"]["clock"] - time.time()
    index, number = message["index"], len(guests) + 1
    if message["count"] != place.count:
        guests[number if index in guests else index] = connection, message
        return {"what": f"process {index} ({message['host']}) was started as one of {message['count']} processes, "
                        f"process 0 as one of {place.count}", "where": "rendezvous",
                "hint": "start all of them with the same number of processes"}  # fmt: skip
    if not 0 <= index < place.count:
        guests[number] = connection, message
        return {"what": f"{message['host']} has process number {index} of {place.count}", "where": "rendezvous"}
    if index in guests or index == 0:
        other = guests[index][1]["host"] if index in guests else socket.gethostname()
        guests[-number] = connection, message  # it hears the verdict too
        return {"what": f"two processes are number {index}: one on {other}, one on {message['host']}",
                "where": "rendezvous", "hint": f"number them from 0 to {place.count - 1}"}  # fmt: skip
    guests[index] = connection, message
    return _trouble([message])


def _trouble(hellos: list[dict]) -> dict | None:
    for hello in hellos:
        if hello["facts"].get("trouble"):
            return {"what": f"process {hello['index']} ({hello['host']}) cannot take part",
                    "why": hello["facts"]["trouble"]}  # fmt: skip
    return None


def _absent(place: Place, missing: list[int], seconds: float) -> dict:
    numbers = ", ".join(map(str, missing))
    return {
        "what": f"process{'es' if len(missing) > 1 else ''} {numbers} of {place.count} did not come",
        "where": "rendezvous",
        "why": f"process 0 waited {seconds:g} s at {place.addresses[0]} on {socket.gethostname()}",
        "hint": "is it running, does that name lead here from its machine, and does a firewall let it through?",
    }  # fmt: skip


def _main_address(connections: dict[int, Connection]) -> str:
    """The address of this machine by which others have come; a loopback one only if all of them are on this machine."""
    mine = [_plain(connection.socket.getsockname()[0]) for connection in connections.values()]
    return next((address for address in mine if not _is_loopback(address)), mine[0])


def _unreached(mine: list, connections: dict[int, Connection], hosts: list[str]) -> dict | None:
    """The fault if a process could not connect to another one; waits for the others' answers."""
    closed = {0: mine}
    for index, connection in connections.items():
        try:
            answer = connection.answer(_REACH_SECONDS * len(hosts) + 5)
        except (OSError, ValueError):
            answer = None
        if answer is None:
            return {"what": f"process {index} ({hosts[index]}) left before the start", "where": "rendezvous"}
        closed[index] = answer["closed"]
    for index, doors in closed.items():
        for other, address, why in doors:
            return {
                "what": f"process {index} ({hosts[index]}) cannot reach process {other} ({hosts[other]}) at {address}: "
                f"{why}",
                "where": "rendezvous", "why": "every process connects to every other, on ports that the system chooses",
                "hint": "open the firewall between these machines, or name the interface that links them "
                "(GLOO_SOCKET_IFNAME on processors, NCCL_SOCKET_IFNAME on GPUs)",
            }  # fmt: skip
    return None


# ---- the others


def _follow(place: Place, hello: dict, seconds: float) -> Met:
    deadline = time.monotonic() + seconds
    connection = _connected(place, seconds)
    address = _plain(connection.socket.getsockname()[0])
    hello["address"] = hello["facts"].get("address") or address
    if hello["facts"].get("clock"):
        hello["facts"] = hello["facts"] | {"clock": time.time()}
    connection.send(hello)
    left = max(deadline - time.monotonic(), 0) + seconds + _LINGER_SECONDS  # process 0 may have come later
    doors = _verdict(connection, left, place)
    connection.send({"closed": _closed_doors(doors["doors"], place.index)})
    go = _verdict(connection, _REACH_SECONDS * (place.count + 1) + 5, place)
    own = doors["doors"][place.index][0]
    return Met(doors["hosts"], own, (doors["doors"][0][0], go["port"]), {0: connection})


def _connected(place: Place, seconds: float) -> Connection:
    """A connection to process 0. UserError, with the last reason, if it does not answer."""
    deadline, began, said = time.monotonic() + seconds, time.monotonic(), False
    while True:
        for address in place.addresses:
            host, _, port = address.rpartition(":")
            host = host.strip("[]")
            wait = max(min(5.0, deadline - time.monotonic()), 0.1)
            try:
                return Connection(socket.create_connection((host, int(port)), timeout=wait))
            except OSError as error:
                reason = _why(error, address)
        if time.monotonic() > deadline:
            raise UserError(
                f"process 0 does not answer at {' or '.join(place.addresses)}: {reason}", where="rendezvous",
                why=f"process {place.index} waited {seconds:g} s",
                hint="is process 0 running, and is that its address?",
            )  # fmt: skip
        if not said and time.monotonic() - began > _QUIET_SECONDS:
            said = _say(place, seconds, f"process 0 at {' or '.join(place.addresses)} ({reason})")
        time.sleep(0.2)


def _why(error: OSError, address: str) -> str:
    if isinstance(error, socket.gaierror):
        return "this machine does not know that name"
    if isinstance(error, TimeoutError):
        return "no answer at all (a firewall or another network drops the packets)"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    return error.strerror or str(error)


def _verdict(connection: Connection, seconds: float, place: Place) -> dict:
    try:
        answer = connection.answer(seconds)
    except ValueError:
        raise UserError(f"something else than a run of aurora_train answers at {place.addresses[0]}",
                        where="rendezvous", hint="take another port") from None  # fmt: skip
    except OSError:
        raise UserError("process 0 left before the start", where="rendezvous",
                        hint="its own message says why") from None  # fmt: skip
    if answer is None:
        raise UserError(f"{place.addresses[0]} accepted the connection and said nothing for {seconds:.0f} s",
                        where="rendezvous", hint="is it a run of aurora_train?")  # fmt: skip
    if "fault" in answer:
        raise UserError(**answer["fault"])
    return answer


def _closed_doors(doors: list, mine: int) -> list:
    """[process, address, why] of each process that this one cannot connect to."""
    closed = []
    for index, (address, port) in enumerate(doors):
        if index == mine:
            continue
        try:
            socket.create_connection((address, port), timeout=_REACH_SECONDS).close()
        except OSError as error:
            closed.append([index, address, _why(error, address)])
    return closed


# ---- both


def _tell(connections: dict[int, Connection], message: dict) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):  # one that has gone is noticed where its answer is read
            connection.send(message)


def _named(hosts: list[str]) -> list[str]:
    """Names of machines without what all of them end with; a machine with several processes keeps one name."""
    return [host.partition(".")[0] for host in hosts] if len({h.partition(".")[0] for h in hosts}) > 1 else hosts


def _outside(address: str, leaders: str) -> str:
    """A process that came by a loopback address is on process 0's machine, which others know by another address."""
    return leaders if _is_loopback(address) else address


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _plain(address: str) -> str:
    """An IPv4 address as such, without the form it has on a socket of both families; without a zone."""
    return address.removeprefix("::ffff:").partition("%")[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _say(place: Place, seconds: float, whom: str) -> bool:
    said = f"process {place.index} of {place.count}: waiting up to {seconds:g} s for {whom}"
    print(said, file=sys.stderr, flush=True)
    return True
