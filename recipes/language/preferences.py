"""The losses of learning from preferences: DPO on pairs of answers, KTO on single answers that were judged.

Both compare a policy with a reference by the ratio of the probabilities that they give to a whole answer y to a prompt
x: r = log p(y | x) - log p_ref(y | x), where log p(y | x) is the *sum* over the tokens of the answer and of its end.
So a longer answer counts with more tokens; only `lengths` divides by them. All arrays are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Judgement(NamedTuple):
    """What a loss says of each example: `losses` [B], and the implicit rewards, beta x r, of its rows, [B, 2]."""

    losses: jax.Array
    rewards: jax.Array


def log_probabilities(nll, weights):
    """The log-probability of each row's answer, float32[...], of -log p [..., T] where `weights` [..., T] is 1."""
    return -(nll.astype(jnp.float32) * weights).sum(-1)


def dpo(policy, reference, beta: float, smoothing: float = 0.0, lengths=None) -> Judgement:
    """Direct preference optimization: -log sigmoid(beta (r_chosen - r_rejected)) (Rafailov et al. 2023, equation 7).

    Args:
        policy, reference: log-probabilities [B, 2] of the chosen and of the rejected answer.
        smoothing: the probability e, below 1/2, that a pair is labelled the wrong way round: the loss is then
            -(1 - e) log sigmoid(z) - e log sigmoid(-z), conservative DPO (Mitchell 2023, "A note on DPO with noisy
            preferences & relationship to IPO").
        lengths: tokens of each answer [B, 2], by which each r is divided: length-normalised DPO (Lambert et al. 2024,
            "Tulu 3"), which needs a larger beta. None: sums.

    Where policy and reference are equal, the loss is log 2 for every beta and smoothing.
    """
    ratios = policy - reference
    rewards = beta * (ratios if lengths is None else ratios / jnp.maximum(lengths, 1.0))
    z = rewards[:, 0] - rewards[:, 1]
    return Judgement(-(1.0 - smoothing) * jax.nn.log_sigmoid(z) - smoothing * jax.nn.log_sigmoid(-z), rewards)


def kto(policy, reference, desirable, beta: float, weights: tuple[float, float] = (1.0, 1.0)):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, equation 7): a `Judgement`, and z.

    The loss of a desirable answer is w (1 - sigmoid(beta (r - z))), of any other w (1 - sigmoid(beta (z - r))). z, the
    reference point, is the mean of r over answers to *other* prompts, at least 0 and without gradient. It estimates
    the KL divergence of policy and reference, and depends on all examples given.

    Args:
        policy, reference: log-probabilities [B, 2] of an example's own answer and of another prompt's answer.
        desirable: [B], 1 or 0.
        weights: w of the desirable and of the undesirable answers (the paper's lambda_D and lambda_U).
    """
    ratios = policy - reference
    z = jax.lax.stop_gradient(jnp.maximum(ratios[:, 1].mean(), 0.0))
    signs, importance = 2.0 * desirable - 1.0, jnp.where(desirable > 0, *weights)
    losses = importance * jax.nn.sigmoid(-signs * beta * (ratios[:, 0] - z))  # 1 - sigmoid(x) = sigmoid(-x)
    return Judgement(losses, beta * ratios), z
