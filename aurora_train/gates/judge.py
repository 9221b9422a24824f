"""The gates of a run, one after the other, and what follows if one fails: no export and no server, or an override.

What was found in the training texts is put on record in the run's chain, and is not searched for again while the data,
the evaluation sets and the settings are the same; so a run that was moved, and its export, pass where the data are not.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aurora_train.check import limits
from aurora_train.config.gates import NAMES, Gates
from aurora_train.errors import MissingExtra, UserError, nearest
from aurora_train.files import read_json
from aurora_train.gates import decontamination, secrets
from aurora_train.lineage import begin, chain
from aurora_train.lineage.following import catch_up
from aurora_train.record.metrics import EventLog
from aurora_train.record.progress import silent
from aurora_train.run import Run
from aurora_train.train.beginning import Beginning
from aurora_train.train.rehearsal import make_recipe
from aurora_train.units import counted, decimal

_NAMED = 3  # things found that a message names
_MANY = 1000  # of which no more are searched for
HINT = '--override GATE --because "REASON" goes on for one command, and puts the reason on record'


class GateFailed(limits.LimitExceeded):
    """A run does not pass one of the gates of its config."""


class Verdict(NamedTuple):
    """`says`: what was found, a line each; `basis`: what decides the verdict, for one that took a search; else {}."""

    gate: str
    passed: bool
    says: list[str]
    basis: dict[str, Any] = {}


def keep(found, by: str, *, override=(), because: str | None = None, limits_reason: str | None = None, recipe=None):
    """Hold a run to its gates before a command `by`; print what was overridden.

    `found` is loaded or opened: a run, or anything else, which has no gates. Raises GateFailed for a gate that fails
    and is not in `override`, LimitExceeded likewise for limits, and UserError for an override that says nothing.
    """
    reason = _reasons(list(override), because, limits_reason)
    run = Run(found.run)
    if not run.config.is_file():
        return
    recipe = recipe or make_recipe(found.config)
    lines = limits.exceeded(recipe, limits.scored(run, found.step))
    said = limits.refuse_exceeded(run, lines, by, reason.pop("limits", None), found.step)
    verdicts = judged(run, found.config, found.step)
    failed = [one for one in verdicts if not one.passed]
    open_ones = [one for one in failed if one.gate not in reason]
    if open_ones:
        raise GateFailed(
            f"this run does not pass {' and '.join(f'the gate `{one.gate}`' for one in open_ones)}, and so there is no "
            f"`aurora {by}` of it", where=str(run.folder),
            why="\n  ".join(f"{one.gate}: {line}" for one in open_ones for line in one.says), hint=HINT,
        )  # fmt: skip
    for one in failed:
        with EventLog(run.events) as events:
            events.event("gate_overridden", found.step, by=by, gate=one.gate, reason=reason[one.gate], says=one.says)
        said += [f"gate overridden: {one.gate}: {line} ({reason[one.gate]})" for line in one.says]
    said += [f"the gate `{name}` is passed or not set: --override had nothing to override"
             for name in reason if name not in [one.gate for one in failed]]  # fmt: skip
    catch_up(run)
    for line in said:
        print(line, file=sys.stderr)


def _reasons(override: list[str], because: str | None, limits_reason: str | None) -> dict[str, str]:
    """The reason for each gate that is overridden. UserError for a gate that does not exist and for a blank reason."""
    for name in override:
        if name not in NAMES:
            raise UserError(f"there is no gate {name!r}", where="--override",
                            hint=nearest(name, NAMES, f"one of {', '.join(NAMES)}"))  # fmt: skip
    if override and not (because or "").strip():
        raise UserError("an override needs a reason, which is put on record", where="--override",
                        hint='--because "for our own use only"')  # fmt: skip
    if because is not None and not override:
        raise UserError("a reason for no gate", where="--because", hint="--override GATE names the gate")
    limits.refuse_blank(limits_reason)
    reasons = dict.fromkeys(override, because or "")
    return reasons | ({"limits": limits_reason} if limits_reason is not None else {})


def judged(run: Run, config, step: int) -> list[Verdict]:
    """The verdict of each gate that the config sets, but for the limits, which are judged apart."""
    gates: Gates = config.gates
    verdicts = []
    if gates.licence is not None:
        verdicts.append(_licence(run, gates.licence))
    if gates.score:
        verdicts.append(_score(limits.scored(run, step), gates.score, step, run))
    if gates.decontamination is not None:
        verdicts.append(_searched(run, config, "decontamination", gates.decontamination.model_dump(), _decontaminated))
    if gates.secrets:
        verdicts.append(_searched(run, config, "secrets", {}, _without_secrets))
    return verdicts


# ---- what the record decides


def _licence(run: Run, allowed: list[str]) -> Verdict:
    """Of the run's own data, and of everything that the chains of its parents name."""
    begun = next((one for one in _records(run) if one["kind"] == "begin"), None)
    if begun is None:
        known = read_json(run.provenance, {})
        begun = {"data": known.get("data"), "parents": begin.published_parents(known)}
    base = _base_licence(run)
    found = [*_licences(begun), *([base] if base else [])]
    known = ", ".join(allowed) or "those allowed"
    faults = [f"the licence of {of} is {name or 'not recorded'}, which is none of {known}"
              for of, name in found if name not in allowed]  # fmt: skip
    return Verdict("licence", bool(found) and not faults, faults or [
        f"the licence of {of} is {name}" for of, name in found] or ["no data and no licence are on record"])


def _licences(begun: dict) -> Iterator[tuple[str, str | None]]:
    data = begun.get("data") or {}
    if data:
        whole = data.get("licence")
        if isinstance(whole, str) and data.get("mix"):
            parts = [part.partition(": ") for part in whole.split("; ")]
            yield from ((f"the data `{name}`", licence) for name, _, licence in parts)
        else:
            yield f"the data `{Path(str(data.get('source'))).name}`", whole
    for parent in begun.get("parents") or []:
        held = (parent.get("lineage") or {}).get("begin")
        if held:
            yield from _licences(held)


def _base_licence(run: Run) -> tuple[str, str | None] | None:
    """Of the open model that a run started from, which its facts name."""
    from aurora_train import facts

    origin = (facts.read(run.facts) or {}).get("origin")
    return None if not origin else (f"the model `{origin.get('name')}`", origin.get("licence"))


def _score(scores: dict, bounds: dict, step: int, run: Run) -> Verdict:
    faults, fine = [], []
    for name, bound in bounds.items():
        value = scores.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            near = nearest(name, [one for one in scores if isinstance(scores[one], int | float)])
            faults.append(f"the score of step {step} has no `{name}`: " + (
                near or f"`aurora evaluate {run.folder.name} --step {step}` makes one"))  # fmt: skip
        elif bound.min is not None and not value >= bound.min:
            faults.append(f"{name} is {decimal(float(value))}, less than gates.score.{name}.min ({bound.min:g})")
        elif bound.max is not None and not value <= bound.max:
            faults.append(f"{name} is {decimal(float(value))}, more than gates.score.{name}.max ({bound.max:g})")
        else:
            fine.append(f"{name} is {decimal(float(value))}")
    return Verdict("score", not faults, faults or fine)


# ---- what has to be searched


def _searched(run: Run, config, gate: str, settings: dict, search: Callable) -> Verdict:
    """The verdict on record if it is of the same data, sets and settings; otherwise a new one, which is recorded."""
    known = read_json(run.provenance, {})
    fingerprint = (known.get("data") or {}).get("fingerprint") or _fingerprint_on_record(run)
    basis, missing = {"data": fingerprint, **_without_paths(settings)}, []
    if sets := settings.get("sets"):
        found = {name: _digest(Path(path)) for name, path in sets.items()}
        basis["sets"], missing = found, [name for name, one in found.items() if one is None]
    for record in reversed(_records(run)):
        if record["kind"] == "gate" and record["gate"] == gate and _same(record["basis"], basis):
            return Verdict(gate, record["passed"], record["says"])
    if missing:
        return Verdict(gate, False, [f"the evaluation set {name} is not here ({sets[name]})" for name in missing])
    try:
        texts = _training_texts(run, config)
        passed, says = search(config, texts)
    except MissingExtra:
        raise
    except UserError as fault:
        return Verdict(gate, False, [f"it cannot be checked here: {str(fault).splitlines()[0]}"])
    if not run.is_export():
        record = {"kind": "gate", "gate": gate, "passed": passed, "says": says, "basis": basis}
        with contextlib.suppress(OSError, UserError):  # the folder may be read-only: it is searched again next time
            catch_up(run)
            if run.lineage.exists():
                chain.add(run.lineage, [record])
    return Verdict(gate, passed, says, basis)


def _fingerprint_on_record(run: Run) -> str | None:
    return next(((one.get("data") or {}).get("fingerprint") for one in _records(run) if one["kind"] == "begin"), None)


def _records(run: Run) -> list[dict]:
    return chain.read(run.lineage) if run.lineage.exists() else []


def _without_paths(settings: dict) -> dict:
    return {name: one for name, one in settings.items() if name != "sets"}


def _digest(path: Path) -> str | None:
    """sha256 over an evaluation set; None if it is not here."""
    if path.is_file():
        return chain.file_digest(path)
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else []
    named = "".join(f"{one.relative_to(path).as_posix()} {chain.file_digest(one)}\n" for one in files)
    return chain.digest(named.encode()) if files else None


def _same(recorded: dict, basis: dict) -> bool:
    """Whether a verdict on record was of this; a set that is not here is taken for the one that was searched for."""
    sets = basis.get("sets")
    if sets is not None:
        known = recorded.get("sets") or {}
        if known.keys() != sets.keys() or any(now not in (None, known[name]) for name, now in sets.items()):
            return False
    return {**recorded, "sets": 0} == {**basis, "sets": 0}


def _training_texts(run: Run, config) -> Callable[[], Iterator[tuple[str, str]]]:
    """The texts that a run was trained on, again and again. UserError if they are not here, or not the same."""
    if run.is_export():
        raise UserError("an export has no training data")
    beginning = Beginning.of(config, run)
    beginning.ready(silent)  # as a resume does, so that other data than the run's are refused
    return beginning.recipe.texts


def _decontaminated(config, texts: Callable) -> tuple[bool, list[str]]:
    asked = config.gates.decontamination
    outcomes = decontamination.search(asked.sets, asked.ngram, texts())
    says, passed = [], True
    for name, one in outcomes.items():
        share = len(one.found) / one.searched if one.searched else 0.0
        line = f"{name}: {len(one.found)} of {counted(one.searched, 'item')} in the training texts"
        line += f", {one.too_short} too short to tell" if one.too_short else ""
        if not one.searched:
            passed, line = False, f"{name}: no item is long enough to be searched for"
        elif share > asked.max_share:
            passed = False
            shown = itertools.islice(one.found.items(), _NAMED)
            line += ": " + "; ".join(f"{place} in {source}" for place, source in shown)
        says.append(line)
    return passed, says


def _without_secrets(config, texts: Callable) -> tuple[bool, list[str]]:
    found = list(itertools.islice(secrets.search(texts()), _MANY))
    if not found:
        return True, ["no key or password of a known format is in the training texts"]
    more = f"and {len(found) - _NAMED} more" if len(found) < _MANY else "and many more"
    return False, found[:_NAMED] + ([more] if len(found) > _NAMED else [])
