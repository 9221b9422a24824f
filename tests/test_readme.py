"""What README.md says can be typed: its verbs exist, no code is torn over lines, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aurora_train.cli.main import VERBS

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def split(text: str) -> tuple[str, list[str]]:
    """(prose, lines of its bash blocks)."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.S)
    return re.sub(r"```.*?```", "", text, flags=re.S), [
        line for kind, block in blocks if kind == "bash" for line in block.splitlines()
    ]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_command_names_a_verb_that_there_is(path):
    prose, lines = split(path.read_text())
    said = [line for line in lines if line.startswith("aurora ")] + re.findall(r"`(aurora [^`]*)`", prose)
    unknown = [line for line in said if line.split()[1] not in VERBS and re.match(r"[a-z]", line.split()[1])]
    assert not unknown


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_code_in_prose_runs_over_its_paragraph_or_holds_two_commands(path):
    prose, _ = split(path.read_text())
    assert prose.count("`") % 2 == 0
    torn = [code for code in re.findall(r"`([^`]*)`", prose) if "\n\n" in code or re.search(r"\n *aurora ", code)]
    assert not torn


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]
