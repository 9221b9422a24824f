"""What this device does is measured, kept, and from then on what plans go by."""

import jax
import pytest

from aurora_train.machine.profile import this_machine
from aurora_train.machine.rates import rates_for, store
from aurora_train.tools import calibrate
from aurora_train.tools.calibrate import matmul_seconds, measure
from aurora_train.tools.doctor import check_rates


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))


def test_a_probe_measures_something_plausible_and_can_be_kept(monkeypatch):
    monkeypatch.setattr(calibrate, "best_seconds", _short(calibrate.best_seconds))
    rates = measure(jax.devices()[0])
    assert set(rates.matmul) == {"float32", "bfloat16"}
    assert all(1e8 < rate < 1e15 for rate in rates.matmul.values())
    assert 1e8 < rates.bandwidth < 1e13
    assert 0 <= rates.per_microbatch_seconds < 0.1
    store(rates)
    assert rates_for(this_machine()) == rates
    assert check_rates(this_machine()).fix is None
    assert "measured" in check_rates(this_machine()).finding


def _short(real):
    return lambda work, for_s: real(work, for_s / 20)


def test_a_larger_product_takes_longer():
    assert matmul_seconds(512, "float32", 0.05) > 4 * matmul_seconds(128, "float32", 0.05)


def test_doctor_says_that_plans_give_no_times_and_how_to_fix_it():
    check = check_rates(this_machine())
    assert check.status == "ok" and check.fix == "aurora doctor --calibrate"
