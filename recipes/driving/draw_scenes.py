"""Rollouts as moving pictures: the recording beside what the model made of it, seen from above. Pillow alone."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from driving.scenes import GREEN, RED, STEP_S, YELLOW, Scene, boxes

SIDE_M, SIDE_PX, GAP_PX = 90.0, 300, 6
FINER = 2  # drawn so much larger, then shrunk, for smooth edges
EVERY = 3  # steps in a picture
GROUND, ROAD, LANE, OTHER, EGO, PERSON, PATH = (
    (247, 248, 250), (222, 226, 231), (190, 197, 206), (98, 109, 122), (11, 107, 203), (194, 65, 12), (120, 170, 220),
)  # fmt: skip
LIGHTS = {RED: (205, 45, 45), YELLOW: (235, 175, 20), GREEN: (40, 150, 75)}


def animation(scene: Scene, panels: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """A GIF with one panel for each (states [A, T, >= 3], present bool[A, T]) of the steps after the history.

    The ego car is blue, pedestrians are orange, and a line marks where the ego car was recorded.
    """
    steps = next(iter(panels.values()))[1].shape[1]
    centre = scene.states[scene.focal, scene.observed - 1, :2]
    ground = _ground(scene, centre)
    frames = []
    for step in range(0, steps, EVERY):
        parts = [_panel(ground.copy(), scene, centre, name, *panel, step) for name, panel in panels.items()]
        width = len(parts) * (SIDE_PX + GAP_PX) - GAP_PX
        frame = Image.new("RGB", (width, SIDE_PX), (255, 255, 255))
        for number, part in enumerate(parts):
            frame.paste(part, (number * (SIDE_PX + GAP_PX), 0))
        frames.append(frame.quantize(255, dither=Image.Dither.NONE))
    written = io.BytesIO()
    frames[0].save(written, "GIF", save_all=True, append_images=frames[1:], duration=int(1000 * EVERY * STEP_S), loop=0)
    return written.getvalue()


def _at(points, centre) -> list[tuple[float, float]]:
    """Metres to points of the picture, whose y axis points down."""
    scale = SIDE_PX * FINER / SIDE_M
    xy = (np.asarray(points, np.float64) - centre) * [scale, -scale] + SIDE_PX * FINER / 2
    return [tuple(point) for point in xy]


def _ground(scene: Scene, centre) -> Image.Image:
    image = Image.new("RGB", (SIDE_PX * FINER,) * 2, GROUND)
    draw = ImageDraw.Draw(image)
    for polygon in scene.drivable:
        draw.polygon(_at(polygon, centre), fill=ROAD)
    for lane in scene.lanes:
        draw.line(_at(lane.centre, centre), fill=LANE, width=FINER)
    recorded = scene.valid[scene.focal, scene.observed :]
    path = scene.states[scene.focal, scene.observed :][recorded, :2]
    if len(path) > 1:
        draw.line(_at(path, centre), fill=PATH, width=2 * FINER)
    return image


def _panel(image, scene: Scene, centre, name: str, states, present, step: int) -> Image.Image:
    draw = ImageDraw.Draw(image)
    at = scene.observed + step
    for light, stop in enumerate(scene.light_stops if scene.lights is not None and at < scene.steps else ()):
        colour = LIGHTS.get(int(scene.lights[light, at]))
        if colour:
            x, y = _at(stop[None], centre)[0]
            draw.ellipse((x - 4 * FINER, y - 4 * FINER, x + 4 * FINER, y + 4 * FINER), fill=colour)
    corners = boxes(np.nan_to_num(states[:, step, :3]).astype(np.float64), scene.sizes.astype(np.float64))
    for agent in np.flatnonzero(present[:, step]):
        colour = EGO if agent == scene.focal else PERSON if scene.kinds[agent] == "pedestrian" else OTHER
        draw.polygon(_at(corners[agent], centre), fill=colour)
    small = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    ImageDraw.Draw(small).text((6, 4), f"{name}  {STEP_S * (step + 1):.1f} s", fill=OTHER)
    return small
