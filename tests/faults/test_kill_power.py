"""A run that is killed with a power cap set: the next start sets the GPU back, and goes on to the bit."""

from __future__ import annotations

import time

import pytest
import toy
from kit import Aurora, events, final_hash, losses

CAP = ("energy.mode=cap", "energy.cap_watts=150", "log.every=5", "--quiet")


@pytest.mark.slow
def test_a_run_killed_with_a_cap_set_leaves_none_behind_its_next_start(tmp_path, shared_cache, monkeypatch):
    from fake_nvml import Fake

    fake = Fake(tmp_path / "box", real_time=True)
    fake.devices[0].counted_to_s = time.monotonic()
    toy.write(tmp_path)
    aurora = Aurora(tmp_path, shared_cache)
    aurora.good("train", "toy.yaml", "--run", "whole", "--quiet")
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)

    killed = aurora("train", "toy.yaml", "--run", "cut", *CAP, environment={"TOY_SIGNAL": "take:13:SIGKILL"})
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert fake.devices[0].limit_w == 150, "nobody was there to set it back"
    aurora.good("resume", "cut", "energy.mode=measure", "energy.cap_watts=null", "--quiet")
    assert fake.devices[0].limit_w == 300
    (said,) = events(tmp_path / "cut", "power_restored")
    assert said["step"] in (0, 10) and not list((shared_cache / "knobs").glob("*.json"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")
    (finish,) = events(tmp_path / "cut", "finish")
    first, second = events(tmp_path / "cut", "meter")
    begun = second["sources"][0]["joules"]  # what the second life had used before its first step
    assert second["total_joules"] > first["total_joules"] + 0.9 * begun > first["total_joules"] > 0, "both lives count"
    assert finish["energy"]["total_joules"] > second["total_joules"]
