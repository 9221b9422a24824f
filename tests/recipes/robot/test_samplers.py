"""The samplers of flow matching and diffusion on a mixture of Gaussians, whose velocity and score are known exactly.

The field takes the network's place. What a sampler computes in float32 is compared, trajectory by trajectory, with the
same rule in float64 numpy written from the papers, and its samples with the mixture itself.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from robot.diffusion import ddim, signal, visited
from robot.flow import follow

MEANS, SPREADS, SHARES = np.array([-1.5, 0.5, 2.0]), np.array([0.2, 0.4, 0.1]), np.array([0.5, 0.3, 0.2])
COUNT = 20_000
MEAN = float(SHARES @ MEANS)
VARIANCE = float(SHARES @ (SPREADS**2 + MEANS**2) - MEAN**2)


def believed(numbers, x, scale, noise):
    """E[actions | x] of x = scale * actions + noise * N(0, 1), for the mixture; `numbers` is numpy or jax.numpy."""
    variance = (scale * SPREADS) ** 2 + noise**2
    apart = x[..., None] - scale * MEANS
    logits = numbers.log(SHARES) - numbers.log(variance) / 2 - apart**2 / (2 * variance)
    likely = numbers.exp(logits - logits.max(-1, keepdims=True))
    likely = likely / likely.sum(-1, keepdims=True)
    return (likely * (MEANS + scale * SPREADS**2 / variance * apart)).sum(-1)


def velocity(numbers, x, t):
    """E[actions - noise | x_t]. With x_t = (1 - t) noise + t actions, it is (E[actions | x_t] - x_t) / (1 - t)."""
    return (believed(numbers, x, t, 1 - t) - x) / (1 - t)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=COUNT)


def assert_is_the_mixture(samples, mean, variance, share):
    """Its mean, variance and the shares of its modes within these tolerances."""
    nearest = np.abs(samples[:, None] - MEANS).argmin(1)
    shares = np.bincount(nearest, minlength=3) / len(samples)
    found = abs(samples.mean() - MEAN), abs(samples.var() - VARIANCE), np.abs(shares - SHARES).max()
    print(f"mean off by {found[0]:.4f}, variance by {found[1]:.4f}, shares of the modes by {found[2]:.4f}")
    assert found[0] < mean and found[1] < variance and found[2] < share


@pytest.mark.parametrize(("solver", "steps", "tolerances"), [
    ("euler", 100, (0.03, 0.06, 0.02)), ("midpoint", 50, (0.03, 0.04, 0.02)),
])  # fmt: skip
def test_flow_follows_the_known_velocity_to_the_mixture(solver, steps, tolerances, noise):
    ours = np.asarray(follow(lambda x, t: velocity(jnp, x, t), jnp.asarray(noise, jnp.float32), steps, solver))
    x, step = noise.copy(), 1 / steps
    for k in range(steps):
        t, slope = k / steps, velocity(np, x, k / steps)
        x = x + step * (slope if solver == "euler" else velocity(np, x + step / 2 * slope, t + step / 2))
    assert x.dtype == np.float64
    assert np.quantile(np.abs(ours - x), 0.999) < 1e-3  # between two modes rounding decides
    assert_is_the_mixture(ours.astype(np.float64), *tolerances)
    assert_is_the_mixture(x, *tolerances)


def test_few_steps_of_flow_are_less_exact_than_many(noise):
    few, many = (np.asarray(follow(lambda x, t: velocity(jnp, x, t), jnp.asarray(noise, jnp.float32), steps))
                 for steps in (3, 100))  # fmt: skip
    assert abs(few.var() - VARIANCE) > 3 * abs(many.var() - VARIANCE)


def test_ddim_follows_the_known_score_to_the_mixture(noise):
    levels, steps = 100, 50
    kept = signal(levels)
    single = kept.astype(np.float32)

    def predicted(numbers, x, a):
        return (x - numbers.sqrt(a) * believed(numbers, x, numbers.sqrt(a), numbers.sqrt(1 - a))) / numbers.sqrt(1 - a)

    ours = np.asarray(ddim(lambda x, level: predicted(jnp, x, jnp.asarray(single)[level.astype(int)]),
                           jnp.asarray(noise, jnp.float32), levels, steps))  # fmt: skip
    x, at = noise.copy(), visited(levels, steps)
    for a, following in zip(kept[at], np.append(kept[at[1:]], 1.0), strict=True):  # Song et al. 2021, equation 12
        said = predicted(np, x, a)
        x = np.sqrt(following) * (x - np.sqrt(1 - a) * said) / np.sqrt(a) + np.sqrt(1 - following) * said
    assert np.quantile(np.abs(ours - x), 0.999) < 5e-3
    assert_is_the_mixture(ours.astype(np.float64), 0.03, 0.08, 0.02)
    assert_is_the_mixture(x, 0.03, 0.08, 0.02)


def test_the_signal_falls_by_a_squared_cosine_and_levels_are_visited_from_the_noisiest():
    kept = signal(100)
    wave = np.cos((np.arange(1, 101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(kept[:-1], wave[:-1], rtol=1e-9)
    assert (np.diff(kept) < 0).all() and kept[-1] == pytest.approx(kept[-2] * 0.001)
    assert visited(100, 10).tolist() == [99, 89, 79, 69, 59, 49, 39, 29, 19, 9]
    assert visited(10, 10).tolist() == list(range(9, -1, -1))
    assert (np.diff(visited(100, 7)) < 0).all()


def test_estimates_of_actions_are_clipped_to_their_bounds():
    x = np.linspace(-3, 3, 101).astype(np.float32)
    free = np.asarray(ddim(lambda x, level: 0 * x, jnp.asarray(x), 100, 5))
    bound = np.asarray(ddim(lambda x, level: 0 * x, jnp.asarray(x), 100, 5, ((-1.0,), (0.5,))))
    assert np.abs(free).max() > 10
    assert bound.min() == -1 and bound.max() == 0.5
