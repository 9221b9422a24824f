"""Whether a run, or an export, is what its chain says: each edit has a line that names the file or the record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aurora_train.checkpoint import audit, durable
from aurora_train.errors import UserError
from aurora_train.files import read_json
from aurora_train.interop.source import digest as foreign_digest
from aurora_train.interop.source import is_foreign
from aurora_train.lineage import begin, chain, signing
from aurora_train.lineage.following import digests, is_fixed, manifest_digest
from aurora_train.run import Run

_TRAINING, _ENDED = ("start", "resume"), ("finish", "stop")


class Found(NamedTuple):
    """`faults`: a line for each edit; `notes`: what could not be checked, and what is not a fault."""

    faults: list[str]
    notes: list[str]
    head: str
    count: int


def verify(folder: Path, key: Path | None = None) -> Found:
    """Check a folder against its chain, and with a public key against its signature. Reads every byte.

    UserError if the folder has no chain.
    """
    path = folder / chain.NAME
    held = chain.lines(path)
    if not path.exists():
        raise no_chain(folder)
    faults, notes = chain.faults(held), []
    torn = path.stat().st_size - sum(map(len, held))
    if torn:
        faults.append(f"{chain.NAME} ends with {torn} bytes that are no record: its end was cut, or a kill tore it")
    records = [record for line in held if (record := chain.decoded(line)) is not None]
    faults += _of_a_run(Run(folder), records, notes) if _is_run(folder) else _of_an_export(folder, records)
    signed = (folder / signing.SIGNATURE).is_file()
    if key is not None:
        faults += _of_the_signature(folder, key, records)
    elif signed:
        notes.append(f"the signature ({signing.SIGNATURE}) was not checked: --key PUBLIC_KEY checks it")
    else:
        notes.append("nothing is signed: whoever can write the folder could have written another chain")
    return Found(list(dict.fromkeys(faults)), notes, chain.digest(held[-1]) if held else "", len(held))


def no_chain(folder: Path) -> UserError:
    """The error of a folder without a lineage."""
    hint = "a run gets one when it is trained or resumed, and an export when it is made"
    return UserError(f"there is no {chain.NAME}", where=str(folder), hint=hint)


def _is_run(folder: Path) -> bool:
    run = Run(folder)
    return run.config.is_file() and not run.is_export()


# ---- a run


def _of_a_run(run: Run, records: list[dict], notes: list[str]) -> Iterator[str]:
    yield from _events(run, records, notes)
    yield from _files(run, records, notes)
    yield from _checkpoints(run, records, notes)
    yield from _parents(run, records, notes)


def _events(run: Run, records: list[dict], notes: list[str]) -> Iterator[str]:
    lines, position = chain.lines(run.events), 0
    for record in records:
        if record["kind"] == "departed":
            yield (f"events.jsonl was not what the chain had when the run went on (record {record.get('n')}): it was "
                   "changed before that")  # fmt: skip
            position = record.get("lines", position)
        elif "event" in record:
            what = f"{record['kind']}, record {record.get('n')} of the chain"
            if position >= len(lines):
                yield f"events.jsonl:{position + 1} is missing: {what}"
            elif chain.digest(lines[position]) != record["event"]:
                yield f"events.jsonl:{position + 1} is not the event that the chain has there ({what})"
            position += 1
    if len(lines) > position:  # a verb that only reads a run leaves its events to the next one that writes the chain
        notes.append(f"events.jsonl:{position + 1} and what follows are not in the chain: newer than it, or it was cut")


def _files(run: Run, records: list[dict], notes: list[str]) -> Iterator[str]:
    known: dict[str, str | None] = {}
    for record in records:
        if record["kind"] == "files":
            known |= record.get("files", {})
    states = [record["kind"] for record in records if record["kind"] in (*_TRAINING, *_ENDED)]
    ended = bool(states) and states[-1] in _ENDED
    if not ended:
        notes.append("the newest process has not ended in order: what it writes while it trains is on record up to "
                     "its events")  # fmt: skip
    now = digests(run, ended=True)
    for name, recorded in known.items():
        if recorded is None or not (ended or is_fixed(name)):
            continue
        if name not in now:
            yield f"{name} is missing"
        elif now[name] != recorded:
            yield f"{name} was changed after it was put on record"
    for name in now:
        if known.get(name) is None and is_fixed(name):
            yield f"{name} was added: the chain does not have it"
        elif known.get(name) is None and ended:
            notes.append(f"{name} is not on record: it was added")


def _checkpoints(run: Run, records: list[dict], notes: list[str]) -> Iterator[str]:
    saved = {record["step"]: record.get("checkpoint") for record in records if record["kind"] == "save"}
    for step in sorted(audit.sealed_steps(run.checkpoints)):
        folder = run.checkpoints / str(step)
        if step not in saved:
            notes.append(f"checkpoint {step}: its save is not on record (a kill came between)")
        elif saved[step] != manifest_digest(folder):
            yield f"checkpoints/{step}/{durable.MANIFEST} was changed after it was put on record"
        for line in durable.faults(folder):
            yield f"checkpoints/{step}/{line}"


def _parents(run: Run, records: list[dict], notes: list[str]) -> Iterator[str]:
    """A parent that is here is held to the digest with which the run began."""
    recorded = {one.get("prefix", ""): one for one in (records[0].get("parents") or [] if records else [])}
    try:
        known = begin.parents_in(read_json(run.provenance, {}))
    except UserError:
        return  # `_files` reports it
    for parent in known:
        name, one = Path(parent["from"]).name, recorded.get(parent.get("prefix", ""))
        if one is None or (one.get("digest"), one.get("step")) != (parent.get("digest"), parent.get("step")):
            yield f"the parent {name} in provenance.json is not the one in the chain: one of them was swapped"
        if not Path(parent["from"]).exists():
            notes.append(f"the parent {name} is not here, and was not looked at")
        elif (now := _digest_of(Path(parent["from"]), parent.get("step"))) not in (None, parent.get("digest")):
            yield f"the parent {name} is not what this run began with: sha256 {now[:12]}, not {parent['digest'][:12]}"


def _digest_of(path: Path, step: int | None) -> str | None:
    """The digest of a parent as it lies here; None for one that cannot be read, or no longer has that checkpoint."""
    if step is not None:
        return durable.manifest(path / "checkpoints" / str(step)).get("digest")
    try:
        return foreign_digest(str(path)) if is_foreign(str(path)) else None
    except (UserError, OSError):
        return None


# ---- an export


def _of_an_export(folder: Path, records: list[dict]) -> Iterator[str]:
    exported = next((one for one in reversed(records) if one["kind"] == "export"), None)
    if exported is None:
        yield f"{chain.NAME} has no record of an export: its end was cut"
        return
    card = next((one for one in reversed(records) if one["kind"] == "card"), None)
    if card is None:
        yield f"{chain.NAME} has no record of the card: its end was cut"
    known: dict[str, Any] = {**exported.get("files", {}), **(card or {}).get("files", {})}
    now = files_of_an_export(folder)
    for name, recorded in known.items():
        if name not in now:
            yield f"{name} is missing"
        elif now[name] != recorded:
            yield f"{name} was changed after the export"
    for name in now:
        if name not in known:
            yield f"{name} was added after the export"
    for record in records[records.index(exported) + 1 :]:
        if record["kind"] not in ("card", "sign"):
            yield f"{chain.NAME}: record {record.get('n')} ({record['kind']}) came after the export"


def files_of_an_export(folder: Path) -> dict[str, str]:
    """sha256 of every file that an export's chain has, by name."""
    apart = (chain.NAME, signing.SIGNATURE, "events.jsonl")  # events: an override by whoever serves it
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in apart and path.is_file() and not name.startswith(".git"):
            found[name] = chain.file_digest(path)
    return found


# ---- the signature


def _of_the_signature(folder: Path, key: Path, records: list[dict]) -> Iterator[str]:
    signed = [number for number, record in enumerate(records) if record["kind"] == "sign"]
    if not signed:
        yield f"{chain.NAME} does not end with a signature's record: its end was cut, or it was never signed"
    for record in records[signed[-1] + 1 :] if signed else ():
        yield f"{chain.NAME}: record {record.get('n')} ({record['kind']}) came after the signature: sign again"
    yield from signing.faults(folder, key)
