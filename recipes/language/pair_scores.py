"""How well implicit rewards tell better answers from worse: the share of pairs in which the better one has more.

Of judged answers, the pairs are all of a desirable and an undesirable one, so that the share is the area under the ROC
curve. Its rows are the answers of the smaller class, each with its share of the pairs that it is in: the variance of
such an area is at most that of as many independent pairs (Cortes and Mohri 2005), so the interval is not too narrow.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aurora_train.evals.intervals import Measure

FILE = "pairs.npz"


def outcomes(judged, policy: np.ndarray, desirable: np.ndarray | None) -> dict[str, np.ndarray]:
    """What each held-out row comes to; float64 arrays, but `rows` and `examples` int64.

    Args:
        judged: a `preferences.Judgement` of N examples.
        policy: the policy's log-probabilities [N, 2] of their answers.
        desirable: [N], 1 or 0, of judged answers; None of pairs.

    Returns `losses` by `examples`, and `won` and `margin` (of rewards) by `rows`; of pairs also `likelier`, which is
    whether the policy itself finds the chosen answer likelier. Ties are halves.
    """
    rewards, losses = np.asarray(judged.rewards, np.float64), np.asarray(judged.losses, np.float64)
    found = {"examples": np.arange(len(losses)), "losses": losses}
    if desirable is None:
        better, worse = rewards.T
        return found | {"rows": found["examples"], "won": wins(better, worse), "margin": better - worse,
                        "likelier": wins(*policy.T)}  # fmt: skip
    is_desirable = desirable > 0
    few = is_desirable if is_desirable.sum() <= (~is_desirable).sum() else ~is_desirable
    sign = 1.0 if few is is_desirable else -1.0
    ours, theirs = sign * rewards[few, 0], np.sort(sign * rewards[~few, 0])
    below, upto = (np.searchsorted(theirs, ours, side) for side in ("left", "right"))
    return found | {"rows": np.flatnonzero(few), "won": (below + upto) / (2 * len(theirs)),
                    "margin": ours - theirs.mean()}  # fmt: skip


def measures(workdir: Path) -> dict[str, Measure]:
    """The numbers of a score, from what it left in its work folder."""
    with np.load(workdir / FILE) as found:
        ones = np.ones(len(found["rows"]))
        likelier = {"likelier": Measure.share(found["rows"], found["likelier"])} if "likelier" in found else {}
        return {
            "pair_accuracy": Measure.share(found["rows"], found["won"]),
            "margin": Measure(found["rows"], found["margin"], ones),
            "loss": Measure(found["examples"], found["losses"], np.ones(len(found["examples"]))), **likelier,
        }  # fmt: skip


def wins(first, second):
    """1 where `first` is greater, 1/2 where both are equal, else 0; of arrays of numpy or of jax."""
    return (first > second) + 0.5 * (first == second)
