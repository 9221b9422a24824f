"""The tasks of Meta-World (Yu et al. 2019) as worlds: a Sawyer arm in MuJoCo, 80 frames a second, scripted experts.

Three things differ from `gymnasium.make`. There the goal follows from a seed given when the environment is made; here
from the seed of each episode. There success ends no episode; here it is reported, and rollouts stop. And each frame is
observed once, without the frame before it, which Meta-World appends.
"""

from __future__ import annotations

import atexit
import ctypes.util
import functools
import importlib
import os
import warnings
from importlib.metadata import version

import numpy as np

from aurora_train.errors import MissingExtra, UserError, nearest

# Views of the place where the work is done, and Meta-World's own cameras, which see the whole table. Azimuth and
# elevation in degrees, distance from the middle and its height in metres. From "above" what lies on the table is seen
# whatever the arm does.
NEAR = {"side": (180, -25, 0.75, 0.12), "front": (90, -35, 0.75, 0.12), "above": (180, -55, 0.5, 0.05)}
CORNERS = ("corner", "corner2", "corner3", "corner4")  # these hang upside down
CAMERAS = (*NEAR, *CORNERS, "topview", "behindGripper", "gripperPOV")
_OBJECT = ("x", "y", "z", "qx", "qy", "qz", "qw")
_HAND, _OBJECTS, _FRAME = 4, 14, 18  # entries: hand and gripper; places kept for objects; both together
_renderers: dict = {}


class MetaWorld:
    """One task, such as "pick-place-v3", with its goal observed.

    "observation.state" is the hand's position in metres and the gripper's opening (0 to 1), float32[4];
    "observation.environment_state" has each object's position and quaternion, and the goal's position. An action is the
    hand's velocity, 1 for 0.8 m/s along an axis, and the gripper's effort (1 closes), float32[4] within +-1.
    """

    fps = 80.0
    max_steps = 500
    action_low, action_high = np.full(4, -1, np.float32), np.full(4, 1, np.float32)
    positions = slice(0, 3)
    cameras = CAMERAS

    def __init__(self, task: str):
        tasks, experts = _metaworld()
        if task not in tasks:
            raise UserError(f"Meta-World has no task `{task}`", hint=nearest(task, tasks, f"one of {', '.join(tasks)}"))
        self.task, self.version = task, f"metaworld {version('metaworld')}, mujoco {version('mujoco')}"
        self._expert = experts[task]()
        self._env = env = tasks[task]()
        # What `set_task` does for a goal that is drawn at each reset and observed.
        env._partially_observable = False
        env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
        del env.sawyer_observation_space  # cached when the goal was still hidden; steps clip observations to it
        self._objects = len(env._get_pos_objects()) // 3 * len(_OBJECT)
        self.reward = 0.0
        parts = [f"object{k or ''}_{part}" for k in range(self._objects // len(_OBJECT)) for part in _OBJECT]
        self.names = {
            "observation.state": ("hand_x", "hand_y", "hand_z", "gripper"),
            "observation.environment_state": (*parts, "goal_x", "goal_y", "goal_z"),
            "action": ("velocity_x", "velocity_y", "velocity_z", "effort"),
        }

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        self._env.seed(int(seed))
        whole, _ = self._env.reset()
        self.reward = 0.0
        space = self._env.sawyer_observation_space  # Meta-World clips to it after a step, and not here
        return self._observed(np.clip(whole, space.low, space.high))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        whole, self.reward, _, _, info = self._env.step(np.clip(action, self.action_low, self.action_high))
        return self._observed(whole), bool(info["success"])

    def _observed(self, whole: np.ndarray) -> dict[str, np.ndarray]:
        objects, goal = whole[_HAND : _HAND + self._objects], whole[2 * _FRAME :]
        return {"observation.state": whole[:_HAND].astype(np.float32),
                "observation.environment_state": np.concatenate([objects, goal]).astype(np.float32)}  # fmt: skip

    def expert(self, observation: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        state, rest = observation["observation.state"], observation["observation.environment_state"]
        frame = np.zeros(_FRAME)
        frame[:_HAND], frame[_HAND : _HAND + self._objects] = state, rest[: self._objects]
        whole = np.concatenate([frame, frame, rest[self._objects :]])
        return np.clip(self._expert.get_action(whole), self.action_low, self.action_high).astype(np.float32)

    def render(self, size: int = 96, camera: str | None = None) -> np.ndarray:
        renderer, camera = _renderer(self.task, size, self._env.model), camera or CAMERAS[0]
        renderer.update_scene(self._env.data, camera=_near(*NEAR[camera]) if camera in NEAR else camera)
        picture = renderer.render()
        return picture[::-1, ::-1] if camera in CORNERS else picture

    def close(self) -> None:
        self._env.close()


@functools.cache
def _metaworld() -> tuple[dict, dict]:
    """The environments and the experts, by task."""
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name.partition(".")[0], "robot", "Meta-World") from error
    # The experts ask for more than the limits far from their target, on purpose; each time they say so.
    warnings.filterwarnings("ignore", message="Constant.s. may be too high")
    return dict(ALL_V3_ENVIRONMENTS), dict(ENV_POLICY_MAP)


def _near(azimuth: float, elevation: float, distance: float, height: float):
    """A camera that looks at the middle of the places where objects and goals are drawn."""
    import mujoco

    made = mujoco.MjvCamera()
    made.type, made.lookat[:], made.distance = mujoco.mjtCamera.mjCAMERA_FREE, (0, 0.72, height), distance
    made.azimuth, made.elevation = azimuth, elevation
    return made


def _draw_off_screen() -> None:
    """Without a window system, let MuJoCo draw off screen, which it otherwise does only if told before its import."""
    from mujoco import gl_context

    if "MUJOCO_GL" not in os.environ and not os.environ.get("DISPLAY"):
        for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
            if ctypes.util.find_library(library):
                os.environ["MUJOCO_GL"] = name
                importlib.reload(gl_context)
                return


def _renderer(task: str, size: int, model):
    """The renderer of a task's pictures of one size; UserError if this machine cannot draw.

    All worlds of the task share it: where things are is not in the model, but in the data that are drawn.
    """
    if (task, size) not in _renderers:
        _renderers[task, size] = made = _made_renderer(size, model)
        atexit.register(made.close)  # later, while Python ends, what closing needs is gone
    return _renderers[task, size]


def _made_renderer(size: int, model):
    """Shadows, reflections and smoothed edges are left out: on a processor they take most of the time."""
    import mujoco

    _draw_off_screen()
    mujoco.Renderer._mjr_context = None  # looked at when a renderer is deleted, even one that could not be made
    kept = model.vis.quality.offsamples, model.vis.quality.shadowsize
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong is in the exception, too
            made = mujoco.Renderer(model, size, size)
    except Exception as error:  # each way of drawing fails with an exception of its own
        raise UserError(
            "MuJoCo cannot draw on this machine", why=str(error) or type(error).__name__,
            hint="install a software renderer (Debian: apt-get install libegl1 libgl1-mesa-dri) and set MUJOCO_GL=egl",
        ) from error  # fmt: skip
    finally:
        model.vis.quality.offsamples, model.vis.quality.shadowsize = kept
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        made.scene.flags[flag] = 0
    return made
