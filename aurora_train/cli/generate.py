"""`aurora generate`: continue a prompt with a trained run or an open model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aurora_train.cli.common import (
    JsonOption,
    ModelArgument,
    StepOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    print_json,
)
from aurora_train.errors import UserError

EXAMPLE = "aurora generate runs/first --prompt 'def main(' --temperature 0.7"

# The name of a setting in a recipe or the sampler -> the option that sets it.
_OPTIONS = {
    "prompt": "--prompt", "max_tokens": "--max-tokens", "max_new_tokens": "--max-tokens", "top_k": "--top-k",
    "temperature": "--temperature", "top_p": "--top-p", "seed": "--seed",
}


def command(
    run: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue; without one, a new text.")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="The most tokens to generate.")] = 256,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = None,
    top_p: TopPOption = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    step: StepOption = None,
    json: JsonOption = False,
):
    """Continue a prompt with a run or an open model; the text is printed while it is generated."""
    from aurora_train.loading import load

    trained = load(run, step, by="generate")
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}

    before, shown = prompt, False  # the prompt is shown with the first text, once no error can refuse it any more

    def show(text: str) -> None:
        nonlocal before, shown
        shown = shown or bool(text)
        if not json:
            sys.stdout.write(before + text)
            sys.stdout.flush()
            before = ""

    try:
        text = trained.generate(prompt, **options, on_text=show)
    except UserError as fault:
        raise by_option(fault) from fault
    show("" if shown else text)  # a recipe may return its text without having shown it piece by piece
    if json:
        print_json({"prompt": prompt, "text": text, "step": trained.step, **options})
    else:
        print()


def by_option(fault: UserError) -> UserError:
    """The same error, naming the command-line option instead of the setting."""
    where = _OPTIONS.get(fault.where, fault.where)
    what, hint = (text and text.replace("max_new_tokens", "--max-tokens") for text in (fault.what, fault.hint))
    return UserError(what, where=where, why=fault.why, hint=hint)
