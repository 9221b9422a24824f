"""Recordings as labs write them, made by the real pynwb: what it wrote is what is read."""

from datetime import UTC, datetime

import numpy as np
import pytest

from aurora_train.errors import UserError
from neural.nwb import read_recording
from neural.spikes import bin_trials, in_stretches

pytestmark = pytest.mark.slow
pynwb = pytest.importorskip("pynwb")
h5py = pytest.importorskip("h5py")

TIMES = np.arange(0, 12, 0.01)
SPIKES = [np.array([0.5, 1.25, 2.0]), np.array([]), np.array([0.75, 3.5, 4.5, 9.0])]
VELOCITY = np.stack([np.sin(TIMES), np.cos(TIMES)], axis=1)
HAND = "processing/behavior/hand_vel"


def hand_vel(**changed):
    given = {"name": "hand_vel", "data": VELOCITY, "unit": "cm/s", "timestamps": TIMES} | changed
    return pynwb.TimeSeries(**given)


class Lab:
    """A file under construction: units whose ragged index fits into uint8, and what a test adds."""

    def __init__(self, path, behavior=None, **observed):
        self.path = path
        self.file = pynwb.NWBFile("a session", "lab-1", datetime(2026, 11, 30, tzinfo=UTC))
        for number, times in enumerate(SPIKES):
            own = {name: values[number] for name, values in observed.items()}
            self.file.add_unit(spike_times=times, id=number + 5, **own)
        self.module = self.file.create_processing_module("behavior", "what the animal did")
        if behavior is not None:
            self.module.add(behavior)

    def trials(self, starts=(0.0, 3.0, 6.0, 9.0), length_s=2.5):
        for start in starts:
            self.file.add_trial(start_time=start, stop_time=start + length_s)
        return self

    def written(self):
        with pynwb.NWBHDF5IO(self.path, "w") as io:
            io.write(self.file)
        return self.path


def read(path, behavior=HAND, **where):
    return read_recording(path, behavior=behavior, **where)


def test_ragged_units_with_the_smallest_index_type_and_a_silent_unit(tmp_path):
    path = Lab(tmp_path / "lab.nwb", hand_vel()).trials().written()
    with h5py.File(path) as file:
        assert file["units/spike_times_index"].dtype == np.uint8
    recording = read(path)
    assert recording.unit_ids.tolist() == [5, 6, 7] and recording.identifier == "lab-1"
    for own, times in zip(recording.spike_times, SPIKES, strict=True):
        np.testing.assert_array_equal(own, times)
    np.testing.assert_array_equal(recording.behavior, VELOCITY)
    assert bin_trials(recording, 0.02).spikes.sum(axis=0).tolist() == [3, 0, 4]


def test_an_index_grows_with_the_spikes_and_is_read_the_same(tmp_path):
    lab = Lab(tmp_path / "lab.nwb", hand_vel()).trials()
    many = np.linspace(0, 11, 400)
    lab.file.add_unit(spike_times=many, id=8)
    with h5py.File(lab.written()) as file:
        assert file["units/spike_times_index"].dtype == np.uint16
    np.testing.assert_array_equal(read(tmp_path / "lab.nwb").spike_times[3], many)


def test_behaviour_in_several_modules_and_containers(tmp_path):
    lab = Lab(tmp_path / "lab.nwb", hand_vel()).trials()
    cursor = pynwb.behavior.SpatialSeries(
        name="cursor", data=VELOCITY * 2, reference_frame="screen", unit="m", timestamps=TIMES
    )
    lab.module.add(pynwb.behavior.Position(spatial_series=cursor))
    eye = lab.file.create_processing_module("eye", "where it looked")
    eye.add(pynwb.TimeSeries(name="speed", data=VELOCITY[:, 0], unit="deg/s", rate=100.0, starting_time=0.0))
    lab.file.add_acquisition(pynwb.TimeSeries(name="lever", data=VELOCITY[:, :1], unit="V", rate=100.0))
    path = lab.written()
    assert read(path, "processing/behavior/Position/cursor").behavior_unit == "m"
    speed = read(path, "processing/eye/speed")
    assert speed.behavior.shape == (1200, 1)
    np.testing.assert_allclose(speed.behavior_times, TIMES, atol=1e-12)
    assert read(path, "acquisition/lever").behavior_unit == "V"
    with pytest.raises(UserError) as error:  # the config names what is not there: the file's own list helps
        read(path, "processing/behavior/joystick")
    for line in ("units: units: 3 units, 7 spikes", "trials: intervals/trials: 4 intervals",
                 f"time series: {HAND}: [1200, 2] cm/s, at 1200 timestamps",
                 "time series: processing/behavior/Position/cursor: [1200, 2] m",
                 "time series: processing/eye/speed: [1200] deg/s, 100 Hz",
                 "time series: acquisition/lever: [1200, 1] V, 100 Hz"):  # fmt: skip
        assert line in str(error.value)


def test_conversion_and_offset_of_stored_integers(tmp_path):
    stored = np.round(VELOCITY * 1000).astype(np.int16)
    path = Lab(tmp_path / "lab.nwb", hand_vel(data=stored, conversion=0.01, offset=-2.0)).trials().written()
    np.testing.assert_allclose(read(path).behavior, stored * 0.01 - 2.0, rtol=1e-6)


def test_epochs_in_place_of_trials_and_neither_of_them(tmp_path):
    lab = Lab(tmp_path / "lab.nwb", hand_vel())
    for start in (0.0, 4.0, 8.0):
        lab.file.add_epoch(start_time=start, stop_time=start + 3.0, tags=["task"])
    recording = read(lab.written(), trials="intervals/epochs")
    assert bin_trials(recording, 0.5).offsets.tolist() == [0, 6, 12, 18]
    with pytest.raises(UserError, match="trials: intervals/epochs: 3 intervals, with tags"):
        read(lab.path)
    plain = read(Lab(tmp_path / "plain.nwb", hand_vel()).written(), trials=None)
    trials = bin_trials(in_stretches(plain, 2.0), 0.5)  # from the first spike to the last, 0.5 s to 9 s
    assert trials.offsets.tolist() == [0, 4, 8, 12, 16] and trials.starts.tolist() == [0.5, 2.5, 4.5, 6.5]


def test_a_gap_in_the_behaviour_has_no_velocity(tmp_path):
    kept = (TIMES < 1.0) | (TIMES >= 2.0)
    gap = hand_vel(data=VELOCITY[kept], timestamps=TIMES[kept])
    trials = bin_trials(read(Lab(tmp_path / "lab.nwb", gap).trials().written()), 0.02)
    unmeasured = np.isnan(trials.velocity).any(axis=1)
    assert unmeasured.sum() == 50 and unmeasured[50:100].all()


def test_links_to_data_and_times_within_a_file_and_out_of_it(tmp_path):
    other = Lab(tmp_path / "other.nwb", hand_vel())
    other.written()
    with pynwb.NWBHDF5IO(tmp_path / "other.nwb", "r") as io:
        theirs = io.read().processing["behavior"]["hand_vel"]
        lab = Lab(tmp_path / "lab.nwb", hand_vel(data=theirs.data, timestamps=theirs.timestamps)).trials()
        lab.module.add(pynwb.TimeSeries(name="again", data=VELOCITY, unit="m", timestamps=lab.module["hand_vel"]))
        lab.written()
    with h5py.File(lab.path) as file:
        assert isinstance(file[HAND].get("data", getlink=True), h5py.ExternalLink)
        assert isinstance(file["processing/behavior/again"].get("timestamps", getlink=True), h5py.SoftLink)
    np.testing.assert_array_equal(read(lab.path).behavior, VELOCITY)
    np.testing.assert_array_equal(read(lab.path, "processing/behavior/again").behavior_times, TIMES)
    (tmp_path / "other.nwb").unlink()
    with pytest.raises(UserError) as error:
        read(lab.path)
    assert f"{HAND}/data: a link that leads nowhere" in str(error.value)


def test_compressed_and_chunked_data(tmp_path):
    from hdmf.backends.hdf5.h5_utils import H5DataIO

    packed = H5DataIO(VELOCITY, compression="gzip", compression_opts=4, shuffle=True, chunks=(128, 2))
    path = Lab(tmp_path / "lab.nwb", hand_vel(data=packed)).trials().written()
    np.testing.assert_array_equal(read(path).behavior, VELOCITY)


def test_units_that_were_observed_for_a_part_of_the_session(tmp_path):
    parts = {"obs_intervals": [[[0.0, 12.0]], [[0.0, 6.0], [6.0, 12.0]], [[0.0, 8.6]]]}
    recording = read(Lab(tmp_path / "lab.nwb", hand_vel(), **parts).trials().written())
    trials = bin_trials(recording, 0.02)
    assert trials.left_out == {"not observed by every unit": 1} and trials.ids.tolist() == [0, 1, 2]
    assert bin_trials(recording, 0.02, unit_ids=[5, 6]).left_out == {}


def test_trials_that_were_aborted_have_no_stop_and_are_left_out(tmp_path):
    lab = Lab(tmp_path / "lab.nwb", hand_vel()).trials()
    lab.file.add_trial(start_time=11.6, stop_time=np.nan)
    trials = bin_trials(read(lab.written()), 0.02)
    assert trials.left_out == {"without a finite start and stop": 1} and len(trials.ids) == 4
