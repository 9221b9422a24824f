"""The command line in this process: what needs no process of its own is quicker so."""

from __future__ import annotations

from aurora_train.cli.main import main


def aurora(*arguments) -> int:
    """The exit status of `aurora ARGUMENTS`; what it prints goes where the test's own output goes."""
    return main([str(argument) for argument in arguments])
