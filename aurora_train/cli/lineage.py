"""`aurora lineage`: where a run or an export comes from, whether it is what its record says, and its signature."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, KeyOption, print_json

EXAMPLE = "aurora lineage runs/first --sign lab.pem, then: aurora lineage runs/first --verify --key lab.pub"

CHANGED = 3  # exit status, as that of `aurora verify` for damage


def command(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN|EXPORT]", help="A run folder, or an export.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hold every file to the record.")] = False,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PUBLIC", help="With --verify: whose signature it has to have.")
    ] = None,
    sign: KeyOption = None,
    new_key: Annotated[
        Path | None, typer.Option("--new-key", metavar="FILE", help="Make a key: FILE, and FILE with .pub for others.")
    ] = None,
    gates: Annotated[bool, typer.Option("--gates", help="Put the run to the gates of its config now.")] = False,
    json: JsonOption = False,
):
    """Draw the lineage of a run or an export, from its corpus to the export.

    With --verify each edit is named, and the exit status is 3 if there is any. An export is verified alone, without the
    run. Signing needs the extra [sign]; docs/lineage.md says what is on record and what a signature covers.
    """
    from aurora_train.errors import UserError

    if new_key is not None:
        from aurora_train.lineage.signing import new_key as make

        print(f"{new_key}: keep it to yourself\n{make(new_key)}: give it to whoever verifies")
        if folder is None:
            return None
    if folder is None:
        raise UserError("a run or an export is missing", where="aurora lineage", hint=EXAMPLE)
    if key is not None and not verify:
        raise UserError("--key says whose signature --verify has to find", where="--key", hint="add --verify")
    if gates:
        return _gates(folder, json)
    _refuse_no_folder(folder)
    if sign is not None:
        _sign(folder, sign)
    return _verified(folder, key, json) if verify else _drawn(folder, json)


def _refuse_no_folder(folder: Path) -> None:
    from aurora_train.lineage import chain
    from aurora_train.lineage.verify import no_chain
    from aurora_train.run import Run

    if not (folder / chain.NAME).is_file() and not (folder / "proof.json").is_file():
        Run.existing(folder)  # a UserError that names the runs nearby
    if not (folder / chain.NAME).is_file():
        raise no_chain(folder)


def _sign(folder: Path, key: Path) -> None:
    from aurora_train.errors import UserError
    from aurora_train.lineage import signing
    from aurora_train.lineage.following import catch_up
    from aurora_train.run import Run

    signing.identity(key)
    run = Run(folder)
    if run.is_held():
        raise UserError("this run is being trained, and each step would end its signature", where=str(folder),
                        hint="sign it once it has finished or stopped")  # fmt: skip
    catch_up(run)
    signing.sign(folder, key)


def _drawn(folder: Path, json: bool) -> None:
    from aurora_train.lineage import drawing

    held = drawing.document(folder)
    if json:
        print_json(held)
    else:
        print("\n".join(drawing.tree(held)))


def _verified(folder: Path, key: Path | None, json: bool) -> int:
    from aurora_train.lineage.verify import verify
    from aurora_train.units import counted

    found = verify(folder, key)
    if json:
        print_json({"folder": str(folder), "intact": not found.faults, "faults": found.faults, "notes": found.notes,
                    "records": found.count, "head": found.head, "signature_checked": key is not None})  # fmt: skip
    else:
        for line in found.faults:
            print(f"{folder}: {line}")
        for line in found.notes:
            print(f"note: {line}")
        if not found.faults:
            signed = f", signed by the holder of {key}" if key is not None else ""
            print(f"{folder}: as on record in {counted(found.count, 'record')}, head {found.head}{signed}")
    return CHANGED if found.faults else 0


def _gates(folder: Path, json: bool) -> int:
    from aurora_train.check.limits import EXCEEDED
    from aurora_train.config import load_resolved
    from aurora_train.gates.judge import judged
    from aurora_train.run import Run

    run = Run.existing(folder)
    verdicts = judged(run, load_resolved(run.folder), run.step())
    if json:
        print_json([{"gate": one.gate, "passed": one.passed, "says": one.says} for one in verdicts])
    else:
        for one in verdicts:
            print("\n  ".join([f"{one.gate}: {'passed' if one.passed else 'FAILED'}", *one.says]))
        if not verdicts:
            print("this run has no gates in its config: docs/lineage.md")
    return 0 if all(one.passed for one in verdicts) else EXCEEDED
