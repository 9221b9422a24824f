"""Pictures that a score leaves in its work folder are part of the report's one file."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from aurora_train.check.results import checked_result
from aurora_train.errors import UserError
from aurora_train.recipe import Recipe
from aurora_train.tools import report_page
from aurora_train.tools.report import write_report
from robot.drawing import draw_paths, write_gif
from robot.rollouts import Expert, rollouts

SVG = '<svg xmlns="http://www.w3.org/2000/svg"/>'


def report(folder, plots) -> str:
    (folder / "config.yaml").write_text("recipe: x\n")
    (folder / "plots.json").write_text(json.dumps(plots))
    return write_report(folder).read_text()


def test_a_film_and_paths_of_rollouts_are_in_the_page(tmp_path):
    from PIL import Image

    work = tmp_path / "work"
    work.mkdir()
    (one, two) = rollouts(Expert(), "two_modes", [0, 1], filmed=1)
    assert one.film and not two.film
    gif = write_gif(work / "rollout-0.gif", one.film, one.steps / 10)
    paths = [r.observations["observation.state"] for r in (one, two)]
    plots = draw_paths(paths, [True, False], ("x", "y"), work)
    assert plots == [{"title": "Paths of 2 episodes, of which 1 succeeded", "file": "paths-x-y.svg"}]
    with Image.open(gif) as moving:
        assert moving.n_frames == len(one.film) and moving.size == (160, 160) and moving.info["loop"] == 0
    page = report(tmp_path, [{"title": "Seed <0>", "file": gif.name}, *plots])
    shown = re.findall(r'<img alt="([^"]*)" src="data:(image/[a-z+]+);base64,([^"]*)">', page)
    assert [(alt, kind) for alt, kind, _ in shown] == [
        ("Seed &lt;0&gt;", "image/gif"), ("Paths of 2 episodes, of which 1 succeeded", "image/svg+xml"),
    ]  # fmt: skip
    assert base64.b64decode(shown[0][2]) == gif.read_bytes()
    drawn = base64.b64decode(shown[1][2]).decode()
    assert drawn.count("clip-path") >= 2 and "#0b6bcb" in drawn and "#c2410c" in drawn  # a success and a failure


def test_a_long_film_is_shortened(tmp_path):
    from PIL import Image

    (one,) = rollouts(Expert(), "two_modes", [0], filmed=1)
    film = [*one.film, *[one.film[0]]] * 10
    with Image.open(write_gif(tmp_path / "long.gif", film, 6.0)) as moving:
        assert moving.n_frames <= 60 and played(moving) == pytest.approx(6.0, rel=0.05)


def test_a_film_takes_as_long_as_the_episode_did(tmp_path):
    from PIL import Image

    pictures = [np.full((8, 8, 3), 4 * number, np.uint8) for number in range(16)]  # 60 steps at 80 a second, each 4th
    with Image.open(write_gif(tmp_path / "short.gif", pictures, 60 / 80)) as moving:
        assert played(moving) == pytest.approx(0.75, rel=0.15)


def played(moving) -> float:
    """Seconds that a film takes."""
    total = 0
    for number in range(moving.n_frames):
        moving.seek(number)
        total += moving.info["duration"]
    return total / 1000


def test_what_is_missing_or_too_large_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "PICTURE_BYTES", len(SVG) - 1)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "large.svg").write_text(SVG)
    page = report(tmp_path, [{"title": "a", "file": "gone.png"}, {"title": "b", "file": "large.svg"}])
    assert "<img" not in page and "large.svg has 41 B and is not shown; the limit is 40 B" in page
    assert report_page.NOT_RECORDED in page[page.index("What it did") :]
    (tmp_path / "secret.svg").write_text("<svg/>")
    assert "<img" not in report(tmp_path, [{"title": "a", "file": "../secret.svg"}]), "a run made by others"


@pytest.mark.parametrize("file", ["../secret.png", "/etc/x.png", "page.html", "x", "", 3])
def test_only_pictures_of_the_work_folder_are_shown(file):
    with pytest.raises(UserError, match="plots"):
        checked_result(Recipe(None, Path()), {"right": 1.0, "plots": [{"title": "a", "file": file}]})
