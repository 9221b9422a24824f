"""docs/robots.md works as written: its commands in its order on a tiny dataset, and its client against the server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from asking import served
from documents import Document
from kit import losses

sys.path.insert(0, str(Path(__file__).parent / "recipes" / "robot"))
from recorded_episodes import episodes  # noqa: E402

SMALL = ["train.steps=2", "train.batch=4", "model.width=16", "model.heads=2", "model.layers=1",
         "model.decoder_layers=1", "evaluate.examples=4"]  # fmt: skip
TINY = {
    # ACT, whose two encoders take the longest to compile, is trained by tests/recipes/robot.
    "arm.yaml": [*SMALL, "model.kind=cloning", "data.chunk=4", "model.vision.kind=vit", "model.vision.layers=1",
                 "model.noising.steps=2", "limits.latency_p99_ms=60000", "limits.action_bound=1000"],
    "robot/two_modes": [*SMALL, "data.episodes=12", "score.episodes=2", "score.gifs=1"],
}  # fmt: skip
FEWER = ["data.cameras=[]"]  # of the run that is compared with the first
DOC = Document("robots.md", TINY)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of a user of the document, with the dataset `pick`."""
    pytest.importorskip("av")
    from robot.lerobot_write import write

    folder = tmp_path_factory.mktemp("robots")
    write(episodes(24), folder / "pick")
    DOC.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("AURORA_CACHE", str(folder / "cache"))
        yield folder


def acts(line: str) -> np.ndarray:
    """What the document's client is answered by `aurora act`, which SIGTERM then ends."""
    chunks = []

    def ask(place: str) -> None:
        import client  # the document's

        policy, frame = client.Policy(int(place.rpartition(":")[2])), episodes(1)[0].arrays
        observation = {name: array[0] for name, array in frame.items() if name != "action"}
        chunks.append(policy({"reset": True, "task": "Move to 0.", **observation}))
        with pytest.raises(RuntimeError, match="there is no `observation.environment_state`"):
            policy({"task": "Move to 0.", "observation.state": observation["observation.state"]})

    words, _ = DOC.arguments_of(line.replace("--port 7411", ""))
    assert served([*words, "--json"], ask) == 0, line
    assert chunks[0].shape == (2, 2) and chunks[0].dtype == np.float32
    return chunks[0]


def test_the_document_names_every_limit_and_its_client_is_python():
    from robot.limits import Limits

    assert all(f"| `{name}` |" in DOC.text for name in Limits.model_fields)
    compile(DOC.files["client.py"], "client.py", "exec")


@pytest.mark.release
def test_every_command_of_the_document_works_in_its_order(here, capsys, monkeypatch):
    assert len(DOC.commands) >= 12
    answers = {}
    for line in DOC.commands:
        if line.startswith("aurora act "):
            answers[line] = acts(line)
            report = json.loads(capsys.readouterr().out)
            assert report["answers"] == 1 and report["refused"] == 1 and report["latency_ms_p99"] > 0
        else:
            DOC.runs(line, capsys, monkeypatch, FEWER if "runs/arm-flow" in line and "train" in line else ())
    assert len(answers) == 3 and all(np.array_equal(one, next(iter(answers.values()))) for one in answers.values())
    for run in ("arm", "arm-flow", "two-modes"):
        assert [step for step, _ in losses(here / "runs" / run)] == [1, 2]
    assert "action_error" in (here / "arm-policy" / "README.md").read_text()
