"""A step compiled while the data is prepared: it is what is run, where it still is the step; else nothing is lost."""

import json
import subprocess
import sys

import pytest
from kit import final_hash

# As on a machine with more cores and more data: which thread planned is told, and everything else is as it is.
SCRIPT = """
import sys, threading
from aurora_train.train import ahead, session
ahead._CORES, ahead._LONG = (0, 0.0) if sys.argv[1] == "ahead" else (10**6, 0.0)
for module in (ahead, session):
    def noted(*arguments, own=module.planner_here, **options):
        print("planned by", threading.current_thread().name.split("_")[0], flush=True)
        return own(*arguments, **options)
    module.planner_here = noted
import jax
jax.monitoring.register_event_listener(
    lambda event, **_: "cache_hits" in event and print("found in the cache by", threading.current_thread().name)
)
from aurora_train.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
FEW = ("train.steps=4", "evaluate.final=false", "samples.count=0")


@pytest.fixture
def trained(aurora, tiny, tmp_path):
    """(when, name, overrides) -> (threads that planned, steps in the cache, programs found there by the main thread).

    At first no data is prepared and the cache is empty.
    """

    def run(when: str, name: str, *overrides: str, code: int = 0, resumed: bool = False):
        cache, programs = tmp_path / f"data-{name}", tmp_path / f"programs-{name}"
        environment = aurora.environment() | {"AURORA_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(programs)}
        verb = ["resume", name] if resumed else ["train", str(tiny), "--run", name, *FEW]
        command = [sys.executable, "-c", SCRIPT, when, *verb, *overrides]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stderr
        by = sorted(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("planned by"))
        found = done.stdout.count("found in the cache by MainThread")
        return by, len(list(programs.glob("jit_program-*-cache"))), found, done.stderr

    return run


@pytest.mark.slow
def test_the_step_that_was_compiled_beside_the_data_is_the_one_that_is_run(trained, tmp_path):
    by, steps, found, _ = trained("ahead", "early")
    assert by == ["MainThread", "ahead"] and steps == 1
    by, steps, compiled, _ = trained("plain", "late")
    assert by == ["MainThread"] and steps == 1
    assert found == compiled + 1  # the step; the initialiser is looked up in a thread of its own
    assert final_hash(tmp_path / "early") == final_hash(tmp_path / "late")
    plans = [json.loads((tmp_path / name / "plan.json").read_text())["plan"] for name in ("early", "late")]
    assert all(plans[0][key] == plans[1][key] for key in ("microbatch", "stacks", "predicted_bytes", "compiled_bytes"))
    assert not trained("ahead", "early", "train.steps=6", resumed=True)[0]


@pytest.mark.slow
def test_a_model_that_is_another_with_its_data_is_planned_again(trained, tmp_path):
    """So little text has fewer words than are asked for."""
    by, steps, _, _ = trained("ahead", "early", "data.tokenizer.vocab=9000")
    assert by == ["MainThread", "ahead"] and steps == 2
    assert trained("plain", "late", "data.tokenizer.vocab=9000")[0] == ["MainThread"]
    assert final_hash(tmp_path / "early") == final_hash(tmp_path / "late")


def test_what_goes_wrong_beside_the_data_is_told_once_by_the_one_who_waits(trained):
    by, _, _, told = trained("ahead", "early", "memory.budget=1MB", code=2)
    assert by == ["MainThread", "ahead"]
    assert told.count("no plan fits") == 1 and "Traceback" not in told and "beside the data" not in told
    plain = trained("plain", "late", "memory.budget=1MB", code=2)[3]
    errors = [next(line for line in text.splitlines() if line.startswith("error:")) for text in (told, plain)]
    assert errors[0] == errors[1]
