"""Thirty and more things a user gets wrong, through the real command line: one message each, exit 2, nothing lost."""

import re
import shutil
import subprocess
import sys

import pytest
from kit import Aurora, can_mount

from aurora_train.cli.main import main


def parquet_of_noise(folder):
    (folder / "bad.parquet").write_bytes(b"PAR1" + bytes(range(200)))


def folder_of_noise(folder):
    (folder / "noise").mkdir()
    for number in range(3):
        (folder / "noise" / f"{number}.txt").write_bytes(b"\xff\xfe\xfa" * 50)


def one_document(folder):
    (folder / "one").mkdir()
    (folder / "one" / "a.txt").write_text("the only document there is\n" * 20)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


TRAIN = ["train", "language.yaml", "--run", "new"]
TOY = ["train", "toy.yaml", "--run", "new"]
RECIPE_HEAD = "from aurora_train.config import Section\nfrom aurora_train.recipe import Recipe\n"

# name: (what is prepared, arguments, what the message says)
CASES = {
    "a typo in a key": (None, [*TRAIN, "train.stps=3"], ["train.stps", "steps"]),
    "a wrong type": (None, [*TRAIN, "train.steps=soon"], ["train.steps", "whole number"]),
    "a negative size": (None, [*TRAIN, "model.width=-4"], ["model.width", "at least 1"]),
    "heads that do not divide the width": (None, [*TRAIN, "model.heads=3"], ["model", "heads", "16"]),
    "a batch that microbatches do not divide": (None, [*TOY, "train.batch=9"], ["train.batch", "9", "nearest"]),
    "a batch of 8 in 16 microbatches": (None, [*TOY, "memory.accumulation=16"], ["batch of 8", "16"]),
    "no such config": (None, ["train", "langage.yaml"], ["langage.yaml", "language.yaml"]),
    "no such bundled config": (None, ["train", "quickstrt"], ["quickstrt", "quickstart"]),
    "a missing data file": (None, [*TRAIN, "data.source=nowhere.txt"], ["nowhere.txt", "data.source"]),
    "an empty corpus": (lambda f: (f / "empty").mkdir(), [*TRAIN, "data.source=empty"], ["empty"]),
    "a corpus of one document": (one_document, [*TRAIN, "data.source=one"], ["document"]),
    "an unreadable parquet": (parquet_of_noise, [*TRAIN, "data.source=bad.parquet"], ["bad.parquet"]),
    "a folder of invalid UTF-8": (folder_of_noise, [*TRAIN, "data.source=noise"], ["noise", "UTF-8"]),
    "a sequence longer than the corpus": (None, [*TRAIN, "data.sequence=10000000"], ["data.sequence"]),
    "a hub source without --online": (None, [*TRAIN, "data.source=hub:a/b"], ["hub:a/b", "--online"]),
    "a tokenizer that is not there": (
        None, [*TRAIN, "data.tokenizer.kind=file", "data.tokenizer.path=t.json"], ["data.tokenizer.path", "t.json"]),
    "a tokenizer that is not one": (
        write("t.json", "{}"), [*TRAIN, "data.tokenizer.kind=file", "data.tokenizer.path=t.json"], ["t.json"]),
    "nothing left to train on": (
        None, [*TRAIN, "data.holdout_test=0.6", "data.holdout_validation=0.5"], ["holdout_test"]),
    "a training split without examples": (None, [*TOY, "data.rows=0"], ["data", "no example"]),
    "a mesh larger than the machine": (None, [*TOY, "mesh.fsdp=64"], ["mesh", "64 devices"]),
    "an unknown tag to save": (None, [*TOY, "memory.save=[hiden]"], ["memory.save", "hiden", "hidden"]),
    "an unknown recipe": (write("a.yaml", "recipe: language_modl\n"), ["train", "a.yaml"],
                          ["a.yaml:1", "language_modl", "language_model"]),
    "a recipe file that is not there": (write("a.yaml", "recipe: tyo.py\n"), ["train", "a.yaml"], ["tyo.py", "toy.py"]),
    "a recipe with a syntax error": (
        lambda f: (write("r.py", "x = 1\ndef f(:\n")(f), write("a.yaml", "recipe: r.py\n")(f)), ["train", "a.yaml"],
        ["r.py:2", "syntax error"]),
    "a recipe without a Recipe": (
        lambda f: (write("r.py", "x = 1\n")(f), write("a.yaml", "recipe: r.py\n")(f)), ["train", "a.yaml"],
        ["r.py", "no subclass of Recipe"]),
    "a recipe without a Config": (
        lambda f: (write("r.py", RECIPE_HEAD + "class Mine(Recipe):\n    pass\n")(f),
                   write("a.yaml", "recipe: r.py\n")(f)), ["train", "a.yaml"], ["r.py:3", "Config"]),
    "a recipe that fails on import": (
        lambda f: (write("r.py", "x = 1\nx.y\n")(f), write("a.yaml", "recipe: r.py\n")(f)), ["train", "a.yaml"],
        ["r.py:2", "AttributeError"]),
    "a run folder that is a file": (write("new", "mine"), TOY, ["new"]),
    "a run folder that holds something else": (
        lambda f: ((f / "new").mkdir(), write("new/thesis.txt", "mine")(f)), TOY, ["new", "--run"]),
    "a start from a run that is not there": (None, [*TOY, "init.from=elsewhere"], ["elsewhere"]),
    "a start from a file that is no weights": (write("w.safetensors", "no"), [*TOY, "init.from=w.safetensors"],
                                               ["w.safetensors"]),
    "resuming what is no run": (None, ["resume", "nowhere"], ["nowhere", "run folder"]),
    "scoring what is no run": (None, ["evaluate", "nowhere"], ["nowhere"]),
    "generating from what is no run": (None, ["generate", "nowhere"], ["nowhere"]),
    "a report of what is no run": (None, ["report", "nowhere"], ["nowhere"]),
    "a negative seed": (None, ["check", "toy.yaml", "train.seed=-1"], ["train.seed", "at least 0"]),
    "an override without a value": (None, ["check", "toy.yaml", "train.steps"], ["train.steps"]),
    "an unknown verb": (None, ["tarin", "toy.yaml"], ["tarin"]),
    "an unknown option": (None, ["train", "toy.yaml", "--fersh"], ["--fersh"]),
}

# The same of a finished language run in `run`.
RUN_CASES = {
    "a run of another config": (["train", "language.yaml", "train.seed=5", "--run", "run"],
                                ["run", "train.seed: 0 -> 5", "another config"]),
    "a warned key through train": (["train", "language.yaml", "optimizer.lr=1", "--run", "run"], ["aurora resume"]),
    "a frozen key through resume": (["resume", "run", "model.width=32"], ["model.width: 16 -> 32", "frozen"]),
    "a typo through resume": (["resume", "run", "train.stps=9"], ["train.stps", "steps"]),
    "fewer steps than are done": (["resume", "run", "train.steps=3"], ["train.steps", "4"]),
    "a step without a checkpoint": (["evaluate", "run", "--step", "3"], ["step 3", "2, 4"]),
    "a step to generate from": (["generate", "run", "--step", "9"], ["step 9", "2, 4"]),
    "a negative temperature": (["generate", "run", "--temperature", "-1"], ["temperature"]),
    "a share of more than all": (["generate", "run", "--top-p", "1.5"], ["top_p"]),
    "no token to choose from": (["generate", "run", "--top-k", "0"], ["top_k"]),
    "a negative number of tokens": (["generate", "run", "--max-tokens", "-1"], ["max"]),
    "a name close to a run": (["evaluate", "rnu"], ["rnu", "run"]),
}


def everything(folder):
    """Path -> content of all files, but for locks and caches."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock" and "__pycache__" not in p.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(arguments, says, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "Traceback" not in out
    assert len(re.findall(r"^error: ", err, re.MULTILINE)) == 1 or "Usage" in err
    for part in says:
        assert part in err, err
    assert len(err.splitlines()) < 25, err


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_message_with_exit_2_and_what_was_there_stays(name, here, capsys):
    prepare, arguments, says = CASES[name]
    if prepare:
        prepare(here)
    before = everything(here)
    refused(arguments, says, capsys)
    after = everything(here)
    assert before.items() <= after.items()
    assert not (here / "new" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", RUN_CASES)
def test_a_run_refuses_with_one_message_and_loses_nothing(name, language_run, capsys):
    arguments, says = RUN_CASES[name]
    before = everything(language_run)
    refused(arguments, says, capsys)
    assert everything(language_run) == before


def test_a_run_without_a_checkpoint_says_how_to_go_on(language_run, capsys):
    shutil.rmtree(language_run / "checkpoints")
    for verb in ("generate", "evaluate"):
        refused([verb, "run"], ["no checkpoint", "aurora resume"], capsys)


def test_a_damaged_checkpoint_is_not_read_and_the_others_are_named(language_run, capsys):
    files = (p for p in (language_run / "checkpoints" / "4").rglob("*") if p.is_file())
    victim = max(files, key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-2])
    refused(["generate", "run"], ["step 4 is damaged", "--step", "2"], capsys)


def test_a_run_whose_recipe_makes_no_text_says_so_in_one_line(here, capsys):
    assert main(["train", "toy.yaml", "train.steps=1", "--run", "toyrun", "--quiet"]) == 0
    refused(["generate", "toyrun"], ["nothing to generate"], capsys)


def test_data_that_changed_under_a_run_is_refused(here, capsys):
    arguments = ["train", "language.yaml", "--run", "r", "evaluate.final=false", "--quiet"]
    assert main([*arguments, "train.steps=2"]) == 0
    path = sorted((here / "corpus").iterdir())[0]
    path.write_text(path.read_text() + "\nchanged = True\n")
    refused(["resume", "r", "train.steps=4"], ["training data is not what this run started on", "fingerprint"], capsys)


def test_a_folder_in_which_nothing_was_trained_yet_takes_the_corrected_config(here, capsys):
    refused([*TOY, "data.rows=0"], ["no example"], capsys)
    assert main([*TOY, "train.steps=1", "--quiet"]) == 0


# ---- disks. These need a process of their own: a mount is for the whole process, a limit too.

UNMOUNTABLE = "needs the right to mount a small disk"


@pytest.mark.skipif(not can_mount(), reason=UNMOUNTABLE)
def test_a_disk_without_room_for_the_config_is_one_message(here):
    """It has no name left; of room for bytes there is a test in tests/faults/test_preflight.py."""
    (here / "disk").mkdir()
    arguments = ["train", "toy.yaml", "--run", "disk/run", "--quiet"]
    done = Aurora(here, here / "cache").after("mount -t tmpfs -o nr_inodes=3 tmpfs disk", *arguments)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "No space left" in done.stderr and "disk/run" in done.stderr


def permissions_bind(folder) -> bool:
    """Whether this process obeys the mode of a folder: root does not, unless it gave up CAP_DAC_OVERRIDE."""
    folder.chmod(0o555)
    try:
        (folder / "probe").touch()
    except PermissionError:
        return True
    (folder / "probe").unlink()
    return False


@pytest.mark.permissions
def test_a_folder_without_write_permission_is_one_message(here):
    (here / "locked").mkdir()
    arguments = ["train", "toy.yaml", "--run", "locked/run", "--quiet"]
    if not permissions_bind(here / "locked"):
        done = Aurora(here, here / "cache").after("mount -t tmpfs -o ro tmpfs locked", *arguments)
    else:
        command = [sys.executable, "-m", "aurora_train.cli.main", *arguments]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr and "locked/run" in done.stderr and "cannot write" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--memory", "8GBB", "must be a size such as 96GB"), ("--token-file", "nowhere", "openssl rand -hex 32 > now")],
)
def test_a_wrong_option_of_serve_is_refused_before_the_model_is_read(option, value, says, capsys):
    pytest.importorskip("uvicorn")
    assert main(["serve", "no-such-run", option, value]) == 2
    said = capsys.readouterr().err
    assert f"{option} {value}" in said and says in said and "no-such-run" not in said
