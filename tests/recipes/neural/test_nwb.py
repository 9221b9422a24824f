"""Recordings: what is written is NWB, what is read is what was written, and a wrong file is one clear message."""

import dataclasses
import shutil

import numpy as np
import pytest

from aurora_train.errors import UserError
from neural.linear import lagged
from neural.nwb import read_recording
from neural.nwb_write import write_recording
from neural.reach_simulation import BEHAVIOR, PERIOD_S, REFRACTORY_S, prepare_simulation, simulate
from neural.spikes import bin_trials
from neural.velocity import r2
from neural.windows import Standard, Windows

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def simulation():
    return simulate(trials=24, units=12, seed=7)


@pytest.fixture(scope="module")
def nwb(simulation, tmp_path_factory):
    path = tmp_path_factory.mktemp("nwb") / "session.nwb"
    write_recording(path, simulation.recording, behavior=BEHAVIOR, rates=(simulation.rates, PERIOD_S))
    return path


@pytest.fixture
def edited(nwb, tmp_path):
    """A copy of the recording after `edit(file)`."""

    def make(edit):
        path = shutil.copy(nwb, tmp_path / "edited.nwb")
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    return make


def replace(file, name, values):
    attributes = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(attributes)


# The simulation


def test_spike_counts_have_the_mean_of_the_known_rates_and_not_more_than_poisson_variance(simulation):
    counts = np.array([len(times) for times in simulation.recording.spike_times])
    expected = simulation.rates.sum(axis=0) * PERIOD_S
    z = (counts - expected) / np.sqrt(expected)
    assert np.all(np.abs(z) < 4) and abs(z.mean()) < 1
    # In time too: over 100 ms bins the counts follow the rates with the residual variance of a (sub-)Poisson process.
    edges = np.arange(0, len(simulation.rates) * PERIOD_S, 0.1)
    observed = np.stack([np.histogram(times, edges)[0] for times in simulation.recording.spike_times], axis=1)
    wanted = simulation.rates[: 10 * len(observed)].reshape(len(observed), 10, -1).sum(axis=1) * PERIOD_S
    dispersion = np.sum((observed - wanted) ** 2) / np.sum(wanted)
    assert 0.85 < dispersion < 1.02


def test_no_unit_spikes_within_its_refractory_period(simulation):
    assert min(np.diff(times).min() for times in simulation.recording.spike_times) >= REFRACTORY_S


def test_reaches_are_as_fast_as_a_monkeys_and_still_before_the_go_cue(simulation):
    recording = simulation.recording
    speed = np.linalg.norm(recording.behavior, axis=1)
    assert 30 < speed.max() < 150  # cm/s
    before = np.concatenate([
        speed[int(start / PERIOD_S) : int(go / PERIOD_S)]
        for start, go in zip(recording.trial_start, recording.trial_columns["go_cue_time"], strict=True)
    ])
    assert np.median(before) < 3


def test_the_same_seed_gives_the_same_file_and_another_seed_another(simulation, nwb, tmp_path):
    again = simulate(trials=24, units=12, seed=7)
    write_recording(tmp_path / "again.nwb", again.recording, behavior=BEHAVIOR, rates=(again.rates, PERIOD_S))
    assert (tmp_path / "again.nwb").read_bytes() == nwb.read_bytes()
    other = simulate(trials=24, units=12, seed=8)
    assert not np.array_equal(other.recording.spike_times[0], again.recording.spike_times[0])


def test_a_simulation_is_prepared_once(tmp_path):
    path = prepare_simulation(tmp_path, trials=10, units=3, seed=0)
    before = path.stat().st_mtime_ns
    assert prepare_simulation(tmp_path, trials=10, units=3, seed=0).stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_writer_that_fails_half_way_leaves_nothing_that_looks_like_a_session(simulation, tmp_path):
    broken = dataclasses.replace(simulation.recording, behavior_times=np.array(["not a time"]))
    with pytest.raises(ValueError):
        write_recording(tmp_path / "session.nwb", broken, behavior=BEHAVIOR)
    assert not list(tmp_path.iterdir())


# The file


def test_the_file_has_the_layout_that_nwb_readers_expect(nwb):
    with h5py.File(nwb) as file:
        assert file.attrs["neurodata_type"] == "NWBFile" and file.attrs["nwb_version"].startswith("2.")
        for name in ("identifier", "session_description", "session_start_time", "file_create_date"):
            assert name in file
        types = {
            "units": "Units", "units/id": "ElementIdentifiers", "units/spike_times": "VectorData",
            "units/spike_times_index": "VectorIndex", "intervals/trials": "TimeIntervals",
            "processing/behavior": "ProcessingModule", BEHAVIOR: "TimeSeries",
        }
        for name, neurodata_type in types.items():
            assert file[name].attrs["neurodata_type"] == neurodata_type, name
            assert {"namespace", "object_id"} <= set(file[name].attrs)
        index = file["units/spike_times_index"]
        assert file[index.attrs["target"]] == file["units/spike_times"]
        assert index[-1] == len(file["units/spike_times"]) and len(index) == 12
        assert list(file["intervals/trials"].attrs["colnames"][:2]) == ["start_time", "stop_time"]
        assert file[BEHAVIOR]["data"].attrs["unit"] == "cm/s"
        assert file["processing/simulation/true_rates/data"].shape[1] == 12


@pytest.mark.slow
def test_pynwb_opens_and_validates_the_file(nwb):
    pynwb = pytest.importorskip("pynwb")
    with pynwb.NWBHDF5IO(str(nwb), "r") as io:
        session = io.read()
        assert len(session.units) == 12 and len(session.trials) == 24
    assert not pynwb.validate(path=str(nwb))


def test_what_is_read_is_what_was_written(simulation, nwb):
    read, written = read_recording(nwb, behavior=BEHAVIOR), simulation.recording
    assert read.identifier == written.identifier and read.behavior_unit == "cm/s"
    for a, b in zip(read.spike_times, written.spike_times, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(read.trial_start, written.trial_start)
    np.testing.assert_allclose(read.behavior, written.behavior, rtol=1e-6, atol=1e-5)


def test_conversion_offset_and_starting_time_with_rate_are_honoured(nwb, edited):
    def edit(file):
        series = file[BEHAVIOR]
        series["data"].attrs.update(conversion=0.01, offset=5.0, unit="m/s")
        del series["timestamps"]
        series["starting_time"] = 0.0
        series["starting_time"].attrs["rate"] = 1 / PERIOD_S

    plain, read = read_recording(nwb, behavior=BEHAVIOR), read_recording(edited(edit), behavior=BEHAVIOR)
    np.testing.assert_allclose(read.behavior, plain.behavior * 0.01 + 5.0)
    np.testing.assert_allclose(read.behavior_times, plain.behavior_times, atol=1e-9)
    assert read.behavior_unit == "m/s"


def faults():
    def drop(name):
        return lambda file: file.__delitem__(name)

    return {
        "no units": (drop("units"), "has no `units/spike_times`"),
        "no index": (drop("units/spike_times_index"), "spike_times_index"),
        "no trials": (drop("intervals/trials"), "has no `intervals/trials/start_time`"),
        "no behaviour": (drop(BEHAVIOR), "processing/simulation/true_rates"),
        "index past the end": (
            lambda f: replace(f, "units/spike_times_index", np.arange(12) * 10**9), "does not index its spike_times"
        ),
        "times not increasing": (
            lambda f: replace(f, BEHAVIOR + "/timestamps", np.zeros(f[BEHAVIOR + "/data"].shape[0])), "timestamps"
        ),
        "four axes": (lambda f: replace(f, BEHAVIOR + "/data", np.zeros((50, 4))), "has the shape (50, 4)"),
        "trial ends first": (
            lambda f: replace(f, "intervals/trials/stop_time", np.zeros(24)), "does not stop after it starts"
        ),
        "no unit at all": (lambda f: replace(f, "units/spike_times_index", np.zeros(0, int)), "is empty"),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_recording_that_lacks_something_is_one_clear_message(edited, fault):
    edit, message = faults()[fault]
    with pytest.raises(UserError) as error:
        read_recording(edited(edit), behavior=BEHAVIOR)
    assert message in str(error.value) and error.value.where.startswith("data.")


def test_a_missing_file_names_its_neighbours_and_a_text_file_is_not_hdf5(nwb, tmp_path):
    with pytest.raises(UserError, match="session.nwb"):
        read_recording(nwb.parent / "sesion.nwb", behavior=BEHAVIOR)
    (tmp_path / "notes.nwb").write_text("not a recording")
    with pytest.raises(UserError, match="not an HDF5 file"):
        read_recording(tmp_path / "notes.nwb", behavior=BEHAVIOR)
    (tmp_path / "cut.nwb").write_bytes(nwb.read_bytes()[:20_000])
    with pytest.raises(UserError, match="cut short"):
        read_recording(tmp_path / "cut.nwb", behavior=BEHAVIOR)


# Bins, splits, windows


def test_bins_hold_every_spike_of_a_trial_once_and_the_mean_velocity(simulation):
    recording = simulation.recording
    trials = bin_trials(recording, bin_s=0.02)
    for k in (0, 11, 23):
        edges = recording.trial_start[k] + np.arange(trials.offsets[k + 1] - trials.offsets[k] + 1) * 0.02
        rows = slice(trials.offsets[k], trials.offsets[k + 1])
        for unit in range(12):
            counts = np.histogram(recording.spike_times[unit], edges)[0]
            np.testing.assert_array_equal(trials.spikes[rows, unit], counts)
        time = recording.behavior_times
        at = [(time >= a) & (time < b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        means = np.array([recording.behavior[inside].mean(axis=0) for inside in at])
        np.testing.assert_allclose(trials.velocity[rows], means, atol=1e-6)


def test_behaviour_sampled_more_coarsely_than_the_bins_is_interpolated(simulation):
    line = dataclasses.replace(
        simulation.recording, behavior_times=np.arange(0, 80, 0.05), behavior=np.arange(0, 80, 0.05)[:, None] * 3
    )
    trials = bin_trials(line, bin_s=0.02)
    centre = line.trial_start[0] + 0.01 + 0.02 * np.arange(trials.offsets[1])
    np.testing.assert_allclose(trials.velocity[: trials.offsets[1], 0], 3 * centre, atol=1e-9)


def test_unmeasured_behaviour_has_no_weight_and_no_nan_reaches_a_batch(simulation):
    behavior = simulation.recording.behavior.copy()
    behavior[200:260] = np.nan
    trials = bin_trials(dataclasses.replace(simulation.recording, behavior=behavior), bin_s=0.02)
    windows = Windows(trials, 16, Standard.of(trials.velocity))
    batch = windows.take(np.arange(len(windows)))
    assert np.isfinite(batch["velocity"]).all()
    unmeasured = np.isnan(trials.velocity).any(axis=1)
    assert unmeasured.any() and (batch["weights"] == 0).any()
    assert np.isfinite(r2(trials.velocity, np.zeros_like(trials.velocity))[0])


def test_a_behaviour_on_another_clock_and_an_unknown_unit_are_refused(simulation):
    elsewhere = dataclasses.replace(simulation.recording, behavior_times=simulation.recording.behavior_times + 1e4)
    with pytest.raises(UserError, match="24 of 24 trials of .* are without behaviour"):
        bin_trials(elsewhere, bin_s=0.02)
    with pytest.raises(UserError, match="has no unit 99"):
        bin_trials(simulation.recording, bin_s=0.02, unit_ids=[0, 99])
    picked = bin_trials(simulation.recording, bin_s=0.02, unit_ids=[5, 2])
    everything = bin_trials(simulation.recording, bin_s=0.02)
    np.testing.assert_array_equal(picked.spikes, everything.spikes[:, [5, 2]])


def test_splits_share_no_trial_and_more_trials_move_none(simulation):
    trials = bin_trials(simulation.recording, bin_s=0.02)
    parts = {name: set(trials.split(name, 0.3).ids) for name in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 24 and set.union(*parts.values()) == set(range(24))
    first = dataclasses.replace(
        simulation.recording,
        trial_ids=simulation.recording.trial_ids[:18],
        trial_start=simulation.recording.trial_start[:18],
        trial_stop=simulation.recording.trial_stop[:18],
    )
    fewer = bin_trials(first, bin_s=0.02)
    assert set(fewer.split("test", 0.3).ids) == {i for i in parts["test"] if i < 18}


def test_take_is_a_pure_function_of_the_indices_and_windows_stay_inside_their_trial(simulation):
    trials = bin_trials(simulation.recording, bin_s=0.02)
    standard = Standard.of(trials.velocity)
    windows, twin = Windows(trials, 16, standard), Windows(trials, 16, standard)
    indices = np.random.default_rng(0).integers(0, len(windows), 40)
    batch = windows.take(indices)
    windows.take(np.arange(3))
    for name, values in twin.take(indices).items():
        np.testing.assert_array_equal(values, batch[name])
    for row, index in enumerate(indices):
        one = windows.take(np.array([index]))
        np.testing.assert_array_equal(one["spikes"][0], batch["spikes"][row])
    assert windows.fingerprint == twin.fingerprint != Windows(trials, 17, standard).fingerprint
    assert batch["spikes"].shape == (40, 16, 12) and batch["spikes"].dtype == np.uint16
    assert np.all(windows.first[indices] + batch["weights"].sum(axis=1) <= windows.end[indices])
    # Every bin of every trial is some window's, and is the last of one once the trial is a window old.
    seen = np.zeros(len(trials.spikes), bool)
    for first, end in zip(windows.first, windows.end, strict=True):
        seen[first : min(first + 16, end)] = True
    assert seen.all()


def test_a_trial_shorter_than_the_window_is_filled_up_with_bins_of_no_weight(simulation):
    trials = bin_trials(simulation.recording, bin_s=0.02)
    windows = Windows(trials, 500, Standard.of(trials.velocity))
    assert len(windows) == 24
    batch = windows.take(np.array([3]))
    length = trials.offsets[4] - trials.offsets[3]
    assert batch["weights"].sum() == length and not batch["spikes"][0, length:].any()
    np.testing.assert_array_equal(batch["spikes"][0, :length], trials.spikes[trials.offsets[3] : trials.offsets[4]])


def test_lagged_spikes_never_reach_into_another_trial_or_the_future():
    spikes = np.arange(1.0, 8.0)[:, None]
    design = lagged(spikes, np.array([0, 3, 7]), lags=3)
    expected = [[1, 0, 0], [2, 1, 0], [3, 2, 1], [4, 0, 0], [5, 4, 0], [6, 5, 4], [7, 6, 5]]
    np.testing.assert_array_equal(design, expected)


def test_r2_is_the_variance_weighted_mean_of_the_axes():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(400, 2)) * [1, 5] + [2, 0]
    guess = truth + rng.normal(size=(400, 2)) * [0.8, 1]
    overall, axes = r2(truth, guess)
    independent = [1 - np.mean((truth[:, d] - guess[:, d]) ** 2) / np.var(truth[:, d]) for d in range(2)]
    np.testing.assert_allclose(axes, independent)
    assert overall == pytest.approx(np.average(independent, weights=truth.var(axis=0)))
    assert r2(truth, truth)[0] == 1 and r2(truth, np.broadcast_to(truth.mean(axis=0), truth.shape))[0] == 0
