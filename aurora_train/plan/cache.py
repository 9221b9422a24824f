"""A cache of plans, keyed by everything that could change them: config, code, versions, machine, budget and rates."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from aurora_train import files
from aurora_train.errors import UserError
from aurora_train.plan.plan import Plan


def key_of(parts: dict) -> str:
    """sha256 hex over JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def load(key: str) -> Plan | None:
    """The plan stored under this key, or None. An unreadable file counts as missing and is overwritten later."""
    try:
        known = files.read_json(_file(key))
        plan = Plan.from_json(known["plan"]) if known and known.get("key") == key else None
    except (OSError, UserError, KeyError, TypeError):
        return None
    if plan is None:
        return None
    return replace(plan, details=plan.details | {"cached": True})


def store(key: str, plan: Plan) -> None:
    """Store a plan. If the cache cannot be written, later starts plan again; the run does not fail."""
    try:
        files.write_json(_file(key), {"key": key, "plan": plan.to_json()})
    except (OSError, UserError):
        pass


def _file(key: str) -> Path:
    return files.cache_folder() / "plans" / f"{key[:32]}.json"
