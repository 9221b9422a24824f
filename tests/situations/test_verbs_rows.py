"""Rows of what a newcomer and other trainers' reports found: what a run says, keeps, leaves behind and is shown by."""

import contextlib
import io
import json
import struct
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import toy
from rich.console import Console
from tools.test_report import Page

from aurora_train.cli.main import main
from aurora_train.config import load, load_resolved
from aurora_train.machine.targets import find_machine
from aurora_train.plan import report
from aurora_train.plan.plan import Plan
from aurora_train.recipe import few
from aurora_train.record import metrics as logs
from aurora_train.run import Run
from aurora_train.score import _depends_on
from aurora_train.tools import report_plan
from aurora_train.tools.recorded import Recorded
from aurora_train.train.start import sinks
from neural.spikes import Trials
from neural.velocity import velocity_plots

SCORE = '''        return {
            "mse": float(np.square(predict(batch) - batch["y"]).mean()),
            "plots": [{"title": "One <row>", "x_label": "place", "y_label": "value",
                       "series": {"true": ([1, 2, 3], [0.5, None, 1.5]), "guessed": ([1, 2, 3], [0.25, 0.5, 1.0])}}],
            "remarks": few(3, "row", "make more rows"),
        }

    def baselines(self, workdir, progress):
        with open("counted", "a") as file:
            file.write("x")
        return {"zero": 1.0, "tables": [{"title": "Rivals", "columns": ["name"], "rows": [["zero"]] * 13}], "notes": []}
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_cache):
    """The folder of a toy run of 25 steps with plots, remarks and baselines, and what was printed while it trained."""
    folder = tmp_path_factory.mktemp("rows")
    toy.write(folder)
    text = (folder / "toy.py").read_text()
    start = text.index('        return {"mse"')
    text = text[:start] + SCORE + text[text.index("\n", start) + 1 :]
    (folder / "toy.py").write_text(text.replace("import Loss", "import Loss, few"))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AURORA_CACHE", str(shared_cache))
        patch.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(["train", "toy.yaml", "--run", "run", "train.steps=25"]) == 0
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture
def run(trained, shared_cache, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    monkeypatch.chdir(trained[0])
    return trained[0] / "run"


# ---- what is printed


def test_L1_memory_figures_that_mean_nothing_on_a_small_cpu_run_are_left_out(trained, run):
    _, _, err = trained
    assert "memory:" not in err and "plan:" not in err and " MB" not in err and "MFU" not in err
    plan = Plan(1, 1, platform="cpu", predicted_bytes=2 * 10**9, compiled_bytes=3 * 10**9, measured_bytes=10**8)
    assert report.side_by_side(plan) == "memory: predicted 2.0 GB, compiled 3.0 GB (+50.0 %)"
    assert report.says_something(plan) and report.says_something(Plan(1, 1, platform="gpu", predicted_bytes=5))
    assert not report.says_something(Plan(1, 1, platform="cpu", predicted_bytes=10**6, measured_bytes=10**8))
    memory = (run / "report.html").read_text().split("<h2>Memory</h2>")[1]
    assert "compiled" in memory and "measured</td>" not in memory


def test_L4_numbers_are_in_units_that_fit_and_parameters_are_counted(trained):
    _, _, err = trained
    assert "3,520 parameters, float32, 1 x cpu\n" in err
    assert "targets/s" in err and "tok/s" not in err and "MiB" not in err


def test_L5_the_log_has_epochs_precision_and_what_is_held_out_and_no_internals(trained, run):
    _, _, err = trained
    assert "50 training examples: 4 epochs in 25 steps of 8; held out: 40 examples for validation\n" in err
    assert "operations" not in err and "attention:" not in err
    forms = json.loads((run / "plan.json").read_text())["plan"]["details"]["forms"]
    assert forms == "cpu"  # the plan has them, and the report of it
    assert "<td>forms</td><td>cpu</td>" in (run / "report.html").read_text()


@pytest.mark.parametrize("number,said", [(1, "the score rests on 1 document of 3.7 kB: raise data.holdout_test"),
                                         (29, "the score rests on 29 documents of 3.7 kB: raise data.holdout_test"),
                                         (30, None)])  # fmt: skip
def test_M4_a_score_that_rests_on_little_says_so(number, said):
    assert few(number, "document", "raise data.holdout_test", "3.7 kB") == ([said] if said else [])


def test_M4_remarks_of_a_score_are_printed_kept_and_in_the_report(trained, run):
    _, out, _ = trained
    assert "note: the score rests on 3 rows: make more rows\n" in out
    assert json.loads((run / "scores.json").read_text())["remarks"] == ["the score rests on 3 rows: make more rows"]
    assert "the score rests on 3 rows" in (run / "report.html").read_text()


# ---- the report


def test_L7_the_report_has_curves_first_a_smoothed_loss_what_the_score_drew_and_no_empty_samples(trained, run):
    text = (run / "report.html").read_text()
    page = Page(text)
    titles = [title for title in page.texts if title in ("Training", "Score", "What it did", "Samples", "Memory")]
    assert titles == ["Training", "Score", "What it did", "Memory"]
    assert "training loss, mean of the last 10 steps" in page.texts and "One <row>" in page.texts
    assert "13 rows" in page.texts
    held = Recorded.of(Run(run))
    assert held.recent_loss()[0] == pytest.approx(np.mean([record["loss"] for record in held.steps[-10:]]))
    assert replace(held, steps=[{"loss": float("nan")}]).recent_loss() is None


def test_L7_the_neural_score_draws_the_decoded_beside_the_true_velocity_of_whole_trials():
    velocity = np.arange(24.0).reshape(12, 2)
    velocity[3] = np.nan
    trials = Trials(np.zeros((12, 1), np.uint16), velocity, np.array([0, 5, 9, 12]), np.arange(3), "x", 0.02, "cm/s")
    first, second = velocity_plots(trials, velocity + 0.5, most_bins=10)
    times, true = first["series"]["true"]
    assert len(times) == len(true) == 9 and times[:2] == [0.0, 0.02]  # two whole trials
    assert true[:5] == [0.0, 2.0, 4.0, None, 8.0] and second["series"]["decoded"][1][0] == 1.5
    assert first["y_label"] == "cm/s" and "Velocity x" in first["title"]
    assert len(velocity_plots(trials, velocity, most_bins=2)[0]["series"]["true"][0]) == 5  # one trial at least


# ---- verbs on a finished run


def test_L2_baselines_are_kept_where_nothing_changed_and_made_anew_where_something_did(trained, run, capsys):
    folder, *_ = trained

    def evaluated(*options) -> tuple[str, int]:
        (folder / "counted").write_text("")
        assert main(["evaluate", "run", "--quiet", *options]) == 0
        return capsys.readouterr().out, len((folder / "counted").read_text())

    before = json.loads((run / "scores.json").read_text())["baselines_made"]
    out, made = evaluated()
    since = before["time"][:16].replace("T", " ")
    assert made == 0 and f"baselines: kept from {since} UTC" in out and "zero 1.0" in out
    record = json.loads((run / "scores.json").read_text())
    assert record["baselines"] == {"zero": 1.0} and record["baselines_made"] == before | {"kept": True}
    assert evaluated("--baselines")[1] == 1  # asked for
    (run / "work" / "left-by-the-score").write_text("other")
    out, made = evaluated()
    assert made == 1 and "kept" not in out
    changed = load_resolved(run), load_resolved(run, ["evaluate.examples=8"])
    recipe = changed[0].recipe_class(changed[0], run)
    keys = {_depends_on(recipe, config, Run(run), step) for config in changed for step in (20, 25)}
    assert len(keys) == 4 and _depends_on(recipe, changed[0], Run(run), 25) in keys


def test_L8_a_resume_of_a_finished_run_says_that_nothing_is_left_to_do(run, capsys):
    before = (run / "events.jsonl").read_bytes()
    assert main(["resume", "run", "optimizer.lr=1e-3", "log.every=5"]) == 0
    err = capsys.readouterr().err
    assert "this run is finished, so these keys were not changed: optimizer.lr, log.every" in err
    assert "changes the run from here on" not in err and "train.steps=N" in err
    assert (run / "events.jsonl").read_bytes() == before


# ---- failed starts


def test_M10_a_start_that_is_refused_leaves_no_folder_and_one_that_was_there_stays(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    toy.write(tmp_path)
    refused = ["train", "toy.yaml", "data.rows=0", "--quiet"]
    assert main(refused) == 2 and "the training split has no example" in capsys.readouterr().err
    assert main([*refused, "--run", "deep/er/run"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"toy.py", "toy.yaml"}
    (tmp_path / "mine" / "run").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    assert main([*refused, "--run", "mine/run"]) == 2 and main(refused) == 2
    assert (tmp_path / "mine" / "run").is_dir() and list((tmp_path / "runs").iterdir()) == []


def test_M10_a_crash_before_the_first_step_leaves_nothing_and_one_after_it_everything(tmp_path):
    for fault in (ValueError, KeyboardInterrupt, SystemExit):
        run = Run(tmp_path / "runs" / "a")
        with pytest.raises(fault), run.lock():
            (run.folder / "config.yaml").touch()
            run.metrics.touch()  # opened, nothing written
            raise fault
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError), run.lock():
        run.metrics.write_text('{"step": 1}\n')
        raise ValueError
    assert run.metrics.exists()
    with pytest.raises(ValueError), run.lock():  # a later life of it that fails at once
        raise ValueError
    assert run.metrics.exists() and not run.is_held()


def test_M10_a_lock_file_that_was_removed_with_its_folder_keeps_nobody_out(tmp_path):
    run = Run(tmp_path / "runs" / "a")
    with run.lock():
        pass
    assert not (tmp_path / "runs").exists()  # nothing came of it
    with run.lock():
        (run.folder / "config.yaml").touch()
        assert run.is_held()
    assert run.config.exists() and not run.is_held()


# ---- viewers


def tensorboard_events(folder):
    """(step, tag or "START", file) of every event in a folder of TensorBoard files, in the order TensorBoard reads."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted(folder.glob("*.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found.append((event.step, "START", path.name))
            found += [(event.step, value.tag, path.name) for value in event.summary.value]
    return found


@pytest.mark.parametrize("goes_on_after", [0, 2])
def test_R14_tensorboard_shows_each_step_once_after_a_restart(tmp_path, goes_on_after):
    pytest.importorskip("tensorboardX")
    toy.write(tmp_path)
    config, run = load(tmp_path / "toy.yaml", ["log.sinks=[tensorboard]"]), Run(tmp_path / "run")
    for first, last in ((1, 5), (goes_on_after + 1, 7)):  # killed at step 5; both lives begin within one second
        (sink,) = sinks(config, run, first - 1)
        for step in range(first, last + 1):
            sink.write({"step": step, "loss": 1.0})
        sink.close()
    shown = []
    for step, tag, _ in tensorboard_events(run.folder / "tensorboard"):
        if tag == "START":  # TensorBoard forgets what it has from that step on
            shown = [one for one in shown if one < step]
        else:
            shown.append(step)
    assert shown == list(range(1, 8))
    assert len({name for *_, name in tensorboard_events(run.folder / "tensorboard")}) == 2


def test_R15_every_life_of_a_run_is_one_wandb_run(tmp_path, monkeypatch):
    calls = []
    stub = types.SimpleNamespace(init=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    toy.write(tmp_path)
    config = load(tmp_path / "toy.yaml", ["log.sinks=[wandb]"])
    for name in ("run", "run", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        sinks(config, Run(tmp_path / name), 0)
    first, second, other = calls
    assert first["id"] == second["id"] != other["id"] and {call["resume"] for call in calls} == {"allow"}
    assert first["mode"] == "offline" and first["dir"] == str(tmp_path / "run")


@pytest.mark.slow
def test_R15_the_real_wandb_keeps_both_lives_under_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for life in (1, 4):
        sink = logs.WandbSink(tmp_path, tmp_path / "wandb.id", "toy", {})
        sink.write({"step": life, "loss": 1.0})
        sink.close()
    identity = (tmp_path / "wandb.id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert files and not [path for path in (tmp_path / "wandb").glob("*/run-*.wandb") if path not in files]


# ---- plans


def test_M8_bfloat16_is_the_first_lever_of_a_float32_plan_for_a_gpu(run, capsys):
    asked = ["plan", "toy.yaml", "--machine", "dgx-spark", "--no-compile", "--json"]
    assert main([*asked, "train.precision=float32"]) == 0
    first = json.loads(capsys.readouterr().out)["levers"][0]
    assert first["setting"] == "train.precision=bfloat16" and first["saves_bytes"] > 0 and first["faster"] > 1
    plan = Plan(1, 1, platform="gpu", predicted_bytes=10**9, details={"levers": [first]})
    console = Console(file=io.StringIO(), width=200)
    report_plan.show(plan, console)
    assert "bfloat16 compute, products 4 x as fast" in console.file.getvalue()


def test_L3_a_plan_says_in_plain_words_what_its_budget_is_and_what_its_time_leaves_out():
    assert find_machine("dgx-spark").budget_reason == (
        "CUDA can allocate about 110 GB of the memory that it shares with the processor, of which 7.52 GB are left for "
        "Python, the data and the page cache"
    )
    time = {"steps": 600, "seconds": 1.6, "step_seconds": 0.0027, "rates": "assumed"}
    last = report_plan.time_lines(Plan(1, 1, platform="gpu", details={"time": time}))[-1]
    assert last.startswith("not included: the time to launch each kernel, which is most of a step this short; saves")
    long = report_plan.time_lines(Plan(1, 1, platform="gpu", details={"time": time | {"step_seconds": 2.0}}))[-1]
    assert long == "not included: the time to launch each kernel; saves and evaluations"
    assert "kernel" not in report_plan.time_lines(Plan(1, 1, platform="cpu", details={"time": time}))[-1]
