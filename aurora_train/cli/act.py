"""`aurora act` and `aurora stream`, one verb under two names: a run answers requests over a local socket."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import (
    BecauseOption,
    GateOption,
    HostOption,
    JsonOption,
    OverrideOption,
    RunArgument,
    StepOption,
    TokenFileOption,
    print_json,
    until_asked,
)

EXAMPLE = "aurora act runs/policy --port 7411"
EXAMPLE_OF_STREAM = "aurora stream runs/decoder --socket decoder.sock"


def command(
    context: typer.Context,
    run: RunArgument,
    port: Annotated[int, typer.Option("--port", help="The port of this machine; 0 takes any that is free.")] = 7411,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="Listen on this Unix socket, not on a port.")
    ] = None,
    host: HostOption = None,
    token_file: TokenFileOption = None,
    step: StepOption = None,
    override_limits: OverrideOption = None,
    override: GateOption = None,
    because: BecauseOption = None,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two lines of latencies.")] = 10.0,
    json: JsonOption = False,
):
    """Answer requests, one line of JSON each, over a local socket, until Ctrl-C or SIGTERM.

    A robot policy answers observations with actions, a neural decoder answers bins of spikes; docs/robots.md has the
    protocol. The latencies of the answers are printed while it runs and at the end.
    """
    from aurora_train.check import limits
    from aurora_train.gates.judge import keep
    from aurora_train.lineage.following import catch_up
    from aurora_train.loading import load
    from aurora_train.run import Run
    from aurora_train.serve.address import address
    from aurora_train.serve.lines import LineServer

    verb, place = context.info_name, address(host, port, socket, token_file)
    trained = load(run, step, by=verb, at_once=True)
    recipe, folder = trained.recipe, Run(trained.run)
    scores = limits.scored(folder, trained.step)
    known = limits.exceeded(recipe, scores)
    keep(trained, verb, override=override or (), because=because, limits_reason=override_limits, recipe=recipe)
    with until_asked() as stop, contextlib.closing(LineServer(_answering(trained), place)) as server:
        print(f"{trained!r} listens on {server.place}; Ctrl-C ends it", file=sys.stderr)
        server.run(stop, lambda line: print(line, file=sys.stderr), every)
    found = server.latencies.summary()
    found["exceeded"] = [line for line in limits.exceeded(recipe, scores | found) if line not in known]
    status, said = 0, []
    if found["exceeded"]:  # by the latencies
        status, said = limits.judged(folder, found["exceeded"], verb, override_limits, trained.step)
        catch_up(folder)
    print_json(found) if json else print(server.latencies.line())
    for line in said:
        print(line, file=sys.stderr)
    return status


def _answering(trained):
    """What makes the function that answers one client; a mistake in a user's recipe is one message."""
    from aurora_train.check.blame import recipe_code

    predict = trained.evaluator.predictor(trained.state)

    def connect():
        with recipe_code(trained.recipe, "responder"):
            return trained.recipe.responder(predict)

    return connect
