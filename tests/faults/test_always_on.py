"""A run under a real systemd: started at boot, and again after a kill, a hang and a power cut; not after its end.

    pytest -m release -s tests/faults/test_always_on.py      # about 5 minutes, as root

Each machine is booted in namespaces of its own (booting.py): its process 1 is systemd, and so is its user's manager. Of
the unit nothing is edited; a drop-in shortens the pause before a restart.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path

import pytest
import toy
from booting import USER, Machine, why_not
from killing import assert_same_run
from kit import Aurora, events, losses

import aurora_train
from aurora_train.checkpoint.audit import sealed_steps

pytestmark = pytest.mark.release
STEPS, EVERY = 20000, 1000
SETTINGS = (f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "evaluate.every=null", "train.watchdog=0.25")
HOME = f"/home/{USER}"
_SHOWN = "ActiveState,SubState,Result,NRestarts,MainPID,ExecMainCode,ExecMainStatus"
AGAIN = 1  # RestartSec of the drop-in


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    config = toy.write(folder)
    Aurora(folder, folder / "cache").good("train", config, *SETTINGS, "--run", folder / "run", "--quiet")
    return folder / "run"


@pytest.fixture
def machine(tmp_path):
    """A machine that is on, with a user, the toy's files, and `aurora` on the user's path."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    toy.write(tmp_path / "toy")
    started = Machine(tmp_path)
    try:
        started.boot()
    except OSError as error:
        pytest.skip(f"systemd cannot be booted here: {error}")
    try:
        started.add_user()
        started.inside("cp", "-r", str(tmp_path / "toy"), f"{HOME}/toy")
        started.inside("sh", "-c", f"""mkdir {HOME}/bin && cat > {HOME}/bin/aurora << 'END'
#!/bin/sh
export AURORA_CACHE={HOME}/cache JAX_PLATFORMS=cpu PYTHONPATH={Path(aurora_train.__file__).parents[1]}
exec {sys.executable} -P -m aurora_train "$@"
END
chmod +x {HOME}/bin/aurora && chown -R {USER}: {HOME}""")
        yield started
    finally:
        started.cut_power()


# status of the process -> whether systemd starts it again; what the table of docs/always-on.md says.
STARTED_AGAIN = {0: False, 1: True, 2: False, 74: False, 75: True, 76: True, 130: True, 134: True, 143: True}


class Unit:
    """One run of the machine's user and the unit that keeps it going, as systemd sees it."""

    def __init__(self, machine: Machine, name: str, *, system: bool):
        self.machine, self.path, self.system = machine, f"{HOME}/{name}", system
        self.run = machine.on_disk(self.path)
        self.resumes = 0  # seen so far
        self.name = "aurora-" + re.sub(r"\W", "_", name)
        self.dropins = f"/etc/systemd/system/{self.name}.service.d"
        if not system:
            self.dropins = f"{HOME}/.config/systemd/user/{self.name}.service.d"

    def begin(self) -> None:
        """Train by hand, until a signal stops it."""
        line = f"cd ~/toy && TOY_SIGNAL=take:50:SIGTERM aurora train toy.yaml {' '.join(SETTINGS)} --run \"$0\""
        result = self.shell(line, self.path, check=False)
        assert result.returncode == 75, result.stderr[-2000:]

    def install(self, *options: str) -> str:
        """Type the lines that the head of the unit shows; returns the unit."""
        flag = "--system" if self.system else "--user"
        text = self.shell('aurora unit "$@"', self.path, flag, *options, first="sh").stdout
        into_place, start = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
        self.dropin("fast", f"[Service]\nRestartSec={AGAIN}\n")
        for line in (into_place, start.split(" && ")[0]):  # without polkit only root may let a user linger
            line = line.replace("sudo ", "")
            self.machine.inside(*self._as_shell(line, user=not self.system), user=not self.system)
        return text

    def shell(self, line: str, *arguments: str, first: str | None = None, check: bool = True):
        """A line in the user's shell."""
        words = (first, *arguments) if first else arguments
        return self.machine.inside(*self._as_shell(line, user=True), *words, user=True, check=check)

    @staticmethod
    def _as_shell(line: str, *, user: bool) -> tuple[str, ...]:
        return "env", f"HOME={HOME}" if user else "HOME=/root", "sh", "-c", f"PATH={HOME}/bin:$PATH; {line}"

    def dropin(self, name: str, text: str | None) -> None:
        """Put a drop-in beside the unit, or take it away."""
        where = shlex.quote(f"{self.dropins}/{name}.conf")
        line = f"rm {where}" if text is None else f"mkdir -p {shlex.quote(self.dropins)} && echo '{text}' > {where}"
        self.machine.inside("sh", "-c", line, user=not self.system)
        self.systemctl("daemon-reload")

    def systemctl(self, verb: str, *arguments: str, check: bool = True):
        who = () if self.system else ("--user",)
        return self.machine.inside("systemctl", *who, verb, *arguments, user=not self.system, check=check)

    def state(self) -> dict[str, str]:
        shown = self.systemctl("show", f"{self.name}.service", f"--property={_SHOWN}").stdout
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)

    def step(self) -> int:
        """The newest step on record."""
        return losses(self.run)[-1][0] if (self.run / "metrics.jsonl").exists() else 0

    def wait(self, what, timeout: float = 90, why: str = "") -> dict[str, str]:
        """Until `what(state)`; the state."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = self.state()
            if what(state):
                return state
            time.sleep(0.1)
        raise AssertionError(f"{why}: {self.state()}\n{self.journal()}")

    def goes_on(self, restarts: int, by: int = 300) -> dict[str, str]:
        """Wait until the unit was started again so many times, and the process has resumed and is past some steps."""
        state = self.wait(
            lambda s: s["ActiveState"] == "active" and s["NRestarts"] == str(restarts), why=f"{restarts} restarts"
        )
        self.resumes += 1
        self.wait(lambda _: len(events(self.run, "resume")) == self.resumes, why="a resume")
        begun = self.step()
        self.wait(lambda _: self.step() >= begun + by, why="steps")
        return state

    def stays(self, active: str, **expected: str) -> None:
        """It is in this state, and still is after a restart would have come."""
        self.wait(lambda s: s["ActiveState"] == active, why=active)
        before = self.state()
        time.sleep(AGAIN + 2)
        after = self.state()
        for key, value in {"ActiveState": active, **expected}.items():
            assert (before[key], after[key]) == (value, value), (key, before[key], after[key], self.journal())
        assert after["NRestarts"] == before["NRestarts"]

    def kill(self, name: str) -> None:
        self.machine.inside("kill", f"-{name}", self.state()["MainPID"])

    def journal(self) -> str:
        return self.machine.inside("journalctl", "--no-pager", "-n", "40", "-o", "short-monotonic").stdout


def test_a_users_run_goes_on_after_everything_but_its_end(machine, undisturbed):
    unit = Unit(machine, "first", system=False)
    machine.inside("loginctl", "enable-linger", USER)
    unit.begin()
    unit.install()
    unit.goes_on(restarts=0)

    unit.kill("KILL")
    unit.goes_on(restarts=1)

    unit.kill("TERM")  # nobody asked systemd
    unit.goes_on(restarts=2)

    unit.dropin("hang", "[Service]\nEnvironment=TOY_SIGNAL=take:700:HANG\n")
    unit.kill("KILL")
    unit.goes_on(restarts=3)
    unit.dropin("hang", None)
    unit.goes_on(restarts=4)
    assert len(events(unit.run, "hang")) == 1
    assert "status=76" in unit.journal()

    unit.systemctl("stop", unit.name)
    unit.stays("inactive", ExecMainStatus="75", Result="success")
    assert max(sealed_steps(unit.run / "checkpoints")) == unit.step(), "what was trained is saved"

    unit.systemctl("start", unit.name)
    unit.goes_on(restarts=0)
    machine.cut_power()
    machine.boot()
    unit.goes_on(restarts=0)

    machine.shut_down()
    assert max(sealed_steps(unit.run / "checkpoints")) == unit.step(), "a shutdown waits for the save"
    machine.boot()
    unit.goes_on(restarts=0)

    unit.stays("inactive", ExecMainStatus="0", Result="success", NRestarts="0")
    machine.cut_power()
    machine.boot()
    unit.stays("inactive", ExecMainStatus="0", Result="success", NRestarts="0")
    assert_same_run(unit.run, undisturbed)
    print({name: len(events(unit.run, name)) for name in ("resume", "hang", "stop", "finish")})


def test_a_systems_run_in_a_folder_of_any_name_and_every_exit_status(machine):
    unit = Unit(machine, "50% of 'it' $HOME", system=True)
    unit.begin()
    text = unit.install("--on-failure", "told.service")
    assert f"User={USER}" in text
    machine.inside("sh", "-c", "printf '[Service]\nExecStart=/bin/touch /told\n' > /etc/systemd/system/told.service")
    unit.goes_on(restarts=0)
    unit.kill("KILL")
    unit.goes_on(restarts=1)
    assert machine.inside("stat", "-c", "%U", f"{unit.path}/metrics.jsonl").stdout.strip() == USER

    unit.systemctl("stop", unit.name)
    machine.inside("mv", f"{unit.path}/checkpoints", f"{unit.path}/elsewhere")  # a user's error
    unit.systemctl("start", unit.name)
    unit.stays("failed", ExecMainStatus="2", NRestarts="0")
    assert "every checkpoint of this run is gone" in unit.journal()
    assert machine.on_disk("/told").exists(), "OnFailure"

    seen = {status: starts_again(unit, status) for status in STARTED_AGAIN}
    assert seen == STARTED_AGAIN

    machine.inside("rm", "/told")
    unit.dropin("fast", "[Service]\nRestartSec=50ms\n")
    unit.dropin("status", "[Service]\nExecStart=\nExecStart=/bin/sh -c \"exit 1\"\n")
    unit.systemctl("start", unit.name)
    state = unit.wait(lambda s: s["ActiveState"] == "failed", why="it gives up")
    unit.wait(lambda _: machine.on_disk("/told").exists(), why="OnFailure")
    print({"started again": seen, "gave up after restarts": int(state["NRestarts"])})


def starts_again(unit: Unit, status: int) -> bool:
    """Whether systemd starts the unit again whose process ends with a status of its own accord."""
    unit.dropin("status", f"[Service]\nExecStart=\nExecStart=/bin/sh -c \"sleep 0.2; exit {status}\"\n")
    unit.systemctl("start", unit.name)
    state = unit.wait(lambda s: s["ExecMainStatus"] == str(status) and s["ExecMainCode"] == "1", why=str(status))
    time.sleep(AGAIN + 1)
    again = int(unit.state()["NRestarts"]) > int(state["NRestarts"]) or unit.state()["NRestarts"] != "0"
    unit.systemctl("stop", unit.name)
    unit.systemctl("reset-failed", unit.name, check=False)
    return again
