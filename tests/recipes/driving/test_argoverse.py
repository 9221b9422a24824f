"""Argoverse 2 scenarios: what is written is read, whatever the order of its rows; wrong files are one clear message."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_scene_store import assert_same, quiet, without_agents

from aurora_train.errors import UserError
from driving.argoverse import read_scene
from driving.argoverse_writing import write_scene
from driving.car_following import generate
from driving.recorded import recorded_scenes, split_of
from driving.scene_store import SPLITS
from driving.scenes import DEFAULT_SIZES, Scene


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A generated scene whose tracks are in the order of their ids as text, as a reader has them."""
    made = generate(2, 1)[0]
    order = np.argsort(made.track_ids)
    return dataclasses.replace(
        made, track_ids=tuple(made.track_ids[k] for k in order), kinds=tuple(made.kinds[k] for k in order),
        states=made.states[order], sizes=made.sizes[order], focal=int(np.flatnonzero(order == made.focal)[0]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(scene, tmp_path_factory):
    return write_scene(scene, tmp_path_factory.mktemp("av2"))


@pytest.fixture
def files(written, tmp_path):
    """A copy of the scenario's folder: its parquet file, its map and its lights."""
    folder = tmp_path / written.parent.name
    shutil.copytree(written.parent, folder)
    beside = {"map": "log_map*", "lights": "traffic*"}
    return {"tracks": folder / written.name, **{name: next(folder.glob(glob)) for name, glob in beside.items()}}


def columns(path) -> dict:
    table = pyarrow.parquet.read_table(path)
    return {name: table.column(name).to_pylist() for name in table.column_names}


def rewrite(path, content: dict) -> None:
    pyarrow.parquet.write_table(pyarrow.table(content), path)


def test_a_scenario_is_read_as_it_was_written(scene, written):
    assert_same(scene, read_scene(written))


def test_the_order_of_rows_and_numeric_ids_do_not_matter(scene, files):
    rows = columns(files["tracks"])
    shuffled = np.random.default_rng(0).permutation(len(rows["timestep"]))
    rows = {name: [values[k] for k in shuffled] for name, values in rows.items()}
    rewrite(files["tracks"], rows)
    assert_same(scene, read_scene(files["tracks"]))
    names = {name: 1000 + number for number, name in enumerate(scene.track_ids)}
    rewrite(files["tracks"], rows | {"track_id": [names[name] for name in rows["track_id"]],
                                     "focal_track_id": [names[name] for name in rows["focal_track_id"]]})  # fmt: skip
    read = read_scene(files["tracks"])
    assert read.track_ids[read.focal] == str(names[scene.track_ids[scene.focal]])
    np.testing.assert_array_equal(read.states, scene.states)


def test_a_track_with_gaps_and_a_truncated_one_keep_their_steps(scene, files):
    rows = columns(files["tracks"])
    focal = scene.track_ids[scene.focal]
    kept = [k for k, (name, step) in enumerate(zip(rows["track_id"], rows["timestep"], strict=True))
            if name != focal or step < 60 and step % 7]  # fmt: skip
    rewrite(files["tracks"], {name: [values[k] for k in kept] for name, values in rows.items()})
    valid = read_scene(files["tracks"]).valid[scene.focal]
    np.testing.assert_array_equal(np.flatnonzero(valid), [step for step in range(60) if step % 7])


def test_coordinates_of_a_city_keep_their_millimetres(scene, tmp_path):
    far = dataclasses.replace(scene, origin=(123456.0, -98765.0))
    read = read_scene(write_scene(far, tmp_path))
    assert max(np.abs(read.states[read.valid][:, :2]).max(), np.abs(read.lanes[0].centre).max()) < 1000
    for name in ("states", "light_stops"):
        there, here = getattr(far, name), getattr(read, name)
        world = [a[..., :2].astype(np.float64) + s.origin for a, s in ((there, far), (here, read))]
        np.testing.assert_allclose(world[1], world[0], atol=1e-4)


def test_a_scenario_without_files_that_are_ours_has_usual_sizes_and_no_lights(scene, files):
    files["lights"].unlink()
    rows = columns(files["tracks"])
    rewrite(files["tracks"], {name: rows[name] for name in rows if name not in ("length_m", "width_m", "map_id")})
    content = json.loads(files["map"].read_text())
    for lane in content["lane_segments"].values():
        del lane["centerline"], lane["speed_limit_mps"]
    files["map"].write_text(json.dumps(content))
    read = read_scene(files["tracks"])
    assert read.lights is None and read.map_id == scene.identifier and np.isnan(read.lanes[0].speed_limit)
    assert read.sizes[read.focal].tolist() == pytest.approx([4.6, 1.9])
    for ours, theirs in zip(scene.lanes, read.lanes, strict=True):
        apart = np.linalg.norm(theirs.centre[:, None] - ours.centre[None], axis=-1).min(axis=1)
        assert apart.max() < 0.6  # the points are half a metre or a metre apart
    files["map"].unlink()
    assert read_scene(files["tracks"]).lanes == ()


def test_an_id_names_no_file_elsewhere_and_half_a_size_is_none(files, tmp_path):
    """The id comes with the recording. Neither reading it nor writing it again leaves the folder."""
    rows = columns(files["tracks"])
    del rows["width_m"]
    rows["scenario_id"] = ["../elsewhere"] * len(rows["scenario_id"])
    rewrite(files["tracks"], rows)
    read = read_scene(files["tracks"])
    assert read.identifier == "../elsewhere" and read.lights is not None
    np.testing.assert_array_equal(read.sizes, np.array([DEFAULT_SIZES[kind] for kind in read.kinds], np.float32))
    for identifier in ("../elsewhere", "..", "", "a/b"):
        with pytest.raises(UserError, match="cannot be the name of a folder"):
            write_scene(dataclasses.replace(read, identifier=identifier), tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()


def test_what_the_format_cannot_hold_is_refused(scene, tmp_path):
    named = dataclasses.replace(scene.lanes[0], id="north")
    for wrong, said in ((without_agents(scene), "focal"), (dataclasses.replace(scene, lanes=(named,)), "north")):
        with pytest.raises(UserError, match=said):
            write_scene(wrong, tmp_path)


def test_whole_maps_are_held_out_and_published_splits_are_kept(scene, tmp_path):
    for number in range(12):
        more = {"identifier": f"s{number}", "map_id": f"{number // 2}", "lanes": scene.lanes[:2], "lights": None}
        small = dataclasses.replace(scene, light_lanes=(), light_stops=scene.light_stops[:0], **more)
        write_scene(small, tmp_path / "flat")
    store = recorded_scenes(tmp_path, tmp_path / "flat", 0.3, quiet)
    for split in SPLITS:
        for k in range(store.count(split)):
            assert split_of(store.scene(split, k).map_id, 0.3) == split
    assert sum(map(store.count, SPLITS)) == 12 and 0 < store.count("test") < 12
    (tmp_path / "set").mkdir()
    shutil.copytree(tmp_path / "flat", tmp_path / "set" / "train")
    shutil.copytree(tmp_path / "flat" / "s0", tmp_path / "set" / "val" / "s0")
    published = recorded_scenes(tmp_path, tmp_path / "set", 0.3, quiet)
    assert published.count("test") == 1 and published.count("train") + published.count("validation") == 12
    for folder, number in (("flat", 12), ("set", 13)):  # `evaluate --on`: whatever is there is the test
        assert recorded_scenes(tmp_path, tmp_path / folder, 1.0, quiet).count("test") == number


def change(name, row, value):
    """Set one value of a column, in a row or in all of them."""
    def edit(rows):
        wanted = range(len(rows[name])) if row is None else [row]
        for k in wanted:
            rows[name][k] = value

    return edit


def repeat_first(rows):
    for values in rows.values():
        values.append(values[0])


def no_rows(rows):
    for values in rows.values():
        values.clear()


BAD_TRACKS = {
    "no column": (lambda rows: rows.pop("heading"), ["`heading`", "has all of"]),
    "column of text": (change("position_x", None, "12.5"), ["`position_x`", "string"]),
    "no rows": (no_rows, ["no rows"]),
    "null id": (change("track_id", 5, None), ["`track_id`", "row 5"]),
    "unknown type": (change("object_type", 3, "vehicel"), ["row 3", "did you mean `vehicle`?"]),
    "type changes": (change("object_type", 1, "bus"), ["row 1", "changes"]),
    "no focal track": (change("focal_track_id", None, "AV"), ["'AV'"]),
    "two focal tracks": (change("focal_track_id", 4, "1"), ["`focal_track_id`", "row 4"]),
    "two scenarios": (change("scenario_id", 2, "other"), ["`scenario_id`", "row 2"]),
    "a step twice": (repeat_first, ["was there before"]),
    "step before the first": (change("timestep", 0, -1), ["timestep -1", "row 0"]),
    "step after the last": (change("timestep", 0, 110), ["timestep 110"]),
    "half a step": (change("timestep", 0, 1.5), ["`timestep`", "whole"]),
    "nan": (change("velocity_y", 9, float("nan")), ["`velocity_y`", "row 9"]),
    "infinity": (change("position_y", 9, float("inf")), ["`position_y`", "row 9"]),
    "degrees": (change("heading", 7, 270.0), ["270", "radians", "row 7"]),
    "nothing observed": (change("observed", None, False), ["no row is observed"]),
    "a hole in the history": (change("observed", 0, False), ["row 0", "not observed"]),
    "observed is a number": (change("observed", None, 1), ["`observed`", "true and false"]),
    "20 Hz": (change("end_timestamp", None, 5_450_000_000), ["span 5.45 s", "10 Hz"]),
    "no steps": (change("num_timestamps", None, 0), ["num_timestamps is 0"]),
    "no size": (change("width_m", 2, 0.0), ["`width_m`", "row 2"]),
    "endless size": (change("length_m", None, float("inf")), ["`length_m` is inf"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TRACKS)
def test_wrong_tracks_are_one_message_with_the_file(files, case):
    edit, expected = BAD_TRACKS[case]
    rows = columns(files["tracks"])
    edit(rows)
    if case == "no rows":
        schema = pyarrow.parquet.read_schema(files["tracks"])
        pyarrow.parquet.write_table(pyarrow.table(rows, schema=schema), files["tracks"])
    else:
        rewrite(files["tracks"], rows)
    assert_refused(files["tracks"], files["tracks"], expected)


def first(content, layer):
    return next(iter(content[layer].values()))


BAD_MAPS = {
    "no layer": (lambda m: m.pop("drivable_areas"), ["`drivable_areas`"]),
    "no boundary": (lambda m: first(m, "lane_segments").pop("left_lane_boundary"), ["`left_lane_boundary`"]),
    "one point": (lambda m: first(m, "lane_segments").update(centerline=[{"x": 0, "y": 0}]), ["1 point", "at least 2"]),
    "no x": (lambda m: first(m, "lane_segments")["centerline"][0].pop("x"), ["not a list of points"]),
    "nan": (lambda m: first(m, "lane_segments")["centerline"][3].update(x=float("nan")), ["point 3", "not finite"]),
    "unknown type": (lambda m: first(m, "lane_segments").update(lane_type="VEHICEL"), ["did you mean `VEHICLE`?"]),
    "an id twice": (lambda m: m["lane_segments"].update(x=first(m, "lane_segments")), ["two lanes"]),
    "two points": (lambda m: first(m, "drivable_areas")["area_boundary"].__delitem__(slice(2, None)), ["2 points"]),
    "speed limit": (lambda m: first(m, "lane_segments").update(speed_limit_mps=-3), ["speed_limit_mps", "-3"]),
    "no limit at all": (lambda m: first(m, "lane_segments").update(speed_limit_mps=float("inf")), ["mps", "inf"]),
    "a list": (lambda m: m.update(lane_segments=[]), ["`lane_segments`"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MAPS)
def test_wrong_maps_are_one_message_with_the_file(files, case):
    edit, expected = BAD_MAPS[case]
    content = json.loads(files["map"].read_text())
    edit(content)
    files["map"].write_text(json.dumps(content))
    assert_refused(files["tracks"], files["map"], expected)


BAD_LIGHTS = {
    "unknown word": (lambda light: light["states"].__setitem__(0, "purple"), ["purple", "green"]),
    "unknown lane": (lambda light: light.update(lane_id=7), ["lane 7"]),
    "too few states": (lambda light: light.update(states=light["states"][:50]), []),
    "stop nowhere": (lambda light: light.update(stop={"x": float("nan"), "y": 0.0}), ["stop is not finite"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LIGHTS)
def test_wrong_lights_are_one_message_with_the_file(files, case):
    edit, expected = BAD_LIGHTS[case]
    content = json.loads(files["lights"].read_text())
    edit(content["lights"][0])
    files["lights"].write_text(json.dumps(content))
    assert_refused(files["tracks"], files["lights"], expected)


def test_cut_files_and_several_maps_are_one_message(files):
    shutil.copy(files["map"], files["map"].with_name("log_map_archive_b.json"))
    files["map"].rename(files["map"].with_name("log_map_archive_a.json"))
    assert_refused(files["tracks"], files["tracks"], ["several maps", "log_map_archive_b.json"])
    files["map"].write_bytes(files["map"].with_name("log_map_archive_b.json").read_bytes()[:-100])
    assert_refused(files["tracks"], files["map"], ["cut short"])
    files["tracks"].write_bytes(files["tracks"].read_bytes()[:-100])
    assert_refused(files["tracks"], files["tracks"], ["not a whole parquet file"])


def test_folders_without_scenarios_are_one_message(written, tmp_path):
    above, right = written.parents[2], written.parents[1]
    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path, "no scenarios"), (above, str(right))):
        with pytest.raises(UserError) as caught:
            recorded_scenes(tmp_path / "store", folder, 0.2, quiet)
        assert said in str(caught.value) and str(folder) in str(caught.value)


def assert_refused(scenario, file, expected):
    with pytest.raises(UserError) as caught:
        read_scene(scenario)
    message = str(caught.value)
    assert str(file) in message and all(word in message for word in expected), message
