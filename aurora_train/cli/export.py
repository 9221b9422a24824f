"""`aurora export`: a run in a format that other programs load, with proof that it says the same."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, RunArgument, print_json

EXAMPLE = "aurora export runs/first --to first-hf --verify transformers"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Library(StrEnum):
    transformers = "transformers"


class Format(StrEnum):
    hf = "hf"


def command(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write; it must not exist yet.")],
    format: Annotated[Format, typer.Option("--format", help="hf: a Hugging Face folder.")] = Format.hf,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="By default that of the model that the run started from.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add adapters to the weights they were trained on.")] = False,
    verify: Annotated[
        Library | None, typer.Option("--verify", help="Compare with this library as well: an independent proof.")
    ] = None,
    step: Annotated[int | None, typer.Option("--step", help="The checkpoint; by default the newest.")] = None,
    json: JsonOption = False,
):
    """Write a run as a model that other programs load. It is read back and compared before it gets its name."""
    import shutil

    from aurora_train.interop import export, proof
    from aurora_train.interop.result import result_of
    from aurora_train.loading import load

    export.refuse_target(to)
    result = result_of(load(run, step, by="export"), merge=merge)
    chosen = dtype.value if dtype else export.default_dtype(result)
    made = export.beside(to)
    try:
        family = export.write_folder(result, made, chosen)
        proved = proof.prove(result, family, made, chosen, verify and verify.value)
        export.write_card(result, family, made, chosen, proved)
        export.put_in_place(made, to)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    if json:
        print_json({"folder": str(to), "family": family.model_type, "dtype": chosen, "proof": proved["kind"],
                    "says": proved["says"]})  # fmt: skip
    else:
        print(f"{to}: a model of the family {family.title}, in {chosen}")
        print(f"proof ({proved['kind']}): {proved['says']}")
