"""Remarks that a user should read before a run's first step instead of learning them from its result. Never errors.

Free of jax: `aurora check` prints the remarks that need no data, `aurora train` prints all of them before step 1.
"""

from __future__ import annotations

import numpy as np

from aurora_train.learning_rate import rate

EPOCHS = 10  # beyond, a model memorises its training text (Muennighoff et al. 2023: little is gained after 4)
HELD_OUT = 30  # documents; with fewer, the score depends more on their choice than on the model
_ENOUGH = 8  # recorded losses; those of fewer batches differ by chance
_GRID = 10_000  # steps at which a schedule is sampled


def remarks_on_config(config) -> list[str]:
    """One line for each remark that needs no data."""
    schedule, steps = config.optimizer.schedule, config.train.steps
    at = np.unique(np.linspace(0, steps - 1, min(steps, _GRID)).astype(np.int64))
    at = np.union1d(at, [min(max(schedule.warmup, 1), steps) - 1])
    shares = np.broadcast_to(rate(at, 1.0, schedule, steps), at.shape)
    lines, peak = [], float(shares.max())
    if schedule.warmup and peak < 0.995:
        decay = f" and a decay over the last {schedule.decay:.0%}" if schedule.name == "wsd" and schedule.decay else ""
        lines.append(
            f"the learning rate reaches {_share(peak)} of optimizer.lr: the warm-up is {schedule.warmup:,} steps long"
            f"{decay}, and the run {steps:,} steps"
        )
    if schedule.extend is not None and schedule.extend > steps:
        lines.append(
            f"the schedule is that of {schedule.extend:,} steps (optimizer.schedule.extend) and the run ends at step "
            f"{steps:,}, at {_share(float(shares[-1]))} of optimizer.lr"
        )
    return lines


def remarks_on_data(config, source) -> list[str]:
    """One line for each remark on the size of the training data; `source` is that of the training split."""
    batch, steps, examples = config.train.batch, config.train.steps, len(source)
    lines, epochs = [], batch * steps / examples
    if batch > examples:
        lines.append(
            f"a batch of {batch:,} takes each of the {examples:,} training examples {batch / examples:,.1f} times: "
            f"train.batch={examples} takes each once"
        )
    if epochs > EPOCHS:
        enough = max(EPOCHS * examples // batch, 1)
        lines.append(
            f"{epochs:,.0f} epochs: {steps:,} batches of {batch:,} are {epochs:,.0f} times the {examples:,} training "
            f"examples; {EPOCHS} times would be train.steps={enough}"
        )
    return lines + _on_held_out(config, source.describe().get("splits"))


def remarks_on_losses(losses: list[float], lr: float) -> list[str]:
    """A remark if a run's last losses are not below that of its first step, in which the model was untrained."""
    if len(losses) < _ENOUGH:
        return []
    number = len(losses) // 4
    last = float(np.median(losses[-number:]))
    if last < losses[0] - 0.01 * abs(losses[0]):
        return []
    return [
        f"the training loss has not fallen: it was {losses[0]:.4g} in the first step and {last:.4g} in the last "
        f"{number}; optimizer.lr={lr:g} may be too large, or too small"
    ]


def _on_held_out(config, splits) -> list[str]:
    """`splits`: the "documents" of each split, as a text source counts them; None if a source does not count them."""
    if not isinstance(splits, dict) or not all(isinstance(one, dict) and "documents" in one for one in splits.values()):
        return []
    held = {name: splits[name]["documents"] for name in ("test", "validation") if name in splits}
    read = [name for name in held if held[name] and (name == "validation" or config.evaluate.final)]
    if not read or sum(held[name] for name in read) >= HELD_OUT:
        return []
    counted = " and ".join(f"{held[name]:,} for {name}" for name in read)
    keys = " and ".join(f"data.holdout_{name}" for name in read)
    return [
        f"documents held out: {counted}, fewer than {HELD_OUT} in all: the numbers depend on which they are; a larger "
        f"{keys} holds out more"
    ]


def rate_line(old, new, step: int) -> str | None:
    """The learning rate before and after a run at `step` changes its config from `old` to `new`; None if neither the
    schedule nor the length changed, or if there is no next step."""
    before, after = _rated(old), _rated(new)
    if before == after or step == 0 or step >= new.train.steps:
        return None
    was, now = _rate(old, step), _rate(new, step + 1)
    line = f"learning rate: {was:.3g} at step {step:,}, {now:.3g} at step {step + 1:,}"
    length = old.optimizer.schedule.extend or old.train.steps
    if now > 1.05 * was and new.train.steps > length and new.optimizer.schedule.extend is None:
        line += f"; add optimizer.schedule.extend={length} to keep the rate with which the run ended"
    return line


def _rated(config) -> tuple:
    return config.train.steps, config.optimizer.lr, config.optimizer.schedule


def _rate(config, step: int) -> float:
    """The rate of a step, counted from 1."""
    return float(rate(step - 1, config.optimizer.lr, config.optimizer.schedule, config.train.steps))


def _share(value: float) -> str:
    return f"{100 * value:.2g} %"
