"""`aurora generate`: continue a prompt with a trained run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aurora_train.cli.common import JsonOption, RunArgument, print_json

EXAMPLE = "aurora generate runs/first --prompt 'def main(' --temperature 0.7"


def command(
    run: RunArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue; none: from nothing.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to make at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from this many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Draw from this share of the probability.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    step: Annotated[int | None, typer.Option("--step", help="The checkpoint to read; else the newest.")] = None,
    json: JsonOption = False,
):
    """Continue a prompt with a trained run; the text is printed as it is made."""
    from aurora_train.loading import load

    trained = load(run, step)
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}

    def show(text: str) -> None:
        if not json:
            sys.stdout.write(text)
            sys.stdout.flush()

    show(prompt)
    text = trained.recipe.generate(trained.model, prompt, options, show)
    if json:
        print_json({"prompt": prompt, "text": text, "step": trained.step, **options})
    else:
        print()
