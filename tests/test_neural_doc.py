"""docs/neural.md works as written: its commands in order on a small recording, and its client against the server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from asking import served
from documents import Document
from kit import losses

sys.path.insert(0, str(Path(__file__).parent / "recipes" / "neural"))
from small_sessions import session, write_session  # noqa: E402

SMALL = ["train.steps=2", "train.batch=4", "model.width=16", "model.heads=2", "model.layers=1", "evaluate.examples=4"]
DOC = Document("neural.md", {"hand.yaml": [*SMALL, "data.window=12"], "neural/masked": [*SMALL, "data.window=12"]})


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of a user of the document, with the recording `session.nwb`."""
    pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("neural")
    write_session(folder / "session.nwb", trials=40)
    DOC.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("AURORA_CACHE", str(folder / "cache"))
        yield folder


def streams(line: str) -> None:
    """The document's client against `aurora stream`, which SIGTERM then ends: a trial twice, and a bad bin."""
    import aurora_train
    from neural.nwb import read_recording
    from neural.spikes import SPLITS, bin_trials
    from neural.velocity import decode

    trials = bin_trials(read_recording("session.nwb", behavior="processing/behavior/hand_vel"), 0.02)
    answered = []

    def ask(place: str) -> None:
        import rig  # the document's

        decoder = rig.Decoder(int(place.rpartition(":")[2]))
        for _ in range(2):
            decoder.start_trial()
            answered.append([decoder.velocity(counts.tolist()) for counts in trials.spikes[: trials.offsets[1]]])
        with pytest.raises(RuntimeError, match="of the units 10, 11, 12, 13, 14, 15 in this order"):
            decoder.velocity([0] * 5)

    words, _ = DOC.arguments_of(line.replace("--port 7411", ""))
    assert served([*words, "--json"], ask) == 0
    loaded = aurora_train.load("runs/hand")
    recipe = loaded.recipe.ready(lambda *said: None)
    windows = next(data for data in map(recipe.data, SPLITS) if 0 in data.trials.ids)
    row = windows.trials.offsets[windows.trials.ids.tolist().index(0)]
    expected = decode(loaded.predict, windows, lambda *said: None)[row : row + len(answered[0])]
    np.testing.assert_allclose(answered[0], expected, rtol=1e-4, atol=1e-4)
    assert answered[0] == answered[1]


def test_the_document_names_as_many_bad_files_as_there_are():
    import test_bad_recordings

    assert f"{len(test_bad_recordings.CASES) + 3} such files" in DOC.text
    compile(DOC.files["rig.py"], "rig.py", "exec")


@pytest.mark.slow
def test_every_command_of_the_document_works_in_its_order(here, capsys, monkeypatch):
    assert len(DOC.commands) == 9 and len(session().unit_ids) == 6
    for line in DOC.commands:
        if line.startswith("aurora stream "):
            capsys.readouterr()
            streams(line)
            said = json.loads(capsys.readouterr().out)
            assert said["answers"] > 80 and said["refused"] == 1 and said["latency_ms_p99"] > 0
        else:
            DOC.runs(line, capsys, monkeypatch)
    for run in ("hand", "hand-gru", "rates"):
        assert [step for step, _ in losses(here / "runs" / run)] == [1, 2]
    assert "Velocity x, decoded and true" in (here / "runs" / "hand" / "report.html").read_text()
