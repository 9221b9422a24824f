"""One run in several processes: the same batches and losses as in one, and one ending for all, whatever ends it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
import toy
from kit import Aurora, evaluations, events, final_hash, free_address, in_process, losses

from aurora_train.errors import UserError
from aurora_train.machine.line import EXIT_LOST
from aurora_train.machine.place import Place, local_devices, place

PLAIN = {"schedule: {warmup: 3}": "schedule: {name: constant}", "{accumulation: 2}": "{accumulation: 1}"}
BOTH = [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.release)]  # the leader, the other


def ended(processes, timeout: float = 240) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each."""
    said = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, said, strict=True)]


def good(processes) -> str:
    """What the leader said, when all went well; the others have nothing to say."""
    results = ended(processes)
    assert [status for status, _, _ in results] == [0] * len(results), results[0][2][-2000:] + results[-1][2][-2000:]
    assert not any(out for _, out, _ in results[1:])
    return results[0][2]


def wait_for_step(run, step: int, processes) -> None:
    for _ in range(6000):  # five minutes
        if (run / "metrics.jsonl").exists() and any(at >= step for at, _ in losses(run)):
            return
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The tests of this file compile a program once; no other file's process, killed in a write, tears an entry."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.release
def test_two_processes_then_one_then_two_with_two_devices_each(tmp_path, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path, **PLAIN)
    aurora.good("train", config, "train.steps=50", "--run", "still", "--quiet")
    said = good(aurora.team(2, "train", config, "train.steps=20", "--run", "moved"))
    assert "2 x cpu in 2 processes" in said
    said = aurora.good("resume", "moved", "train.steps=35").stderr
    assert "processes are not what this run had before" in said
    good(aurora.team(2, "resume", "moved", "train.steps=50", "mesh.fsdp=2", devices=2))
    still, moved = losses(tmp_path / "still"), losses(tmp_path / "moved")
    assert [step for step, _ in moved] == [step for step, _ in still] == list(range(1, 51))
    assert [loss for _, loss in moved] == pytest.approx([loss for _, loss in still], rel=1e-5)
    mine, one = dict(evaluations(tmp_path / "moved")), dict(evaluations(tmp_path / "still"))
    both = mine.keys() & one.keys()
    assert {10, 20, 30, 40, 50} <= both
    assert {step: mine[step] for step in both} == pytest.approx({step: one[step] for step in both}, rel=1e-5)
    moves = [event for event in events(tmp_path / "moved", "replan") if event["what"] == "processes"]
    assert [(move["before"], move["after"]) for move in moves] == [(2, 1), (1, 2)]


@pytest.fixture(scope="module")
def still(tmp_path_factory, cache):
    """A run of two processes that nobody disturbed."""
    folder = tmp_path_factory.mktemp("still")
    aurora, config = Aurora(folder, cache), toy.write(folder)
    good(aurora.team(2, "train", config, "train.steps=60", "--run", "still"))
    return folder / "still"


@pytest.mark.parametrize("told", BOTH)
def test_a_signal_to_one_stops_all_after_the_same_step_and_the_rest_is_the_same_to_the_bit(
    told, still, tmp_path, cache
):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    team = aurora.team(2, "train", config, "train.steps=60", "--run", "stopped")
    wait_for_step(tmp_path / "stopped", 5, team)
    team[told].send_signal(signal.SIGTERM)
    assert [status for status, _, _ in ended(team)] == [75, 75]
    assert events(tmp_path / "stopped", "stop")[-1]["by"] == "SIGTERM"
    last = losses(tmp_path / "stopped")[-1][0]
    assert last < 60 and (tmp_path / "stopped/checkpoints" / str(last)).is_dir()
    good(aurora.team(2, "train", config, "train.steps=60", "--run", "stopped"))
    assert losses(tmp_path / "stopped") == losses(still)
    assert final_hash(tmp_path / "stopped") == final_hash(still)


@pytest.mark.parametrize("killed", BOTH)
def test_one_that_is_killed_takes_the_others_with_it_and_the_run_comes_back(killed, still, tmp_path, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    team = aurora.team(2, "train", config, "train.steps=60", "--run", "killed")
    wait_for_step(tmp_path / "killed", 12, team)
    os.kill(team[killed].pid, signal.SIGKILL)
    results = ended(team, timeout=150)
    assert results[killed][0] == -signal.SIGKILL
    assert results[1 - killed][0] == EXIT_LOST and f"process {killed} (" in results[1 - killed][2]
    assert not any("Traceback" in said for _, _, said in results)
    lost = events(tmp_path / "killed", "lost")
    assert [event["process"].partition(" (")[0] for event in lost] == ["process 1"] * killed  # process 0 records it
    good(aurora.team(2, "train", config, "train.steps=60", "--run", "killed"))
    assert losses(tmp_path / "killed") == losses(still)
    assert final_hash(tmp_path / "killed") == final_hash(still)


@pytest.mark.release
def test_one_that_is_late_for_the_first_step_is_waited_for(still, tmp_path, cache):
    """For longer than the 30 s that gloo gives those who come to a collective."""
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    team = aurora.team(2, "train", config, "train.steps=60", "--run", "late")
    while "compiling" not in (line := team[0].stderr.readline()):
        assert line, "it ended"
    team[1].send_signal(signal.SIGSTOP)
    time.sleep(33)
    assert not (tmp_path / "late/metrics.jsonl").exists(), "the leader does not begin alone"
    team[1].send_signal(signal.SIGCONT)
    good(team)
    assert losses(tmp_path / "late") == losses(still)


@pytest.mark.release
def test_bad_data_takes_all_of_them_back_together(tmp_path, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    settings = ("data.bad=7", "train.rewind_after=1", "train.rewinds=20", "checkpoint.every=2")
    aurora.good("train", config, *settings, "--run", "one", "--quiet")
    good(aurora.team(2, "train", config, *settings, "--run", "two"))
    went_back = [[(e["first"], e["data_step"]) for e in events(tmp_path / run, "rewind")] for run in ("one", "two")]
    assert went_back[0] and went_back[0] == went_back[1]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5)


@pytest.mark.slow
def test_what_the_leader_refuses_ends_all(tmp_path, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    results = ended(aurora.team(2, "train", config, "mesh.data=1", "--run", "uneven"))
    assert [status for status, _, _ in results] == [2, 2]
    left_out = "a mesh of 1 devices leaves out some of the 2 of these 2 processes"
    assert left_out in results[0][2] and not any("Traceback" in r[2] for r in results)
    results = ended(aurora.team(2, "train", config, "--run", "/proc/nobody/writes/here"))
    assert [status for status, _, _ in results] == [2, 2] and "cannot write the run folder" in results[1][2]
    aurora.good("train", config, "train.steps=10", "--run", "lost", "--quiet")
    shutil.rmtree(tmp_path / "lost/checkpoints")
    results = ended(aurora.team(2, "resume", "lost", "train.steps=20"))
    assert [status for status, _, _ in results] == [2, 2]
    gone = "every checkpoint of this run is gone"
    assert gone in results[0][2] and "process 0 ended" in results[1][2] and gone in results[1][2]


@pytest.mark.release
def test_a_finished_run_is_shown_once_and_started_over_by_all(tmp_path, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    aurora.good("train", config, "train.steps=4", "--run", "done", "--quiet")
    results = ended(aurora.team(2, "train", config, "train.steps=4", "--run", "done", "--json"))
    assert [status for status, _, _ in results] == [0, 0] and not results[1][1]
    assert json.loads(results[0][1])["step"] == 4
    good(aurora.team(2, "train", config, "train.steps=6", "--run", "done", "--fresh"))
    assert losses(tmp_path / "done")[-1][0] == 6 and len(list(tmp_path.glob("done*"))) == 2


@pytest.mark.release
def test_processes_that_see_different_runs_do_not_train(tmp_path, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    for name, seed in (("one", 0), ("two", 1)):
        aurora.good("train", config, "train.steps=4", f"train.seed={seed}", "--run", name, "--quiet")
    shutil.copy(tmp_path / "one/config.yaml", tmp_path / "two/config.yaml")
    address = free_address()
    team = [aurora.member(i, 2, address, "resume", r, "train.steps=8") for i, r in enumerate(("one", "two"))]
    results = ended(team)
    assert [status for status, _, _ in results] == [2, 2]
    assert all("another run folder (it has to be on a disk that all of them see)" in said for _, _, said in results)


@pytest.mark.slow
def test_a_process_whose_recipe_file_is_another_one_does_not_train(tmp_path, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    other = toy.write(tmp_path / "there")
    (tmp_path / "there/toy.py").write_text(toy.RECIPE + "\n# edited\n")
    address = free_address()
    team = [aurora.member(i, 2, address, "train", c, "--run", "x") for i, c in enumerate((config, other))]
    results = ended(team)
    assert [status for status, _, _ in results] == [2, 2]
    assert all("differ in their code" in said and "recipe: " in said for _, _, said in results)


@pytest.mark.parametrize("told", BOTH)
def test_a_signal_before_the_first_step_ends_all(told, tmp_path):
    aurora, config = Aurora(tmp_path, tmp_path / "cache"), toy.write(tmp_path)
    team = aurora.team(2, "train", config, "model.layers=12", "memory.unroll=true", "--run", "early")
    for _ in range(6000):  # five minutes
        if (tmp_path / "early/events.jsonl").exists():
            break
        time.sleep(0.05)
    team[told].send_signal(signal.SIGTERM)
    results = ended(team)
    # The other may be compiling for longer than it is waited for; jax then aborts it.
    assert results[told][0] == 75 and results[1 - told][0] in (75, EXIT_LOST, -signal.SIGABRT)
    torn = [said[said.index("Traceback") :][:3000] for _, _, said in results if "Traceback" in said]
    assert not torn, torn[0]


@pytest.mark.slow
def test_a_process_with_another_config_does_not_train(tmp_path, cache):
    aurora, config = Aurora(tmp_path, cache), toy.write(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("lr: 1e-2", "lr: 2e-2"))
    address = free_address()
    team = [aurora.member(i, 2, address, "train", c, "--run", "x") for i, c in enumerate((config, other))]
    results = ended(team, timeout=150)
    assert [status for status, _, _ in results] == [2, 2]
    assert all("differ in their config" in said and "optimizer.lr: 0.01 and 0.02" in said for _, _, said in results)
    assert not (tmp_path / "x/config.yaml").exists()


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "4100", "SLURM_STEP_ID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
MPI_4 = MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
MPI_5 = MPI | {"PMIX_NAMESPACE": "prterun-my-box-100@1"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, (0, 1, (), "")),
        (ADDRESS, (0, 1, (), "")),  # an address alone is somebody else's setting
        (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, (1, 2, ("10.0.0.1:1234",), "")),
        (ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, (0, 1, (), "")),
        (SLURM | {"SLURM_STEP_NODELIST": "box[07-09,12]-ib,other"}, (1, 2, ("box07-ib:61445",), "slurm 4100.1")),
        (SLURM | {"SLURM_STEP_NODELIST": "box1,box2"}, (1, 2, ("box1:61445",), "slurm 4100.1")),
        (SLURM | {"SLURM_STEP_NODELIST": "box1"} | ADDRESS, (1, 2, ("10.0.0.1:1234",), "slurm 4100.1")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1, (), "")),
        (MPI_4, (3, 4, ("10.96.0.1:62624", "10.148.0.1:62624"), "mpi 1531576320")),
        (MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (3, 4, ("127.0.0.1:62624",), "mpi 1531576320")),
        (MPI_5, (3, 4, ("my-box:61540",), "mpi prterun-my-box-100@1")),
    ],
)
def test_the_environment_says_which_process_this_is(environ, found):
    assert place(environ) == Place(*found)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not set"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "'two' is not a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "box", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "has no port"),
        (SLURM | {"SLURM_STEP_NODELIST": "box1", "JAX_COORDINATOR_ADDRESS": "box1"}, "has no port"),
        (SLURM, "SLURM_STEP_NODELIST is not set"),
        (MPI, "does not say where process 0 is"),
    ],
)
def test_a_wrong_setting_of_processes_is_named(environ, said):
    with pytest.raises(UserError, match=said):
        place(environ)


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}, [3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, [1]),
    ],
)
def test_several_processes_of_a_launcher_on_a_box_take_an_accelerator_each(environ, devices):
    assert local_devices(environ) == devices


def test_a_place_on_the_command_line_is_whole_or_refused(tmp_path, capsys):
    assert in_process("train", "quickstart", "--coordinator", "127.0.0.1:1") == 2
    assert "--process and --processes not given" in capsys.readouterr().err
