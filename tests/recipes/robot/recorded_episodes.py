"""Small made-up episodes: an arm of three joints, the place of an object, one camera of 16 x 16 pixels."""

import numpy as np

from robot.episodes import Episode, Episodes

FPS = 10.0
NAMES = {"observation.state": ("shoulder", "elbow", "wrist"), "action": ("shoulder", "elbow")}


def episode(number: int, camera: bool = True) -> Episode:
    """Smooth motions and a moving square, of 5 to 9 frames; everything follows from the number."""
    rng = np.random.default_rng(number)
    length = 5 + number % 5
    time = np.linspace(0, 1, length)[:, None]
    state = np.sin(time * rng.uniform(1, 3, 3) + rng.uniform(0, 6, 3)).astype(np.float32)
    arrays = {
        "observation.state": state,
        "observation.environment_state": np.repeat(rng.normal(size=(1, 2)), length, 0).astype(np.float32),
        "action": np.diff(state[:, :2], axis=0, append=state[-1:, :2]).astype(np.float32),
    }
    if camera:
        images = np.full((length, 16, 16, 3), rng.integers(0, 100, 3), np.uint8)
        for t in range(length):
            images[t, 4:12, t : t + 6] = (200, 40 + 20 * (number % 8), 60)
        arrays["observation.images.top"] = images
    return Episode(arrays, f"Move to {number % 2}.", {"number": number})


def episodes(number: int, camera: bool = True) -> Episodes:
    return Episodes.of([episode(e, camera) for e in range(number)], FPS, NAMES, {"source": "made up"})
