"""The score of a robot policy: what it does in simulation, beside the world's expert and beside chance.

The seeds of the rollouts are in the config, so every score meets the same starts and goals, and a score that was
interrupted is repeated with the same result. Without a world, the score is the error of held-out actions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aurora_train.errors import UserError
from aurora_train.evals.intervals import wilson
from aurora_train.recipe import few
from robot.chunks import inputs
from robot.drawing import draw_paths, write_gif
from robot.fitting import opened, refuse
from robot.limits import of_bound
from robot.rollouts import Chunked, Expert, Rollout, Uniform, refuse_not_finite, rollouts
from robot.worlds import World, world

VALIDATION = 1_000_000  # added to the seeds of scores while training, which choose checkpoints: other goals
RANDOM_EPISODES = 10  # of the random policy, which takes all steps of each
TIMED = 200  # single observations whose answer is timed
BATCH = 256  # of held-out chunks


def score(recipe, predict: Callable, split: str, key, workdir: Path, progress: Callable) -> dict:
    """The score of a `policy.Policy`; see `Recipe.score`."""
    if recipe.world is None:
        return _of_held_out_actions(recipe, predict, split, key, progress)
    settings = recipe.config.score
    seeds = np.arange(settings.episodes) + settings.seed + (VALIDATION if split == "validation" else 0)
    on, size = opened(recipe.known, recipe.world)
    try:
        act, first = asker(recipe, on, predict, key), on.reset(int(seeds[0])) | on.pictures()
        cannot = _cannot_draw(on) if settings.gifs and split == "test" else None
    finally:
        on.close()
    execute = recipe.executed
    choose = Chunked(act, execute=execute, ensemble=settings.ensemble)
    done = rollouts(
        choose, recipe.world, seeds, cameras=recipe.known["cameras"], size=size, progress=progress,
        filmed=settings.gifs if split == "test" and not cannot else 0,
    )  # fmt: skip
    one = {name: value[None] for name, value in first.items()}
    found = measured(done, on) | latency(lambda step: act(one, np.zeros(1, int), step))
    found |= of_bound(np.concatenate([one.actions for one in done]), recipe.config.limits)
    if split == "validation":
        return found
    shown = _shown(done, on, Path(workdir))
    shown["notes"] = [
        f"{len(done)} episodes in {recipe.world} ({on.version}), seeds {seeds[0]} to {seeds[-1]}. An episode ends at "
        f"its first success, or fails after {on.max_steps} steps of {1000 / on.fps:g} ms; Wilson's interval at 95 %.",
        f"The first {execute} actions of each chunk are executed." if settings.ensemble is None else
        "The policy is asked at every step, and what its chunks say of a step is averaged.",
        f"Latency: from one observation on the host to its chunk on the host, {TIMED} times.",
        "Return: the sum of the world's rewards, the last of which counts for the steps that a success leaves over. "
        "Jerk: the root mean square third derivative of the position in the state. Both are means over episodes.",
    ]  # fmt: skip
    shown["remarks"] = few(len(done), "episode", "raise score.episodes") + ([cannot] if cannot else [])
    return found | shown


def baselines(recipe, workdir: Path, progress: Callable) -> dict:
    """Successes of the world's expert on the same seeds, and of random actions on the first of them."""
    if recipe.world is None:
        return {}
    settings, on = recipe.config.score, world(recipe.world)
    on.close()
    seeds = np.arange(settings.episodes) + settings.seed
    found = {
        "expert": rollouts(Expert(), recipe.world, seeds, progress=progress, what="episodes of the expert"),
        "random": rollouts(Uniform(), recipe.world, seeds[:RANDOM_EPISODES], progress=progress,
                           what="episodes of random actions"),
    }  # fmt: skip
    numbers = {name: measured(done, on) for name, done in found.items()}
    columns = list(numbers["expert"])
    table = {
        "title": "The world's own expert, and random actions", "columns": ["policy", *columns],
        "rows": [[name, *(one.get(column) for column in columns)] for name, one in numbers.items()],
    }  # fmt: skip
    note = f"Random actions: {len(found['random'])} of the episodes, each with all of its steps."
    return {name: {kind: one[kind] for kind in ("success", "return")} for name, one in numbers.items()} | {
        "tables": [table], "notes": [note],
    }  # fmt: skip


def measured(done: list[Rollout], on: World) -> dict[str, float]:
    """The numbers of rollouts in one world; `success`, the headline, is the first."""
    successes = [one for one in done if one.success]
    low, high = wilson(len(successes), len(done))
    numbers = {"success": len(successes) / len(done), "success_low": low, "success_high": high, "episodes": len(done)}
    if successes:
        numbers["steps_to_success"] = float(np.median([one.steps for one in successes]))
    actions = np.concatenate([one.actions for one in done])
    excess = np.maximum(actions - on.action_high, on.action_low - actions)
    half = (on.action_high - on.action_low) / 2
    numbers["return"] = float(np.mean([returned(one, on.max_steps) for one in done]))
    numbers["actions_outside"] = float((excess > 0).any(axis=1).mean())
    numbers["action_excess"] = float(max((excess / half).max(), 0.0))
    numbers["jerk"] = float(np.mean([jerk(path(one, on.positions), on.fps) for one in done]))
    return numbers


def returned(one: Rollout, max_steps: int) -> float:
    """The rewards of an episode, as if the last went on after a success: so a faster success never counts less."""
    return float(one.rewards.sum() + one.rewards[-1] * (max_steps - one.steps) * one.success)


def path(one: Rollout, positions: slice) -> np.ndarray:
    """float64[T + 1, 2 or 3]: where the robot was."""
    states = [*one.observations["observation.state"], one.last["observation.state"]]
    return np.array(states, np.float64)[:, positions]


def jerk(points: np.ndarray, fps: float) -> float:
    """Root mean square length of the third derivative of points [T, D], by differences; 0 for fewer than four."""
    third = np.diff(points, n=3, axis=0) * fps**3
    return float(np.sqrt((third**2).sum(axis=1).mean())) if len(third) else 0.0


def asker(recipe, on: World, predict: Callable, key) -> Callable[[dict, np.ndarray, int], np.ndarray]:
    """The policy as `rollouts.Chunked` asks it. Its noise depends on the episode and the step alone.

    Raises what `fitting.refuse` raises.
    """
    import jax

    known, tasks = recipe.known, recipe.known["tasks"]
    refuse(known, on)
    task = tasks.index(on.task) if on.task in tasks else 0

    @jax.jit
    def keys(episodes, step):
        return jax.vmap(lambda episode: jax.random.fold_in(jax.random.fold_in(key, episode), step))(episodes)

    def act(seen: dict, episodes: np.ndarray, step: int) -> np.ndarray:
        batch = inputs(seen, known["state"], known["cameras"])
        return predict(batch | {"task": np.full(len(episodes), task, np.int32), "key": keys(episodes, step)})

    return act


def latency(ask: Callable[[int], np.ndarray]) -> dict[str, float]:
    """Wall time in milliseconds of `ask(step)`, from one observation on the host to its chunk on the host."""
    took = []
    ask(0)  # compiles
    for step in range(TIMED):
        before = time.perf_counter()
        np.asarray(ask(step))
        took.append(1000 * (time.perf_counter() - before))
    return {"latency_ms_p50": float(np.percentile(took, 50)), "latency_ms_p99": float(np.percentile(took, 99))}


def _cannot_draw(on: World) -> str | None:
    """Why the world cannot be drawn here; None if it can."""
    try:
        on.reset(0)
        on.render(16)
    except UserError as error:
        return f"no rollout is shown: {error.what} ({error.why}); {error.hint}"
    return None


def _shown(done: list[Rollout], on: World, workdir: Path) -> dict:
    """What the report shows beside the numbers: a table of the episodes, their paths, and films of a few."""
    plots = draw_paths([path(one, on.positions) for one in done], [one.success for one in done],
                       on.names["observation.state"][on.positions], workdir)  # fmt: skip
    for number, one in enumerate(one for one in done if one.film):
        said = f"Seed {one.seed}: {'success' if one.success else 'failure'} after {one.steps} steps"
        film = write_gif(workdir / f"rollout-{number}.gif", one.film, one.steps / on.fps)
        plots.append({"title": said, "file": film.name})
    rows = [[one.seed, one.success, one.steps, returned(one, on.max_steps)] for one in done]
    return {"plots": plots, "tables": [{"title": "Episodes", "columns": ["seed", "success", "steps", "return"],
                                        "rows": rows}]}  # fmt: skip


def _of_held_out_actions(recipe, predict: Callable, split: str, key, progress: Callable) -> dict:
    """Root mean square error of the actions of held-out episodes, in deviations of the training actions.

    Flow and diffusion draw a chunk for each example, as they do when they act.
    """
    import jax

    from robot.scaling import moving

    def seen(taken: dict, start: int) -> dict:
        keys = jax.random.split(jax.random.fold_in(key, start), len(taken["padded"]))
        return {name: value for name, value in taken.items() if name not in ("action", "padded")} | {"key": keys}

    source, scale = recipe.data(split), recipe.known["scale"]["action"]
    if source is None:
        raise UserError("no episodes are held out, and there is no world to act in", where=f"data.{split}",
                        hint=f"data.{split}=0.1, or score.world=NAME")  # fmt: skip
    total, weight, largest = 0.0, 0.0, 0.0
    for start in range(0, len(source), BATCH):
        taken = source.take(np.minimum(np.arange(start, start + BATCH), len(source) - 1))
        real = ~taken["padded"] & (np.arange(start, start + BATCH) < len(source))[:, None]
        said = refuse_not_finite(predict(seen(taken, start)), f"for chunk {start} of {split} or one after it")
        total = total + (np.square(said - taken["action"]) * real[..., None]).sum(axis=(0, 1))
        weight += real.sum()
        largest = np.maximum(largest, np.abs(said).max(axis=(0, 1)))
        progress(min(start + BATCH, len(source)), len(source), "predicting held-out actions")
    errors = np.sqrt(total / weight)
    names = recipe.known["names"]["action"] or [str(entry) for entry in range(len(errors))]
    held, deviations = len(source.which), moving(scale["std"]).astype(np.float64)
    table = {"title": "Error of held-out actions, in their own units", "columns": ["action", "rms error"],
             "rows": [[name, float(error)] for name, error in zip(names, errors, strict=True)]}  # fmt: skip
    one = seen(source.take(np.zeros(1, int)), 0)
    numbers = {"action_error": float(np.sqrt(np.mean((errors / deviations) ** 2)))}
    return numbers | of_bound(largest, recipe.config.limits) | latency(lambda step: predict(one)) | {
        "tables": [table],
        "notes": [f"Actions of {held} held-out episodes, {len(source)} chunks; 1 is the deviation of the training "
                  "actions, or the unit of an entry that stood still. A small error promises no success: only acting "
                  "shows that."],
        "remarks": few(held, "episode", f"raise data.{split}"),
    }  # fmt: skip
