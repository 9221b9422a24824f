"""What several verbs share: common arguments, and the one function that prints JSON for scripts."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a bundled config such as `quickstart`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Laid over the config, in order.", show_default=False),
]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="RUN|SOURCE", help="A run folder, a Hugging Face folder or a GGUF file.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
StepOption = Annotated[int | None, typer.Option("--step", help="The checkpoint to read; by default the newest.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 takes the most likely token.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Draw from this many most likely tokens.")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Draw from this share of the probability.")]
OverrideOption = Annotated[
    str | None,
    typer.Option("--override-limits", metavar="REASON", help="Go on if limits are exceeded; the reason is recorded."),
]
HostOption = Annotated[
    str | None, typer.Option("--host", help="Listen on this address, not on 127.0.0.1; needs --token-file.")
]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="A secret that clients have to send.")
]
AllowHostOption = Annotated[
    list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A further name that clients may use.")
]
GateOption = Annotated[
    list[str] | None,
    typer.Option("--override", metavar="GATE", help="Go on although this gate fails; needs --because."),
]
BecauseOption = Annotated[
    str | None, typer.Option("--because", metavar="REASON", help="Why a gate is overridden; it is put on record.")
]
KeyOption = Annotated[
    Path | None, typer.Option("--sign", metavar="KEY", help="Sign it with this private key (PEM): docs/lineage.md.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def open_page(path: Path) -> None:
    """Open a page in the browser."""
    import webbrowser

    webbrowser.open(path.absolute().as_uri())


@contextlib.contextmanager
def until_asked():
    """An event that Ctrl-C, SIGTERM and SIGHUP set. A second signal has its usual effect."""
    stop, before = threading.Event(), {}

    def ask(number, frame):
        signal.signal(number, before[number])
        stop.set()

    before |= {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
