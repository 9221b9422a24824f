"""How `train` and `resume` become one of several processes: the options for a start by hand, and the meeting."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

CoordinatorOption = Annotated[
    str | None,
    typer.Option("--coordinator", metavar="HOST:PORT", help="Several processes by hand: where process 0 waits."),
]
ProcessOption = Annotated[int | None, typer.Option("--process", metavar="I", help="The number of this one, from 0.")]
ProcessesOption = Annotated[int | None, typer.Option("--processes", metavar="N", help="How many there are.")]


@contextlib.contextmanager
def joined(config, **command):
    """In this context, the process has joined the others that train the same run, if there are any.

    `command`: what of the command line every process must have in common, besides the config.
    """
    from aurora_train.machine import processes

    facts = {}
    if processes.place().count > 1:
        from aurora_train.machine.profile import prepare_environment

        prepare_environment(config)
        with processes.told():
            facts = _facts(config, command)
    with processes.together(facts):
        yield


def _facts(config, command: dict) -> dict:
    import tempfile

    from aurora_train.files import cache_folder
    from aurora_train.machine.unlike import facts_of, flat
    from aurora_train.run import code_hash, versions

    return facts_of(
        command=command, config=flat(config.model_dump(mode="json")), versions=versions(),
        code={"aurora_train": code_hash(), "recipe": config.recipe_sha256},
        folders=[cache_folder(), tempfile.gettempdir()],
    )
