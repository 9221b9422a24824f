"""`aurora export`: a run in a format that other programs load, with proof that it says the same."""

from __future__ import annotations

import contextlib
import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import (
    BecauseOption,
    GateOption,
    JsonOption,
    KeyOption,
    OverrideOption,
    RunArgument,
    print_json,
)

EXAMPLE = "aurora export runs/first --to first-hf --verify transformers"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class Library(StrEnum):
    transformers = "transformers"


class Format(StrEnum):
    hf = "hf"
    gguf = "gguf"
    peft = "peft"


def command(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write; it must not exist yet.")],
    format: Annotated[
        str, typer.Option("--format", help="hf: a Hugging Face folder; gguf: llama.cpp; peft: adapters; policy, or "
                          "what else the recipe names: a folder that `aurora act` serves.")
    ] = Format.hf.value,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Default: that of the model the run started from; gguf: bf16.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add adapters to the weights they were trained on.")] = False,
    verify: Annotated[
        Library | None, typer.Option("--verify", help="Compare with this library as well: an independent proof.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="DIR", help="With --format peft: the base, or hub:owner/name, if it has moved."),
    ] = None,
    step: Annotated[int | None, typer.Option("--step", help="The checkpoint; by default the newest.")] = None,
    override_limits: OverrideOption = None,
    override: GateOption = None,
    because: BecauseOption = None,
    sign: KeyOption = None,
    json: JsonOption = False,
):
    """Write a run as a model that other programs load. It is read back and compared before it gets its name.

    It has to pass the gates of its config first (exit status 4 if it does not), and takes its lineage with it.
    """
    from aurora_train.gates.judge import keep
    from aurora_train.interop import export, proof
    from aurora_train.loading import unread

    _refuse_early(to, sign)
    overridden = {"override": override or (), "because": because, "limits_reason": override_limits}
    if format not in list(Format):
        given = {"--dtype": dtype, "--merge": merge or None, "--verify": verify, "--base": base}
        return _export_by_recipe(run, to, format, step, overridden, sign, json, given)
    format = Format(format)
    _refuse_clash(format, merge, base)
    with unread(run, step, by="export") as found:
        keep(found, "export", **overridden)
        result = _result(found, format, dtype, merge)
        write, chosen = _way(format, dtype, result, verify, base)
        with _made_for(to) as made:
            family = write(result, made, chosen)
            proved = proof.prove(result, family, made, chosen, verify and verify.value)
            about = {"format": format.value, **export.about(result, family, made, chosen)}
            _complete(found, made, about, proved, sign)
    _say(to, format, family, chosen, proved, json)


def _say(to: Path, format: Format, family, chosen: str, proved: dict, json: bool) -> None:
    if json:
        return print_json({"folder": str(to), "family": family.model_type, "dtype": chosen, "proof": proved["kind"],
                           "says": proved["says"]})  # fmt: skip
    what = "adapters of" if format is Format.peft else "a model of"
    print(f"{to}: {what} the family {family.title}" + ("" if format is Format.peft else f", in {chosen}"))
    print(f"proof ({proved['kind']}): {proved['says']}")


@contextlib.contextmanager
def _made_for(to: Path):
    """A new folder, which gets the name `to` at the end of this context, or is removed if it fails or is asked to end.
    """
    import shutil

    from aurora_train.interop import export

    def end(number, frame):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    made = export.beside(to)
    try:
        yield made
        export.put_in_place(made, to)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_early(to: Path, key: Path | None) -> None:
    """UserError for a target that exists and a key that cannot sign, before the work of an export."""
    from aurora_train.interop import export

    export.refuse_target(to)
    if key is not None:
        from aurora_train.lineage import signing

        signing.identity(key)


def _complete(found, made: Path, about: dict, proved: dict, key: Path | None) -> None:
    """Write the chain and the card of an export, and sign it if there is a key."""
    from aurora_train.lineage import exporting, signing

    exporting.complete(found, made, about, proved)
    if key is not None:
        signing.sign(made, key)


def _export_by_recipe(run, to: Path, format: str, step, overridden: dict, sign, json: bool, given: dict) -> int:
    """Export in a format that the recipe names."""
    from aurora_train.errors import UserError
    from aurora_train.gates.judge import keep
    from aurora_train.loading import load
    from aurora_train.run import Run
    from aurora_train.tools import exported

    exported.refuse_format(Run.existing(run), format, tuple(Format))
    for option, value in given.items():
        if value is not None:
            raise UserError(f"--format {format} has no {option}", where=option, hint="leave it out")
    trained = load(run, step, by="export")
    keep(trained, "export", recipe=trained.recipe, **overridden)
    with _made_for(to) as made:
        compared = exported.write(trained, made, format)
        proved = exported.prove(compared, load(made, by="export").predict, made)
        _complete(trained, made, {**exported.about(trained, format), "step": trained.step}, proved, sign)
    if json:
        print_json({"folder": str(to), "format": format, "proof": proved["kind"], "says": proved["says"]})
    else:
        print(f"{to}: a {format} of step {trained.step}, which `aurora act {to}` serves")
        print(f"proof ({proved['kind']}): {proved['says']}")
    return 0


def _refuse_clash(format: Format, merge: bool, base: Path | None) -> None:
    from aurora_train.errors import UserError

    if format is Format.peft and merge:
        raise UserError("--format peft writes the adapters alone, and --merge adds them to the base", where="--merge",
                        hint="leave one of them out")  # fmt: skip
    if format is not Format.peft and base is not None:
        raise UserError(f"--format {format.value} writes the whole model", where="--base", hint="--format peft")


def _result(found, format: Format, dtype: Dtype | None, merge: bool):
    """What a run gives away in a format: with the rest of a vision checkpoint and the base's own dtypes only in hf."""
    from aurora_train.interop.parts import with_parts
    from aurora_train.interop.result import result_of

    result = result_of(found, merge=merge or format is Format.peft)
    result = with_parts(result, fits=None if format is Format.hf else f"--format {format.value} does not hold them")
    return result if dtype is None and format is Format.hf else result._replace(dtypes={})


def _way(format: Format, dtype: Dtype | None, result, verify: Library | None, base: Path | None):
    """(the function that writes the format, the dtype). UserError for a dtype that the format does not have."""
    from aurora_train.errors import UserError
    from aurora_train.interop import export

    if verify and format is not Format.hf:
        raise UserError("transformers is compared with a Hugging Face folder only", where="--verify",
                        hint="export one beside it with --format hf --verify transformers")  # fmt: skip
    if format is Format.peft:
        from aurora_train.interop.peft_export import over_base

        if dtype not in (None, Dtype.float32):
            raise UserError(f"--format peft has no {dtype}", where="--dtype", hint="adapters are float32, on any base")
        return over_base(result, base)
    if format is Format.hf:
        write, known, chosen = export.write_folder, export.DTYPES, dtype or export.default_dtype(result)
    else:
        from aurora_train.interop.gguf.export import write_gguf_folder
        from aurora_train.interop.gguf.write import FORMATS

        write, known, chosen = write_gguf_folder, FORMATS, dtype or "bf16"
    if chosen not in known:
        raise UserError(f"--format {format.value} has no {chosen}", where="--dtype", hint=f"one of {', '.join(known)}")
    return write, str(chosen)
