"""Several processes that train one run: which one leads, and how all come to the same decisions.

`machine/place.py` says which one this is, in `machine/rendezvous.py` they meet, and `machine/line.py` notices the
loss of one. The compiled step synchronises them. Decisions on the host (the plan, the checkpoint to continue from, when
to stop) are made by process 0, the leader, which passes them to the others through the key-value store of
`jax.distributed`. With one process, every function here is a plain call.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from aurora_train.errors import UserError
from aurora_train.machine.line import EXIT_LOST, Line
from aurora_train.machine.place import Place, local_devices, place
from aurora_train.machine.rendezvous import meet as rendezvous

_CONNECT_SECONDS = 60  # allowed to jax for connecting processes that have met
_SILENT_SECONDS = 100  # jax's own time without a heartbeat: `machine/line.py` is sooner, and lets a slow process be
_BROKEN_SECONDS = 5  # that a broken collective waits for the line to say why
_ASK_MILLISECONDS = 500  # between two checks of a waiting process for its own signals
_PART_SECONDS = 10  # that the leader, whose process holds the store, waits for others that may be compiling
_STEPS_AHEAD = 2  # see `stop_asked`
_SIGNS = ("Gloo", "gloo", "NCCL", "ocket closed", "onnection reset", "onnection closed", "UNAVAILABLE")


class Ended(UserError):
    """Another process left before the work was done. `status`: the one that it left with, or that all start again."""

    def __init__(self, who: str, why: str, status: int = EXIT_LOST):
        super().__init__(f"{who} ended: {why}", hint="follow that process's own message, then start all of them again")
        self.status = status


class _Team:
    """The processes that this one has joined."""

    def __init__(self, place: Place, client, line: Line, address: str):
        self.place, self.client, self.line, self.address = place, client, line, address
        self.heard: dict[str, Callable] = {}
        line.heard = lambda process, message: self.heard.get(message["kind"], _ignore)(process, message)
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
            if self.line.left:
                raise Ended(*self.line.left)


_team: _Team | None = None


def join(facts: dict) -> None:
    """Join the other processes, if there are any, and wait for all of them. Call it before jax looks for devices.

    `facts` (`machine/unlike.py`) are compared between all; a UserError says in every process what does not fit.
    """
    global _team
    own = place()
    if own.count == 1 or _team is not None:
        return
    met = rendezvous(own, facts)
    line = Line(met, own.index)
    _keep_stdout_for_results()
    import jax
    from jax._src import distributed  # the store has no public name; Orbax imports it in the same way

    jax.config.update("jax_enable_preemption_service", False)  # `train.signals` handles signals
    _let_gloo_use(met.address)
    host, port = met.coordinator
    host = f"[{host}]" if ":" in host else host
    try:
        jax.distributed.initialize(
            f"{host}:{port}", own.count, own.index, local_devices(), cluster_detection_method="deactivate",
            coordinator_bind_address=f"{host}:{port}" if own.index == 0 else None,
            initialization_timeout=_CONNECT_SECONDS, heartbeat_timeout_seconds=_SILENT_SECONDS,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        line.leave(str(error).splitlines()[0], 1)
        raise UserError(
            f"cannot join the other processes: {str(error).splitlines()[0]}", where="rendezvous",
            hint="start all of them again",
        ) from error  # fmt: skip
    jax.devices()  # connects the clients of all processes now; later, one of them may be waiting for a decision
    _team = _Team(own, distributed.global_state.client, line, met.address)
    _refuse_another_count(jax.process_count(), own.count)
    _each_for_itself()


def _let_gloo_use(address: str) -> None:
    """Let gloo, which connects processors, take the address by which the others reach this machine.

    jax leaves gloo with whatever the machine's own name resolves to (127.0.1.1 on a plain Debian), reads no variable,
    and offers no setting.
    """
    from functools import partial

    from jax._src.lib import _jax

    _jax.make_gloo_tcp_collectives = partial(_jax.make_gloo_tcp_collectives, hostname=address)


def _refuse_another_count(found: int, wanted: int) -> None:
    """UserError if jax does not see the processes that were started: each would train alone, without a word."""
    if found != wanted:
        raise UserError(f"jax sees {found} processes and {wanted} were started", where="rendezvous",
                        hint="was jax used before the processes had joined?")  # fmt: skip


@contextlib.contextmanager
def told():
    """In this context a UserError of this process, which has not joined yet, ends the others at once too."""
    try:
        yield
    except UserError as error:
        own = place()
        if own.count > 1 and _team is None:
            with contextlib.suppress(UserError):  # this process has its own message
                rendezvous(own, {"trouble": str(error)})
        raise


def _keep_stdout_for_results() -> None:
    """Gloo, which connects the processes, prints to descriptor 1, where a script may be waiting for JSON."""
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w")


def _each_for_itself() -> None:
    """Make Orbax, which reads and writes files in this process, see a single process.

    Otherwise it would wait for all processes at every save. No setting turns that off everywhere: Orbax 0.12.8 takes
    jax's store for the signals between the threads of a save whenever there is one (`signaling_client`), under the
    same names in each process, so that two saves at once wait for ever; and its barriers and broadcasts ask
    `jax.process_count`, whatever `multiprocessing` says. Its own saves over processes are no way out: they need a disk
    that all machines share, and none of ours does with `checkpoint.gather`.
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


def boxes() -> int:
    """On how many machines they run, by the names that these give themselves."""
    return 1 if _team is None else len(set(_team.line.hosts))


def address() -> str:
    """The address by which the others reach this one."""
    return _team.address


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
    reply, leaders = f"aurora/{_team.decisions}/reply", agreed(lambda: mine)
    if leads():
        known = {number: json.loads(_team.wait(f"{reply}/{number}")) for number in range(1, count())}
    else:
        known = {index(): mine}
        _team.client.key_value_set(f"{reply}/{index()}", json.dumps(mine))
    differ = [number for number, theirs in known.items() if theirs != leaders]
    if differ:
        shown = f"{leaders} and {known[differ[0]]}"
        raise UserError(
            f"{name(differ[0])} has another {what} than {name(0)}", where="environment",
            why=shown if len(shown) < 200 else None,
            hint="start every process with the same command, files and packages, on machines of one kind",
        )  # fmt: skip


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


def post(key: str, value: str) -> None:
    """Leave a message for the other processes, from any thread. A key is used once."""
    _team.client.key_value_set(key, value)


def await_post(key: str) -> str:
    """The message that a process leaves under a key, from any thread; waits for it. `Ended` if a process left."""
    return _team.wait(key)


def meet() -> None:
    """Wait until every process has called this."""
    refuse_unlike("place", "here")


@contextlib.contextmanager
def together(facts: dict):
    """Join the others. If this process leaves the context early, it notifies the others, so that none waits forever."""
    join(facts)
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

    _team.line.part()
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
    _team.line.leave(why, status)
    if leads():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _team.client.key_value_set(f"aurora/{_team.decisions}", json.dumps({"ended": why, "status": status}))
            if _team.line.left is None:
                _part()
    # Another leaves at once: the leader may be in a collective, which only the end of this process interrupts.


def lost(error: Exception) -> Ended | None:
    """The error of a collective that another process has left, as one line; None for any other error.

    Does not return if a process is lost: the line ends this one, with the name of the other.
    """
    text = str(error)
    if _team is None or not any(sign in text for sign in _SIGNS):
        return None
    _team.line.await_loss(_BROKEN_SECONDS)
    return Ended(*(_team.line.left or ("another process", text.splitlines()[0][:200])))


def tell(kind: str, **fields) -> None:
    """Send a message to all other processes. Does nothing in a single process."""
    if _team is not None:
        _team.line.tell(kind, **fields)


def on(kind: str, heard: Callable[[int, dict], None]) -> None:
    """Let `heard(process, message)` be called, in a thread, with each message of this kind that another sends."""
    if _team is not None:
        _team.heard[kind] = heard


def at_loss(call: Callable[[str], None]) -> None:
    """Let `call` be called with the name of a process that is lost, before this one is ended for it."""
    if _team is not None:
        _team.line.at_loss = call


def name(process: int) -> str:
    """How a message calls a process: its number and its machine."""
    return f"process {process}" if _team is None else _team.line.name(process)


def _ignore(process: int, message: dict) -> None:
    """What is done with a message that nobody listens for yet."""


def joined() -> bool:
    """Whether this process has joined others: at exit jax would wait for all of them, and crash without one."""
    return _team is not None
