"""`aurora act` as a robot has it: another process, a real socket, a real signal; the limits it is held to, and
`aurora export` of what it serves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import toy
from asking import Client
from asking import served as served_by
from kit import Aurora, events, in_process
from safetensors.numpy import save

from aurora_train.config import load
from aurora_train.errors import UserError
from aurora_train.loading import load as load_model

# The toy recipe with a client's function that adds up what it has answered, and a limit of its score.
SERVED = '''"""The toy, served."""
import os

import numpy as np
from toy import Config as ToyConfig
from toy import Toy

from aurora_train.config import Section, setting
from aurora_train.errors import UserError


class Limits(Section):
    mse_max: float | None = setting(None, help="largest error")
    signed_by: str | None = setting(None, help="a file", path_unless=())
    latency_p99_ms: float | None = setting(None, help="slowest answer")


class Config(ToyConfig):
    limits: Limits = Limits()


class Served(Toy):
    Config = Config
    formats = ("toy",)

    def probe(self, examples):
        return {"x": np.random.default_rng(0).normal(size=(examples, 8)).astype(np.float32)}

    def responder(self, predict):
        total = np.zeros(int(os.environ.get("TOY_INPUTS", 8)), np.float32)
        predict({"x": total[None]})

        def respond(request):
            nonlocal total
            x = np.asarray(request.get("x", ()), np.float32)
            if x.shape != (8,):
                raise UserError("x has to be 8 numbers", where="x")
            y = predict({"x": x[None]})[0]
            total = total + y
            return {"y": y, "total": total}

        return respond

    def exceeded(self, scores):
        limits = {"mse": self.config.limits.mse_max, "latency_ms_p99": self.config.limits.latency_p99_ms}
        scores = {"mse": np.nan, "latency_ms_p99": 0.0} | scores  # there are no latencies until it was served
        return [f"{name} is {scores[name]}, and the limit is {limit}" for name, limit in limits.items()
                if limit is not None and not scores[name] <= limit]
'''
SMALL = {"recipe: toy.py": "recipe: served.py", "steps: 30": "steps: 2", "every: 10, keep": "every: 2, keep",
         "evaluate: {every: 10, ": "evaluate: {every: 2, baselines: false, ", "layers: 3": "layers: 1",
         ", ema: 0.9": "", "memory: {accumulation: 2}": "memory: {accumulation: 1}"}  # fmt: skip
TRAIN = ("train", "toy.yaml", "limits.mse_max=1e-9", "limits.signed_by=mine/a.txt", "--run", "run", "--quiet")


@pytest.fixture(scope="module")
def served(tmp_path_factory, shared_cache):
    """The command line in the folder of a trained run, `run`, which exceeds a limit."""
    folder = tmp_path_factory.mktemp("served")
    toy.write(folder, **SMALL)
    (folder / "served.py").write_text(SERVED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AURORA_CACHE", str(shared_cache))
        assert in_process(*TRAIN) == 4
        yield Aurora(folder, shared_cache)


class Acting:
    """`aurora act RUN ARGUMENTS` in a process of its own, and one client."""

    def __init__(self, aurora: Aurora, *arguments):
        self.process = subprocess.Popen(
            aurora.command("act", *arguments), cwd=aurora.folder, env=aurora.environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.said = ""
        while not (found := re.search(r"listens on 127.0.0.1:(\d+)", self.said)):
            line = self.process.stderr.readline()
            assert line, f"it ended: {self.said}"
            self.said += line
        self.ask = Client(f"127.0.0.1:{found[1]}")

    def __call__(self, **request) -> dict:
        return self.ask(**request)

    def end(self, number) -> tuple[int, str, str]:
        """(exit status, standard output, standard error) after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, self.said + err


def test_a_run_that_exceeds_a_limit_says_which_unless_that_is_overridden_on_record(served, capsys, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(served.cache))
    monkeypatch.chdir(served.folder)
    run = served.folder / "run"
    assert len(json.loads((run / "scores.json").read_text())["exceeded"]) == 1
    assert "limit exceeded: mse" in (run / "report.html").read_text()
    assert len(events(run, "finish")) == 1 and not events(run, "limits_overridden")
    for arguments in (TRAIN, ("resume", "run"), ("act", "run", "--port", 0)):
        assert in_process(*arguments) == 4, "it is refused again, and by every verb"
        said = capsys.readouterr().err
        assert "mse is " in said and "--override-limits" in said
    assert in_process("act", "run", "--port", 0, "--override-limits", " ") == 2
    assert "needs a reason" in capsys.readouterr().err
    assert in_process(*TRAIN, "--override-limits", "a test") == 0
    assert "limit overridden: mse is " in capsys.readouterr().err
    (event,) = events(run, "limits_overridden")
    (record,) = json.loads((run / "provenance.json").read_text())["limits_overridden"]
    assert event["reason"] == record["reason"] == "a test" and event["time"] and record["time"]
    assert event["exceeded"] == record["exceeded"] and record["by"] == "train"
    assert in_process("act", "run", "--port", 0) == 4, "an override holds for one command"


def test_the_score_of_another_step_says_nothing_of_this_one(served, capsys, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(served.cache))
    monkeypatch.chdir(served.folder)
    scores, known = served.folder / "run" / "scores.json", served.folder / "run" / "provenance.json"
    kept, record = scores.read_text(), known.read_text()
    scores.write_text(json.dumps(json.loads(kept) | {"step": 1, "score": {"mse": 0.0}}))
    for arguments in (("act", "run", "--port", 0), ("export", "run", "--to", "other", "--format", "toy")):
        assert in_process(*arguments) == 4
        assert "its score is of step 1: `aurora evaluate " in capsys.readouterr().err
    scores.unlink()
    assert in_process("act", "run", "--port", 0) == 4
    assert "it has no score yet: `aurora evaluate " in capsys.readouterr().err
    scores.write_text(json.dumps(json.loads(kept) | {"step": 1, "score": {"mse": 0.0}}))
    assert in_process("export", "run", "--to", "other", "--override-limits", "a test") == 2
    assert "its own format: --format toy" in capsys.readouterr().err
    assert in_process("export", "run", "--to", "other", "--format", "toy", "--override-limits", "a test") == 0
    assert "## Score" not in (served.folder / "other" / "README.md").read_text()
    scores.write_text(kept)
    known.write_text(record)


def test_a_blank_reason_is_refused_before_any_work(served, capsys, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(served.cache))
    monkeypatch.chdir(served.folder)
    assert in_process("train", "toy.yaml", "--run", "never", "--quiet", "--override-limits", " ") == 2
    assert "needs a reason" in capsys.readouterr().err and not (served.folder / "never" / "metrics.jsonl").exists()


def test_a_run_answers_in_this_process(served, capsys, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(served.cache))
    monkeypatch.chdir(served.folder)
    answers = []
    stream = ("stream", "run", "--json", "--override-limits", "a test")
    assert served_by(stream, lambda place: answers.append(Client(place)(x=[1] * 8)), path="a.sock") == 0
    assert len(answers[0]["y"]) == 8 and json.loads(capsys.readouterr().out)["answers"] == 1
    assert events(served.folder / "run", "limits_overridden")[-1]["by"] == "stream"


@pytest.mark.slow
def test_a_run_answers_until_a_signal_and_prints_its_latencies(served):
    acting = Acting(served, "run", "--port", 0, "--json", "--override-limits", "a test")
    first, second = acting(x=[1] * 8), acting(x=[1] * 8)
    assert first["y"] == first["total"] and second["y"] == first["y"]
    assert second["total"] == pytest.approx([2 * one for one in first["y"]])
    own = load_model(served.folder / "run").predict({"x": np.ones((1, 8), np.float32)})[0]
    assert np.array_equal(np.float32(first["y"]), own), "programs on the calling thread say the same"
    assert "8 numbers" in acting(x=[1])["error"]
    assert acting(reset=True, x=[1] * 8)["total"] == first["total"]
    status, out, err = acting.end(signal.SIGTERM)
    found = json.loads(out)
    assert status == 0 and found["answers"] == 3 and found["refused"] == 1 and "Traceback" not in err
    assert 0 < found["latency_ms_p50"] <= found["latency_ms_p99"]


def test_a_mistake_of_a_recipe_is_one_message_with_its_line(served, capsys, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(served.cache))
    monkeypatch.chdir(served.folder)
    monkeypatch.setenv("TOY_INPUTS", "many")
    assert in_process("act", "run", "--port", 0, "--override-limits", "a test") == 2
    said = capsys.readouterr().err
    assert "`responder` fails: ValueError" in said and "served.py:" in said and "Traceback" not in said


def test_a_recipe_that_answers_nothing_says_so(tmp_path):
    config = load("quickstart")
    with pytest.raises(UserError, match="answers no requests"):
        config.recipe_class(config, tmp_path).responder(None)


def test_an_export_stands_alone_and_is_the_run_to_the_bit(served, capsys, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(served.cache))
    monkeypatch.chdir(served.folder)
    export = ("export", "run", "--to", "toy", "--format", "toy")
    assert in_process(*export) == 4 and not Path("toy").exists()
    assert in_process("export", "run", "--to", "toy", "--format", "onnx") == 2
    assert "\n  one of toy\n" in capsys.readouterr().err  # and none of those of a language model
    assert in_process(*export, "--dtype", "float16") == 2
    capsys.readouterr()
    assert in_process(*export, "--override-limits", "to be compared", "--json") == 0
    assert "to the bit" in json.loads(capsys.readouterr().out)["says"]
    moved = served.folder / "elsewhere" / "toy"
    moved.parent.mkdir()
    Path("toy").rename(moved)
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    own, other = load_model("run"), load_model(moved)
    assert np.array_equal(own.predict({"x": x}), other.predict({"x": x})) and other.step == own.step == 2
    assert "respond" in repr(other.recipe.responder(other.predict))
    assert in_process("act", moved, "--port", 0) == 4, "its limits went with it"
    card = (moved / "README.md").read_text()
    assert "Limits that it exceeds" in card and "to be compared" in card and str(served.folder) not in card
    texts = [path.read_bytes() for path in moved.rglob("*") if path.is_file()]
    assert not any(str(served.folder).encode() in text for text in texts), "folders of this machine stay here"
    assert in_process("verify", moved) == 0
    assert "## Score" in card
    probe = (moved / "probe.safetensors").read_bytes()
    (moved / "probe.safetensors").write_bytes(save({"output": np.zeros((2, 1), np.float32)}))
    capsys.readouterr()
    assert in_process("verify", moved) == 3 and "probe.safetensors was changed" in capsys.readouterr().out
    (moved / "probe.safetensors").write_bytes(probe)
    there = sorted(path.name for path in moved.iterdir())
    for arguments in (("resume", moved, "data.seed=1"), ("train", "toy.yaml", *TRAIN[2:3], "--run", moved)):
        assert in_process(*arguments) == 2 and "an export of a run" in capsys.readouterr().err
    assert in_process("evaluate", moved) == 2 and "score the run that it was made of" in capsys.readouterr().err
    assert sorted(path.name for path in moved.iterdir()) == there, "no training began in it"
    weights = bytearray((moved / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "weights.safetensors").write_bytes(weights)
    capsys.readouterr()
    assert in_process("verify", moved) == 3 and "weights.safetensors was changed" in capsys.readouterr().out
    assert in_process("act", moved, "--port", 0) == 2 and "not those that were exported" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_was_too_slow_ends_with_the_status_of_limits(served):
    config = served.folder / "run" / "config.yaml"
    text = config.read_text()
    assert "latency_p99_ms: null" in text and "mse_max: 1e-09" in text
    text = text.replace("mse_max: 1e-09", "mse_max: null")
    config.write_text(text.replace("latency_p99_ms: null", "latency_p99_ms: 0.0"))
    acting = Acting(served, "run", "--port", 0)
    acting(x=[1] * 8)
    status, _, err = acting.end(signal.SIGINT)
    config.write_text(text)
    assert status == 4 and "limit exceeded: latency_ms_p99 is " in err
