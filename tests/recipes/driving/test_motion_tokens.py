"""Templates of motion: learned by k-disks, matched from where the previous one has led."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import traffic_batches

from aurora_train.errors import UserError
from driving.scenes import HISTORY, boxes
from driving.tokens import anchors, distances, learn, motions_of, moved, relative, tokenised

COUNT = 48


@pytest.fixture(scope="module")
def motions():
    batch = traffic_batches.batch(agents=24)
    return motions_of(batch["states"], batch["valid"], HISTORY - 1)


def corners(poses):
    return boxes(np.asarray(poses, np.float64), np.broadcast_to([4.6, 1.9], (*np.shape(poses)[:-1], 2)))


def test_a_distance_is_the_rms_of_the_distances_of_a_cars_corners():
    one, other = np.random.default_rng(0).uniform(-4, 4, (2, 100, 3))
    expected = np.sqrt(np.square(corners(one) - corners(other)).sum(-1).mean(-1))
    np.testing.assert_allclose(distances(np, one, other), expected, rtol=1e-12)


def test_a_pose_seen_from_a_frame_is_the_pose_again_once_moved_there():
    frame, pose = np.random.default_rng(1).uniform(-3, 3, (2, 100, 3))
    back = moved(np, frame, relative(np, frame, pose))
    np.testing.assert_allclose(back[:, :2], pose[:, :2], atol=1e-12)
    np.testing.assert_allclose(np.exp(1j * back[:, 2]), np.exp(1j * pose[:, 2]), atol=1e-12)


def test_anchors_include_the_last_step_of_the_history():
    assert anchors(110, 49).tolist() == list(range(4, 110, 5))
    assert anchors(50, 49)[-1] == 49 and 49 in anchors(73, 49)


def test_motions_are_those_of_whole_half_seconds_in_the_frame_of_their_beginning(motions):
    assert motions.shape[1:] == (5, 3)
    track = np.zeros((1, 16, 5), np.float32)
    track[0, :, 1], track[0, :, 2] = np.arange(16), np.pi / 2  # northwards, 1 m a step
    valid = np.ones((1, 16), bool)
    valid[0, 12] = False  # the third motion has a gap
    found = motions_of(track, valid, 0)
    assert len(found) == 2
    np.testing.assert_allclose(found[0], np.stack([np.arange(1, 6), np.zeros(5), np.zeros(5)], 1), atol=1e-6)


def test_templates_lie_apart_and_every_motion_lies_near_one(motions):
    templates = learn(motions, COUNT)
    np.testing.assert_array_equal(templates, learn(motions, COUNT))
    assert all((template == motions).all((1, 2)).any() for template in templates), "templates are motions of the data"
    ends = templates[:, -1].astype(np.float64)
    apart = distances(np, ends[:, None], ends)
    radius = apart[~np.eye(COUNT, dtype=bool)].min()
    covered = distances(np, motions[:, None, -1].astype(np.float64), ends).min(1)
    assert covered.max() <= 1.5 * radius and np.median(covered) < radius / 2


def test_data_with_fewer_motions_than_templates_are_refused(motions):
    different = len(np.unique(motions[:7, -1], axis=0))
    with pytest.raises(UserError) as caught:
        learn(np.repeat(motions[:7], 5, axis=0), 16)
    assert caught.value.where == "model.tokens" and f"only {different} different motions" in caught.value.what


def test_tracks_are_matched_from_where_the_templates_have_led(motions):
    """Against a loop in float64 over agents and steps."""
    templates, batch = learn(motions, COUNT), traffic_batches.batch()
    at = anchors(110, HISTORY - 1)
    poses, valid = batch["states"][:, :, at, :3], batch["valid"][:, :, at].copy()
    valid[0, 0, 7] = False  # a gap
    reached, taken, nearest = jax.jit(lambda p, v: tokenised(templates, p, v))(poses, valid)
    ends, ours = templates[:, -1].astype(np.float64), 0
    for b, a in np.ndindex(valid.shape[:2]):
        here = poses[b, a, 0].astype(np.float64)
        for t in range(1, len(at)):
            target = poses[b, a, t].astype(np.float64)
            token = COUNT
            if valid[b, a, t - 1] and valid[b, a, t]:
                off = np.sqrt(np.square(corners(moved(np, here, ends)) - corners(target)).sum(-1).mean(-1))
                token = int(nearest[b, a, t])
                assert off[token] <= off.min() + 1e-4, "ties may be broken otherwise in float32"
                here, ours = moved(np, here, ends[token]), ours + 1
            else:
                here = target
            assert taken[b, a, t] == nearest[b, a, t] == token
            np.testing.assert_allclose(np.asarray(reached)[b, a, t, :2], here[:2], atol=1e-3)
    assert ours > 200
    error = np.linalg.norm(np.asarray(reached)[..., :2] - poses[..., :2], axis=-1)[valid]
    assert error.mean() < 0.3, "errors do not add up"


def test_noise_strays_with_the_key_of_its_example_alone(motions):
    templates, batch = jnp.asarray(learn(motions, COUNT)), traffic_batches.batch()
    at = anchors(110, HISTORY - 1)
    poses, valid = batch["states"][:, :, at, :3], batch["valid"][:, :, at]
    run = jax.jit(lambda p, v, k: tokenised(templates, p, v, 0.3, k)[1])
    keys = jax.random.split(jax.random.key(3), len(poses))
    first, others = np.asarray(run(poses, valid, keys)), np.asarray(run(poses, valid, keys[::-1]))
    np.testing.assert_array_equal(run(poses[::-1], valid[::-1], keys[::-1])[::-1], first)
    assert (first != others).any()
