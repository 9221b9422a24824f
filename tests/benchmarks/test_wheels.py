"""It can be installed at all: every pin and every extra has wheels for both kinds of machine under each Python."""

import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
wheels = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "wheels.py")))
PINS = wheels.PINS


def test_the_table_of_wheels_has_every_extra():
    rows = [line.split("|") for line in (ROOT / "docs" / "installing.md").read_text().splitlines() if "|" in line]
    assert {row[1].strip() for row in rows} >= {f"`[{name}]`" if name else "(none)" for name in wheels.extras()}


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    return wheels.Pip(tmp_path_factory.mktemp("pip"))


@pytest.mark.release
@pytest.mark.parametrize("python", wheels.PYTHONS)
@pytest.mark.parametrize("machine", wheels.MACHINES)
def test_every_pin_and_every_extra_has_wheels(pip, machine, python):
    pins = [line for line in PINS.read_text().splitlines() if "==" in line]
    with ThreadPoolExecutor() as several:  # an index is slow to answer
        found = several.submit(pip.resolve, ["-r", str(PINS)], machine, python, "--no-deps")
        pinned, newest = (several.submit(pip.lacking, machine, python, *given) for given in (("-c", str(PINS)), ()))
    assert len(found.result().versions) == len(pins), found.result().words
    assert pinned.result() == {}
    assert newest.result() == {}


@pytest.mark.release
def test_what_has_no_wheel_for_a_machine_is_seen(pip):
    """jaxlib 0.4.13 was the last release without wheels for aarch64."""
    assert pip.resolve(["jaxlib==0.4.13"], "x86_64", "3.11", "--no-deps").versions == {"jaxlib": "0.4.13"}
    assert "jaxlib==0.4.13" in pip.resolve(["jaxlib==0.4.13"], "aarch64", "3.11", "--no-deps").words
