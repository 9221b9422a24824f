"""Several processes that train one run: which one leads, and how all come to the same decisions.

They are started by what the lab already has, each with the same command: Slurm, Open MPI, or anything that sets
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. The compiled step synchronises them. Decisions on the
host (the plan, the checkpoint to continue from, when to stop) are made by process 0, the leader, which passes them to
the others through the key-value store of `jax.distributed`. With one process, every function here is a plain call.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from aurora_train.errors import UserError

_ADDRESS, _COUNT, _RANK = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_LAUNCHERS = (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
_CONNECT_SECONDS = 120  # allowed for connecting: with a cold file system, imports may take long
_SILENT_SECONDS = 60  # without a heartbeat before a process counts as dead and the others end
_ASK_MILLISECONDS = 500  # between two checks of a waiting process for its own signals
_PART_SECONDS = 10  # that the leader, whose process holds the store, waits for others that may be compiling
_STEPS_AHEAD = 2  # see `stop_asked`
_SIGNS = ("Gloo", "gloo", "NCCL", "ocket closed", "onnection reset", "onnection closed", "UNAVAILABLE")


class Place(NamedTuple):
    """The index of this process and the number of processes; `address` is None if the launcher provides it."""

    index: int
    count: int
    address: str | None = None


class Ended(UserError):
    """Another process left before the work was done. `status`: the leader's if it left, else 1 (start all again)."""

    def __init__(self, who: str, why: str, status: int = 1):
        super().__init__(f"{who} ended: {why}", hint="follow that process's own message, then start all of them again")
        self.status = status


class _Team:
    """The processes that this one has joined."""

    def __init__(self, place: Place, client):
        self.place, self.client = place, client
        self.decisions = 0
        self.asked = self.left = False
        self.stop: tuple[int, str] | None = None  # (the step after which all stop, why)

    def get(self, key: str) -> str | None:
        import jax

        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise Ended("another process", str(error).splitlines()[0]) from error

    def wait(self, key: str) -> str:
        import jax

        while True:  # wait in short stretches, because Python runs signal handlers only in between
            try:
                return self.client.blocking_key_value_get(key, _ASK_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise Ended("another process", str(error).splitlines()[0]) from error
            left = self.get("aurora/left/any")
            if left:
                who, why = json.loads(left)
                raise Ended(f"process {who}", why)


_team: _Team | None = None


def place(environ=None) -> Place:
    """This process's place by the environment; Place(0, 1) if it is alone. UserError if settings are missing."""
    environ = os.environ if environ is None else environ
    if _COUNT in environ or _RANK in environ:
        lacking = [name for name in (_ADDRESS, _COUNT, _RANK) if not environ.get(name)]
        if lacking:
            raise UserError(
                f"{' and '.join(lacking)} not set", where="environment",
                why=f"{_ADDRESS}, {_COUNT} and {_RANK} belong together",
                hint=f"set all three (address HOST:PORT of process 0), or unset {_COUNT} and {_RANK} to train alone",
            )  # fmt: skip
        given = Place(_whole(environ, _RANK), _whole(environ, _COUNT), environ[_ADDRESS])
        if not 0 <= given.index < given.count:
            raise UserError(
                f"{_RANK}={given.index} of {_COUNT}={given.count}", where="environment",
                why="processes are numbered from 0",
            )  # fmt: skip
        if not given.address.rpartition(":")[2].isdigit():
            raise UserError(f"{_ADDRESS}={given.address} has no port", where="environment", hint="HOST:PORT")
        return given if given.count > 1 else Place(0, 1)
    for count, rank in _LAUNCHERS:
        if environ.get(count, "1") != "1" and rank in environ:
            return Place(_whole(environ, rank), _whole(environ, count), environ.get(_ADDRESS))
    return Place(0, 1)


def _whole(environ, name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name}={environ[name]!r} is not a whole number", where="environment") from None


def join() -> None:
    """Join the other processes, if there are any, and wait for all of them. Call it before jax looks for devices."""
    global _team
    own = place()
    if own.count == 1 or _team is not None:
        return
    import jax
    from jax._src import distributed  # the store has no public name; Orbax imports it in the same way

    given: dict[str, Any] = {"local_device_ids": []} if _alone_on_its_box() else {}  # [] means all devices, not one
    if own.address:
        given = {"coordinator_address": own.address, "num_processes": own.count, "process_id": own.index}
        given["cluster_detection_method"] = "deactivate"
        if own.address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
            given["coordinator_bind_address"] = own.address  # jax would listen on every interface
    jax.config.update("jax_enable_preemption_service", False)  # `train.signals` handles signals
    _say_waiting(own)
    try:
        jax.distributed.initialize(
            **given, initialization_timeout=_CONNECT_SECONDS, heartbeat_timeout_seconds=_SILENT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes: {str(error).splitlines()[0]}", where="environment",
            hint=f"set {_ADDRESS} (HOST:PORT of process 0), {_COUNT} and {_RANK} for each of them",
        ) from error  # fmt: skip
    _keep_stdout_for_results()
    jax.devices()  # connects the clients of all processes now; later, one of them may be waiting for a decision
    _team = _Team(own, distributed.global_state.client)
    _each_for_itself()


def _alone_on_its_box(environ=None) -> bool:
    """Whether the launcher placed one process on each box, which then drives all of the box's devices."""
    environ = os.environ if environ is None else environ
    slurm = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    return "1" in (slurm, environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"))


def _say_waiting(own: Place) -> None:
    """Print what this process waits for: if the others do not come, jax ends it without raising a Python error."""
    where = f" at {own.address}" if own.address else ""
    whom = f"process 0{where}" if own.index else f"{own.count - 1} more{where}"
    print(f"process {own.index} of {own.count}: waiting up to {_CONNECT_SECONDS} s for {whom}", file=sys.stderr)
    if not (own.index and own.address):
        return
    host, _, port = own.address.rpartition(":")
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 does not answer at {own.address}: {error}", where="environment",
                    why=f"waited {_CONNECT_SECONDS} s", hint=f"is it running, with the same {_ADDRESS}?",
                ) from error  # fmt: skip
            time.sleep(0.2)


def _keep_stdout_for_results() -> None:
    """Gloo, which connects the processes, prints to descriptor 1, where a script may be waiting for JSON."""
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w")


def _each_for_itself() -> None:
    """Make Orbax, which reads and writes files in this process, see a single process.

    Otherwise it would wait for all processes at every save, and no setting of its own turns that off everywhere. The
    threads of a save would send each other their signals through the store that all processes share, under the same
    names in each.
    """
    import jax
    from orbax.checkpoint._src.multihost import multihost

    jax.process_count = lambda backend=None: 1
    jax.process_index = lambda backend=None: 0
    multihost.is_jax_distributed_client_initialized = lambda: False


def count() -> int:
    """How many processes train this run."""
    return 1 if _team is None else _team.place.count


def index() -> int:
    """The number of this process, from 0."""
    return 0 if _team is None else _team.place.index


def leads() -> bool:
    """Whether this process writes the run's record."""
    return index() == 0


def agreed(decide: Callable[[], Any], pack=lambda value: value, unpack=lambda value: value) -> Any:
    """The leader's decision, returned in every process; only the leader calls `decide`.

    All processes have to call this, in the same order. `pack` makes the decision JSON-able, and `unpack` reverses that.
    If the leader ends instead, the others raise a UserError.
    """
    if _team is None:
        return decide()
    key = f"aurora/{_team.decisions}"
    if leads():
        value = decide()
        _team.client.key_value_set(key, json.dumps({"value": pack(value)}))
        _team.decisions += 1
        return value
    message = json.loads(_team.wait(key))
    _team.decisions += 1
    if "ended" in message:
        _team.left = True
        _part()
        raise Ended("process 0", message["ended"], message["status"])
    return unpack(message["value"])


def refuse_unlike(what: str, mine: str) -> None:
    """UserError in every process if one's `mine` differs from the leader's: it would train something else."""
    if _team is None:
        return
    reply, theirs = f"aurora/{_team.decisions}/reply", agreed(lambda: mine)
    if leads():
        differ = [number for number in range(1, count()) if _team.wait(f"{reply}/{number}") != "same"]
    else:
        differ = [index()] if theirs != mine else []
        _team.client.key_value_set(f"{reply}/{index()}", "other" if differ else "same")
    if differ:
        raise UserError(
            f"process {differ[0]} has another {what} than process 0", where="environment",
            hint="start every process with the same command, files and packages",
        )


def stop_asked(step: int, mine: str | None) -> str | None:
    """The name of what stops the run after `step`, the same in every process. `mine`: a stop requested of this one.

    Called between steps. No process dispatches step s + 2 before the results of step s + 1 have arrived, and those
    need the leader to take part. So all processes read before step s + 3 what the leader wrote after step s.
    """
    if _team is None:
        return mine
    if _team.stop is None and leads():
        name = mine or _team.get("aurora/asked")
        if name:
            _team.stop = step + _STEPS_AHEAD, name
            _team.client.key_value_set("aurora/stop", json.dumps(_team.stop))
    elif _team.stop is None:
        if mine and not _team.asked:
            _team.client.key_value_set("aurora/asked", mine, allow_overwrite=True)
            _team.asked = True
        message = _team.get("aurora/stop")
        _team.stop = tuple(json.loads(message)) if message else None
    return _team.stop[1] if _team.stop and step >= _team.stop[0] else None


def tell(key: str, value: str) -> None:
    """Leave a message for the other processes, from any thread. A key is used once."""
    _team.client.key_value_set(key, value)


def hear(key: str) -> str:
    """The message that a process leaves under a key, from any thread; waits for it. `Ended` if a process left."""
    return _team.wait(key)


def meet() -> None:
    """Wait until every process has called this."""
    refuse_unlike("place", "here")


@contextlib.contextmanager
def together():
    """Join the others. If this process leaves the context early, it notifies the others, so that none waits forever."""
    join()
    try:
        yield
    except BaseException as error:
        leave(str(error) or type(error).__name__, getattr(error, "status", 1))
        raise
    if _team is not None and not _team.left:
        agreed(lambda: None)  # the leader's last work may take longer than jax waits for it
        _part()


def _part() -> None:
    """Leave together if all get here within `_PART_SECONDS`; otherwise leave alone, and others may crash.

    The leader's process holds the store, and jax aborts a process whose store disappears before it has left properly.
    """
    import jax

    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if not leads():
            _team.client.key_value_set(f"aurora/parted/{index()}", "", allow_overwrite=True)
        deadline = time.monotonic() + _PART_SECONDS
        for number in range(1, count() if leads() else 1):
            left = max(deadline - time.monotonic(), 0.1)
            _team.client.blocking_key_value_get(f"aurora/parted/{number}", int(1000 * left))
        jax.distributed.shutdown()


def leave(why: str, status: int) -> None:
    """Notify the others, once, that this process ends with a status. Does nothing in a single process."""
    if _team is None or _team.left:
        return
    import jax

    _team.left = True
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if leads():
            _team.client.key_value_set(f"aurora/{_team.decisions}", json.dumps({"ended": why, "status": status}))
            if _team.client.key_value_dir_get("aurora/left") == []:
                _part()
        else:  # leave at once: the leader may be in a collective, which only the end of this process interrupts
            _team.client.key_value_set("aurora/left/any", json.dumps([index(), why]), allow_overwrite=True)


def lost(error: Exception) -> Ended | None:
    """The error of a collective that another process has left, as one line; None for any other error."""
    text = str(error)
    broken = _team is not None and any(sign in text for sign in _SIGNS)
    return Ended("another process", text.splitlines()[0][:200]) if broken else None


def joined() -> bool:
    """Whether this process has joined others: at exit jax would wait for all of them, and crash without one."""
    return _team is not None
