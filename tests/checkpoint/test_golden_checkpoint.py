"""Runs that earlier versions saved stay readable. One is added with each release, and none is ever written again:

    python tests/checkpoint/test_golden_checkpoint.py 0.1      # writes tests/checkpoint/golden/0.1/
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toy  # noqa: E402
from kit import Aurora, losses  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = "expected.json"


def state_of(run: Path) -> str:
    """sha256 of the state in a run's newest checkpoint."""
    from aurora_train import mesh as meshes
    from aurora_train.config import load_resolved
    from aurora_train.run import Run
    from aurora_train.train.loop import state_hash
    from aurora_train.train.session import open_session

    config = load_resolved(run)
    session = open_session(config, Run(run), lambda *_: None)
    assert session.mesh.devices.size == meshes.make_mesh(1, 1).devices.size
    step, damaged = session.store.newest_intact()
    assert not damaged
    digest = state_hash(session.restore(step))
    session.store.close()
    return digest


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir()))
def test_what_an_earlier_version_saved_is_verified_restored_and_gone_on_with(version, tmp_path):
    run, aurora = tmp_path / "run", Aurora(tmp_path, tmp_path / "cache")
    shutil.copytree(GOLDEN / version, run)
    expected = json.loads((run / EXPECTED).read_text())
    (run / EXPECTED).unlink()
    assert "intact" in aurora.good("verify", run).stdout
    assert state_of(run) == expected["state_sha256"]
    aurora.good("resume", run, "--quiet")
    went_on = dict(losses(run))
    assert sorted(went_on) == list(range(1, 31))
    for step, loss in expected["losses"].items():
        assert went_on[int(step)] == pytest.approx(loss, rel=1e-4)  # another processor, perhaps


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir()))
def test_a_plan_that_an_earlier_version_pinned_is_kept_while_its_memory_section_says_the_same(version, tmp_path):
    from aurora_train import mesh as meshes
    from aurora_train.config import load_resolved
    from aurora_train.run import Run
    from aurora_train.train.planning import pinned_plan

    shutil.copytree(GOLDEN / version, tmp_path / "run")
    run, mesh = Run(tmp_path / "run"), meshes.make_mesh(1, 1)
    assert pinned_plan(run, load_resolved(run.folder), mesh) is not None
    assert pinned_plan(run, load_resolved(run.folder, ["memory.accumulation=1"]), mesh) is None
    pinned = json.loads(run.plan.read_text())
    pinned["asked"]["fuse_update"] = True
    run.plan.write_text(json.dumps(pinned))
    assert pinned_plan(run, load_resolved(run.folder), mesh) is None


def write(version: str) -> None:
    """A toy run stopped at step 20 of 30, with what it went on to."""
    import tempfile

    here = GOLDEN / version
    assert not here.exists(), "a golden checkpoint is written once"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        aurora, config = Aurora(folder, folder / "cache"), toy.write(folder)
        settings = ("checkpoint.keep=1", "checkpoint.best=0", "evaluate.every=null")
        aurora.good("train", config, *settings, "train.steps=20", "optimizer.schedule.name=constant", "--run", "run")
        left_out = shutil.ignore_patterns("report.html", "work", ".lock", ".trash", "samples")
        shutil.copytree(folder / "run", here, ignore=left_out)
        digest = state_of(here)
        aurora.good("resume", "run", "train.steps=30")
        text = (here / "config.yaml").read_text().replace("steps: 20", "steps: 30")
        (here / "config.yaml").write_text(text)
        provenance = json.loads((here / "provenance.json").read_text()) | {"command": ["aurora", "train", "toy.yaml"]}
        (here / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
        expected = {"state_sha256": digest, "losses": dict(losses(folder / "run"))}
        (here / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    write(sys.argv[1])
