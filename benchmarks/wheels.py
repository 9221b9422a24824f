"""Whether every pin and every extra has wheels: pip's dry run for other machines and Pythons than the one at hand.

    python benchmarks/wheels.py

Nothing is installed and no wheel is downloaded, only what wheels say of themselves. Needs a network: a package index.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
GLIBC = range(17, 29)  # 2.28 is of 2018; RHEL 8, Debian 10 and Ubuntu 20.04 have it or a newer one
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


def pins() -> list[str]:
    """The lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


class Pip:
    """The newest pip, in an environment of its own: before 25 a dry run downloads gigabytes."""

    def __init__(self, folder: Path):
        self.folder, self.python = folder, folder / "pip" / "bin" / "python"
        if not self.python.exists():
            venv.create(folder / "pip", with_pip=True)
            subprocess.run([self.python, "-m", "pip", "install", "-q", "-U", "pip"], check=True)

    def resolve(self, wanted: list[str], machine: str, python: str, *more: str) -> Answer:
        """What pip would install of `wanted` there; `more` are further options of pip."""
        there = {"platform_machine": machine, "python_version": python, "python_full_version": f"{python}.0"}
        report = self.folder / f"report-{machine}-{python}.json"
        tags = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC] + [f"--platform=manylinux2014_{machine}"]
        command = [
            self.python, "-c", LAUNCH, json.dumps(there), "install", "-q", "--dry-run", "--ignore-installed",
            "--only-binary=:all:", "--use-feature=fast-deps", "--implementation=cp", f"--python-version={python}",
            f"--target={self.folder / 'none'}", f"--report={report}", *tags, *more, *wanted,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("WARNING")]
            return Answer({}, "\n".join(lines))
        found = json.loads(report.read_text())["install"]
        return Answer({one["metadata"]["name"]: one["metadata"]["version"] for one in found})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="extras to try; all where not given", metavar="EXTRA")
    chosen = parser.parse_args().only
    wanted = {name: lines for name, lines in extras().items() if chosen is None or name in chosen}
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        pip = Pip(Path(folder))
        for name, lines in wanted.items():
            for how in ("pinned", "newest"):
                options = ("-c", str(ROOT / "constraints.txt")) if how == "pinned" else ()
                for machine in MACHINES:
                    for python in PYTHONS:
                        answer = pip.resolve([*wanted.get("", ()), *lines], machine, python, *options)
                        print(f"{name or '(none)'} {how} {machine} {python}:", answer.words or len(answer.versions), flush=True)
                        failed |= {(name, how, machine, python): answer.words} if answer.words else {}
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
