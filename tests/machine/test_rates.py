"""Rates are measured here, kept per kind of device, or assumed from the table and marked so; else there are none."""

import json
from dataclasses import replace

import jax
import pytest

from aurora_train.errors import UserError
from aurora_train.machine.profile import this_machine
from aurora_train.machine.rates import Rates, assumed, device_name, flop_rate, rates_for, store
from aurora_train.machine.table import known_machines, lookup
from aurora_train.machine.targets import find_machine

MEASURED = Rates(
    matmul={"float32": 4e14, "bfloat16": 7.8e14}, bandwidth=4e12, per_microbatch_seconds=1e-4,
    source="measured", date="2026-11-23", device="NVIDIA H200",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))
    return tmp_path


def test_without_a_measurement_a_processor_has_no_rates():
    assert rates_for(this_machine()) is None


def test_a_measurement_is_kept_and_wins_for_its_kind_of_device_alone(cache):
    assert rates_for(find_machine("h200")).source == "assumed"
    path = store(MEASURED)
    assert path.is_relative_to(cache)
    assert rates_for(find_machine("h200")) == MEASURED
    assert rates_for(find_machine("h100")).source == "assumed"
    here = replace(this_machine(), platform="gpu", device_kind="NVIDIA H200", known=lookup("NVIDIA H200"))
    assert rates_for(here) == MEASURED
    assert rates_for(this_machine()) is None


def test_a_processor_is_measured_as_so_many_of_its_cores(monkeypatch):
    machine = this_machine()
    store(replace(MEASURED, device=device_name(jax.devices()[0])))
    assert rates_for(machine).source == "measured"
    assert rates_for(replace(machine, cpu_cores=machine.cpu_cores + 62)) is None


def test_a_damaged_measurement_is_said_and_not_passed_over():
    path = store(MEASURED)
    path.write_text('{"matmul": {}')
    with pytest.raises(UserError, match="doctor --calibrate"):
        rates_for(find_machine("h200"))
    path.write_text(json.dumps({"some": "thing"}))
    with pytest.raises(UserError, match="not a readable calibration"):
        rates_for(find_machine("h200"))


@pytest.mark.parametrize("row", known_machines().values(), ids=lambda row: row.name)
def test_assumed_rates_stay_under_the_peak_and_say_their_source(row):
    rates = assumed(row)
    assert 0.2 < rates.matmul["bfloat16"] / row.peak_flops["bfloat16"].value < 1
    assert rates.bandwidth < row.bandwidth.value
    assert rates.source == "assumed" and rates.note and rates.date == ""


def test_assumed_rates_lie_where_they_were_measured():
    assert 770e12 <= assumed(lookup("NVIDIA H200")).matmul["bfloat16"] <= 800e12
    assert 30e12 <= assumed(lookup("NVIDIA GB10")).matmul["bfloat16"] <= 60e12
    assert 1.0e15 <= assumed(lookup("NVIDIA GB300")).matmul["bfloat16"] <= 1.4e15


def test_rates_are_written_with_a_space_before_the_unit():
    assert flop_rate(1.49e11) == "149 GFLOP/s" and flop_rate(None) == "n/a"
