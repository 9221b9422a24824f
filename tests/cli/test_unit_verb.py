"""`aurora unit` prints a unit that systemd's own checker accepts, with nothing left to fill in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aurora_train.always_on.guard import EXIT_LOW_MEMORY
from aurora_train.always_on.watchdog import EXIT_HUNG
from aurora_train.cli.main import main
from aurora_train.machine.memory import host_memory
from aurora_train.tools import unit
from aurora_train.train.saving import EXIT_UNSAVED
from aurora_train.train.signals import EXIT_STOPPED

DOC = Path(__file__).parents[2] / "docs" / "always-on.md"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What of a run folder the verb looks at; its name is one that has to be escaped."""
    folder = tmp_path / '50% "of" it\\s $HOME'
    folder.mkdir()
    (folder / "config.yaml").write_text("recipe: language_model\ntrain: {steps: 4}\n")
    (folder / "plan.json").write_text('{"device": "cpu"}')
    monkeypatch.chdir(tmp_path)
    return folder


def printed(capsys, *arguments) -> str:
    assert main(["unit", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def settings(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


def has_a_checker() -> bool:
    """Whether systemd's checker is here and can be told to look at one unit alone (since 250)."""
    if not shutil.which("systemd-analyze"):
        return False
    return "--recursive-errors" in subprocess.run(["systemd-analyze", "--help"], capture_output=True, text=True).stdout


@pytest.mark.skipif(not has_a_checker(), reason="needs systemd-analyze of systemd 250 or later")
@pytest.mark.parametrize("whose", ["--user", "--system"])
def test_systemd_accepts_it(whose, run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", '--one="a b" --two=50%')
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    file = tmp_path / "aurora-test.service"
    file.write_text(printed(capsys, run.name, whose, "--on-failure", "told.service"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", whose, str(file)], capture_output=True, text=True
    )  # fmt: skip
    assert checked.returncode == 0 and not checked.stderr, checked.stderr + file.read_text()


def test_every_path_is_absolute_and_escaped(run, capsys, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", "cache")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((".", "lib")))
    text = printed(capsys, run.name)
    where = run.parent
    (start,) = settings(text, "ExecStart")
    assert start.startswith(f"{sys.executable} -P -m aurora_train resume ")
    assert start.endswith(f'"{where}/50%% \\"of\\" it\\\\s $$HOME"')
    assert f'"AURORA_CACHE={where}/cache"' in settings(text, "Environment")
    assert f'"PYTHONPATH={where}{os.pathsep}{where}/lib"' in settings(text, "Environment")
    assert settings(text, "WantedBy") == ["default.target"] and settings(text, "User") == []


def test_whatever_ends_the_run_its_power_cap_is_set_back(run, capsys):
    (after,) = settings(printed(capsys, run), "ExecStopPost")
    assert after == f"-{sys.executable} -P -m aurora_train energy --restore"


def test_secrets_stay_out(run, capsys, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AURORA_SECRET", "NVIDIA_API_KEY"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("XLA_FLAGS", "--kept=1")
    text = printed(capsys, run)
    assert "hush" not in text and '"XLA_FLAGS=--kept=1"' in text


def test_the_machines_unit_runs_as_the_runs_owner(run, capsys):
    text = printed(capsys, run, "--system", "--stop-minutes", "30", "--on-failure", "told.service")
    into_place = next(line for line in text.splitlines() if " | " in line)
    assert "--stop-minutes=30 --on-failure=told.service --system |" in into_place, "the same unit again"
    assert settings(text, "User") == [run.owner()] and settings(text, "WantedBy") == ["multi-user.target"]
    assert settings(text, "TimeoutStopSec") == ["30min"]


def test_a_run_that_began_on_a_gpu_never_goes_on_without_one(run, capsys, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert "JAX_PLATFORMS" not in printed(capsys, run)
    (run / "plan.json").write_text('{"device": "NVIDIA GB10"}')
    assert '"JAX_PLATFORMS=cuda,cpu"' in printed(capsys, run)


def test_a_run_that_stops_on_a_clock_is_not_started_again_at_once(run, capsys):
    assert settings(printed(capsys, run), "RestartForceExitStatus") == ["75 SIGTERM"]
    (run / "config.yaml").write_text("train: {stop_after_minutes: 120}\n")
    assert settings(printed(capsys, run), "RestartForceExitStatus") == []


def test_the_kernel_is_to_kill_the_run_first_and_a_leak_ends_at_a_limit(run, capsys):
    text, memory = printed(capsys, run), host_memory()
    assert 300 < int(settings(text, "OOMScoreAdjust")[0]) <= 1000, "a browser asks for 300 for its pages"
    (limit,) = settings(text, "MemoryMax")
    assert memory.size / 2 - 2**20 <= int(limit.removesuffix("M")) * 2**20 <= 0.92 * memory.size


def test_no_run_no_unit(tmp_path, capsys):
    assert main(["unit", str(tmp_path / "nowhere")]) == 2
    assert "not a run folder (there is nothing at this path)" in capsys.readouterr().err
    assert main(["unit", str(tmp_path)]) == 2
    assert "not a run folder (it has no config.yaml)" in capsys.readouterr().err


def test_the_table_of_statuses_is_the_units_and_the_codes(run, capsys):
    text = printed(capsys, run)
    rows = dict(re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", DOC.read_text(), re.MULTILINE))
    prevented = [status for status, then in rows.items() if then.startswith("no")]
    assert sorted(prevented) == sorted(["0", *settings(text, "RestartPreventExitStatus")[0].split()])
    for status in (EXIT_UNSAVED, EXIT_STOPPED, EXIT_HUNG, EXIT_LOW_MEMORY, 1, 2, 130, 143):
        assert str(status) in rows
    assert rows[str(EXIT_LOW_MEMORY)].startswith("yes") and EXIT_LOW_MEMORY not in unit.NOT_AGAIN
    assert unit.STOPPED == EXIT_STOPPED and EXIT_UNSAVED in unit.NOT_AGAIN and EXIT_HUNG not in unit.NOT_AGAIN
