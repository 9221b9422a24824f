"""Several processes that train one run: which one leads, and how all come to the same decisions.

They are started by what the lab already has, each with the same command: Slurm, Open MPI, or anything that sets
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. The compiled step keeps them in time with each other;
what is decided on the host (the plan, the checkpoint to go on from, when to stop) is decided by process 0, the leader,
and told to the others through the key-value store of `jax.distributed`. Alone, every function here is a plain call.
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
_CONNECT_SECONDS = 120  # to find each other: a cold file system may keep one of them importing for long
_SILENT_SECONDS = 60  # without a sign of life before a process counts as dead, and the others end
_ASK_MILLISECONDS = 500  # between looks of a waiting process at its own signals
_PART_SECONDS = 10  # that a leader, whose process holds the store, waits for others that may be compiling
_STEPS_AHEAD = 2  # see `stop_asked`
_SIGNS = ("Gloo", "gloo", "NCCL", "ocket closed", "onnection reset", "onnection closed", "UNAVAILABLE")


class Place(NamedTuple):
    """Which of how many processes this one is; `address` None where the launcher is asked for it."""

    index: int
    count: int
    address: str | None = None


class Ended(UserError):
    """Another process left before the work was done. `status`: of the leader where it left, else 1: start all again."""

    def __init__(self, who: str, why: str, status: int = 1):
        super().__init__(f"{who} ended: {why}", hint="its own message says what to do; then start all of them again")
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

        while True:  # in short stretches, between which Python runs the handlers of signals
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
    """Where the environment puts this process; Place(0, 1) for one of its own. UserError for half a setting."""
    environ = os.environ if environ is None else environ
    if _COUNT in environ or _RANK in environ:
        lacking = [name for name in (_ADDRESS, _COUNT, _RANK) if not environ.get(name)]
        if lacking:
            raise UserError(
                f"{' and '.join(lacking)} not set", where="environment",
                why=f"{_ADDRESS}, {_COUNT} and {_RANK} belong together",
                hint=f"set all three (address HOST:PORT of process 0), or unset {_COUNT} and {_RANK} to train alone",
            )  # fmt: skip
        found = Place(_whole(environ, _RANK), _whole(environ, _COUNT), environ[_ADDRESS])
        if not 0 <= found.index < found.count:
            raise UserError(
                f"{_RANK}={found.index} of {_COUNT}={found.count}", where="environment",
                why="processes are numbered from 0",
            )  # fmt: skip
        if not found.address.rpartition(":")[2].isdigit():
            raise UserError(f"{_ADDRESS}={found.address} has no port", where="environment", hint="HOST:PORT")
        return found if found.count > 1 else Place(0, 1)
    for count, rank in _LAUNCHERS:
        if environ.get(count, "1") != "1" and rank in environ:
            return Place(_whole(environ, rank), _whole(environ, count), environ.get(_ADDRESS))
    return Place(0, 1)


def _whole(environ, name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name}={environ[name]!r} is no whole number", where="environment") from None


def join() -> None:
    """Meet the other processes, where there are any. Before jax has looked for devices; waits for all of them."""
    global _team
    found = place()
    if found.count == 1 or _team is not None:
        return
    import jax
    from jax._src import distributed  # the store has no public name; Orbax reaches for it the same way

    given: dict[str, Any] = {"local_device_ids": []} if _alone_on_its_box() else {}  # [] is all, and not one
    if found.address:
        given = {"coordinator_address": found.address, "num_processes": found.count, "process_id": found.index}
        given["cluster_detection_method"] = "deactivate"
        if found.address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
            given["coordinator_bind_address"] = found.address  # and not, as is jax's way, every interface
    jax.config.update("jax_enable_preemption_service", False)  # signals are `train.signals`'s
    _say_waiting(found)
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
    jax.devices()  # makes the clients of all processes meet: later, one of them may wait for a decision instead
    _team = _Team(found, distributed.global_state.client)
    _each_for_itself()


def _alone_on_its_box(environ=None) -> bool:
    """Whether the launcher put one process on each box, which then drives all of its devices."""
    environ = os.environ if environ is None else environ
    slurm = environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    return "1" in (slurm, environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"))


def _say_waiting(found: Place) -> None:
    """jax ends the process without a word of Python where the others do not come: say before what it waits for."""
    where = f" at {found.address}" if found.address else ""
    whom = f"process 0{where}" if found.index else f"{found.count - 1} more{where}"
    print(f"process {found.index} of {found.count}: waiting up to {_CONNECT_SECONDS} s for {whom}", file=sys.stderr)
    if not (found.index and found.address):
        return
    host, _, port = found.address.rpartition(":")
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 does not answer at {found.address}: {error}", where="environment",
                    why=f"waited {_CONNECT_SECONDS} s", hint=f"is it running, with the same {_ADDRESS}?",
                ) from error  # fmt: skip
            time.sleep(0.2)


def _keep_stdout_for_results() -> None:
    """Gloo, which connects processors, says so on descriptor 1, where a script may be waiting for JSON."""
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w")


def _each_for_itself() -> None:
    """What reads and writes files in this process (Orbax) does so alone, as the leader or as a reader.

    It would else wait for all processes at every save, and has no setting against it that reaches everywhere.
    """
    import jax

    jax.process_count = lambda backend=None: 1
    jax.process_index = lambda backend=None: 0


def count() -> int:
    """How many processes train this run."""
    return 1 if _team is None else _team.place.count


def index() -> int:
    """Which of them this is, from 0."""
    return 0 if _team is None else _team.place.index


def leads() -> bool:
    """Whether this process writes the run's record."""
    return index() == 0


def agreed(decide: Callable[[], Any], pack=lambda value: value, unpack=lambda value: value) -> Any:
    """What the leader decides, in every process; only the leader calls `decide`.

    All processes have to come here, in the same order. `pack` makes the decision JSON-able, `unpack` undoes that.
    A leader that ends instead is a UserError in the others.
    """
    if _team is None:
        return decide()
    key = f"aurora/{_team.decisions}"
    if leads():
        value = decide()
        _team.client.key_value_set(key, json.dumps({"value": pack(value)}))
        _team.decisions += 1
        return value
    told = json.loads(_team.wait(key))
    _team.decisions += 1
    if "ended" in told:
        _team.left = True
        _part()
        raise Ended("process 0", told["ended"], told["status"])
    return unpack(told["value"])


def refuse_unlike(what: str, mine: str) -> None:
    """UserError in every process where one's `mine` is not the leader's: it would train something else."""
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
    """The name of what stops the run after `step`, the same in every process; `mine` is what this one was asked.

    Called between steps. A process hands over step s + 2 at the earliest when the numbers of step s + 1 are there,
    and those need the leader's hand. So what the leader writes down after step s is read by all before step s + 3.
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
        told = _team.get("aurora/stop")
        _team.stop = tuple(json.loads(told)) if told else None
    return _team.stop[1] if _team.stop and step >= _team.stop[0] else None


def meet() -> None:
    """Wait until every process is here."""
    refuse_unlike("place", "here")


@contextlib.contextmanager
def together():
    """Join the others, and tell them where this process leaves what they do together early: none waits for ever."""
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
    """Leave together where all come here within a while; else without the others, who crash if they are not done.

    The leader's process holds the store, and jax aborts a process whose store has gone before it has left properly.
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
    """Tell the others that this process ends with a status, if it has not already. Nothing, alone."""
    if _team is None or _team.left:
        return
    import jax

    _team.left = True
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if leads():
            _team.client.key_value_set(f"aurora/{_team.decisions}", json.dumps({"ended": why, "status": status}))
            if _team.client.key_value_dir_get("aurora/left") == []:
                _part()
        else:  # and go at once: the leader may be in a collective, which only the end of this process ends
            _team.client.key_value_set("aurora/left/any", json.dumps([index(), why]), allow_overwrite=True)


def lost(error: Exception) -> Ended | None:
    """The error of a collective that another process no longer takes part in, in a line; None for any other error."""
    text = str(error)
    broken = _team is not None and any(sign in text for sign in _SIGNS)
    return Ended("another process", text.splitlines()[0][:200]) if broken else None


def joined() -> bool:
    """Whether this process has met others: jax would wait for all of them at its exit, and crash without one."""
    return _team is not None
