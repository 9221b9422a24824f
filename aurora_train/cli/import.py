"""`aurora import`: an open model as a run at step 0, which every verb accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, print_json

EXAMPLE = "aurora import ~/models/Qwen3-0.6B --to runs/qwen3"


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A Hugging Face folder of safetensors files, a GGUF file, or hub:owner/name."
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="RUN", help="The run folder to write; it must not exist yet.")],
    online: Annotated[bool, typer.Option("--online", help="Download a hub: source, or what is new of it.")] = False,
    json: JsonOption = False,
):
    """Import an open model: weights, tokenizer, chat template and licence, as a run at step 0."""
    from aurora_train.interop.importing import import_model

    run, opened = import_model(source, str(to), online=online)
    count = sum(_size(shape) for shape in opened.shapes.values())
    if json:
        print_json({"run": str(run.folder), "family": opened.family.model_type, "parameters": count,
                    "licence": opened.source.licence, "left_out": opened.beside})  # fmt: skip
        return
    licence = opened.source.licence or "not recorded"
    print(f"{to}: {opened.family.title}, {count:,} parameters, {opened.vocabulary:,} tokens; licence: {licence}")
    if opened.beside:
        first, number = opened.beside[0], len(opened.beside)
        print(f"The text model was read; {number} tensors of other parts ({first}, ...) were not.")
        print(f"`aurora export --format hf` copies them from {source}, as long as it is there unchanged.")
    print(f"Next: aurora generate {to}, or a config with `model: {{from: {to}}}`")


def _size(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)
