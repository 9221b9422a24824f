"""Whether every pin and every extra has wheels, for other machines and Pythons than the one at hand: pip's dry run.

    python benchmarks/wheels.py

Needs an index, and about a minute a row. Nothing is installed, and of wheels only what they say of themselves is read.
Prints the table of docs/installing.md and ends with 1 where something has no wheel. `newest` is what `pip install .`
takes, `pinned` what it takes with `-c constraints.txt`.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import tomllib
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
GLIBC = range(17, 29)  # 2.28 is of 2018; RHEL 8, Debian 10 and Ubuntu 20.04 have it or a newer one
PINS = ROOT / "constraints.txt"
SOURCES = ("sqlitedict", "word2number")  # what lm-eval asks for and is published without wheels; pure Python
# pip takes wheels for the machine that is asked for, but reads the markers of requirements for the one it runs on.
LAUNCH = """
import json, sys
from pip._vendor.packaging import markers
there, here = json.loads(sys.argv.pop(1)), markers.default_environment
markers.default_environment = lambda: {**here(), **there}
from pip._internal.cli.main import main
sys.exit(main())
"""


class Answer(NamedTuple):
    """`versions` by package, where all could be had; else pip's own `words` on what could not."""

    versions: dict[str, str]
    words: str = ""


def extras() -> dict[str, list[str]]:
    """What pyproject.toml asks for, by extra; "" is what every installation has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"]} | project["optional-dependencies"]


class Pip:
    """The newest pip, in an environment of its own: an older one downloads gigabytes in a dry run."""

    def __init__(self, folder: Path):
        self.folder, self.python = folder, folder / "pip" / "bin" / "python"
        venv.create(folder / "pip", with_pip=True)
        for command in (["install", "-U", "pip"], ["wheel", "--no-deps", "-w", folder / "wheels", *SOURCES]):
            subprocess.run([self.python, "-m", "pip", *command, "-qq"], check=True)

    def resolve(self, wanted: list[str], machine: str, python: str, *options: str) -> Answer:
        """What pip would install of `wanted` on a `machine` under a `python`, from wheels alone."""
        there = {"platform_machine": machine, "python_version": python, "python_full_version": f"{python}.0"}
        tags = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in GLIBC)]
        command = [
            self.python, "-c", LAUNCH, json.dumps(there), "install", "-q", "--dry-run", "--ignore-installed",
            "--only-binary=:all:", "--use-feature=fast-deps", "--implementation=cp", f"--python-version={python}",
            f"--find-links={self.folder / 'wheels'}",
            *(f"--platform={tag}_{machine}" for tag in tags), f"--target={self.folder / 'none'}",
            "--report=-", *options, *wanted,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()
            return Answer({}, "\n".join(line for line in lines if not line.startswith("WARNING")) or "pip failed")
        found = json.loads(done.stdout)["install"]
        return Answer({one["metadata"]["name"]: one["metadata"]["version"] for one in found})

    def lacking(self, machine: str, python: str, *options: str) -> dict[str, str]:
        """The extras that cannot be had, with pip's words. All are tried at once, and singly where that fails."""
        wanted = extras()
        whole = self.resolve([line for lines in wanted.values() for line in lines], machine, python, *options)
        if not whole.words:
            return {}
        each = {name: self.resolve([*wanted[""], *lines], machine, python, *options) for name, lines in wanted.items()}
        return {name: answer.words for name, answer in each.items() if answer.words}


def main() -> int:
    places = list(itertools.product(("pinned", "newest"), MACHINES, PYTHONS))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as several:  # an index is slow to answer
        pip = Pip(Path(folder))

        def tried(place) -> dict[str, str]:
            how, machine, python = place
            lacking = pip.lacking(machine, python, *(("-c", str(PINS)) if how == "pinned" else ()))
            print(f"{how}, {machine}, Python {python}: {lacking or 'all'}", file=sys.stderr, flush=True)
            return lacking

        lacking = dict(zip(places, several.map(tried, places), strict=True))
    print("| extra | pinned, x86-64 | pinned, aarch64 | newest, x86-64 | newest, aarch64 |\n|---|---|---|---|---|")
    for name in extras():
        cells = [
            ", ".join(python for python in PYTHONS if name not in lacking[how, machine, python]) or "none"
            for how, machine in itertools.product(("pinned", "newest"), MACHINES)
        ]
        print(f"| {f'`[{name}]`' if name else '(none)'} | {' | '.join(cells)} |")
    return int(any(lacking.values()))


if __name__ == "__main__":
    sys.exit(main())
