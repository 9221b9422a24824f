"""Recordings and settings that cannot work: each is one message that names the key, the fault and what is there."""

import shutil

import numpy as np
import pytest
from kit import in_process
from small_sessions import BEHAVIOR, write_session

from aurora_train.config import load
from aurora_train.errors import UserError
from neural.spikes import SPLITS

h5py = pytest.importorskip("h5py")


def silent(done, total, what):
    pass



@pytest.fixture(scope="module")
def nwb(tmp_path_factory):
    return write_session(tmp_path_factory.mktemp("nwb") / "session.nwb")


def put(name, values, **attributes):
    """An edit that replaces a dataset, or adds one, and keeps its attributes."""

    def edit(file):
        known = dict(file[name].attrs) if name in file else {}
        if name in file:
            del file[name]
        file[name] = values
        file[name].attrs.update(known | attributes)

    return edit


def drop(*names):
    return lambda file: [file.__delitem__(name) for name in names]


def scale(name, factor):
    return lambda file: put(name, file[name][()] * factor)(file)


def both(*edits):
    return lambda file: [edit(file) for edit in edits]


def _link(name, target_file):
    def edit(file):
        del file[name]
        file[name] = h5py.ExternalLink(target_file, "/data")

    return edit


UNITS, TRIALS = "units/spike_times", "intervals/trials"
OBSERVED = both(
    put("units/obs_intervals", np.array([[0.0, 26.0]] * 5 + [[0.0, 3.0]])),
    put("units/obs_intervals_index", np.arange(1, 7, dtype=np.uint8)),
)
# name: (edit of the file, overrides, the key that is named, what is said)
CASES = {
    "no units": (drop("units"), [], "data.units_table", "has no `units/spike_times`"),
    "units without an index": (drop(UNITS + "_index"), [], "data.units_table", "spike_times_index"),
    "another table of units": (None, ["data.units_table=ecephys/units"], "data.units_table", "units: units: 6"),
    "no unit at all": (put(UNITS + "_index", np.zeros(0, np.uint8)), [], "data.source", "is empty"),
    "units without a spike": (
        both(put(UNITS + "_index", np.zeros(6, np.uint8)), put(UNITS, np.zeros(0))), [], "data.source",
        "none of the 6 units"),
    "an index that wrapped": (
        lambda file: put(UNITS + "_index", file[UNITS + "_index"][()].astype(np.uint8))(file), [], "data.source",
        "does not index its spike_times"),
    "a spike time that is not a number": (
        lambda file: file[UNITS].__setitem__(3, np.nan), [], "data.source", "unit 10 of"),
    "spikes in milliseconds": (scale(UNITS, 1000.0), [], "data.source", "seconds, not samples or milliseconds"),
    "times that are text": (
        put(TRIALS + "/start_time", np.array([b"noon"] * 24)), [], "data.source", "does not hold numbers"),
    "two units of one id": (put("units/id", np.array([1, 2, 3, 3, 4, 5])), [], "data.source", "3 is there twice"),
    "a unit that is not there": (None, ["data.units=[10,99]"], "data.units", "no unit 99"),
    "an empty list of units": (None, ["data.units=[]"], "data.units", "the list of units is empty"),
    "a unit that was not observed": (OBSERVED, [], "data.units", "unit 15 cover 2 trials"),
    "observations of other units": (
        both(OBSERVED, put("units/obs_intervals_index", np.array([3, 6], np.uint8))), [], "data.source",
        "has 2 entries"),
    "no trials": (drop(TRIALS), [], "data.trials", "has no `intervals/trials/start_time`"),
    "no row in the trials": (
        both(put(TRIALS + "/start_time", np.zeros(0)), put(TRIALS + "/stop_time", np.zeros(0))), [], "data.trials",
        "0 start times"),
    "a trial that ends before it starts": (
        lambda file: file[TRIALS + "/stop_time"].__setitem__(4, 0.0), [], "data.source", "trial 4 of"),
    "trials outside the recording": (
        both(scale(TRIALS + "/start_time", 1e3), scale(TRIALS + "/stop_time", 1e3)), [], "data.behavior",
        "24 of 24 trials"),
    "trials that overlap": (
        lambda file: put(TRIALS + "/stop_time", file[TRIALS + "/stop_time"][()] + 0.5)(file), [], "data.trials",
        "overlap by 0.4"),
    "a table of trials with another name": (
        None, ["data.trials=intervals/trial"], "data.trials", "did you mean `data.trials=intervals/trials`?"),
    "stretches longer than the recording": (
        None, ["data.trials=null", "data.stretch_s=1000"], "data.stretch_s", "no stretch of 1000 s"),
    "no behaviour": (drop(BEHAVIOR), [], "data.behavior", "trials: intervals/trials: 24 intervals"),
    "behaviour with another name": (
        None, ["data.behavior=processing/behavior/hand_ve"], "data.behavior", f"did you mean `{BEHAVIOR}`?"),
    "behaviour at another clock": (
        lambda file: put(BEHAVIOR + "/timestamps", file[BEHAVIOR + "/timestamps"][()] + 1e6)(file), [],
        "data.behavior", "without behaviour"),
    "behaviour in milliseconds": (
        scale(BEHAVIOR + "/timestamps", 1000.0), [], "data.behavior", "one sample in 10 s"),
    "times that do not increase": (
        lambda file: file[BEHAVIOR + "/timestamps"].__setitem__(5, 0.0), [], "data.behavior", "increasing times"),
    "fewer times than samples": (
        put(BEHAVIOR + "/timestamps", np.arange(7.0)), [], "data.behavior", "there are 7"),
    "a rate of zero": (
        both(drop(BEHAVIOR + "/timestamps"), put(BEHAVIOR + "/starting_time", 0.0, rate=0.0)), [], "data.behavior",
        "the rate 0 Hz"),
    "four axes": (put(BEHAVIOR + "/data", np.zeros((2600, 4))), [], "data.behavior", "has the shape (2600, 4)"),
    "behaviour that was never measured": (
        put(BEHAVIOR + "/data", np.full((2600, 2), np.nan)), [], "data.behavior", "has no finite value"),
    "behaviour between trials alone": (
        lambda file: put(BEHAVIOR + "/data", np.where(
            (file[BEHAVIOR + "/timestamps"][()] % 1 < 0.95)[:, None], np.nan, file[BEHAVIOR + "/data"][()]))(file), [],
        "data.behavior", "no bin of the"),
    "behaviour in a file that is not here": (
        _link(BEHAVIOR + "/data", "gone.nwb"), [], "data.behavior", "a link that leads nowhere"),
    "spikes in a file that is not here": (
        _link(UNITS, "gone.nwb"), [], "data.units_table", "units/spike_times: a link that leads nowhere"),
    "bins longer than the trials": (None, ["data.bin_ms=1000"], "data.bin_ms", "24 of 24 trials"),
    "a share that holds no trial out": (None, ["data.held_out=0.001"], "data.held_out", "no trial of small falls"),
    "NWB of the first version": (put("nwb_version", b"NWB-1.0.6"), [], "data.source", "NWB 1 has another layout"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_recording_that_cannot_be_used_is_one_message(name, nwb, tmp_path):
    edit, overrides, where, said = CASES[name]
    path = shutil.copy(nwb, tmp_path / "edited.nwb")
    if edit is not None:
        with h5py.File(path, "r+") as file:
            edit(file)
    config = load("neural/decoding", [f"data.source={path}", *overrides])
    with pytest.raises(UserError) as caught:
        recipe = config.recipe_class(config, tmp_path).ready(silent)
        [recipe.data(split) for split in SPLITS]
    assert caught.value.where == where and said in " ".join(str(caught.value).split())


def test_a_file_that_is_missing_cut_short_or_something_else_is_one_message(nwb, tmp_path, capsys):
    (tmp_path / "notes.nwb").write_text("not a recording")
    (tmp_path / "cut.nwb").write_bytes(nwb.read_bytes()[:6000])
    said = {nwb.parent / "sesion.nwb": "session.nwb", tmp_path / "notes.nwb": "not an HDF5 file",
            tmp_path / "cut.nwb": "cut short"}  # fmt: skip
    for path, words in said.items():
        assert in_process("inspect", "neural/decoding", f"data.source={path}") == 2
        error = capsys.readouterr().err
        assert "error: data.source: " in error and words in error and "Traceback" not in error


def test_what_was_left_out_is_said(nwb, tmp_path, monkeypatch, capsys):
    """An aborted trial has no stop, and the last ones have no behaviour; the others are used."""
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    path = shutil.copy(nwb, tmp_path / "edited.nwb")
    with h5py.File(path, "r+") as file:
        file[TRIALS + "/stop_time"][2] = np.nan
        for name in ("data", "timestamps"):
            put(f"{BEHAVIOR}/{name}", file[f"{BEHAVIOR}/{name}"][:2150])(file)
    assert in_process("inspect", "neural/decoding", f"data.source={path}", "data.held_out=0.3") == 0
    printed = capsys.readouterr()
    assert "19 trials, 4 without behaviour left out, 1 without a finite start and stop left out" in printed.err
    assert "small: " in printed.out and "bins of 20 ms" in printed.out and "trial" in printed.out
