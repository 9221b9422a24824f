"""`aurora launch`: start a run on several machines, or as several processes of this one, by one command."""

from __future__ import annotations

from typing import Annotated

import typer

from aurora_train.errors import UserError

EXAMPLE = "aurora launch --hosts box1,box2 quickstart train.steps=200 --run runs/first"
SETTINGS = {"allow_interspersed_args": False}  # what follows the config belongs to the command that is launched

_VERBS = ("train", "resume")


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG ...", help="As for `aurora train`; `resume RUN ...` continues a run."),
    ],
    hosts: Annotated[
        str | None, typer.Option("--hosts", metavar="A,B", help="Machines, reached by ssh; localhost is this one.")
    ] = None,
    processes_here: Annotated[
        int | None, typer.Option("--processes-here", metavar="N", min=1, help="N processes of this machine.")
    ] = None,
    interface: Annotated[
        str | None, typer.Option("--interface", metavar="NAME", help="The network interface, instead of the fastest.")
    ] = None,
    ssh: Annotated[str, typer.Option("--ssh", metavar="COMMAND", help="How to reach a machine.")] = "ssh",
    python: Annotated[
        str | None, typer.Option("--python", metavar="PATH", help="The Python of every machine, if not this one's.")
    ] = None,
):
    """Train on several machines: the same command on each, in the folder and with the Python of this one."""
    import sys

    if (hosts is None) == (processes_here is None):
        raise UserError(
            "where shall the processes run?", where="command line",
            hint="either --hosts A,B or --processes-here N",
        )  # fmt: skip
    arguments = arguments if arguments[0] in _VERBS else ["train", *arguments]
    names = ["localhost"] * processes_here if processes_here else [name.strip() for name in hosts.split(",")]
    if not all(names):
        raise UserError(f"a name is missing in {hosts!r}", where="--hosts", hint="--hosts box1,box2")
    if options := [name for name in names if name.startswith("-")]:  # ssh would take it for one of its own
        raise UserError(f"`{options[0]}` is no machine's name", where="--hosts", hint="--hosts box1,box2")
    _refuse_unreadable(*arguments, here="localhost" in names)
    from aurora_train.tools.launch import launch

    return launch(names, arguments, ssh=ssh, python=python or sys.executable, interface=interface)


def _refuse_unreadable(verb: str, *words: str, here: bool) -> None:
    """UserError, before a machine is reached, for what every process would refuse: an option, a config, an override.

    `here`: whether a process runs on this machine. If none does, what is not on its disk is left to the others.
    """
    import importlib
    from pathlib import Path

    from aurora_train.check.intent import for_resume
    from aurora_train.config import load

    alone = typer.Typer(add_completion=False)
    alone.command()(importlib.import_module(f"aurora_train.cli.{verb}").command)
    given = typer.main.get_command(alone).make_context(f"aurora {verb}", list(words)).params
    if verb == "resume" and (here or Path(given["run"]).exists()):
        for_resume(given["run"], given["overrides"] or [], given["allow_change"] or [])
    elif verb == "train" and (here or Path(given["config"]).exists() or "/" not in given["config"]):
        online = ["data.online=true"] if given["online"] else []
        load(given["config"], [*(given["overrides"] or ()), *online])
