"""Gates and hooks of a recipe's own: they run after the built-in ones, and what they remember is part of the state."""

import numpy as np
from kit import final_hash, records, write_documented

from aurora_train.cli.main import main

HOOKED = '''"""The toy, with a gate that refuses a large gradient, and a hook that counts the good updates."""
import jax.numpy as jnp
import toy

from aurora_train.train.hooks import Gate, Hook


class Hooked(toy.Toy):
    def gates(self):
        return [Gate("bounded", lambda state, info: info["grad_norm"] < 12.0)]

    def hooks(self):
        def after(old, new, info, good):
            return new._replace(extra={**new.extra, "good": old.extra["good"] + good})

        return [Hook("good", after, begin=lambda params: jnp.int32(0))]
'''
TRAIN = ["train", "toy.yaml", "recipe=hooked.py", "evaluate.final=false", "--quiet", "--run", "run"]


def restored(run):
    """`TrainState.extra` as the newest checkpoint has it."""
    from aurora_train.config import load_resolved
    from aurora_train.run import Run
    from aurora_train.train.session import open_session

    session = open_session(load_resolved(run), Run(run), lambda *_: None)
    state = session.restore(Run(run).step())
    session.store.close()
    return state.extra


def test_a_recipes_gate_refuses_an_update_and_its_hook_remembers_across_a_resume(here):
    (here / "hooked.py").write_text(HOOKED)
    assert main([*TRAIN, "train.stop_after_minutes=1e-9"]) == 75
    assert main(["resume", "run", "train.stop_after_minutes=null", "--quiet"]) == 0
    steps = [record for record in records(here / "run") if "loss" in record]
    refused = [record["step"] for record in steps if record["skipped"]]
    assert refused == [record["step"] for record in steps if record["grad_norm"] >= 12.0]
    assert 0 < len(refused) < 30
    extra = restored(here / "run")
    assert extra.keys() == {"ema", "good"} and extra["good"] == 30 - len(refused)
    whole = here / "whole"
    assert main([*TRAIN[:-1], str(whole)]) == 0
    assert final_hash(whole) == final_hash(here / "run")


def test_two_hooks_of_one_name_are_refused(here, capsys):
    (here / "hooked.py").write_text(HOOKED.replace('"good"', '"ema"'))
    assert main(TRAIN) == 2
    said = capsys.readouterr().err
    assert "two hooks are called `ema`" in said and "Hooked" in said and "Traceback" not in said


def test_the_documents_hook_keeps_a_slower_average(tmp_path, monkeypatch):
    write_documented(tmp_path)
    monkeypatch.chdir(tmp_path)
    short = ["model.width=8", "train.steps=3", "train.batch=16", "evaluate.every=null", "evaluate.final=false"]
    assert main(["train", "forecast.yaml", "recipe=hooked.py", *short, "--run", "run", "--quiet"]) == 0
    slow = restored(tmp_path / "run")["slow"]
    assert np.isfinite(slow["out"]["kernel"]).all() and slow["out"]["kernel"].shape == (8, 8)
