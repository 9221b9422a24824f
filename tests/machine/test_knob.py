"""A power cap or a clock lock is set back: by its run, by the next start after a kill -9, and by the printed unit."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from fake_nvml import Fake

from aurora_train.cli.main import main
from aurora_train.machine import knob, nvml

# A run as far as its knob is concerned. It turns until it is killed, and says when it has begun and turned once.
TURNS = """
from aurora_train.machine import knob, nvml
held, why = knob.hold(nvml.gpus()[0])
assert held, why
print("holds", flush=True)
held.set(0.0)
print("turned", flush=True)
share = 0.37
while True:
    held.set(share)
    share = (share + 0.37) % 1
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))


def journals(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "knobs").glob("*.json"))


def killed_while_it_turns(fake: Fake, after_s: float, has_turned: bool = True) -> None:
    """A process that turns the knobs of a box, killed at an instant that nobody chose; after a first turn, if so."""
    environment = {**os.environ, **fake.environment}
    process = subprocess.Popen([sys.executable, "-c", TURNS], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "holds\n"
        if has_turned:
            assert process.stdout.readline() == "turned\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(after_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def restored(fake: Fake) -> str:
    """What `aurora energy --restore` says, as the unit runs it."""
    command = [sys.executable, "-P", "-m", "aurora_train", "energy", "--restore"]
    ended = subprocess.run(command, env={**os.environ, **fake.environment}, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("kind", [knob.POWER_CAP, knob.CLOCK_LOCK])
def test_a_knob_is_turned_and_set_back(gpu_box, tmp_path, kind):
    fake = gpu_box(count=2)
    for device in fake.devices:
        device.no_cap = kind == knob.CLOCK_LOCK
    held, why = knob.hold(nvml.gpus()[0])
    assert held.kind == kind and kind in why and fake.devices[0].limit_w == 300
    held.set(0.5)
    expected = {knob.POWER_CAP: (200, 0), knob.CLOCK_LOCK: (300, 1400)}[kind]
    assert all((device.limit_w, device.clock_mhz) == expected for device in fake.devices)
    assert len(journals(tmp_path)) == 2 and knob.restore_left() == [], "its run is alive"
    held.release()
    assert all((device.limit_w, device.clock_mhz) == (300, 0) for device in fake.devices)
    assert journals(tmp_path) == []


def test_a_cap_that_the_owner_lowered_is_the_most_that_is_set(gpu_box):
    fake = gpu_box()
    fake.devices[0].limit_w = 220
    held, _ = knob.hold(nvml.gpus()[0])
    held.set(1.0)
    assert fake.devices[0].limit_w == 220 and held.range == "100 W to 220 W"
    held.set(0.0)
    held.release()
    assert fake.devices[0].limit_w == 220


def test_without_permission_or_without_a_knob_nothing_is_turned_and_it_says_why(gpu_box):
    fake = gpu_box()
    fake.state.no_permission = 1
    held, why = knob.hold(nvml.gpus()[0])
    assert held is None and "needs root" in why
    fake.state.no_permission, fake.devices[0].no_cap, fake.devices[0].no_clock = 0, 1, 1
    held, why = knob.hold(nvml.gpus()[0])
    assert held is None and "neither a power cap nor a clock lock" in why
    assert knob.hold([]) == (None, "there is no GPU with a knob")


def test_two_runs_do_not_turn_one_knob(gpu_box):
    gpu_box(count=2)
    gpus, _ = nvml.gpus()
    first, _ = knob.hold(gpus[:1])
    second, why = knob.hold(gpus)
    assert second is None and "another run holds the knob of GPU 0" in why
    other, _ = knob.hold(gpus[1:])
    assert other is not None
    first.release()
    other.release()


def test_what_someone_else_has_set_since_or_a_reboot_has_reset_stays(gpu_box, tmp_path):
    fake = gpu_box()
    killed_while_it_turns(fake, 0.05)
    fake.devices[0].limit_w = 250
    (line,) = knob.restore_left()
    assert "no run of ours has set" in line and fake.devices[0].limit_w == 250 and journals(tmp_path) == []
    killed_while_it_turns(fake, 0.05)
    fake.devices[0].limit_w = 140
    (file,) = (tmp_path / "cache" / "knobs").glob("*.json")
    left = json.loads(file.read_text())
    file.write_text(json.dumps({**left, "boot": "another", "set": [140]}))
    assert knob.restore_left() == [] and fake.devices[0].limit_w == 140 and journals(tmp_path) == []


def test_a_cache_that_is_emptied_while_a_run_lives_takes_no_knob_along(gpu_box, tmp_path):
    fake = gpu_box()
    held, _ = knob.hold(nvml.gpus()[0])
    held.set(0.5)
    shutil.rmtree(tmp_path / "cache")
    held.release()
    assert fake.devices[0].limit_w == 300


def test_what_a_killed_run_left_is_the_next_ones_to_set_back_and_not_its_own_cap(gpu_box, tmp_path):
    fake = gpu_box()
    killed_while_it_turns(fake, 0.0)
    held, _ = knob.hold(nvml.gpus()[0])  # nobody has called `restore_left` since
    assert held.range == "100 W to 300 W" and fake.devices[0].limit_w == 300
    held.release()
    killed_while_it_turns(fake, 0.0)
    fake.state.no_permission = 1
    (line,) = knob.restore_left()
    held, why = knob.hold(nvml.gpus()[0])
    assert held is None and line == why and "was left behind and cannot be set back" in why
    assert journals(tmp_path), "whoever may set it back will"


def test_what_root_has_left_in_a_shared_cache_is_said_to_a_user_who_may_not_set_it_back(gpu_box, tmp_path, monkeypatch):
    fake = gpu_box()
    killed_while_it_turns(fake, 0.0)
    fake.devices[0].limit_w = 300

    def denied(path, missing_ok=False):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(knob.Path, "unlink", denied)
    (line,) = knob.restore_left()
    assert "cannot be set back" in line and "Permission denied" in line


def test_the_verb_shows_meters_and_knobs(gpu_box, capsys):
    gpu_box(count=2)
    assert main(["energy"]) == 0
    out = capsys.readouterr().out
    assert "GPU 1: NVML total energy; covers the GPU" in out and "GPU 1: knob: power cap, 100 to 300 W" in out
    assert main(["energy", "--json"]) == 0
    assert [one["to"] for one in json.loads(capsys.readouterr().out)["knobs"]] == [300, 300]


def test_where_nothing_measures_the_verb_says_what_would(monkeypatch, capsys):
    monkeypatch.setattr("aurora_train.energy.meter.sources", lambda gpus, plug: [])
    assert main(["energy"]) == 0
    out = capsys.readouterr().out
    assert "not measured here" in out and "RAPL" in out and "--plug FILE" in out


@pytest.mark.parametrize("kind", [pytest.param(knob.POWER_CAP, marks=pytest.mark.slow),
                                  pytest.param(knob.CLOCK_LOCK, marks=pytest.mark.release)])  # fmt: skip
def test_the_knob_is_as_it_was_after_twenty_kills(gpu_box, tmp_path, kind):
    fake = gpu_box(count=2)
    for device in fake.devices:
        device.no_cap, device.limit_w = kind == knob.CLOCK_LOCK, 280
    draw, turned = random.Random(0), 0
    for number in range(20):
        killed_while_it_turns(fake, draw.uniform(0.0, 0.1), has_turned=number % 2 == 0)
        turned += any((device.limit_w, device.clock_mhz) != (280, 0) for device in fake.devices)
        if number % 4 == 3:
            restored(fake)
        else:
            knob.restore_left()  # as the next start does
        assert all((device.limit_w, device.clock_mhz) == (280, 0) for device in fake.devices), number
        assert journals(tmp_path) == []
    assert turned >= 10, "half of the kills came after a turn"
