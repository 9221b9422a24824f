"""Scores of a model that drives: forecasts on unseen roads, and closed loop, beside baselines in the same scenes.

A forecast knows the history alone. In closed loop the lights go on as recorded, since nobody in a scene decides them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aurora_train.errors import UserError
from aurora_train.recipe import few
from driving import baselines
from driving.driving_scores import ROAD_USERS, driving_scores, forecast_scores, mean
from driving.moves import Moves, blind
from driving.scenes import HISTORY, STEPS, Scene

FUTURE, MODES = STEPS - HISTORY, 6
FORECASTERS = ("constant velocity", "CTRV", "IDM")
FORECAST_COLUMNS = ("minADE1_3s", "minADE1_6s", "minADE6_3s", "minADE6_6s", "minFDE6_6s", "miss6_6s")
OTHERS_REPLAY, OTHERS_REACT = "the model, others replay", "the model, others by the model"
SHOWN = {"recorded": "as recorded", "others replay": OTHERS_REPLAY, "all by the model": OTHERS_REACT}


def scored(predict, source: Moves, config, key, num_films: int, workdir: Path, progress) -> dict:
    """The result of `Motion.score`. `config`: the section `rollout`. Films are written to `workdir`."""
    indices = chosen(source, config.scenes)
    batch, scenes = source.located(indices), [source.scene(index) for index in indices]
    paths = forecast(predict, source, batch, config, key, progress)[:, :, 0, :, :2]
    errors = {"the model": of_focal(modes_of(paths), batch)} | baseline_scores(scenes, batch, progress)
    made = driven(predict, source, scenes, batch, config, key, progress)
    rates = {name: mishaps(scenes, paths) for name, paths in made.items()}
    tables = [
        _table("Forecasts of the focal agent: metres, and the share missed by 2 m", errors, FORECAST_COLUMNS),
        _table("Closed loop: the share of scenes in which the ego car does this within 3 or 6 s", rates),
    ]
    cars = sum(_ego(scene).any() for scene in scenes)
    notes = [
        f"{len(scenes)} scenes of {len({scene.map_id for scene in scenes})} maps. "
        f"Of {config.samples} forecasts a scene, the medoid is the first mode.",
        f"The focal agent is the ego car in the {cars} scenes where it is a {', a '.join(ROAD_USERS[:-1])} or a "
        f"{ROAD_USERS[-1]}. In closed loop it is a bicycle that follows the model's tokens, decided anew each 0.5 s.",
    ]
    if config.sumo_maps:
        from driving.sumo_scores import TITLE, reactive

        among_sumo = reactive(predict, source, config, key, progress)
        tables.append(_table(TITLE, among_sumo))
        errors["the model"] |= {f"sumo_{name}": value for name, value in among_sumo["the model"].items()}
    driven_numbers = {f"driven_{name}": value for name, value in rates[OTHERS_REPLAY].items()}
    remarks = few(len(scenes), "scene", "raise rollout.scenes, or hold out more")
    shown = {"tables": tables, "notes": notes, "remarks": remarks, "plots": films(scenes, made, num_films, workdir)}
    return errors["the model"] | driven_numbers | shown


def films(scenes: list[Scene], made: dict[str, list], count: int, workdir: Path) -> list[dict]:
    """GIFs of the first scenes, of those in which the model's ego car collides before others, as "plots" of a score."""
    from driving.draw_scenes import animation

    rolled = zip(scenes, made[OTHERS_REPLAY], strict=True)
    hits = [driving_scores(scene, *one, _ego(scene))["collision_6s"] == 1 for scene, one in rolled]
    plots = []
    for row in sorted(range(len(scenes)), key=lambda row: -hits[row])[:count]:
        panels = {short: made[name][row] for short, name in SHOWN.items()}
        file = f"scene-{row}.gif"
        (Path(workdir) / file).write_bytes(animation(scenes[row], panels))
        what = "the ego car collides" if hits[row] else "the focal agent is blue"
        plots.append({"title": f"{scenes[row].identifier}: {what}", "file": file})
    return plots


def baseline_errors(source: Moves, config, progress) -> dict[str, float]:
    """The first number of `scored` for each forecaster that is no model."""
    indices = chosen(source, config.scenes)
    batch, scenes = source.located(indices), [source.scene(index) for index in indices]
    found = baseline_scores(scenes, batch, progress)
    return {name.replace(" ", "_"): scores["minADE1_3s"] for name, scores in found.items()}


def chosen(source: Moves, most: int) -> np.ndarray:
    """At most `most` scenes, spread evenly, with 6 s after the history, and whose focal agent is there at its end."""
    spread = np.arange(min(most, len(source))) * len(source) // max(min(most, len(source)), 1)
    kept = [index for index in spread if _can_be_scored(source.scene(index))]
    if not kept:
        raise UserError("no scene can be scored", where="data.source",
                        why="a scene needs a focal agent at the end of its history, and 6 s after it")  # fmt: skip
    return np.array(kept)


def _can_be_scored(scene: Scene) -> bool:
    there = scene.focal >= 0 and bool(scene.valid[scene.focal, scene.observed - 1])
    return there and scene.steps >= scene.observed + FUTURE


def _table(title: str, rows: dict[str, dict], columns=None) -> dict:
    columns = list(columns or next(iter(rows.values())))
    cells = [[name, *(row.get(column, float("nan")) for column in columns)] for name, row in rows.items()]
    return {"title": title, "columns": ["by", *columns], "rows": cells}


# Forecasts


def forecast(predict, source: Moves, batch: dict, config, key, progress) -> np.ndarray:
    """`config.samples` forecasts of N scenes, float32[N, K, A, 60, 5], all agents together in each."""
    import jax

    known = blind({name: batch[name] for name in source.names})
    number, agents = batch["valid"].shape[:2]
    rows = np.repeat(np.arange(number), config.samples)
    cast = {"replayed": np.zeros((len(rows), agents), bool), "steered": np.zeros(len(rows), bool)}
    arrays = {name: array[rows] for name, array in known.items()} | cast | {"key": jax.random.split(key, len(rows))}
    states = in_batches(predict, arrays, config.batch, progress, "forecasting")["states"]
    return states.reshape(-1, config.samples, *states.shape[1:])


def in_batches(predict, arrays: dict, size: int, progress, what: str) -> dict:
    """`predict` for all rows, `size` at once; the last rows are repeated, so that only one shape is compiled."""
    count, found = len(arrays["valid"]), []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        found.append(predict({name: array[rows] for name, array in arrays.items()}))
        progress(min(start + size, count), count, what)
    return {name: np.concatenate([out[name] for out in found])[:count] for name in found[0]}


def modes_of(paths: np.ndarray, count: int = MODES) -> np.ndarray:
    """Of K sampled paths [N, K, T, 2] the `count` that stand for all of them best, [N, count, T, 2].

    The first is the medoid: the path with the least mean distance to all others. Each further one lowers the distance
    of all paths to the nearest chosen one the most (greedy k-medoids).
    """
    paths = paths.astype(np.float64)
    apart = np.linalg.norm(paths[:, :, None] - paths[:, None], axis=-1).mean(-1)  # [N, K, K]
    nearest, picks = np.full(paths.shape[:2], np.inf), []
    for _ in range(count):
        left = np.minimum(nearest[:, None], apart).sum(-1)  # if path i were added
        picks.append(left.argmin(-1))
        nearest = np.minimum(nearest, apart[np.arange(len(apart)), picks[-1]])
    return np.take_along_axis(paths, np.stack(picks, 1)[:, :, None, None], axis=1)


def of_focal(paths: np.ndarray, batch: dict) -> dict[str, float]:
    """Errors of forecasts [N, K, 60, 2] of the focal agents, the most probable first."""
    return forecast_scores(paths, batch["states"][:, 0, HISTORY:, :2], batch["valid"][:, 0, HISTORY:])


def baseline_scores(scenes: list[Scene], batch: dict, progress) -> dict[str, dict]:
    """Errors of the baselines' forecasts, which know the history alone as well."""
    found = {}
    for number, name in enumerate(FORECASTERS):
        progress(number, len(FORECASTERS), f"baselines: {name}")
        paths = [baselines.rollout(name, scene, FUTURE)[0][scene.focal, :, :2] for scene in scenes]
        only = np.stack(paths)[:, None] - batch["origin"][:, None, None]
        found[name] = of_focal(np.repeat(only, MODES, axis=1), batch)  # of one mode: its six are the same
    return found


# Closed loop


def driven(predict, source: Moves, scenes: list[Scene], batch: dict, config, key, progress) -> dict[str, list]:
    """What happens in each scene (as `in_scene`), by who drives the ego car and what the others do."""
    import jax

    made = {}
    for name in ("log replay", *FORECASTERS):
        row = f"{name}, others replay" if name in FORECASTERS else "as recorded"
        made[row] = [baselines.rollout(name, scene, FUTURE, _ego(scene), _lights(scene)) for scene in scenes]
    arrays = {name: batch[name] for name in source.names} | {"key": jax.random.split(key, len(scenes))}
    arrays["steered"] = np.ones(len(scenes), bool)
    for name, replays in ((OTHERS_REPLAY, True), (OTHERS_REACT, False)):
        others = np.arange(batch["valid"].shape[1]) > 0
        arrays["replayed"] = np.broadcast_to(others & replays, batch["valid"].shape[:2])
        out = in_batches(predict, arrays, config.batch, progress, f"driving: {name}")
        made[name] = [in_scene(scene, batch, out, row) for row, scene in enumerate(scenes)]
    return made


def in_scene(scene: Scene, batch: dict, out: dict, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(states float64[A, 60, 3], presence bool[A, 60]) of all agents of a scene; those that no model saw replay."""
    states, present = baselines.rollout("log replay", scene, FUTURE)
    known = batch["agents"][row] >= 0
    who = batch["agents"][row][known]
    states[who] = out["states"][row][known][..., :3] + np.array([*batch["origin"][row], 0])
    present[who] = out["present"][row][known]
    return states, present


def mishaps(scenes: list[Scene], made) -> dict[str, float]:
    """The share of scenes with each mishap of the ego car, by name and horizon."""
    found = [driving_scores(scene, *one, _ego(scene)) for scene, one in zip(scenes, made, strict=True)]
    return {name: mean(np.array([scores[name] for scores in found])) for name in found[0]}


def _ego(scene: Scene) -> np.ndarray:
    """bool[A]: the focal agent, if it is one that can be steered as a car; the recordings' may be a pedestrian."""
    return (np.arange(scene.num_agents) == scene.focal) & np.isin(scene.kinds, ROAD_USERS)


def _lights(scene: Scene) -> np.ndarray | None:
    return None if scene.lights is None else scene.lights[:, scene.observed : scene.observed + FUTURE]
