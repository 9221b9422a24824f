"""Energy is measured or said not to be."""

from aurora_train.record.energy import EnergyMeter


def domain(root, name, energy, label="package-0", wrap=1_000_000_000):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    return folder / "energy_uj"


def test_without_a_counter_energy_is_not_measured(tmp_path):
    meter = EnergyMeter(tmp_path)
    if "GPU" not in meter.describe():
        assert meter.total_joules() is None and "not measured" in meter.describe()


def test_joules_are_counted_across_a_wrap_and_parts_are_not_counted_twice(tmp_path):
    counter = domain(tmp_path, "intel-rapl:0", 900_000_000)
    domain(tmp_path, "intel-rapl:0:0", 5, label="core")
    meter = EnergyMeter(tmp_path)
    counter.write_text("950000000\n")
    assert meter.read()["processor"] == 50.0
    counter.write_text("10000000\n")
    assert meter.read()["processor"] == 110.0
