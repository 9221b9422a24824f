"""The search for the setting at which a token costs least energy: on the stand-in for NVML, whose clock is set."""

import shutil

import pytest
from fake_nvml import Fake

from aurora_train.energy.meter import EnergyMeter, sources
from aurora_train.energy.tuner import Search, Tuner
from aurora_train.machine import knob, nvml

TOKENS = 1000  # of a step


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))


class Bench:
    """Steps whose speed follows the GPU's: of a step at full speed, `bound` is memory, which no clock slows."""

    def __init__(self, fake: Fake, tmp_path, bound: float, search: Search | None, share: float = 1.0):
        self.fake, self.bound, self.done, self.said = fake, bound, (0, 0.0, 0.0, 0), []
        gpus, _ = nvml.gpus()
        self.knob, self.what = knob.hold(gpus)
        if search is not None and search._cap is None:
            search._share_of = self.knob.share_of_draw()
        self.meter = EnergyMeter(sources(gpus, None, tmp_path), clock=self.now)
        self.tuner = Tuner(
            self.meter, gpus, self.knob, search, share, steps=lambda: self.done,
            say=lambda text, event, **fields: self.said.append((event, text, fields)), clock=self.now,
        )  # fmt: skip

    def now(self) -> float:
        return self.fake.state.now_s

    def rate(self) -> float:
        """Steps a second now."""
        return 1 / (self.bound + (1 - self.bound) / self.fake.speed())

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.fake.state.now_s += 1 / self.rate()
            self.done = (self.done[0] + 1, self.done[1] + TOKENS, self.now(), self.done[3])
            self.meter.sample()
            self.tuner.tick()

    def joules_per_token(self, share: float) -> tuple[float, float]:
        """(joules a token, steps a second) at a share of the knob's range, from the stated curve."""
        device = self.fake.devices[0]
        before = device.limit_w, device.clock_mhz
        if self.knob.kind == knob.POWER_CAP:
            device.limit_w = 100 + share * 200
        else:
            device.clock_mhz = device.most_mhz * (0.4 + 0.6 * share)
        speed, rate = self.fake.speed(), self.rate()
        device.limit_w, device.clock_mhz = before
        return watts_at(device, speed) / (TOKENS * rate), rate


def watts_at(device, speed: float) -> float:
    return device.idle_w + (device.base_w - device.idle_w) * speed**3


@pytest.mark.parametrize("base_w", [240, 299])
@pytest.mark.parametrize("bound", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("slowdown", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("kind", [knob.POWER_CAP, knob.CLOCK_LOCK])
def test_what_is_found_costs_at_most_five_percent_more_than_the_least(
    gpu_box, tmp_path, kind, slowdown, bound, base_w
):
    fake = gpu_box()
    fake.devices[0].no_cap, fake.devices[0].base_w = kind == knob.CLOCK_LOCK, base_w
    bench = Bench(fake, tmp_path, bound, Search(slowdown))
    assert bench.knob.kind == kind
    curve = [bench.joules_per_token(index / 1000) for index in range(1001)]
    least = min(joules for joules, rate in curve if curve[-1][1] <= (1 + slowdown) * rate)
    while not bench.said and bench.done[0] < 500:
        bench.train(10)
    (event, text, fields) = bench.said[-1]
    assert event == "power" and len(fields["tried"]) <= 7, text
    found, rate = bench.joules_per_token(fields["share"])
    assert curve[-1][1] <= (1 + slowdown) * rate * 1.001 and found <= 1.05 * least, (found / least, fields)
    assert bench.knob.share == fields["share"]


def test_a_cap_is_kept_to_by_a_power_cap_and_where_there_is_none_by_a_clock(gpu_box, tmp_path):
    fake = gpu_box()
    bench = Bench(fake, tmp_path, 0.3, None, share=0.5)
    bench.train(5)
    assert fake.devices[0].limit_w == 200 and bench.said[-1][0] == "power"
    bench.knob.release()
    fake = gpu_box()
    fake.devices[0].no_cap = 1
    bench = Bench(fake, tmp_path, 0.3, Search(0.1, cap_watts=150))
    bench.train(400)
    device = fake.devices[0]
    assert 120 < watts_at(device, device.clock_mhz / 2000) <= 150 and bench.said[-1][2]["share"] == bench.knob.share


def test_a_save_or_an_evaluation_spoils_no_measurement(gpu_box, tmp_path):
    quiet = Bench(gpu_box(), tmp_path, 0.5, Search(0.3))
    quiet.train(400)
    quiet.knob.release()
    busy = Bench(gpu_box(), tmp_path, 0.5, Search(0.3))
    for _ in range(40):
        busy.train(23)
        busy.fake.state.now_s += 30.0  # idle in nothing but the steps
        busy.done = (*busy.done[:3], busy.done[3] + 1)
    assert busy.said[-1][2]["share"] == pytest.approx(quiet.said[-1][2]["share"], abs=0.02)


def test_a_hot_gpu_makes_the_knob_give_way_and_it_comes_back_when_it_has_cooled(gpu_box, tmp_path):
    fake = gpu_box()
    bench = Bench(fake, tmp_path, 0.5, None, share=0.75)
    bench.train(20)
    assert fake.devices[0].limit_w == 250
    fake.devices[0].celsius = 88
    bench.train(12)
    assert fake.devices[0].limit_w <= 200 and bench.said[-1][0] == "hot"
    fake.devices[0].celsius = 60
    bench.train(20)
    assert fake.devices[0].limit_w == 250 and bench.said[-1][0] == "cool"


def test_a_setting_that_is_too_hot_is_not_chosen(gpu_box, tmp_path):
    fake = gpu_box()
    bench = Bench(fake, tmp_path, 0.5, Search(0.9))
    while bench.knob.share > 0.75 or bench.tuner._turned is None:
        bench.train(1)
        fake.devices[0].celsius = 89 if bench.knob.share > 0.6 else 50
    bench.train(3)
    fake.devices[0].celsius = 50
    bench.train(400)
    assert bench.said[-1][2]["share"] < 0.75


def test_a_journal_that_cannot_be_written_ends_the_search_and_not_the_meter(gpu_box, tmp_path):
    bench = Bench(gpu_box(), tmp_path, 0.5, Search(0.3))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    bench.train(30)
    assert "cannot write" in bench.tuner.lost and [event for event, *_ in bench.said] == ["power_lost"]
    bench.knob.release()


def test_a_gpu_that_is_too_hot_for_any_setting_is_left_as_it_was_found(gpu_box, tmp_path):
    fake = gpu_box()
    bench = Bench(fake, tmp_path, 0.5, Search(0.1))
    bench.train(1)
    fake.devices[0].celsius = 89
    while bench.said[-1:] == [] or bench.said[-1][0] != "power":
        bench.train(1)
    assert bench.said[-1][2]["share"] == 1.0 and "too hot" in bench.said[-1][1]
    bench.train(40)
    assert fake.devices[0].limit_w == 100, "the heat still makes it give way"


def test_a_gpu_that_vanishes_in_the_search_ends_it_and_not_the_run(gpu_box, tmp_path):
    fake = gpu_box()
    bench = Bench(fake, tmp_path, 0.5, Search(0.3))
    bench.train(30)
    fake.devices[0].lost = 1
    bench.train(60)
    assert bench.tuner.lost and [event for event, *_ in bench.said][-1] == "power_lost"
    bench.knob.release()  # does not raise
