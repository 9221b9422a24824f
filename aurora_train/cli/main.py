"""The command `aurora`: finds the verb, runs it, and turns a failure into one message and an exit status.

A verb is one module of this package with either `command`, a function for typer, and `EXAMPLE`, one line for its help;
or `app`, a typer group. Only the requested verb is imported, and no verb imports jax at module level, so that
`aurora --help` and `aurora check` answer at once.

Exit status: 0 done, 1 a failure the verb reports, 2 something the user can fix, 4 a limit is exceeded or a gate fails,
75 stopped and resumable, 130 interrupted; all of them are in docs/always-on.md.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from importlib import metadata

import typer

from aurora_train.errors import UserError
from aurora_train.machine import processes
from aurora_train.machine.hugepages import restart_with_huge_pages
from aurora_train.units import printable

# `train.signals.EXIT_STOPPED` and `always_on.guard.EXIT_LOW_MEMORY`, repeated here because those modules import jax.
_STOPPED = (75, 77)
_INTERRUPTED = 130  # 128 and SIGINT

VERBS = (
    "train", "plan", "resume", "launch", "unit", "generate", "evaluate", "report", "checkpoints", "verify", "recipes",
    "check", "schema", "inspect", "inspect-batch", "profile", "doctor", "energy", "runs", "compare", "sweep",
    "lineage", "import", "export", "chat", "serve", "act", "stream", "watch",
)

_IN_ANOTHER = {  # verbs in the file of another
    "inspect-batch": ("inspect", "of_a_run", "EXAMPLE_OF_A_RUN"), "stream": ("act", "command", "EXAMPLE_OF_STREAM"),
}

_STEPPING = ("train", "resume", "profile", "evaluate")  # these run compiled steps for a long time

# The base class of typer's own errors (an unknown option, a missing argument) in every release we support.
_UsageError = typer.BadParameter.__base__

_STAY_HOME = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
}


# Thresholds of Python's garbage collector. With the default ones it takes a twentieth of a cold start, because tracing
# makes millions of objects that stay, and it may delay any step.
_COLLECT = (100_000, 20, 100)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    gc.set_threshold(*_COLLECT)
    sys.unraisablehook = _told_again
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.getLogger("aurora_train").addFilter(_printable)
    if not logging.getLogger().handlers:  # else the first library that logs adds one, which writes `WARNING:root:`
        logging.getLogger().addHandler(logging.lastResort)
    for name, value in _STAY_HOME.items():
        os.environ.setdefault(name, value)
    try:
        status = _app(arguments)(arguments, prog_name="aurora", standalone_mode=False)
        sys.stdout.flush()
        if status == _INTERRUPTED:  # typer turns a KeyboardInterrupt into this status
            print("interrupted", file=sys.stderr)
        return status if isinstance(status, int) else 0
    except UserError as fault:
        print(f"error: {printable(str(fault))}", file=sys.stderr)  # it may quote the data
        return fault.status
    except _UsageError as fault:
        fault.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe; the interpreter's own flush at exit must not report that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # the status that typer gives a pipe that breaks inside a verb


def _told_again(lost) -> None:
    """Python's hook for an exception that it can raise nowhere. jax (0.10.2) has a callback in garbage collection: a
    Ctrl-C that arrives within it would be printed and lost, and is therefore sent again once the callback is over."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(lost)
    try:
        threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    except KeyboardInterrupt:  # on a busy machine it is there before `start` returns, and would be lost here as well
        _told_again(lost)


def _printable(record: logging.LogRecord) -> bool:
    """A filter that makes a record's message `printable`: it may name files, or quote the data."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _verb(arguments: list[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


def _app(arguments: list[str]) -> typer.Typer:
    app = typer.Typer(
        help="Train mid-sized models end to end on one compact supercomputer.",
        epilog="Example: aurora train quickstart",
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"]},
    )

    @app.callback()
    def root(version: bool = typer.Option(False, "--version", is_eager=True, callback=_print_version,
                                          help="Print the version and exit.")):
        pass

    asked = _verb(arguments)
    for verb in (asked,) if asked in VERBS else VERBS:
        _add(app, verb)
    return app


def _add(app: typer.Typer, verb: str) -> None:
    file, function, example = _IN_ANOTHER.get(verb, (verb, "command", "EXAMPLE"))
    module = importlib.import_module(f"aurora_train.cli.{file}")
    if hasattr(module, "app"):
        app.add_typer(module.app, name=verb)
    else:
        settings = getattr(module, "SETTINGS", None)
        app.command(verb, epilog=f"Example: {getattr(module, example)}", context_settings=settings)(
            getattr(module, function)
        )


def _print_version(asked: bool) -> None:
    if asked:
        try:
            print(f"aurora_train {metadata.version('aurora_train')}")
        except metadata.PackageNotFoundError:
            print("aurora_train from a checkout that is not installed")
        raise typer.Exit()


def _holds_up(thread: threading.Thread) -> bool:
    """Whether the interpreter would wait for this thread at exit."""
    return not thread.daemon and thread is not threading.main_thread()


def _status() -> int:
    try:
        return main()
    except Exception:
        if not processes.joined():
            raise
        traceback.print_exc()
        return 1


def run() -> None:
    """The entry point of the process: run `main` and exit with its status."""
    if _verb(sys.argv[1:]) in _STEPPING:
        restart_with_huge_pages()
    status = _status()
    sys.stdout.flush()
    sys.stderr.flush()
    if status in (*_STOPPED, _INTERRUPTED) or processes.joined() or any(map(_holds_up, threading.enumerate())):
        # Skip the interpreter's shutdown. After a stop, XLA may still be compiling in a thread, and shutting down
        # around it would crash. A failed save may leave an Orbax thread that waits forever; all that matters is on
        # disk by now. And one of several processes must not wait for the others, as jax would do at exit.
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
