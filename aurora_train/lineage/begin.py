"""The first record of a chain: everything that a run began with, from the files of its folder."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from aurora_train.config.yaml import read_file
from aurora_train.data.prepared import MANIFEST
from aurora_train.errors import UserError
from aurora_train.files import read_json
from aurora_train.lineage import chain
from aurora_train.lineage.publish import of_config, without_folders
from aurora_train.run import Run

_DATA_ONLY_HERE = ("folder",)


def record(run: Run) -> dict[str, Any]:
    """The record "begin": config, code, packages, data with licence and shards, tokenizer, seed, hardware, parents."""
    known = read_json(run.provenance, {})
    config = read_file(run.config).value
    data = known.get("data") or {}
    return {
        "kind": "begin", "run": run.folder.name, "created": known.get("created"),
        "recipe": known.get("recipe"), "config": of_config(config), "seed": known.get("seed"),
        "code_sha256": known.get("code_sha256"), "versions": known.get("versions") or {}, "packages": packages(),
        "data": without_folders({name: one for name, one in data.items() if name not in _DATA_ONLY_HERE}),
        "shards": shards(data), "facts_sha256": known.get("facts_sha256"), "tokenizer": data.get("tokenizer"),
        "machine": known.get("machine"), "parents": published_parents(known),
    }  # fmt: skip


def packages() -> dict[str, str]:
    """Every installed Python package with its version, by the names of their records: reading these takes 0.15 s."""
    found: dict[str, str] = {}
    for place in sys.path:
        with contextlib.suppress(OSError):
            for name in os.listdir(place or "."):
                package, _, version = name.removesuffix(".dist-info").partition("-")
                if name.endswith(".dist-info") and version:
                    found.setdefault(package.replace("_", "-"), version)  # the first on the path is what is imported
    return dict(sorted(found.items()))


def shards(data: dict) -> dict[str, dict]:
    """The files of prepared data, each with its bytes and xxh3, while they are there; {} otherwise."""
    folder = data.get("folder")
    if not folder:
        return {}
    try:
        manifest = read_json(Path(folder) / MANIFEST, {})
    except (UserError, OSError):
        return {}
    return manifest.get("files", {}) if manifest.get("key") == data.get("key") else {}


def parents_in(provenance: dict) -> list[dict]:
    """The parents in a run's provenance, that of the whole model first."""
    return ([provenance["parent"]] if provenance.get("parent") else []) + provenance.get("parents", [])


def published_parents(provenance: dict) -> list[dict]:
    """Those parents as they go out, each with the beginning and the head of its own chain, if it has one."""
    return [_parent(one) for one in parents_in(provenance)]


def _parent(known: dict) -> dict[str, Any]:
    shown = {"from": known.get("hub") or Path(known["from"]).name}
    shown |= {name: known[name] for name in ("prefix", "revision", "step", "digest", "facts_sha256") if name in known}
    path = Path(known["from"]) / chain.NAME
    try:
        records = chain.read(path)
    except (UserError, OSError):  # a file of weights, or a chain whose damage its own `--verify` reports
        records = []
    if records:
        head = chain.head_of(path)
        shown["lineage"] = {"records": head.count, "head": head.sha256, "begin": _short(records[0])}
    return shown


def _short(begin: dict) -> dict:
    """The beginning of a parent, without what is long and in the parent's own chain."""
    return {name: one for name, one in begin.items() if name not in ("packages", "shards", "config", "prev")}
