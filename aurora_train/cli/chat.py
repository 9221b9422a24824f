"""`aurora chat`: a conversation with a run or an open model in the terminal."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from aurora_train.cli.common import ModelArgument, StepOption, TemperatureOption, TopKOption, TopPOption
from aurora_train.cli.generate import by_option
from aurora_train.errors import UserError

EXAMPLE = "aurora chat SmolLM2-135M-Instruct.Q4_1.gguf --system 'Answer in one sentence.'"

_HELP = """/system TEXT  begin a new conversation under this system prompt; without TEXT, under none
/reset        begin a new conversation under the same system prompt
/save FILE    write the conversation as JSON: a list of {"role", "content"}
/help         show these commands
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Conversation:
    """The messages so far, and what a line of the user does with them."""

    def __init__(self, trained, system: str | None, options: dict, template: Path | None = None):
        self._trained, self._options, self._interactive = trained, options, sys.stdin.isatty()
        self._template = template
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget the conversation, and begin one under a system prompt."""
        self._system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        """Read lines to the end of the input, or until `/quit`."""
        while (line := self._line()) is not None:
            try:
                if line.startswith("/"):
                    if self._command(*line.split(maxsplit=1)) == "quit":
                        return
                elif line:
                    self._ask(line)
            except UserError as fault:
                if not self._interactive:
                    raise
                print(f"error: {fault}", file=sys.stderr)

    def _line(self) -> str | None:
        """The next line without spaces around it; None at the end of the input, or at Ctrl-C."""
        try:
            return (input("> ") if self._interactive else input()).strip()
        except (EOFError, KeyboardInterrupt):
            if self._interactive:
                print()
            return None

    def _ask(self, text: str) -> None:
        """Add the user's message and print the answer as it is written. A conversation that fails is left as it was."""
        asked, pieces = [*self.messages, {"role": "user", "content": text}], []

        def show(piece: str) -> None:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()

        try:
            answer = self._trained.chat(asked, **self._options, on_text=show)
        except UserError as fault:
            found = by_option(fault)
            where = found.where and found.where.replace("--template", f"--template {self._template}", 1)
            raise UserError(found.what, where=where, why=found.why, hint=found.hint) from fault
        except KeyboardInterrupt:
            answer = "".join(pieces)
        print(answer[len("".join(pieces)) :])  # all of it, if the recipe does not write piece by piece
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _command(self, name: str, rest: str = "") -> str | None:
        """What a line that begins with a slash asks for; returns "quit" if that is to leave."""
        rest = rest.strip()
        if name == "/system":
            self.begin(rest or None)
        elif name == "/reset":
            self.begin(self._system)
        elif name == "/save":
            self._save(rest)
        elif name == "/help":
            print(_HELP)
        elif name == "/quit":
            return "quit"
        else:
            raise UserError(f"there is no command {name}", hint="/help shows the commands")
        return None

    def _save(self, file: str) -> None:
        if not file:
            raise UserError("/save needs the name of a file", hint="/save conversation.json")
        path = Path(file).expanduser()
        if path.exists():
            raise UserError("this file exists", where=str(path), hint="name another one")
        try:
            path.write_text(json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from error
        print(f"saved {len(self.messages)} messages in {path}")


def command(
    run: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", help="The system prompt.")] = None,
    template: Annotated[
        Path | None, typer.Option("--template", help="A Jinja chat template to use instead of the model's own.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="The most tokens of an answer.")] = 1024,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = None,
    top_p: TopPOption = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same answers.")] = 0,
    step: StepOption = None,
):
    """Talk to a run or an open model; each line is a message, and /help shows the commands."""
    from aurora_train.config.yaml import read_text
    from aurora_train.interop.templates import ChatTemplate
    from aurora_train.loading import load

    text = None if template is None else read_text(template, "template")
    if text:  # refused by its name and line before the model is read
        ChatTemplate(text, {}, datetime.now(), f"--template {template}")
    trained = load(run, step, by="chat")
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
               "template": text}  # fmt: skip
    if sys.stdin.isatty():
        print(f"{trained!r}; /help shows the commands", file=sys.stderr)
    Conversation(trained, system, options, template).run()
