"""Two hundred edits of a signed run and of its signed export: each is seen, and a line names what was edited."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit import in_process

from aurora_train.lineage import chain, signing
from aurora_train.lineage.verify import verify
from aurora_train.record.metrics import encode

pytestmark = pytest.mark.slow
Edit = tuple[str, str, Callable[[Path], None]]  # what, the name that a line has to have, how


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.is_file() and path.name != ".lock")  # fmt: skip


def of_files(folder: Path, count: int, draw: random.Random) -> Iterator[Edit]:
    """A byte changed, a file cut, emptied, removed, or put in the place of another."""
    names = files_in(folder)
    for number in range(count):
        name = names[number % len(names)] if number < len(names) else draw.choice(names)
        how = draw.choice(["byte", "cut", "append", "remove"]) if number >= len(names) else "byte"

        place = draw.random()

        def edit(folder: Path, name=name, how=how, place=place) -> None:
            path = folder / name
            content = bytearray(path.read_bytes())
            if how == "remove":
                return path.unlink()
            if how == "append" or not content:
                content += b" "
            elif how == "cut":
                del content[int(place * len(content)) :]
            else:
                content[int(place * len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)

        yield f"{how} of {name}", name, edit


def lines_of(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        before = path.read_bytes().splitlines(keepends=True)
        after = change(list(before))
        assert after != before
        path.write_bytes(b"".join(after))

    return edit


def moved(lines: list[bytes], at: int, to: int) -> list[bytes]:
    lines.insert(to, lines.pop(at))
    return lines


def of_order(name: str, length: int) -> Iterator[Edit]:
    """Records exchanged, removed, doubled, and a tail cut off."""
    for at in range(0, length - 1, 2):
        yield f"{name}: {at} and the next", name, lines_of(name, lambda lines, at=at: moved(lines, at, at + 1))
        yield f"{name}: {at} removed", name, lines_of(name, lambda lines, at=at: lines[:at] + lines[at + 1 :])
        yield f"{name}: {at} doubled", name, lines_of(name, lambda lines, at=at: lines[: at + 1] + lines[at:])
        yield f"{name}: cut after {at}", name, lines_of(name, lambda lines, at=at: lines[: at + 1])


def rehashed(change: Callable[[list[dict]], None]) -> Callable[[list[bytes]], list[bytes]]:
    """A forger who knows the format: the records are changed and all hashes made anew."""

    def forge(lines: list[bytes]) -> list[bytes]:
        records = [json.loads(line) for line in lines]
        change(records)
        before, forged = "", []
        for number, record in enumerate(records):
            forged.append(encode({**record, "n": number, "prev": before}))
            before = chain.digest(forged[-1])
        return forged

    return forge


def set_in_begin(**values) -> Callable[[list[dict]], None]:
    return lambda records: records[0].update(values)


def of_forgers() -> Iterator[Edit]:
    """The chain is whole after each of these: the signature alone tells."""
    forged: dict[str, Callable[[list[dict]], None]] = {
        "another parent": lambda records: records[0]["parents"][0].update({"digest": "0" * 64}),
        "no parent": set_in_begin(parents=[]),
        "another licence": lambda records: records[0]["data"].update(licence="MIT"),
        "another seed": set_in_begin(seed=7), "another code": set_in_begin(code_sha256="0" * 64),
        "a resume hidden": lambda records: records.pop(next(i for i, r in enumerate(records) if r["kind"] == "resume")),
        "a better score": lambda records: [r["scores"]["score"].update(bits_per_byte=0.1) for r in records
                                           if r.get("scores")],
        "an older time": lambda records: records[1].update(time="2020-01-01T00:00:00.000+00:00"),
        "the tail cut": lambda records: records.__delitem__(slice(-2, None)),
        "a record added": lambda records: records.append({"kind": "gate", "gate": "licence", "passed": True}),
    }  # fmt: skip
    for what, change in forged.items():
        yield f"forged: {what}", chain.NAME, lines_of(chain.NAME, rehashed(change))


def of_the_signature(other: Path) -> Iterator[Edit]:
    def signed_by_another(folder: Path) -> None:
        signing.sign(folder, other)

    def repacked(folder: Path) -> None:
        """The signature's claim about a file is changed together with the file."""
        path = folder / signing.SIGNATURE
        path.write_text(path.read_text().replace('"sig":"M', '"sig":"N', 1).replace('"sig": "M', '"sig": "N', 1))

    yield "signed again by another key", signing.SIGNATURE, signed_by_another
    yield "a changed signature", signing.SIGNATURE, repacked
    for name in ("notes.txt", "added.safetensors", "facts/added.json", "code/added.py", ".hidden"):
        yield f"{name} added", name, lambda folder, name=name: added(folder / name)


def added(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")


def edits(folder: Path, other: Path, files: int, is_run: bool, draw: random.Random) -> list[Edit]:
    made = [*of_files(folder, files, draw), *of_forgers(), *of_the_signature(other)]
    length = len(chain.lines(folder / chain.NAME))
    return made + list(of_order(chain.NAME, length)) + (
        list(of_order("events.jsonl", len(chain.lines(folder / "events.jsonl")))) if is_run else [])


def test_two_hundred_edits_against_a_signed_head_are_seen_and_named(lab, tmp_path):
    assert in_process("lineage", "--new-key", tmp_path / "other.pem") == 0
    draw, seen, missed = random.Random(28), 0, []
    for folder, files in ((lab.run, 84), (lab.out, 24)):
        assert verify(folder, lab.key).faults == []
        copy, made = tmp_path / folder.name, edits(folder, tmp_path / "other.pem", files, folder == lab.run, draw)
        for what, name, edit in made:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            edit(copy)
            found = verify(copy, lab.key).faults
            seen += any(name in line for line in found)
            missed += [] if any(name in line for line in found) else [(folder.name, what, found)]
    print(f"{seen} edits seen and named")
    assert missed == [] and seen >= 200


def test_a_swapped_parent_is_named(lab, monkeypatch):
    """The folder from which the run began is another one now, of the same name."""
    path = next(lab.folder.glob("base/checkpoints/*/manifest.aurora.json"))
    kept = path.read_text()
    try:
        path.write_text(kept.replace(json.loads(kept)["digest"], "0" * 16))
        found = verify(lab.run, lab.key).faults
        assert len(found) == 1 and "the parent base is not what this run began with" in found[0]
        shutil.move(lab.folder / "base", lab.folder / "away")
        assert verify(lab.run, lab.key).faults == []
        assert any("the parent base is not here" in line for line in verify(lab.run, lab.key).notes)
        shutil.move(lab.folder / "away", lab.folder / "base")
    finally:
        path.write_text(kept)


def test_edits_that_no_signature_is_needed_for_are_named_without_a_key(signed):
    """What an accident changes: whoever changes a file and knows the format could change the chain as well."""
    for folder, name in ((signed.run, "config.yaml"), (signed.run, "metrics.jsonl"), (signed.run, "scores.json"),
                         (signed.run, "facts/tokenizer.json"), (signed.out, "model.safetensors"),
                         (signed.out, "README.md"), (signed.out, "tokenizer.json")):  # fmt: skip
        if not (folder / name).exists():
            name = "facts/facts.json"
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept[:-2] + b"~\n")
        assert any(line.startswith(name) for line in verify(folder).faults), name
        (folder / name).write_bytes(kept)
        assert verify(folder).faults == []
