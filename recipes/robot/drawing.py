"""Pictures of rollouts for the report: the paths that a robot took, and films of a few episodes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MOST_PICTURES = 60  # of a film; those of a longer episode are further apart


def draw_paths(
    paths: Sequence[np.ndarray], successes: Sequence[bool], names: Sequence[str], folder: Path
) -> list[dict]:  # fmt: skip
    """Draw where the robot went, seen along each axis: SVG files in `folder`, as "plots" of a score.

    Args:
        paths: float[T, 2 or 3] for each episode.
        successes: whether each succeeded; failures have the second colour.
        names: of the axes.
    """
    plots = []
    for a, b in itertools.combinations(range(len(names)), 2):
        name = f"paths-{names[a]}-{names[b]}.svg"
        (Path(folder) / name).write_text(_drawn(paths, successes, (a, b), names))
        plots.append({"title": f"Paths of {len(paths)} episodes, of which {sum(successes)} succeeded", "file": name})
    return plots


def _drawn(paths, successes, axes_of: tuple[int, int], names) -> str:
    from aurora_train.tools.report_plots import MAIN, SECOND, drawing, svg_file

    figure, axes = drawing(5.6, 4.2)
    for points, success in zip(paths, successes, strict=True):
        x, y = (points[:, axis] for axis in axes_of)
        axes.plot(x, y, color=MAIN if success else SECOND, linewidth=0.8, alpha=0.6)
        axes.plot(x[-1], y[-1], color=MAIN if success else SECOND, marker="o" if success else "x", markersize=3)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(names[axes_of[0]])
    axes.set_ylabel(names[axes_of[1]])
    described = f"{names[axes_of[1]]} by {names[axes_of[0]]} of {len(paths)} episodes"
    return svg_file(figure, f"paths-{axes_of[0]}-{axes_of[1]}", described)


def write_gif(path: Path, film: Sequence[np.ndarray], seconds: float) -> Path:
    """Write pictures uint8[H, W, 3] as a moving GIF that repeats and takes the `seconds` that the episode took, to the
    hundredths for each picture that a GIF knows; of more than MOST_PICTURES, evenly spaced ones."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(film) - 1, min(len(film), MOST_PICTURES)).round().astype(int))
    images = [Image.fromarray(film[number]) for number in chosen]
    shown_ms = 10 * max(round(100 * seconds / len(images)), 2)  # players show what is shorter slowly
    images[0].save(path, save_all=True, append_images=images[1:], duration=shown_ms, loop=0)
    return path
