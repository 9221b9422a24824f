"""Energy is measured or said not to be: NVML through the real bindings on a stand-in, RAPL and a plug through files."""

import os
import sys
import threading
import time

import pytest
from fake_nvml import Fake

from aurora_train.energy.meter import EnergyMeter, gpu_source, in_words, sources
from aurora_train.errors import UserError
from aurora_train.machine import nvml


def meter_of(fake: Fake, **settings) -> EnergyMeter:
    gpus, why = nvml.gpus()
    assert why is None
    return EnergyMeter(sources(gpus, None, **settings), clock=lambda: fake.state.now_s)


def run_for(fake: Fake, meter: EnergyMeter, seconds: float, every: float) -> None:
    for _ in range(round(seconds / every)):
        fake.state.now_s += every
        meter.sample()


@pytest.mark.parametrize("has_counter", [True, False])
def test_joules_of_two_gpus_are_the_integral_of_their_curve(gpu_box, tmp_path, has_counter):
    fake = gpu_box(count=2)
    for device in fake.devices:
        device.swing, device.no_energy = 0.2, not has_counter
    meter = meter_of(fake, powercap=tmp_path)
    run_for(fake, meter, 600, 0.1)
    truth = sum(device.integral(600) for device in fake.devices)
    assert meter.total_joules() == pytest.approx(truth, rel=0.01)
    told = [source.describe() for source in meter.sources]
    assert [one["name"] for one in told] == ["GPU 0", "GPU 1"] and {one["coverage"] for one in told} == {"GPU"}
    method = "NVML total energy" if has_counter else "NVML power, integrated"
    assert {one["method"] for one in told} == {method} and method in in_words(meter.sources)
    errors = sum(one["error_joules"] for one in told)
    assert abs(meter.total_joules() - truth) <= errors + 1e-6 * truth <= 0.03 * truth


def test_a_gpu_without_a_counter_is_integrated_and_one_without_either_is_left_out(gpu_box, tmp_path):
    fake = gpu_box(count=3)
    fake.devices[1].no_energy = fake.devices[2].no_energy = fake.devices[2].no_power = 1
    methods = [(source.name, source.method) for source in meter_of(fake, powercap=tmp_path).sources]
    assert methods == [("GPU 0", "NVML total energy"), ("GPU 1", "NVML power, integrated")]


def test_a_counter_of_32_bits_wraps_and_one_that_began_again_is_not_taken_for_it(gpu_box, tmp_path):
    fake = gpu_box()
    fake.state.wraps_at_mj = 2.0**32
    fake.devices[0].millijoules = 2.0**32 - 1e6
    meter = meter_of(fake, powercap=tmp_path)
    run_for(fake, meter, 100, 1.0)
    assert meter.total_joules() == pytest.approx(24000, rel=0.01) and meter.sources[0].gap_s == 0
    fake.devices[0].millijoules = 5e3  # the driver was loaded again
    run_for(fake, meter, 10, 1.0)
    assert meter.total_joules() == pytest.approx(24000 + 5 + 2400, rel=0.01)
    assert meter.sources[0].describe()["gap_seconds"] == 1.0


def test_a_gpu_that_vanishes_is_said_to_be_lost_and_keeps_what_was_measured(gpu_box, tmp_path):
    fake = gpu_box(count=2)
    meter = meter_of(fake, powercap=tmp_path)
    run_for(fake, meter, 10, 1.0)
    fake.devices[1].lost = 1
    run_for(fake, meter, 10, 1.0)
    assert meter.total_joules() == pytest.approx(240 * 20 + 200 * 10, rel=0.01)
    (lost,) = meter.lost()
    assert lost.name == "GPU 1" and "lost" in lost.describe()["lost"].lower()
    fake.devices[1].lost = 0
    run_for(fake, meter, 1, 1.0)
    assert meter.lost() == [] and meter.total_joules() == pytest.approx((240 + 200) * 21, rel=0.01)


def test_only_the_gpus_that_cuda_may_see_are_measured(gpu_box, monkeypatch):
    gpu_box(count=3)
    for text, names in (("2,0", ["GPU 2", "GPU 0"]), ("GPU-00000001", ["GPU 1"]), ("", []), ("0,7,1", ["GPU 0"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert [gpu.name for gpu in nvml.gpus()[0]] == names
    assert "no GPU is `7`" in nvml.gpus()[1]


def test_the_meters_thread_measures_by_itself(gpu_box, tmp_path):
    fake = gpu_box(real_time=True)
    fake.devices[0].counted_to_s = time.monotonic()
    ticked, began = threading.Event(), time.monotonic()
    meter = EnergyMeter(sources(nvml.gpus()[0], None, tmp_path), ticked.set)
    made = time.monotonic()
    meter.start()
    assert ticked.wait(60)
    ends = time.monotonic()
    meter.close()
    assert 240 * (ends - made) <= meter.total_joules() + 0.002 <= 240 * (time.monotonic() - began) + 0.004


def domain(root, name, energy, label="package-0", wrap=1_000_000_000):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    return folder / "energy_uj"


def test_without_a_source_energy_is_not_measured(tmp_path):
    meter = EnergyMeter(sources([], None, tmp_path))
    assert meter.total_joules() is None and in_words(meter.sources) == "not measured"


def test_rapl_is_counted_across_a_wrap_and_nothing_twice(tmp_path):
    counter = domain(tmp_path, "intel-rapl:0", 900_000_000)
    domain(tmp_path, "intel-rapl:0:0", 5, label="core")
    domain(tmp_path, "intel-rapl:1", 5, label="psys")
    (domain(tmp_path, "intel-rapl:2", 5, label="package-1").parent / "energy_uj").unlink()  # as without permission
    meter = EnergyMeter(sources([], None, tmp_path))
    counter.write_text("950000000\n")
    meter.sample()
    assert meter.total_joules() == pytest.approx(50.0)
    counter.write_text("10000000\n")
    meter.sample()
    assert meter.total_joules() == pytest.approx(110.0)
    (told,) = (source.describe() for source in meter.sources)
    assert (told["method"], told["coverage"], told["name"]) == ("RAPL", "processor package", "package-0")


def test_a_plug_covers_the_box_so_that_nothing_else_is_added_to_it(tmp_path):
    domain(tmp_path, "intel-rapl:0", 0)
    plug, now = tmp_path / "plug", [0.0]
    plug.write_text("power: 100.0 W\n")
    meter = EnergyMeter(sources([], str(plug), tmp_path), clock=lambda: now[0])
    for watts in (200, 200, 50):
        plug.write_text(f"{watts}")
        now[0] += 1.0
        meter.sample()
    assert meter.total_joules() == 150 + 200 + 125 and [one.name for one in meter.counted] == ["plug"]
    assert meter.sources[-1].error_joules == 50 + 0 + 75
    plug.unlink()
    for _ in range(3):
        now[0] += 10.0
        meter.sample()
    assert [one.name for one in meter.lost()] == ["plug"]
    plug.write_text("50")
    meter.sample()
    assert meter.total_joules() == 475 and meter.sources[-1].gap_s == 30, "what was between is not made up"


def test_a_command_may_give_the_watts(tmp_path):
    command = f"command:{sys.executable} -c \"print('86.5 W')\""
    (source,) = sources([], command, tmp_path)
    assert source._last[1] == 86.5


@pytest.mark.parametrize(
    "plug, said",
    [("/no/such/plug", "No such file"), (os.devnull, "gave no watts"), ("command:false", "ended with status 1"),
     ("command:no-such-command-here", "No such file"), ("command:echo -5", "gave no watts"),
     ("command:'", "No closing quotation")],
)  # fmt: skip
def test_a_plug_without_a_reading_is_one_message(plug, said, tmp_path):
    with pytest.raises(UserError) as fault:
        sources([], plug, tmp_path)
    assert said in str(fault.value) and "energy.plug" in str(fault.value) and "command:" in str(fault.value)


def test_a_source_that_never_answers_is_no_source(gpu_box):
    fake = gpu_box()
    fake.devices[0].lost = 1
    assert gpu_source(nvml.gpus()[0][0]) is None
