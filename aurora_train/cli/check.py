"""`aurora check`: validate a config and print what a run of it would use."""

from __future__ import annotations

from dataclasses import asdict

from aurora_train.cli.common import ConfigArgument, JsonOption, Overrides, print_json
from aurora_train.config import config_hash, dump, load, tree_of
from aurora_train.config.yaml import show_path, write_flow

EXAMPLE = "aurora check quickstart train.steps=10"


def command(config: ConfigArgument, overrides: Overrides = None, json: JsonOption = False):
    """Check a config without running it; print it resolved, with every derived value and its formula."""
    checked = load(config, overrides or ())
    digest = config_hash(checked)
    if json:
        derived = [asdict(one) for one in checked.derived]
        print_json({"config": tree_of(checked), "derived": derived, "hash": digest, "source": str(checked.source)})
        return
    print(f"# {show_path(checked.source)} is valid; resolved, config hash {digest[:8]}")
    for one in checked.derived:
        print(f"# derived {one.key} = {write_flow(one.value)}: {one.formula} ({one.source})")
    print(dump(checked), end="")
