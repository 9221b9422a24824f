"""Data that the model makes itself: the documents' self-play, killed, and resumed to the bit through the one loop."""

import json
import math
import os
import signal
import types
from pathlib import Path

import numpy as np
import pytest
from kit import Aurora, events, final_hash, losses, write_documented

from aurora_train.cli.main import main
from aurora_train.train.experience import Actor, Journal

KILL = '''
import os
import signal
import time
from pathlib import Path


def kill_at(number):
    """kill -9 of this very process where the environment says so, once there is a checkpoint to come back to."""
    if os.environ.get("DIES_AT") == str(number):
        while not Path("run/checkpoints/10/manifest.aurora.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
'''
DYING = '''"""Nim, whose process is killed at one data step."""
from kill import kill_at
from nim import Nim


class Dying(Nim):
    def experience(self, actor, indices, key):
        kill_at(actor.step)
        return super().experience(actor, indices, key)
'''
# What it answers depends on how often it was asked: to ask twice is to train another run.
REFEREE = '''
from pathlib import Path

from kill import kill_at


def judge(taken):
    calls = Path("calls")
    number = len(calls.read_text()) if calls.exists() else 0
    kill_at(number)
    with calls.open("a") as file:
        file.write("x")
    return (taken == number % 3).astype("float32")
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    write_documented(tmp_path)
    (tmp_path / "kill.py").write_text(KILL)
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "referee.py").write_text(REFEREE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def killed(folder, *arguments):
    done = Aurora(folder, Path(os.environ["AURORA_CACHE"]))(*arguments, environment={"DIES_AT": "25"})
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert 23 <= losses(folder / "run")[-1][0] <= 25


@pytest.mark.parametrize("recipe", ["judged.py", pytest.param("dying.py", marks=pytest.mark.slow)])
def test_self_play_that_is_killed_resumes_to_the_bit_and_asks_nobody_twice(recipe, here, capsys):
    train = ["train", "nim.yaml", f"recipe={recipe}", "--quiet", "--run"]
    assert main([*train, "undisturbed"]) == 0
    asked = len((here / "calls").read_text()) if recipe == "judged.py" else 0
    (here / "calls").unlink(missing_ok=True)
    killed(here, *train, "run")
    assert main(["resume", "run", "--quiet"]) == 0
    assert [event["step"] in (10, 20) for event in events(here / "run", "resume")] == [True]
    assert losses(here / "run") == losses(here / "undisturbed")
    assert final_hash(here / "run") == final_hash(here / "undisturbed")
    if recipe == "judged.py":
        assert asked == len((here / "calls").read_text()) == 40
        lines = (here / "run" / "journal" / "process-0.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(40))
    else:
        assert not (here / "run" / "journal").exists()
        assert main(["resume", "run", "train.steps=42", "memory.accumulation=2"]) == 0
        said = capsys.readouterr().err
        assert "memory.accumulation: 'auto' -> 2 (changes the run from here on)" in said
        assert "from here the model makes different data" in said


def test_an_answer_comes_back_as_it_was_given_whatever_it_says(tmp_path):
    state = types.SimpleNamespace(params=None, rest=None, frozen=None)
    answer = ["NaN", "Infinity", "'-Infinity", {"share": math.inf}, None]
    for judge in (lambda text: answer, pytest.fail):  # the second is not asked
        journal = Journal(tmp_path / "journal.jsonl", 0)
        assert Actor(None, state, 3, journal).ask("judge", judge, "NaN") == answer
        journal.close()


def test_the_documents_game_is_learned_in_one_short_file(here):
    assert len((here / "nim.py").read_text().splitlines()) <= 60
    assert main(["train", "nim.yaml", "train.steps=150", "--run", "run", "--quiet"]) == 0
    from aurora_train import load

    scores = load(here / "run").model(np.eye(10)[1:4])
    assert scores.argmax(-1).tolist() == [0, 1, 2]  # of so few, all of them


def test_a_validation_split_of_other_arrays_is_refused_before_any_step(here, capsys):
    text = (here / "nim.py").read_text()
    (here / "nim.py").write_text(text.replace('return Games() if split == "train" else None', "return Games()"))
    assert main(["train", "nim.yaml", "--run", "run", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "the validation split lacks `reward`" in err and "nim.py:" in err and "Traceback" not in err


@pytest.mark.parametrize("old, new, said", [
    ("jnp.float32}", "jnp.int16}", "`experience` returned `reward` of float32[64, 9]"),
    ('"reward": jnp.float32}', '"rewards": jnp.float32}', "`experience` returned no `rewards`"),
    ('"taken": jnp.int32, ', "", "`experience` returned `taken`, which `shapes` does not announce"),
])  # fmt: skip
def test_a_batch_that_shapes_did_not_announce_is_one_message(old, new, said, here, capsys):
    text = (here / "nim.py").read_text()
    assert old in text
    text = text.replace(old, new).replace('batch["taken"]', '(0 * batch["stones"])')
    (here / "nim.py").write_text(text.replace('batch["reward"]', "1.0"))
    assert main(["train", "nim.yaml", "--run", "run", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert said in err and "nim.py:" in err and "Traceback" not in err
