"""A run that was asked to stop, changed, found finished or found taken: what each call of the command line does."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from kit import Aurora, evaluations, events, final_hash, losses, records

from aurora_train.cli.main import main
from aurora_train.data.order import indices

TRAIN = ["train", "toy.yaml", "--run", "run", "--quiet"]


def started(folder, arguments) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Aurora(folder, Path(os.environ["AURORA_CACHE"])).forked(*arguments, **pipes)


def assert_equal(run, other):
    assert losses(run) == losses(other) and evaluations(run) == evaluations(other)
    assert final_hash(run) == final_hash(other)


@pytest.mark.parametrize("name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.slow) for n in ("SIGINT", "SIGHUP"))])
def test_a_signal_ends_the_run_after_a_saved_step_and_the_same_command_goes_on_to_the_same_end(
    name, here, finished_once, monkeypatch, capsys
):
    monkeypatch.setenv("TOY_SIGNAL", f"take:13:{name}")
    assert main(TRAIN) == 75
    said = capsys.readouterr().out
    monkeypatch.delenv("TOY_SIGNAL")
    run = here / "run"
    (stop,) = events(run, "stop")
    step = stop["step"]
    assert stop["by"] == name and 0 < step < 30 and losses(run)[-1][0] == step
    assert str(step) in os.listdir(run / "checkpoints")
    assert f"stopped by {name} at step {step}" in said
    command = re.search(r"resume with: aurora (resume .+)", said)[1].split()
    assert main([*command, "--quiet"]) == 0
    assert [event["step"] for event in events(run, "resume")] == [step]
    assert_equal(run, finished_once)


def test_a_disk_that_mends_at_the_last_moment_does_not_end_the_run(here, finished_once, monkeypatch):
    from aurora_train.train.saving import Saver

    asked = iter([False] * 12 + [True])  # waited long enough after step 12; and then the save is taken after all
    monkeypatch.setattr(Saver, "overdue", lambda saver: next(asked, False))
    assert main(TRAIN) == 0
    assert_equal(here / "run", finished_once)
    assert next(asked, None) is None


def test_a_signal_whose_exception_was_dropped_is_heeded_at_the_next_chance():
    from aurora_train.train.signals import Stopped, StopRequest

    with StopRequest() as stop:
        with stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            stop.heed()  # between steps the loop looks at the name
            assert stop.name == "SIGTERM"
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.heed()


def test_a_signal_while_preparing_exits_75_before_anything_is_trained(here, monkeypatch, capsys):
    monkeypatch.setenv("TOY_SIGNAL", "prepare:0:SIGTERM")
    assert main(TRAIN) == 75
    assert "the same command starts again" in capsys.readouterr().out
    assert not (here / "run").exists()


def test_a_real_process_stops_at_the_first_signal_and_quits_at_the_second(here):
    process = started(here, [*TRAIN[:-1], "train.steps=1000000", "checkpoint.every=1000000", "evaluate.every=null"])
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGTERM" in out
    saved = [int(name) for name in os.listdir(here / "run" / "checkpoints") if name.isdigit()]
    assert saved == [losses(here / "run")[-1][0]]
    # Stopped by a signal that is held back between two steps, so that the second one finds it waiting.
    process = started(here, ["resume", "run"])
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_minutes_are_kept_and_the_run_goes_on_from_there(here, finished_once, capsys):
    assert main([*TRAIN, "train.stop_after_minutes=1e-9"]) == 75
    assert "train.stop_after_minutes" in capsys.readouterr().out
    assert main(TRAIN) == 0
    assert_equal(here / "run", finished_once)


def test_a_resumed_step_takes_over_the_buffers_of_the_restored_state(finished):
    from aurora_train.config import load_resolved
    from aurora_train.data.batches import read_batch
    from aurora_train.run import Run
    from aurora_train.train.session import open_session

    session = open_session(load_resolved(finished), Run(finished), lambda done, total, what: None)
    compiled, _ = session.compile()
    state = session.restore(20)
    old = jax.tree.leaves(state)
    before = {leaf.unsafe_buffer_pointer() for leaf in old if leaf.size > 1}
    state, _ = compiled(state, jax.device_put(read_batch(session.source, 0, 8, 20)))
    assert all(leaf.is_deleted() for leaf in old)
    after = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size > 1}
    assert len(before & after) > 0.9 * len(before)
    session.store.close()


def test_how_saves_are_made_is_decided_again_once_an_estimated_plan_is_compiled(finished):
    from dataclasses import replace

    from aurora_train.config import load_resolved
    from aurora_train.run import Run
    from aurora_train.train.session import open_session

    session = open_session(load_resolved(finished), Run(finished), lambda done, total, what: None)
    estimated = replace(session.plan, compiled_bytes=None)
    for room, in_place in ((1, True), (10**12, False)):
        session.plan = replace(estimated, beside_copy_bytes=room, saves_in_place=not in_place)
        session.compile()
        assert session.plan.saves_in_place == in_place and session.plan.compiled_bytes > 1
    session.store.close()


def test_a_second_trainer_is_told_who_holds_the_run_and_a_killed_one_leaves_no_lock(here, capsys):
    process = started(here, [*TRAIN[:-1], "train.steps=1000000", "evaluate.every=null"])
    for line in process.stderr:
        if line.startswith("saved step"):
            break
    assert main(["resume", "run"]) == 2
    said = capsys.readouterr().err
    assert f"process {process.pid}" in said and "run" in said and "Traceback" not in said
    assert main([*TRAIN, "train.steps=1000000", "evaluate.every=null", "--fresh"]) == 2
    assert f"process {process.pid}" in capsys.readouterr().err and (here / "run").is_dir()
    process.kill()
    process.communicate()
    last = int(max(os.listdir(here / "run" / "checkpoints"), key=lambda name: int(name) if name.isdigit() else -1))
    assert main(["resume", "run", f"train.steps={last + 1}", "--quiet"]) == 0


# ---- changed, finished, fresh


def test_a_free_key_is_taken_without_a_word_and_a_warned_one_with_a_line_and_an_event(finished, capsys):
    assert main(["resume", "run", "log.every=7", "train.steps=32", "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "changed train.steps: 30 -> 32" in said and "log.every" not in said
    (override,) = events(finished, "override")
    assert ["train.steps", 30, 32, "warned"] in override["changes"]
    assert [step for step, _ in losses(finished)] == list(range(1, 33))


def test_a_finished_run_says_its_score_again_and_touches_nothing(finished, capsys):
    def stamps():
        return {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}

    before = stamps()
    for arguments in (TRAIN, ["resume", "run"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "finished at step 30" in out and "mse" in out
    assert stamps() == before


def test_fresh_keeps_the_old_run_beside_the_new_one(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert main([*TRAIN, "--fresh"]) == 0
    (aside,) = [p for p in finished.parent.glob("run.*") if p.is_dir()]
    assert (aside / "metrics.jsonl").read_bytes() == before and (aside / "checkpoints" / "30").is_dir()
    assert_equal(finished, aside)


def test_an_edited_config_starts_a_run_of_its_own_beside_the_first(here):
    for override in ("train.seed=0", "train.seed=1"):
        short = ["train.steps=1", "evaluate.every=null", "evaluate.final=false", "--quiet"]
        assert main(["train", "toy.yaml", override, *short]) == 0
    assert len(list((here / "runs").glob("toy-????????"))) == 2


def test_a_damaged_newest_checkpoint_is_walked_back_from_out_loud(finished, finished_once, capsys):
    files = (p for p in (finished / "checkpoints" / "30").rglob("*") if p.is_file())
    victim = max(files, key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    lines = (finished / "events.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["event"] != "finish"]
    (finished / "events.jsonl").write_text("\n".join(kept) + "\n")
    assert main(["resume", "run"]) == 0
    assert "checkpoint 30 is damaged" in capsys.readouterr().err
    (event,) = events(finished, "walk_back")
    assert event["step"] == 30 and os.path.isdir(event["moved_to"])
    assert_equal(finished, finished_once)
    assert (finished / "metrics.set-aside.jsonl").is_file()


def test_steps_that_are_not_finite_are_skipped_counted_and_on_record(here, capsys):
    bad = 17
    assert main([*TRAIN[:-1], f"data.bad={bad}", "train.steps=12", "evaluate.every=null"]) == 0
    hit = [step + 1 for step in range(12) if bad in indices(0, step, 8, 50)]
    assert hit and [event["step"] for event in events(here / "run", "skip")] == hit
    assert [r["step"] for r in records(here / "run") if r.get("skipped")] == hit
    assert "not applied" in capsys.readouterr().err


# ---- starting from another run's parameters


def parameters(run, step):
    from aurora_train import load

    model = load(run, step).model
    return np.asarray(model.head[...])


def test_a_run_starts_from_another_ones_averaged_parameters(finished, here):
    from aurora_train.config import load
    from aurora_train.run import Run
    from aurora_train.train.session import open_session

    config = load("toy.yaml", [f"init.from={finished}", "train.seed=3"])
    session = open_session(config, Run(here / "other"), lambda done, total, what: None)
    state = session.fresh()
    np.testing.assert_array_equal(state.params["head"], parameters(finished, 30))
    np.testing.assert_array_equal(state.extra["ema"]["head"], state.params["head"])
    assert int(state.step) == 0
    session.store.close()


def test_parameters_of_another_shape_are_refused_in_one_message_that_names_them(finished, capsys):
    arguments = ["train", "toy.yaml", f"init.from={finished}", "model.width=24", "--run", "other", "--quiet"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "embedding" in said and "[8, 16] stored" in said and "[8, 24] wanted" in said and "Traceback" not in said
    assert not (finished.parent / "other" / "checkpoints" / "1").exists()


def test_a_safetensors_file_is_a_start_too(finished, here):
    from safetensors.numpy import save_file

    from aurora_train.checkpoint import layout
    from aurora_train.config import load
    from aurora_train.run import Run
    from aurora_train.train.session import open_session

    def opened(path):
        config = load("toy.yaml", [f"init.from={path}"] if path else [])
        return open_session(config, Run(here / "other"), lambda done, total, what: None)

    drawn = opened(None).fresh().params
    tensors = {name: np.ascontiguousarray(array) * 2 for name, array in layout.snapshot(drawn).items()}
    save_file(tensors, here / "start.safetensors")
    again = layout.snapshot(opened("start.safetensors").fresh().params)
    assert again.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(again[name], tensors[name])


def test_the_run_folder_keeps_the_recipe_so_that_it_can_be_resumed_without_its_config(finished, here):
    (here / "toy.yaml").unlink()
    (here / "toy.py").unlink()
    moved = shutil.move(finished, here / "moved")
    assert main(["resume", str(moved), "train.steps=31", "--quiet"]) == 0
