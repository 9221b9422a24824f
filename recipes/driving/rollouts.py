"""Scores of a model that drives: forecasts on unseen roads, and closed loop, beside baselines in the same scenes.

A forecast knows the history alone. In closed loop the lights go on as recorded, since nobody in a scene decides them.
"""

from __future__ import annotations

import numpy as np

from driving import driving_scores
from driving.moves import Moves, blind
from driving.scenes import HISTORY

MODES = 6


def scored(predict, source: Moves, config, key, progress) -> dict:
    """The result of `Motion.score`. `config`: the section `rollout`."""
    indices = chosen(source, config.scenes)
    batch = source.located(indices)
    forecasts = forecast(predict, source, batch, config, key, progress)
    numbers = forecast_numbers(forecasts[:, :, 0, :, :2], batch)
    rows = driven(predict, source, indices, batch, config, key, progress)
    columns = list(next(iter(rows.values())))
    table = {"title": "Closed loop: the share of scenes in which the ego car does this within 3 and 6 s",
             "columns": ["the ego car", *columns], "rows": [[who, *row.values()] for who, row in rows.items()]}  # fmt: skip
    return numbers | {f"driven_{name}": value for name, value in rows["the model, others replay"].items()} | {
        "tables": [table]
    }


def chosen(source: Moves, most: int) -> np.ndarray:
    """At most `most` scenes, spread evenly, whose focal agent is there at the end of the history."""
    spread = np.arange(min(most, len(source))) * len(source) // max(min(most, len(source)), 1)
    there = source.take(spread)["valid"][:, 0, HISTORY - 1]
    return spread[there]


def forecast(predict, source, batch: dict, config, key, progress) -> np.ndarray:
    """`config.samples` forecasts of N scenes, float32[N, K, A, 60, 5]."""
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


def forecast_numbers(paths: np.ndarray, batch: dict) -> dict[str, float]:
    """Errors of the focal agent's sampled paths [N, K, T, 2]."""
    truth, valid = batch["states"][:, 0, HISTORY:, :2], batch["valid"][:, 0, HISTORY:]
    return driving_scores.forecast_scores(modes_of(paths), truth, valid)


def driven(predict, source, indices, batch: dict, config, key, progress) -> dict[str, dict]:
    """Rates of mishaps of the ego car by who drives it and what the others do."""
    import jax

    from driving.closed_loop import Log, drive, straight_on

    arrays = {name: batch[name] for name in source.names} | {"key": jax.random.split(key, len(indices))}
    ego = np.arange(batch["valid"].shape[1]) == 0
    steered = np.ones(len(indices), bool)
    recorded = batch["states"][:, :, HISTORY:], batch["valid"][:, :, HISTORY:]
    rows = {"the recording": recorded}
    path, _ = drive(straight_on, Log(arrays["states"], arrays["valid"], arrays["sizes"]), HISTORY - 1, 60)
    rows["constant velocity, others replay"] = with_ego(recorded, np.asarray(path))
    for name, replays in (("the model, others replay", True), ("the model, others by the model", False)):
        replayed = np.broadcast_to(~ego & replays, batch["valid"].shape[:2])
        out = in_batches(predict, arrays | {"replayed": replayed, "steered": steered}, config.batch, progress, "driving")
        rows[name] = out["states"], out["present"]
    return {name: mishaps(source, indices, batch, *made) for name, made in rows.items()}


def with_ego(recorded, path: np.ndarray):
    """The recorded states and presence with another path of agent 0, float32[N, 60, 5]."""
    states, present = (array.copy() for array in recorded)
    states[:, 0], present[:, 0] = path, True
    return states, present


def mishaps(source, indices, batch: dict, states: np.ndarray, present: np.ndarray) -> dict[str, float]:
    """Means over scenes of `driving_scores.driving_scores` of the focal agent; agents not modelled replay."""
    found = []
    for row, index in enumerate(indices):
        scene = source.scene(index)
        all_states, all_present = scene.states[:, HISTORY:].copy(), scene.valid[:, HISTORY:].copy()
        known = batch["agents"][row] >= 0
        who = batch["agents"][row][known]
        origin = np.array([*batch["origin"][row], 0, 0, 0])
        all_states[who], all_present[who] = states[row][known] + origin, present[row][known]
        counted = np.arange(scene.num_agents) == scene.focal
        found.append(driving_scores.driving_scores(scene, all_states, all_present, counted))
    return {name: driving_scores.mean(np.array([scores[name] for scores in found])) for name in found[0]}
