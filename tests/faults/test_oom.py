"""Memory runs out under a run: it goes on with a smaller plan, or ends in one message that says what to do.

The kernel refuses the memory (RLIMIT_AS), in a process of its own. The limit leaves room for the smaller plan and not
for the first one, beside whatever the process holds at that moment; while a plan is searched for it is lifted, because
what XLA takes to compile is not what is tried here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from kit import Aurora, events, final_hash, losses

from aurora_train.cli.main import main
from aurora_train.plan.plan import Plan
from aurora_train.train import oom
from aurora_train.train.evaluate import Evaluator
from aurora_train.train.session import Session

# Keeps everything and unrolls by itself: some 960 MB by the compiler's account, and the next smaller plan 810 MB.
BIG = """
recipe: language_model
model: {{width: 64, layers: 6, heads: 4, dropout: 0.1}}
data:
  {{source: {corpus}, tokenizer: {{kind: bpe, vocab: 300}}, sequence: 256, holdout_test: 0.1, holdout_validation: 0.1}}
train: {{steps: 8, batch: 72}}
memory: {{accumulation: 1}}
optimizer: {{lr: 1e-3, schedule: {{name: constant}}}}
checkpoint: {{every: 4, keep: 9}}
evaluate: {{examples: 8, final: false}}
log: {{every: 1}}
"""
# Bytes of address space between the two plans: clearly too little for the first one, then the most it is still too
# little for, because threads and the allocator take some beside the plan.
ROOM, ROOM_LATER = 885_000_000, 945_000_000

# The command line in a process that may grow by `room` once `after` steps are on record, and by `later` in each life
# after that; with `after` 0, by `room` from before the first step of its first life to that life's end.
LIMITED = '''
import contextlib, json, re, resource, sys, time

import jax

from aurora_train.cli.main import main
from aurora_train.record import metrics as logs
from aurora_train.train import start

(after, room, later), told = map(int, sys.argv[1:4]), sys.argv[4]
idle, live, replanned = None, [], start.replanned

def address_space():
    return int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def limit(number):
    resource.setrlimit(resource.RLIMIT_AS, (number, resource.RLIM_INFINITY))

class Limiting(logs.MetricsLog):
    """Opened once in each life, when the state is in place."""

    def __init__(self, *arguments):
        global idle
        super().__init__(*arguments)
        live.append(sum(array.nbytes for array in jax.live_arrays()))
        with open(told, "w") as file:
            json.dump(live, file)
        idle = address_space()
        if (len(live) > 1) == (after > 0):  # the first step of a process takes more than a plan knows of
            limit(idle + (later if after else room))

    def write(self, record):
        super().write(record)
        if record["step"] == after and len(live) == 1 and "loss" in record:
            given_back()  # the next step is under way
            limit(address_space() + room)

def given_back():
    while address_space() > idle + 400_000_000:
        time.sleep(0.002)

def compiled_to_run_one_at_a_time(session, **how):
    # XLA:CPU gives a step's temporaries back in a thread of its own, now and then after the next step has begun: the
    # smaller plan would need room for two. The loop reports a step that was refused memory.
    step, seconds = compiled(session, **how)

    def one_at_a_time(state, batch):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready(state)
        given_back()
        return step(state, batch)

    return one_at_a_time, seconds

def unlimited(*arguments):
    limit(resource.RLIM_INFINITY)
    return replanned(*arguments)

compiled, start.Session.compile = start.Session.compile, compiled_to_run_one_at_a_time
logs.MetricsLog, start.replanned = Limiting, unlimited
sys.exit(main(sys.argv[5:]))
'''


@pytest.fixture(scope="module")
def big(tmp_path_factory, corpus) -> Aurora:
    """A folder with the config, the limiting script, and `plain`: a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("oom")
    (folder / "big.yaml").write_text(BIG.format(corpus=corpus))
    (folder / "limited.py").write_text(LIMITED)
    aurora = Aurora(folder, folder / "cache")
    aurora.good("train", "big.yaml", "--run", "plain")
    return aurora


def limited(aurora: Aurora, after: int, *arguments) -> tuple[subprocess.CompletedProcess, list[int]]:
    """(the ended process, bytes of the live arrays when each of its lives had its state in place)."""
    command = [sys.executable, "limited.py", after, ROOM, ROOM_LATER, "live.json", *arguments]
    result = subprocess.run(
        list(map(str, command)), cwd=aurora.folder, env={**aurora.environment(), "MALLOC_ARENA_MAX": "2"},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600,
    )  # fmt: skip
    return result, json.loads((aurora.folder / "live.json").read_text())


def pinned(run: Path) -> Plan:
    return Plan.from_json(json.loads((run / "plan.json").read_text())["plan"])


def work(run: Path) -> dict:
    """What the pinned plan tells the device to do, as an event has it."""
    return json.loads(json.dumps(pinned(run).work))


def moved_over(aurora: Aurora, name: str, step: int, plan: Path) -> Path:
    """The undisturbed run taken back to `step` and given another run's plan, then resumed to its end."""
    run = aurora.folder / name
    shutil.copytree(aurora.folder / "plain", run)
    for folder in (run / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    (run / "checkpoints" / "index.json").unlink()  # else they are missed
    (run / "events.jsonl").unlink()
    shutil.copyfile(plan, run / "plan.json")
    aurora.good("resume", name)
    return run


@pytest.mark.release  # the limit must fall between two plans, which other work on the machine can spoil
@pytest.mark.parametrize(("after", "restored"), [(5, 4), (0, 0)])
def test_a_refused_step_goes_on_under_a_smaller_plan_as_a_run_that_was_moved_to_it(big, after, restored):
    name = f"refused-{after}"
    result, live = limited(big, after, "train", "big.yaml", "--run", name)
    assert result.returncode == 0, result.stderr[-3000:]
    run, plain = big.folder / name, big.folder / "plain"

    replan, *more = events(run, "replan")
    assert not more, more
    assert replan["reason"] == "out of memory" and replan["restored"] == replan["step"] == restored
    assert "RESOURCE_EXHAUSTED" in replan["cause"] and replan["live"]["anonymous"] > 0
    assert replan["before"] == work(plain) and replan["after"] == work(run) != replan["before"]
    failed = int(replan["doing"].removeprefix("step "))
    assert failed in (after + 1, after + 2)  # one may have been under way when the limit came
    for said in ("out of memory in step", "the plan: compiled", "live:", "most of the plan:", "a new plan"):
        assert said in result.stderr
    assert live[1] < 1.01 * live[0]  # nothing of the dead state is kept

    assert [step for step, _ in losses(run)] == list(range(1, 9))
    set_aside = run / "metrics.set-aside.jsonl"
    undone = [json.loads(line)["step"] for line in set_aside.read_text().splitlines()] if set_aside.exists() else []
    assert undone == list(range(restored + 1, failed))

    control = moved_over(big, f"control-{after}", restored, run / "plan.json")
    assert final_hash(run) == final_hash(control)
    assert losses(run) == losses(control)
    np.testing.assert_allclose([x for _, x in losses(run)], [x for _, x in losses(plain)], rtol=1e-5)

    plan = pinned(run)
    assert plan.compiled_bytes < ROOM < ROOM_LATER < pinned(plain).compiled_bytes
    assert 0.5 < plan.measured_bytes / plan.compiled_bytes < 2
    assert f"measured {plan.measured_bytes / 1e6:.0f} MB" in result.stderr


@pytest.mark.release
def test_a_run_told_to_stop_says_what_was_live_and_what_would_go_on(big):
    arguments = ("train", "big.yaml", "memory.on_oom=stop", "--run", "stopped", "--quiet")
    result, _ = limited(big, 0, *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for said in ("out of memory in step 1", "the plan: compiled 9", "aurora resume", "memory.on_oom=replan"):
        assert said in result.stderr, result.stderr
    assert work(big.folder / "stopped") == work(big.folder / "plain")


# ---- where a real limit would not meet the moment: the error that XLA raises, raised in its place


@pytest.fixture
def here(tmp_path, monkeypatch, shared_cache) -> Path:
    (tmp_path / "toy.py").write_text(toy.RECIPE)
    (tmp_path / "toy.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    return tmp_path


SMALL = """
recipe: toy.py
train: {steps: 6, batch: 8}
optimizer: {lr: 1e-2, schedule: {name: constant}}
checkpoint: {every: 2}
evaluate: {every: 2, examples: 8, final: false}
"""
TRAIN = ["train", "toy.yaml", "--run", "run", "--quiet"]


def refuse(*_arguments, **_options):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")


@pytest.mark.slow
def test_three_replans_without_a_finished_step_are_the_last_and_each_was_for_less(here, monkeypatch, capsys):
    monkeypatch.setattr(Session, "compile", refuse)
    assert main([*TRAIN, "model.layers=8", "train.batch=512"]) == 2
    said = capsys.readouterr().err
    assert "out of memory in compiling" in said and "Traceback" not in said
    replans = events(here / "run", "replan")
    assert 1 <= len(replans) <= oom.REPLANS
    assert "smaller plans in a row" in said or "no plan needs clearly less" in said
    for one, next_one in zip(replans, replans[1:], strict=False):
        assert one["after"] == next_one["before"]
    assert replans[-1]["after"] == work(here / "run")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main([*TRAIN, "model.layers=8", "train.batch=512"]) == 0  # the plan that was pinned last is gone on with
    assert work(here / "run") == replans[-1]["after"]


def test_what_the_user_set_is_kept_and_said(here, monkeypatch, capsys):
    monkeypatch.setattr(Session, "compile", refuse)
    assert main([*TRAIN, "memory.save=nothing"]) == 2
    said = capsys.readouterr().err
    assert "a setting is never overridden" in said and "memory.save=auto memory.unroll=auto" in said
    assert not (here / "run").exists(), "a start that fails before its first step leaves nothing"


@pytest.mark.slow
def test_an_evaluation_that_is_refused_memory_is_not_replanned_and_loses_no_checkpoint(here, monkeypatch, capsys):
    monkeypatch.setattr(Evaluator, "loss", refuse)
    assert main(TRAIN) == 2
    said = capsys.readouterr().err
    assert "out of memory while evaluating step 2" in said and "memory.accumulation" in said and "Traceback" not in said
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(TRAIN) == 0
    assert events(here / "run", "resume")[0]["step"] == 2


def test_a_save_that_is_refused_memory_is_one_message(here, monkeypatch, capsys):
    from aurora_train.checkpoint import layout

    def refuse(*_arguments):
        raise MemoryError

    monkeypatch.setattr(layout, "snapshot", refuse)
    assert main(TRAIN) == 2
    said = capsys.readouterr().err
    assert "out of memory while saving step 2" in said and "memory of the host" in said and "Traceback" not in said


@pytest.mark.slow
def test_replan_drops_the_pinned_plan_and_says_so_in_an_event(here, capsys):
    assert main([*TRAIN, "memory.accumulation=2", "train.steps=2"]) == 0
    run = here / "run"
    known = json.loads((run / "plan.json").read_text())
    assert known["plan"]["measured_bytes"] is None or known["plan"]["measured_bytes"] > 0
    made = work(run)
    (stack,) = known["plan"]["stacks"]
    known["plan"]["stacks"][stack] = [{**known["plan"]["stacks"][stack][0], "save": [], "unroll": False}]
    (run / "plan.json").write_text(json.dumps(known))
    planted = work(run)
    assert main(["resume", "run", "train.steps=4", "--quiet"]) == 0
    assert not events(run, "replan") and work(run) == planted
    assert main(["resume", "run", "train.steps=6", "--quiet", "--replan"]) == 0
    (replan,) = events(run, "replan")
    assert (replan["reason"], replan["before"], replan["after"]) == ("--replan", planted, made)
    assert replan["restored"] == 4 and work(run) == made


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: donated"), False),
        (ValueError("RESOURCE_EXHAUSTED"), False),
    ],
)
def test_only_a_refused_allocation_is_out_of_memory(error, is_one):
    assert oom.is_out_of_memory(error) == is_one


def test_what_was_live_stands_beside_the_plan_with_its_biggest_causes_first():
    causes = {"parameters": 10, "saved": 400 * 10**6, "workspace": 50 * 10**6, "batch": 2, "frozen": 20, "average": 1}
    plan = Plan(4, 1, predicted_bytes=460 * 10**6, compiled_bytes=470 * 10**6, details={"by_cause": causes})
    live = {"in_use": 90 * 10**9, "peak": 95 * 10**9, "limit": 96 * 10**9}
    lines = oom.fault_lines(oom.Fault("step 3", "RESOURCE_EXHAUSTED: no", live), plan)
    assert lines[0] == "RESOURCE_EXHAUSTED: no"
    assert "compiled 470 MB, predicted 460 MB" in lines[1]
    assert "in use 90" in lines[2] and "limit 96" in lines[2]
    assert lines[3].index("saved activations") < lines[3].index("workspace") and "average" not in lines[3]
