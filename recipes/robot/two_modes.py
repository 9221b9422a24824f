"""A flat world with two right answers: a point has to pass a disc, and its expert passes left or right at random.

Whoever predicts the mean of the two runs into the disc, so the world tells policies that represent several modes from
those that do not. It needs numpy alone. Lengths are in units of the picture's half width, speeds in units per second.
"""

from __future__ import annotations

import numpy as np

from robot.settings import VECTORS

SPEED = 1.0  # largest speed along each axis
RADIUS = 0.4  # of the disc at the origin
REACHED = 0.15  # distance to the goal that counts as success
WAYPOINT = 0.75  # the expert passes the disc at (-0.75, 0) or (0.75, 0)
NOISE = 0.05  # standard deviation of the expert's velocity
_DISC, _GOAL, _POINT, _GROUND = (120, 120, 130), (60, 160, 90), (40, 90, 200), (246, 246, 243)


class TwoModes:
    """Observations: "observation.state" is the position, "observation.environment_state" the goal, float32[2] each.

    The action is a velocity, float32[2] within +-1, which is held for one frame. Touching the disc ends all movement,
    and with it the chance of success. The reward of a step is minus the distance to the goal.
    """

    fps = 10.0
    version = "1"
    max_steps = 60
    action_low = np.full(2, -SPEED, np.float32)
    action_high = np.full(2, SPEED, np.float32)
    names = {
        "observation.state": ("x", "y"), "observation.environment_state": ("goal_x", "goal_y"),
        "action": ("velocity_x", "velocity_y"),
    }  # fmt: skip
    task = "reach the goal without touching the disc"
    positions = slice(0, 2)
    cameras = ("above",)

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Start at the bottom and set a goal at the top; both follow from the seed alone."""
        draws = np.random.default_rng([seed, 2])
        self.position = np.array([draws.uniform(-0.15, 0.15), -1.0])
        self.goal = np.array([draws.uniform(-0.3, 0.3), 1.0])
        self.is_stopped, self._side, self.reward = False, None, 0.0
        return self._observed()

    def step(self, action) -> tuple[dict[str, np.ndarray], bool]:
        """Move for one frame. Returns (the observation, whether the goal is reached at this instant)."""
        velocity = np.clip(np.asarray(action, np.float64), self.action_low, self.action_high)
        if not self.is_stopped:
            # Looked at four times on the way, so that no corner of the disc is cut.
            for _ in range(4):
                self.position = self.position + velocity / (4 * self.fps)
                self.is_stopped = bool(np.hypot(*self.position) <= RADIUS)
                if self.is_stopped:
                    break
        distance = float(np.hypot(*(self.position - self.goal)))
        self.reward = -distance
        return self._observed(), distance <= REACHED and not self.is_stopped

    def expert(self, observation: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """A velocity towards the waypoint on the side that was drawn in this episode's first call, then to the goal."""
        if self._side is None:
            self._side = float(rng.choice([-1.0, 1.0]))
        at, goal = (np.asarray(observation[name], np.float64) for name in VECTORS)
        target = goal if at[1] >= 0 else np.array([self._side * WAYPOINT, 0.05])
        way = target - at
        velocity = SPEED * way / max(np.hypot(*way), SPEED / self.fps)
        return np.clip(velocity + NOISE * rng.normal(size=2), self.action_low, self.action_high).astype(np.float32)

    def render(self, size: int = 96, camera: str | None = None) -> np.ndarray:
        """The world from above, uint8[size, size, 3]; 1.2 units from the middle to each edge."""
        line = np.linspace(-1.2, 1.2, size)
        x, y = np.meshgrid(line, -line)
        picture = np.full((size, size, 3), _GROUND, np.uint8)
        discs = (((0, 0), RADIUS, _DISC), (self.goal, REACHED, _GOAL), (self.position, 0.06, _POINT))
        for centre, radius, colour in discs:
            picture[np.hypot(x - centre[0], y - centre[1]) <= radius] = colour
        return picture

    def close(self) -> None:
        """Nothing is held."""

    def _observed(self) -> dict[str, np.ndarray]:
        return {"observation.state": self.position.astype(np.float32),
                "observation.environment_state": self.goal.astype(np.float32)}  # fmt: skip


def side_of(positions: np.ndarray) -> int:
    """On which side of the disc a trajectory float[T, 2] passes: -1 left, 1 right, 0 neither."""
    beside = positions[np.abs(positions[:, 1]) <= RADIUS / 2]
    return int(np.sign(beside[:, 0].mean())) if len(beside) else 0
