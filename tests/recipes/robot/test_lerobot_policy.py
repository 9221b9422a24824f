"""What the command line says of a bad LeRobot dataset. tests/test_robots_doc.py trains on a good one."""

import pytest
from damaging import DATA, cell
from kit import in_process
from recorded_episodes import episodes

from robot import lerobot_write

pytest.importorskip("av")

CONFIG = """
recipe: robot/policy
model: {{kind: cloning, width: 16, heads: 2, layers: 1, decoder_layers: 1, vision: {{channels: 8}}}}
data: {{source: {source}, chunk: 4, cameras: [top], test: 0.2, validation: 0.2}}
train: {{steps: 4, batch: 4}}
evaluate: {{every: 2, examples: 8}}
"""


def write(folder, damage=lambda folder: None):
    lerobot_write.write(episodes(8), folder / "arm", codec="libx264")
    damage(folder / "arm")
    (folder / "mine.yaml").write_text(CONFIG.format(source=folder / "arm"))
    return folder / "mine.yaml"


@pytest.mark.slow
def test_a_bad_dataset_ends_a_run_with_one_message(tmp_path, monkeypatch, capsys):
    config = write(tmp_path, cell(DATA, 12, "action", [0.0, float("nan")]))
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    assert in_process("train", config, "--run", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"{DATA}: row 12 (episode 2, frame 1): `action` has an entry that is not a finite number" in said
    assert "Traceback" not in said
    assert in_process("train", config, "--run", tmp_path / "run", "data.cameras=[tip]") == 2
    said = capsys.readouterr().err
    assert "data.cameras" in said and "did you mean `observation.images.top`?" in said

