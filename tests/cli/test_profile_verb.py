"""`aurora profile` traces real steps, leaves no run behind, and refuses a folder that holds something."""

import gzip
import json

import pytest
from kit import Aurora


@pytest.mark.slow
def test_a_real_profile(tiny, tmp_path):
    out, cache = tmp_path / "profile", tmp_path / "cache"
    done = Aurora(tmp_path, cache)("profile", str(tiny), "--steps", "2", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert not list((cache / "compile").glob("jit_program-*"))  # nor was it read: names are not part of its key
    found = json.loads(done.stdout)
    parts = {row["part"] for row in found["operations"]}
    assert {"attention", "mlp", "norm", "loss", "optimizer", "embedding"} <= parts
    assert any((row["part"], row["kind"]) == ("mlp", "product") for row in found["operations"])
    assert 0 < found["device_busy_s"] <= found["step_s"]
    assert sum(row["share"] for row in found["operations"]) == pytest.approx(1)
    assert sum(found["host_s"].values()) <= found["step_s"]
    with gzip.open(found["trace"]) as trace:
        assert b"traceEvents" in trace.read(200)
    assert not (out / "run").exists() and found["save_blocks_s"] > 0


def test_a_folder_of_its_own(aurora, tiny, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    done = aurora("profile", str(tiny), "--out", str(tmp_path / "there"))
    assert done.returncode == 2
    assert "not empty" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(aurora, tiny, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "within"):
        done = aurora("profile", str(tiny), "--out", str(out))
        assert done.returncode == 2 and "cannot make the profile's folder" in done.stderr and str(out) in done.stderr
        assert "Traceback" not in done.stderr and "compiling" not in done.stderr
