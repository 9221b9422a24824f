"""A process that has imported what a run imports and forks one child for each call of the command line.

Importing jax, flax, Orbax and matplotlib is a third of what a tiny run in a process of its own costs. The server has
imported them and nothing more: no backend is initialised and no thread of its own runs, so that a child is what
`python -m aurora_train.cli.main` is at that point. It is a real process with its own pid, working directory,
environment and pipes: it can be killed, and it ends as any interpreter does. Its parent is the server, and all
children of one server share one hash seed and one `/proc/PID/cmdline`: what is about these calls `Aurora.command`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

# The first imports jax, flax, Orbax and grain; matplotlib loads the others when it draws.
_IMPORTED = ("aurora_train.train.start", "aurora_train.tools.report", "aurora_train.tools.report_plan",
             "matplotlib.figure", "matplotlib.backends.backend_svg")  # fmt: skip
# Libraries read these when they are imported, so each setting of them has a server of its own.
_READ_AT_IMPORT = ("JAX_", "XLA_", "TF_", "GLIBC_", "MALLOC_", "LD_", "PYTHON", "OMP_", "OPENBLAS_", "MPL")
_OF_ONE_CHILD = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}  # read by us when a run starts


class Forked(subprocess.Popen):
    """`aurora ARGUMENTS` in a child of a fork server; used like the Popen of a process that was started anew."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid,
                       umask, start_new_session, process_group):  # fmt: skip
        assert preexec_fn is None and not pass_fds and process_group == -1, "a child of the server has none of these"
        self._report, theirs = socket.socketpair()
        request = {"arguments": args, "folder": str(cwd), "environment": env, "session": start_new_session}
        pipes = [fd if fd != -1 else own for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        socket.send_fds(_server(read_at_import(env)), [json.dumps(request).encode()], [*pipes, theirs.fileno()])
        theirs.close()
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self.pid, self._child_created = self._reported(), True

    def _try_wait(self, wait_flags):
        """(pid, status) as of os.waitpid, which serves parents alone: the server passes on what it gets."""
        if wait_flags & os.WNOHANG and not select.select([self._report], [], [], 0)[0]:
            return 0, 0
        status = self._reported()
        self._report.close()
        return self.pid, status

    def _reported(self) -> int:
        number = self._report.recv(4)
        if not number:
            raise ChildProcessError("the fork server has ended")
        return int.from_bytes(number, "little")

    def _internal_poll(self, _deadstate=None, **_):
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid == self.pid:
                self._handle_exitstatus(status)
        return self.returncode


def read_at_import(environment: dict[str, str]) -> str:
    """What decides which server forks for this environment, as JSON."""
    chosen = {k: v for k, v in environment.items() if k.startswith(_READ_AT_IMPORT) and k not in _OF_ONE_CHILD}
    return json.dumps(chosen, sort_keys=True)


@functools.cache
def _server(key: str) -> socket.socket:
    """The connection to a running server whose imports see these variables."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_READ_AT_IMPORT)} | json.loads(key)
    # What `restart_with_huge_pages` would give a run by starting it again, which a child of a fork cannot do.
    environment["GLIBC_TUNABLES"] = environment.get("GLIBC_TUNABLES") or "glibc.malloc.hugetlb=1"
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], cwd=root, env=environment,
                               pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # fmt: skip
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def _serve(connection: socket.socket) -> dict | None:
    """Fork children until the tests end; returns twice, with the request in a child and None in the server."""
    reports: dict[int, tuple[int, socket.socket]] = {}  # by the pidfd of each living child
    while True:
        for fd in select.select([connection.fileno(), *reports], [], [])[0]:
            if fd in reports:
                pid, report = reports.pop(fd)
                os.close(fd)
                _pass_on(report, os.waitpid(pid, 0)[1])
                report.close()
                continue
            message, fds, *_ = socket.recv_fds(connection, 1 << 20, 4)
            if not message:
                return None
            pid = os.fork()
            if not pid:
                for other, (_, report) in reports.items():
                    os.close(other)
                    report.close()
                connection.close()
                os.close(fds.pop())
                for own, given in enumerate(fds):
                    os.dup2(given, own)
                    os.close(given)
                return json.loads(message)
            report = socket.socket(fileno=fds.pop())
            _pass_on(report, pid)
            reports[os.pidfd_open(pid)] = pid, report
            for given in fds:
                os.close(given)


def _pass_on(report: socket.socket, number: int) -> None:
    try:
        report.send(number.to_bytes(4, "little"))
    except BrokenPipeError:
        pass  # the test that started the child has ended and does not wait for it


def _become(request: dict) -> None:
    """Be what a new process would be: nothing of the server's own is left."""
    if request["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    tunables = os.environ["GLIBC_TUNABLES"]
    os.environ.clear()
    os.environ.update(request["environment"] | {"GLIBC_TUNABLES": tunables})
    main = import_module("aurora_train.cli.main")
    sys.argv[:] = [main.__file__, *request["arguments"]]
    sys.path.insert(0, request["folder"])
    sys.modules["numpy"].random.seed()  # as `random` does by itself: what nobody has seeded differs from run to run
    main.run()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close the connection
    del sys.path[0]  # this folder; a child has its working directory there
    for name in _IMPORTED:
        import_module(name)
    gc.freeze()  # or a collection in a child would copy the pages of all that is shared
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        _become(asked)
