"""DPO and KTO against the papers' formulas, written out in float64 NumPy, and against TRL's source on torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from language import preferences
from language.pair_scores import wins

DRAWS = np.random.default_rng(0)
POLICY, REFERENCE = (DRAWS.normal(-40, 12, (3, 7, 2)) for _ in range(2))  # three batches of seven examples
LENGTHS = DRAWS.integers(1, 60, (3, 7, 2)).astype(np.float64)
DESIRABLE = np.array([[1, 0, 1, 1, 0, 0, 1], [1] * 7, [0] * 7], np.float64)


def float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) in float64; no term overflows."""
    return np.where(x >= 0, -np.log1p(np.exp(-np.abs(x))), x - np.log1p(np.exp(-np.abs(x))))


@pytest.mark.parametrize("beta", [0.05, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize("batch", range(3))
def test_dpo_is_the_papers_formula(beta, smoothing, is_normalised, batch):
    policy, reference, lengths = POLICY[batch], REFERENCE[batch], LENGTHS[batch]
    expected, rewards = [], []
    for (w, l), (w_ref, l_ref), (long_w, long_l) in zip(policy, reference, lengths, strict=True):  # noqa: E741
        over = (long_w, long_l) if is_normalised else (1, 1)
        pair = beta * (w - w_ref) / over[0], beta * (l - l_ref) / over[1]
        z = pair[0] - pair[1]
        expected.append(-(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z))
        rewards.append(pair)
    given = float32(policy, reference, lengths)
    found = preferences.dpo(*given[:2], beta, smoothing, given[2] if is_normalised else None)
    np.testing.assert_allclose(found.losses, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(found.rewards, rewards, rtol=2e-6, atol=1e-6)


def test_dpo_begins_at_log_2_with_a_gradient_of_half_of_beta():
    (policy,) = float32(POLICY[0])
    for smoothing in (0.0, 0.3):
        losses, _ = preferences.dpo(policy, policy, 0.1, smoothing)
        np.testing.assert_allclose(losses, np.log(2), atol=1e-6)
    gradient = jax.grad(lambda p: preferences.dpo(p, policy, 0.1, 0.25).losses.sum())(policy)
    # d/dz of the loss at 0 is smoothing - 1/2
    np.testing.assert_allclose(gradient, np.tile([-0.025, 0.025], (7, 1)), atol=1e-7)


def test_losses_stay_finite_where_the_policy_has_left_the_reference_far_behind():
    far, near = float32(np.array([[-3000.0, 0.0], [0.0, -3000.0]]), np.zeros((2, 2)))
    for loss in (lambda p: preferences.dpo(p, near, 1.0).losses.sum(),
                 lambda p: preferences.kto(p, near, jnp.array([1.0, 0.0]), 1.0)[0].losses.sum()):  # fmt: skip
        value, gradient = jax.value_and_grad(loss)(far)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("batch", range(3))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.75)])
def test_kto_is_the_papers_formula(batch, weights):
    policy, reference, desirable, beta = POLICY[batch], REFERENCE[batch], DESIRABLE[batch], 0.1
    point = max(sum(own - ref for (_, own), (_, ref) in zip(policy, reference, strict=True)) / len(policy), 0)
    expected = []
    for (own, _), (ref, _), good in zip(policy, reference, desirable, strict=True):
        distance = (own - ref) - point if good else point - (own - ref)
        expected.append(weights[0 if good else 1] * (1 - np.exp(log_sigmoid(beta * distance))))
    found, z = preferences.kto(*float32(policy, reference, desirable), beta, weights)
    np.testing.assert_allclose(z, point, rtol=1e-6)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5, atol=1e-6)


def test_ktos_reference_point_is_not_below_zero_and_has_no_gradient():
    policy, reference = float32(np.zeros((2, 2)), np.full((2, 2), 3.0))
    _, z = preferences.kto(policy, reference, jnp.ones(2), 0.1)
    assert z == 0
    apart = policy.at[:, 1].set(9.0)
    gradient = jax.grad(lambda p: preferences.kto(p, reference, jnp.ones(2), 0.1)[0].losses.sum())(apart)
    assert np.all(gradient[:, 1] == 0) and np.all(gradient[:, 0] < 0)


def test_log_probabilities_are_sums_over_the_learned_tokens():
    nll, weights = float32(DRAWS.gamma(2, 1, (4, 9)), DRAWS.integers(0, 2, (4, 9)))
    expected = [-sum(float(a) for a, b in zip(*row, strict=True) if b) for row in zip(nll, weights, strict=True)]
    np.testing.assert_allclose(preferences.log_probabilities(nll, weights), expected, rtol=1e-6)
    np.testing.assert_array_equal(wins(jnp.array([2.0, 1, 1]), jnp.array([1.0, 1, 2])), [1, 0.5, 0])


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(3))
def test_losses_and_gradients_are_those_of_trls_formulas_on_torch(batch):
    """TRL 1.16: DPOTrainer with loss_type sigmoid and sigmoid_norm, KTOTrainer with loss_type kto, in float32."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    beta, desirable = 0.1, DESIRABLE[batch].astype(bool)

    def on_torch(loss):
        policy = torch.tensor(POLICY[batch], dtype=torch.float32, requires_grad=True)
        losses = loss(policy - torch.tensor(REFERENCE[batch], dtype=torch.float32))
        losses.mean().backward()
        return losses.detach().numpy(), policy.grad.numpy()

    def here(loss):
        policy, reference = float32(POLICY[batch], REFERENCE[batch])
        return loss(policy, reference), jax.grad(lambda p: loss(p, reference).mean())(policy)

    def kto(ratios):
        kl = ratios[:, 1].mean().detach().clamp(min=0)
        chosen = 1 - functional.sigmoid(beta * (ratios[desirable, 0] - kl))
        rejected = 1 - functional.sigmoid(beta * (kl - ratios[~desirable, 0]))
        return torch.cat((1.5 * chosen, 0.75 * rejected))

    lengths = torch.tensor(LENGTHS[batch], dtype=torch.float32)
    good, at = float32(DESIRABLE[batch], LENGTHS[batch])
    order = np.argsort(~desirable, kind="stable")
    cases = [
        (lambda r: -functional.logsigmoid(beta * (r[:, 0] - r[:, 1])),
         lambda p, q: preferences.dpo(p, q, beta).losses),
        (lambda r: -functional.logsigmoid(5 * (r[:, 0] / lengths[:, 0] - r[:, 1] / lengths[:, 1])),
         lambda p, q: preferences.dpo(p, q, 5.0, lengths=at).losses),
        (kto, lambda p, q: preferences.kto(p, q, good, beta, (1.5, 0.75))[0].losses[order]),
    ]  # fmt: skip
    for theirs, ours in cases:
        for expected, found in zip(on_torch(theirs), here(ours), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
