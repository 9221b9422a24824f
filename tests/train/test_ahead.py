"""A step compiled while the data is prepared: it is what is run, where it still is the step; else nothing is lost."""

import json
import subprocess
import sys

import pytest
from harness import final_hash

# As on a machine with more cores and more data: which thread planned is told, and everything else is as it is.
SCRIPT = """
import os, sys, threading
from aurora_train.train import ahead, session
ahead._CORES, ahead._LONG = (0, 0.0) if sys.argv[1] == "ahead" else (10**6, 0.0)
for module in (ahead, session):
    def noted(*arguments, own=module.planner_here, **options):
        print("planned by", threading.current_thread().name.split("_")[0], flush=True)
        return own(*arguments, **options)
    module.planner_here = noted
from aurora_train.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
FEW = ("train.steps=4", "evaluate.final=false", "samples.count=0")


@pytest.fixture
def trained(aurora, tiny, tmp_path):
    """(when, name, overrides) -> (threads that planned, compiled steps, the process). At first no data is prepared."""

    def run(when: str, name: str, *overrides: str, code: int = 0, resumed: bool = False):
        cache, programs = tmp_path / f"data-{name}", tmp_path / f"programs-{name}"
        environment = aurora.environment() | {"AURORA_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(programs)}
        verb = ["resume", name] if resumed else ["train", str(tiny), "--run", name, *FEW]
        command = [sys.executable, "-c", SCRIPT, when, *verb, *overrides]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stderr
        by = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("planned by")]
        return by, len(list(programs.glob("jit_program-*-cache"))), done

    return run


def test_the_step_that_was_compiled_beside_the_data_is_the_one_that_is_run(trained, tmp_path):
    by, steps, _ = trained("ahead", "early")
    assert by == ["ahead"] and steps == 1
    by, steps, _ = trained("plain", "late")
    assert by == ["MainThread"] and steps == 1
    assert final_hash(tmp_path / "early") == final_hash(tmp_path / "late")
    plans = [json.loads((tmp_path / name / "plan.json").read_text())["plan"] for name in ("early", "late")]
    assert all(plans[0][key] == plans[1][key] for key in ("microbatch", "stacks", "predicted_bytes", "compiled_bytes"))
    by, steps, _ = trained("ahead", "early", "train.steps=6", resumed=True)
    assert not by and steps == 1


@pytest.mark.slow
def test_a_model_that_is_another_with_its_data_is_planned_again(trained, tmp_path):
    """So little text has fewer words than are asked for."""
    by, steps, _ = trained("ahead", "early", "data.tokenizer.vocab=9000")
    assert by == ["ahead", "MainThread"] and steps == 2
    by, _, _ = trained("plain", "late", "data.tokenizer.vocab=9000")
    assert by == ["MainThread"]
    assert final_hash(tmp_path / "early") == final_hash(tmp_path / "late")


def test_what_goes_wrong_beside_the_data_is_told_once_by_the_one_who_waits(trained):
    _, _, done = trained("ahead", "early", "memory.budget=1MB", code=2)
    assert done.stderr.count("no plan fits") == 1 and "Traceback" not in done.stderr
    _, _, plain = trained("plain", "late", "memory.budget=1MB", code=2)
    errors = [next(line for line in d.stderr.splitlines() if line.startswith("error:")) for d in (done, plain)]
    assert errors[0] == errors[1]
