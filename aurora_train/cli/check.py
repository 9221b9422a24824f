"""`aurora check`: validate a config and print what a run of it would use."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from aurora_train.check.intent import refuse_adapters_on_nothing, refuse_missing_start
from aurora_train.check.remarks import remarks_on_config
from aurora_train.cli.common import ConfigArgument, JsonOption, Overrides, print_json
from aurora_train.config import config_hash, derived_lines, dump, load, tree_of
from aurora_train.config.yaml import show_path
from aurora_train.machine.precision import expected
from aurora_train.machine.profile import prepare_environment
from aurora_train.record.progress import preparation

EXAMPLE = "aurora check quickstart train.steps=10"


def command(
    config: ConfigArgument,
    overrides: Overrides = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Prepare the data first.")] = False,
    rehearse: Annotated[
        bool | None,
        typer.Option(help="Call every part of the recipe once, in seconds; by default for your own file or with init."),
    ] = None,
    json: JsonOption = False,
):
    """Check a config without training; print it resolved, with every derived value and its formula.

    If its data are prepared, a recipe of your own, or one that starts from another run, is rehearsed: its parameters
    are compared with those of the run; a batch is made twice and compared; the loss, the predictions, the score and the
    samples are each computed once.
    """
    checked = load(config, overrides or ())
    refuse_missing_start(checked)
    refuse_adapters_on_nothing(checked)
    digest, remarks = config_hash(checked), remarks_on_config(checked)
    if prepare or (rehearse if rehearse is not None else not checked.recipe_bundled or checked.init.sources):
        prepare_environment(checked)
        from aurora_train.train.session import rehearse_config

        with preparation(quiet=json) as progress:
            skipped = rehearse_config(checked, progress, prepare=prepare)
        remarks += skipped or ["rehearsed: the data, the loss, the predictions, the score and the samples"]
    if json:
        derived = [asdict(one) for one in checked.derived]
        print_json({
            "config": tree_of(checked), "derived": derived, "overruled": checked.overruled, "remarks": remarks,
            "hash": digest, "source": str(checked.source),
        })  # fmt: skip
        return
    print(f"# {show_path(checked.source)} is valid; resolved, config hash {digest[:8]}")
    for line in derived_lines(checked.derived):
        print(f"# derived {line}")
    for line in [*checked.overruled, *remarks, expected(checked)]:
        if line is not None:
            print(f"# {line}")
    print(dump(checked), end="")
