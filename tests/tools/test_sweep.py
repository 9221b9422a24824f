"""`aurora sweep`: every combination in turn, checked before the first, gone on with after whatever ended it."""

import json
import os
import shutil
import signal

import pytest
import toy
from kit import events
from tools.folders import make

from aurora_train.cli.main import main
from aurora_train.errors import UserError
from aurora_train.tools.runs import described
from aurora_train.tools.sweep import Member, Result, Sweep, members, ranked, split_values


@pytest.fixture
def here(tmp_path, monkeypatch):
    toy.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text,parts", [
    ("1e-3,1e-2", ["1e-3", "1e-2"]), ("[1,2],[3]", ["[1,2]", "[3]"]), ("{a: [1,2], b: 3}", ["{a: [1,2], b: 3}"]),
    ("'a,b',c", ["'a,b'", "c"]), ("1", ["1"]), ("", [""]), ("1,", ["1", ""]), ("null, 0.5", ["null", "0.5"]),
])  # fmt: skip
def test_values_are_split_at_commas_outside_brackets_and_quotes(text, parts):
    assert split_values(text) == parts


def test_every_combination_has_a_folder_that_names_it(here):
    made = members("toy.yaml", ["optimizer.lr=1e-3,1e-2", "train.steps=20", "train.seed=0,1"])
    assert [member.values for member in made] == [
        {"optimizer.lr": lr, "train.seed": seed} for lr in ("1e-3", "1e-2") for seed in ("0", "1")
    ]
    assert {member.config.train.steps for member in made} == {20} and made[3].config.optimizer.lr == 0.01
    names = [str(member.folder) for member in made]
    assert names[0].startswith("runs/toy-sweep/lr=1e-3,seed=0-") and len(set(names)) == 4
    # Another length is another run: it lands beside, as with `aurora train`.
    others = members("toy.yaml", ["optimizer.lr=1e-3,1e-2", "train.seed=0,1"], "S")
    assert not {member.folder.name for member in others} & {member.folder.name for member in made}
    twins = members("toy.yaml", ["model.width=8,16", "data.bad=null,3"])
    assert twins[0].folder.name.startswith("width=8,bad=null-")


@pytest.mark.parametrize("overrides,said", [
    (["optimizer.lr=1e-3"], "nothing to sweep"),
    (["optimizer.lr=1e-3,"], "an empty value"),
    (["optimizer.lr=1e-3,0.001"], "are the same config"),
    (["optimizer.lr=1,2", "optimizer.lr=3"], "given twice"),
    (["optimizer.lr=1e-3,x", "train.batch=8,7"], "3 of 4 combinations cannot start; none was started"),
    (["optimizer.rl=1e-3,1e-2"], "2 of 2 combinations cannot start"),
])  # fmt: skip
def test_what_is_wrong_with_any_combination_is_said_before_the_first_starts(here, overrides, said):
    with pytest.raises(UserError, match=said) as fault:
        members("toy.yaml", overrides)
    if "train.batch" in str(overrides):
        told = str(fault.value)
        assert 'must be a number; got "x"' in told and "a batch of 7 does not divide" in told
    assert not (here / "runs").exists()


def test_a_sweep_is_not_put_into_a_run(here):
    make(here / "run")
    with pytest.raises(UserError, match="this is a run"):
        members("toy.yaml", ["optimizer.lr=1e-3,1e-2"], "run")


def test_M10_a_sweep_whose_runs_are_finished_trains_nothing_and_shows_them_best_first(here, capsys):
    made = members("toy.yaml", ["optimizer.lr=1e-3,1e-2"])
    for member, score in zip(made, (0.5, 0.25), strict=True):
        make(here / member.folder, lr=member.config.optimizer.lr, score=("mse", score))
    assert main(["sweep", "toy.yaml", "optimizer.lr=1e-3,1e-2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [run["values"] for run in record["runs"]] == [{"optimizer.lr": "1e-2"}, {"optimizer.lr": "1e-3"}]
    assert record["sorted_by"] == "mse (less is better)" and record["stopped_by"] is None
    assert main(["sweep", "toy.yaml", "optimizer.lr=1e-3,1e-2"]) == 0
    assert "sorted by mse" in capsys.readouterr().out


def test_a_run_that_exceeds_a_limit_is_finished_as_it_is_for_the_next_sweep(here, monkeypatch):
    made = members("toy.yaml", ["optimizer.lr=1e-3,1e-2"])

    def trained(sweep, member):
        make(here / member.folder, lr=member.config.optimizer.lr, score=("mse", 0.5))
        return (4 if member is made[0] else 0), ["limit exceeded: mse is 0.5"]

    monkeypatch.setattr(Sweep, "_train", trained)
    for _ in range(2):
        results = Sweep("toy.yaml", made, print).run()
        assert [result.why for result in results] == ["", ""]
        assert [result.row.state for result in results] == ["finished", "finished"]


@pytest.mark.parametrize("better,order", [("max", "ba-c"), ("min", "ab-c"), (None, "ba-c")])
def test_the_order_follows_the_score_where_its_direction_is_known_else_the_validation_loss(here, better, order):
    results = []
    for name, score, lr, done in (("a", 0.2, 0.2, 30), ("b", 0.7, 0.1, 30), ("-", float("nan"), float("nan"), 30),
                                  ("c", 0.1, 0.01, 20)):  # fmt: skip
        folder = make(here / name, score=("mse", score), lr=lr, done=done)
        record = json.loads((folder / "scores.json").read_text())
        (folder / "scores.json").write_text(json.dumps({**record, "better": better}))
        results.append(Result(Member({"k": name}, [], None, folder), described(folder, name)[0]))
    best_first, by = ranked(results)
    assert "".join(result.row.name for result in best_first) == order
    assert by.startswith("mse" if better else "validation loss")


SWEEP = ("sweep", "toy.yaml", "optimizer.lr=1e-3,1e-2", "train.steps=600", "checkpoint.every=20", "evaluate.every=null",
         "train.spike=null", "--run", "S")  # fmt: skip


@pytest.mark.release
def test_M10_a_sweep_that_is_interrupted_and_killed_goes_on_to_what_it_would_have_been(aurora, here):
    aurora.good(*SWEEP[:-1], "whole", "--quiet")

    def ended_by(number):
        sweep = aurora.start(*SWEEP)
        for line in sweep.stderr:
            if line.startswith("saved step") and int(line.split()[-1]) > ended_by.after:
                ended_by.after = int(line.split()[-1])
                break
        sweep.send_signal(number)
        return sweep, sweep.communicate(timeout=120)[1]

    ended_by.after = 0
    sweep, said = ended_by(signal.SIGINT)
    assert sweep.returncode == 75 and "stopped by SIGINT; continue with the same command: aurora sweep toy.yaml" in said
    first, second = sorted((here / "S").glob("*")), sorted((here / "whole").glob("*"))
    assert len(first) == 1 and [event["by"] for event in events(first[0], "stop")] == ["SIGINT"]
    sweep, _ = ended_by(signal.SIGKILL)
    assert sweep.returncode == -signal.SIGKILL
    last = aurora.good(*SWEEP)
    assert "is finished" not in last.stdout
    for one, other in zip(sorted((here / "S").glob("*")), second, strict=True):
        assert events(one, "finish")[-1]["state_sha256"] == events(other, "finish")[-1]["state_sha256"]


@pytest.mark.slow
def test_M10_a_failed_run_is_in_the_table_with_its_reason_and_does_not_end_the_sweep(aurora, here):
    done = aurora("sweep", "toy.yaml", "data.rows=0,20", "train.steps=10", "--json")
    assert done.returncode == 1
    good, bad = json.loads(done.stdout)["runs"]
    assert (good["values"], good["state"], good["why"]) == ({"data.rows": "20"}, "finished", "")
    assert (bad["state"], bad["why"]) == ("not started", "data: the training split has no example")
    assert not os.path.exists(bad["run"])
    shutil.rmtree(here / "runs")
