"""How well implicit rewards tell better answers from worse: accuracy over pairs, with ties as halves, and intervals."""

from __future__ import annotations

import numpy as np

from language.intervals import bootstrap, wilson


def measured(judged, policy: np.ndarray, whole: dict[str, np.ndarray]) -> dict:
    """The numbers of a score. `judged`: a `preferences.Judgement`; `whole`: "weights" [N, 2, T], and "desirable" [N] of
    judged answers.

    Of judged answers, the pairs are all of a desirable and an undesirable one, so that the accuracy is the area under
    the ROC curve; its interval is that of the smaller class, which is never too narrow (Cortes and Mohri 2005).
    """
    rewards = np.asarray(judged.rewards, np.float64)
    if "desirable" in whole:
        good = whole["desirable"] > 0
        better, worse = rewards[good, 0], rewards[~good, 0]
        accuracy, number = auroc(better, worse), min(len(better), len(worse))
        margin = float(better.mean() - worse.mean()) if number else 0.0
        more = {"desirable": int(good.sum()), "undesirable": int((~good).sum())}
    else:
        better, worse = rewards.T
        won, number = wins(better, worse), len(better)
        accuracy, margin = float(won.mean()), float((better - worse).mean())
        mean = policy / whole["weights"].sum(-1)
        more = {"margin_interval": bootstrap(better - worse), "pairs": number,
                "likelier_accuracy": float(wins(*policy.T).mean()),
                "likelier_per_token_accuracy": float(wins(*mean.T).mean())}  # fmt: skip
    return {
        "pair_accuracy": accuracy, "pair_accuracy_interval": wilson(accuracy * number, number),
        "margin": margin, "loss": float(np.asarray(judged.losses, np.float64).mean()),
        "better_reward": float(better.mean()) if len(better) else 0.0,
        "worse_reward": float(worse.mean()) if len(worse) else 0.0, **more,
    }  # fmt: skip


def wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where `first` is greater, 1/2 where both are equal, else 0."""
    return (first > second) + 0.5 * (first == second)


def auroc(better: np.ndarray, worse: np.ndarray) -> float:
    """The share of all pairs of the two in which the better one is greater, ties as halves; 1/2 if one is empty."""
    if not len(better) or not len(worse):
        return 0.5
    ordered = np.sort(worse)
    below, upto = (np.searchsorted(ordered, better, side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(worse)))
