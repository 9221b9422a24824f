"""`aurora act` as a robot has it: another process, a real socket, a real signal; and the limits it is held to."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess

import pytest
import toy
from kit import Aurora, in_process

from aurora_train.config import load
from aurora_train.errors import UserError

# The toy recipe with a client's function that adds up what it has answered, and a limit of its score.
SERVED = '''"""The toy, served."""
import numpy as np
from toy import Config as ToyConfig
from toy import Toy

from aurora_train.config import Section, setting
from aurora_train.errors import UserError


class Limits(Section):
    mse_max: float | None = setting(None, help="largest error")
    latency_p99_ms: float | None = setting(None, help="slowest answer")


class Config(ToyConfig):
    limits: Limits = Limits()


class Served(Toy):
    Config = Config

    def responder(self, predict):
        total = np.zeros(8, np.float32)
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
        return [f"{name} is {scores.get(name)}, and the limit is {limit}" for name, limit in limits.items()
                if limit is not None and name in scores and not scores[name] <= limit]
'''
SMALL = {"recipe: toy.py": "recipe: served.py", "steps: 30": "steps: 2", "every: 10, keep": "every: 2, keep",
         "evaluate: {every: 10, ": "evaluate: {every: 2, baselines: false, "}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory, shared_cache):
    """The command line in the folder of a trained run, `run`."""
    folder = tmp_path_factory.mktemp("served")
    toy.write(folder, **SMALL)
    (folder / "served.py").write_text(SERVED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AURORA_CACHE", str(shared_cache))
        assert in_process("train", "toy.yaml", "--run", "run", "--quiet") == 0
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
        self.file = socket.create_connection(("127.0.0.1", int(found[1])), 60).makefile("rwb")

    def __call__(self, **request) -> dict:
        self.file.write(json.dumps(request).encode() + b"\n")
        self.file.flush()
        return json.loads(self.file.readline())

    def end(self, number) -> tuple[int, str, str]:
        """(exit status, standard output, standard error) after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, self.said + err


def test_a_run_answers_until_a_signal_and_prints_its_latencies(served):
    acting = Acting(served, "run", "--port", 0, "--json")
    first, second = acting(x=[1] * 8), acting(x=[1] * 8)
    assert first["y"] == first["total"] and second["y"] == first["y"]
    assert second["total"] == pytest.approx([2 * one for one in first["y"]])
    assert "8 numbers" in acting(x=[1])["error"]
    assert acting(reset=True, x=[1] * 8)["total"] == first["total"]
    status, out, err = acting.end(signal.SIGTERM)
    found = json.loads(out)
    assert status == 0 and found["answers"] == 3 and found["refused"] == 1 and "Traceback" not in err
    assert 0 < found["latency_ms_p50"] <= found["latency_ms_p99"]


def test_a_recipe_that_answers_nothing_says_so(tmp_path):
    config = load("quickstart")
    with pytest.raises(UserError, match="answers no requests"):
        config.recipe_class(config, tmp_path).responder(None)
