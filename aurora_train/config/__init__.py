"""YAML and overrides in, one typed, frozen, checked Config out; every error names `file:line:column`.

    config = load("quickstart", ["train.steps=10"])

Imports neither jax nor flax, so that checking a config takes a moment.
"""

from aurora_train.config.deriving import derived_lines
from aurora_train.config.fields import Section, WrongKey, parse_bytes, setting
from aurora_train.config.load import config_class, load, load_resolved, load_values
from aurora_train.config.resolved import config_hash, diff, dump, dump_without_folders, flat, json_schema, tree_of
from aurora_train.config.schema import Core as Config

__all__ = [
    "Config", "Section", "WrongKey", "config_class", "config_hash", "derived_lines", "diff", "dump",
    "dump_without_folders", "flat", "json_schema", "load", "load_resolved", "load_values", "parse_bytes", "setting",
    "tree_of",
]
