"""What the `energy` section does to a run: everything but its numbers."""

import json
from datetime import datetime, timedelta

import pytest
import toy
from kit import events, final_hash, losses, records

from aurora_train.cli.main import main
from aurora_train.energy import account, tuner
from aurora_train.energy import meter as meters
from aurora_train.energy.account import Energy
from aurora_train.errors import UserError
from aurora_train.train.rehearsal import Rehearsal

SHORT = ("--quiet", "log.every=5")


@pytest.fixture
def here(tmp_path, shared_cache, monkeypatch):
    """A folder with toy.yaml, which is the current one, and a search that takes three steps for a setting."""
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meters, "_POWERCAP", tmp_path / "none")
    monkeypatch.setattr(meters, "TICK_SECONDS", 1e9)  # the steps of `box_of` tick
    for name, value in (("SETTLE_STEPS", 0), ("SETTLE_SECONDS", 0.0), ("STEPS", 1), ("SECONDS", 0.0), ("_REFINED", 0)):
        monkeypatch.setattr(tuner, name, value)
    toy.write(tmp_path)
    return tmp_path


def box_of(gpu_box, monkeypatch):
    """A box with one GPU of 240 W, in whose time every step takes a second."""
    fake, step = gpu_box(), Energy.step

    def of_a_second(energy, *arguments):
        fake.state.now_s += 1.0
        energy._meter.sample()
        step(energy, *arguments)
        energy._tick()

    monkeypatch.setattr(Energy, "step", of_a_second)
    return fake


def assert_same_numbers(run, other) -> None:
    assert losses(run) == losses(other) and final_hash(run) == final_hash(other)


def test_a_run_that_seeks_the_least_energy_computes_the_same_bits_with_the_same_program(
    here, gpu_box, finished_once, monkeypatch, capsys
):
    texts, compile = [], Rehearsal.compile

    def compiled(program, plan):
        texts.append((made := compile(program, plan)).as_text())
        if len(texts) == 1:
            raise UserError("this is all that is wanted of it")
        return made

    monkeypatch.setattr(Rehearsal, "compile", compiled)
    assert main(["train", "toy.yaml", "--run", "plain", "--quiet"]) == 2
    assert "this is all that is wanted of it" in capsys.readouterr().err
    assert not any("total_joules" in record for record in records(finished_once))
    assert events(finished_once, "finish")[0]["energy"] is None
    fake = box_of(gpu_box, monkeypatch)
    least = ["energy.mode=least", "energy.max_slowdown=0.99", "energy.region=DEU", "energy.price_per_kwh=0.3"]
    assert main(["train", "toy.yaml", "--run", "least", "log.every=5", *least]) == 0
    assert len(texts) == 2 and texts[0] == texts[1]
    assert_same_numbers(here / "least", finished_once)
    assert fake.devices[0].writes > 3 and fake.devices[0].limit_w == 300, "turned, and set back"
    (meter,) = events(here / "least", "meter")
    assert meter["sources"][0]["method"] == "NVML total energy" and meter["sources"][0]["coverage"] == "GPU"
    assert events(here / "least", "power"), "what was found is on record"
    told = [record for record in records(here / "least") if "total_joules" in record]
    joules = [record["total_joules"] for record in told]
    assert len(told) == 6 and joules == sorted(joules) and 30 * 60 < joules[-1] < 30 * 240
    rated = next(record for record in told if "joules_per_step" in record)
    assert rated["tokens_per_joule"] == pytest.approx(rated["tokens_per_s"] / rated["watts"])
    energy = events(here / "least", "finish")[0]["energy"]
    assert energy["total_joules"] >= joules[-1] and energy["kwh"] == pytest.approx(energy["total_joules"] / 3.6e6)
    assert (energy["cost"], energy["co2_g"]) == pytest.approx((0.3 * energy["kwh"], 381 * energy["kwh"]))
    manifest = next((here / "least" / "checkpoints" / "20").glob("*.json")).read_text()
    assert 0 < json.loads(manifest)["energy"]["total_joules"] <= joules[-1]
    page = (here / "least" / "report.html").read_text()
    assert "NVML total energy" in page and "sampling error" in page and "power, watts" in page
    assert "not measured" in (finished_once / "report.html").read_text()
    assert "energy: GPU 0 (NVML total energy)" in capsys.readouterr().err


def test_a_spent_budget_stops_a_run_and_hours_pause_it_and_it_goes_on_to_the_same_bits(
    here, gpu_box, finished_once, monkeypatch, capsys
):
    box_of(gpu_box, monkeypatch)
    budget = f"energy.budget_kwh={10 * 240 / 3.6e6}"  # ten steps
    assert main(["train", "toy.yaml", "--run", "cut", *SHORT, budget]) == 75
    out = capsys.readouterr().out
    assert "stopped by energy.budget_kwh at step" in out and "kWh are spent" in out
    (stop,) = events(here / "cut", "stop")
    assert 10 <= stop["step"] <= 11 and (here / "cut" / "checkpoints" / str(stop["step"])).is_dir()
    assert 2400 <= stop["energy"]["total_joules"] <= 11 * 240
    assert main(["resume", "cut", "--quiet"]) == 2
    assert "energy.budget_kwh: " in (err := capsys.readouterr().err) and "resume RUN energy.budget_kwh=N" in err
    asked = clock_that_pauses_the_fifth_step(monkeypatch)
    assert main(["resume", "cut", "--quiet", "energy.budget_kwh=1e9", "energy.hours=22:00-06:00"]) == 0
    assert_same_numbers(here / "cut", finished_once)
    (finish,) = events(here / "cut", "finish")
    assert finish["energy"]["total_joules"] == pytest.approx(30 * 240), "all resumes together"
    ((pause,), (goes_on,)) = events(here / "cut", "pause"), events(here / "cut", "go_on")
    assert pause["step"] == goes_on["step"] == stop["step"] + 4 and len(asked) >= 9
    assert pause["step"] in [event["step"] for event in events(here / "cut", "save")]


def clock_that_pauses_the_fifth_step(monkeypatch) -> list:
    """It is half past 23, but half past 6 when it is looked at for the fifth to the eighth time; the looks so far."""
    asked = []

    class Clock(datetime):
        @classmethod
        def now(cls):
            asked.append(0)
            return datetime(2026, 12, 1, 6 if 5 <= len(asked) < 9 else 23, 30)

    monkeypatch.setattr(account, "datetime", Clock)
    monkeypatch.setattr(account, "_CLOCK_SECONDS", 0.0)
    monkeypatch.setattr("aurora_train.train.loop._LOOK_SECONDS", 0.01)
    return asked


def test_a_machine_without_a_meter_cannot_promise_a_budget(here, capsys):
    assert main(["train", "toy.yaml", "--run", "r", *SHORT, "energy.budget_kwh=1"]) == 2
    err = capsys.readouterr().err
    assert "energy.budget_kwh: the energy of this run cannot be measured here" in err and "energy.plug" in err
    assert not (here / "r").exists()


@pytest.mark.slow
def test_a_machine_without_a_knob_says_so_and_trains(here, capsys):
    assert main(["train", "toy.yaml", "--run", "r", "energy.mode=least"]) == 0
    assert "energy.mode=least turns nothing: there is no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cap_below_what_the_gpu_takes_is_refused_and_one_within_is_kept_to(here, gpu_box, monkeypatch, capsys):
    fake = box_of(gpu_box, monkeypatch)
    cap = ["train", "toy.yaml", "--run", "r", *SHORT, "energy.mode=cap"]
    assert main([*cap, "energy.cap_watts=50"]) == 2
    assert "takes no cap below 100 W" in capsys.readouterr().err and fake.devices[0].limit_w == 300
    assert main([*cap, "energy.cap_watts=150"]) == 0
    (event,) = events(here / "r", "power")
    assert event["share"] == 0.25 and fake.devices[0].limit_w == 300


def test_a_knob_is_not_held_where_nothing_is_measured_because_nobody_would_turn_it(here, gpu_box):
    from aurora_train.config.energy import Energy as Section
    from aurora_train.run import Run

    fake = gpu_box()
    fake.devices[0].no_energy = fake.devices[0].no_power = 1
    with Energy(Section(mode="cap", cap_watts=150), Run(here / "none")) as energy:
        assert [line for line, *_ in energy._says] == ["energy.mode=cap turns nothing: no energy is measured"]
    assert fake.devices[0].limit_w == 300


@pytest.mark.parametrize(
    "given, said",
    [("energy.hours=22-6", "22:00-06:00"), ("energy.hours=22:00-22:00", "two different times"),
     ("energy.region=GER", "did you mean `DEU` (Germany)?"), ("energy.mode=cap", "energy.cap_watts=250"),
     ("energy.cap_watts=100", "energy.mode=cap"), ("energy.mode=last", "least")],
)  # fmt: skip
def test_a_mistake_in_the_section_is_one_message(here, given, said, capsys):
    assert main(["check", "toy.yaml", given]) == 2
    out = capsys.readouterr()
    assert said in out.out + out.err and "Traceback" not in out.out + out.err


@pytest.mark.parametrize(
    "hours, time, wait",
    [("22:00-06:00", "23:10", 0), ("22:00-06:00", "05:59", 0), ("22:00-06:00", "06:00", 16 * 3600),
     ("09:30-17:00", "17:00", 16.5 * 3600), ("09:30-17:00", "09:00", 1800), ("09:30-17:00", "09:30", 0)],
)  # fmt: skip
def test_the_wait_until_the_hours_begin(hours, time, wait):
    from aurora_train.config.energy import Energy

    now = datetime.fromisoformat(f"2026-12-01T{time}")
    assert Energy(hours=hours).seconds_to_wait(now) == wait
    assert wait == 0 or Energy(hours=hours).seconds_to_wait(now + timedelta(seconds=wait)) == 0
