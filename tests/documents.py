"""What tests of documents share: the configs and commands that a document shows, run as a user would, but tiny."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

from kit import in_process

DOCS = Path(__file__).parents[1] / "docs"


class Document:
    """A file of docs/. `tiny`: by the config that a command names, the overrides that follow it."""

    def __init__(self, name: str, tiny: dict[str, list[str]]):
        self.text, self.tiny = (DOCS / name).read_text(), tiny
        blocks = re.findall(r"```sh\n(.*?)```", self.text, re.DOTALL)
        self.commands = [line for block in blocks for line in block.splitlines()]
        files = re.findall(r"```(?:yaml|python)\n(.*?)```", self.text, re.DOTALL)
        self.files = {text.splitlines()[0].removeprefix("# "): text for text in files}

    def write(self, folder: Path) -> None:
        """The files that it shows, each named by the first line of its block."""
        for name, text in self.files.items():
            (folder / name).write_text(text)

    def arguments_of(self, line: str, more=()) -> tuple[list[str], str]:
        """(the arguments of a line's `aurora`, what is typed into it), with a config of the document made tiny."""
        typed, _, command = line.rpartition(" | ")
        words = shlex.split(command, comments=True)
        assert words.pop(0) == "aurora" and (not typed or typed.startswith("echo "))
        if words[1] in self.tiny:
            words[2:2] = [*self.tiny[words[1]], *more]
        return words, shlex.split(typed)[1] + "\n" if typed else ""

    def runs(self, line: str, capsys, monkeypatch, more=()) -> str:
        """What a command prints; it must succeed."""
        words, typed = self.arguments_of(line, more)
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert in_process(*words) == 0, f"{line}\n{capsys.readouterr().err}"
        return capsys.readouterr().out
