"""The real av2 opens what we write, we read what it writes, and its metrics equal ours on the same predictions.

It lives in a Python of its own, because it brings torch and pins other versions than constraints.txt does:

    AURORA_AV2_PYTHON=/path/to/venv/bin/python pytest -m release tests/recipes/driving/test_av2_real.py
"""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from driving import sumo_process
from driving.argoverse import read_scene, scenario_files
from driving.argoverse_writing import write_scene
from driving.car_following import generate
from driving.driving_scores import displacement

PYTHON = os.environ.get("AURORA_AV2_PYTHON")
pytestmark = [
    pytest.mark.release,
    pytest.mark.skipif(PYTHON is None, reason="AURORA_AV2_PYTHON names no Python that has av2"),
]


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """(our scenes, predictions, what av2 found, the folder that it wrote). SUMO's are among them if it is installed."""
    folder = tmp_path_factory.mktemp("exchanged")
    scenes = [scene for seed in range(4) for scene in generate(seed, 2)]
    if find_spec("libsumo") is not None:
        scenes += next(sumo_process.simulations([1], 2, 0))
    scenes = sorted((s for s in scenes if s.valid[s.focal].all()), key=lambda scene: scene.identifier)
    rng = np.random.default_rng(0)
    for scene in scenes:
        write_scene(scene, folder / "ours")
    truth = [scene.states[scene.focal, 50:, :2].astype(np.float64) for scene in scenes]
    guesses = [t + rng.normal(0, 0.05, (6, 60, 2)).cumsum(axis=1) for t in truth]
    np.savez(folder / "guesses.npz", **{f"{k}": guess for k, guess in enumerate(guesses)})
    side = Path(__file__).with_name("av2_side.py")
    arguments = [folder / name for name in ("ours", "guesses.npz", "found.npz", "theirs")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([PYTHON, side, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    with np.load(folder / "found.npz") as file:
        return scenes, guesses, {name: file[name] for name in file.files}, folder / "theirs"


def test_av2_opens_our_tracks_to_the_bit(exchanged):
    scenes, _, found, _ = exchanged
    for number, scene in enumerate(scenes):
        names = {key.rpartition("/")[2] for key in found if key.startswith(f"{number}/track/")}
        assert names == set(scene.track_ids)
        for name, kind, states, valid in zip(scene.track_ids, scene.kinds, scene.states, scene.valid, strict=True):
            steps, rows = np.flatnonzero(valid), found[f"{number}/track/{name}"]
            np.testing.assert_array_equal(rows[:, 0], steps)
            np.testing.assert_array_equal(rows[:, 1:6], states[valid].astype(np.float64))
            np.testing.assert_array_equal(rows[:, 6], steps < scene.observed)
            assert str(found[f"{number}/kind/{name}"]) == kind


def test_av2_opens_our_maps_to_the_bit(exchanged):
    scenes, _, found, _ = exchanged
    for number, scene in enumerate(scenes):
        for lane in scene.lanes:
            np.testing.assert_array_equal(found[f"{number}/lane/{lane.id}"], lane.left.astype(np.float64))
            assert [str(name) for name in found[f"{number}/after/{lane.id}"]] == list(lane.successors)
        assert found[f"{number}/areas"] == len(scene.drivable)
        crossings = found[f"{number}/crossings"].reshape(-1, 4, 2)
        np.testing.assert_array_equal(crossings, np.reshape(scene.crossings, (-1, 4, 2)))


def test_metrics_of_av2_equal_ours(exchanged):
    scenes, guesses, found, _ = exchanged
    for number, (scene, guess) in enumerate(zip(scenes, guesses, strict=True)):
        truth, valid = scene.states[scene.focal][None, 50:, :2], scene.valid[scene.focal][None, 50:]
        for seconds, steps in ((3, 30), (6, 60)):
            for modes in (1, 6):
                ours = displacement(guess[None], truth, valid, seconds, modes)
                theirs = {name: found[f"{number}/{name}/{steps}"][:modes].min() for name in ("ade", "fde", "miss")}
                for name in ours:
                    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-12)


def test_we_read_what_av2_writes(exchanged):
    scenes, _, _, theirs = exchanged
    files = scenario_files(theirs)
    assert len(files) == len(scenes)
    for path, scene in zip(files, scenes, strict=True):
        read = read_scene(path)
        assert read.identifier == scene.identifier and read.track_ids[read.focal] == scene.track_ids[scene.focal]
        place = {name: k for k, name in enumerate(scene.track_ids)}
        order = [place[name] for name in read.track_ids]
        np.testing.assert_array_equal(read.states, scene.states[order])
        assert read.kinds == tuple(scene.kinds[k] for k in order) and read.observed == scene.observed
