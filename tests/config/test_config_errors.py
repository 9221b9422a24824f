"""Whatever a user writes into a config ends in one message that says where: exit 2, no traceback."""

import os
import subprocess
import sys

import pytest

from aurora_train.cli.main import main

OK = "recipe: tiny.py\ndata: {path: x}\n"
STUB = "from aurora_train.config import Section\nfrom aurora_train.recipe import Recipe\n"

# name: (files, arguments of `aurora check`, what the message says; the first entry is the place)
CASES = {
    "typo in a key": ({"b.yaml": OK + "train: {stps: 3}\n"}, ["b.yaml"],
                      ["b.yaml:3:9: train.stps", "unknown key", "did you mean `steps`?"]),
    "typo in a section": ({"b.yaml": OK + "optimzer: {lr: 1}\n"}, ["b.yaml"],
                          ["b.yaml:3:1: optimzer", "did you mean `optimizer`?"]),
    "key in the wrong section": ({"b.yaml": OK + "train:\n  lr: 1\n"}, ["b.yaml"],
                                 ["b.yaml:4:3: train.lr", "it lives in `optimizer.lr`"]),
    "nested key at the top": ({"b.yaml": OK + "warmup: 3\n"}, ["b.yaml"],
                              ["b.yaml:3:1: warmup", "it lives in `optimizer.schedule.warmup`"]),
    "typo in a recipe's key": ({"b.yaml": OK + "model: {wdth: 3}\n"}, ["b.yaml"],
                               ["b.yaml:3:9: model.wdth", "did you mean `width`?"]),
    "text for a whole number": ({"b.yaml": OK + "train: {batch: '8'}\n"}, ["b.yaml"],
                                ["b.yaml:3:16: train.batch", 'whole number; got "8"', "without quotes"]),
    "float for a whole number": ({"b.yaml": OK + "train: {steps: 1e3}\n"}, ["b.yaml"],
                                 ["b.yaml:3:16: train.steps", "whole number; got 1000.0", "write 1000"]),
    "truth for a whole number": ({"b.yaml": OK + "train: {steps: true}\n"}, ["b.yaml"],
                                 ["b.yaml:3:16: train.steps", "whole number; got true"]),
    "yes for true": ({"b.yaml": OK + "evaluate: {final: yes}\n"}, ["b.yaml"],
                     ["b.yaml:3:19: evaluate.final", "true or false", "write true"]),
    "a key that is gone": ({"b.yaml": OK + "log: {online: true}\n"}, ["b.yaml"],
                           ["b.yaml:3:7: log.online: this key has been removed", "log.sinks=[wandb-online]"]),
    "number for text": ({"b.yaml": "recipe: tiny.py\ndata: {path: 3}\n"}, ["b.yaml"],
                        ["b.yaml:2:14: data.path", "must be text; got 3"]),
    "negative size": ({"b.yaml": OK + "model: {width: -4}\n"}, ["b.yaml"],
                      ["b.yaml:3:16: model.width", "at least 1; got -4"]),
    "learning rate of zero": ({"b.yaml": OK + "optimizer: {lr: 0}\n"}, ["b.yaml"],
                              ["b.yaml:3:17: optimizer.lr", "greater than 0; got 0"]),
    "infinite learning rate": ({"b.yaml": OK + "optimizer: {lr: .inf}\n"}, ["b.yaml"],
                               ["b.yaml:3:17: optimizer.lr", "finite"]),
    "an adapter of what no model has": (
        {"b.yaml": OK.replace("tiny.py", "language_model").replace("path", "source") +
         "model:\n  lora:\n    targets: [query, quary]\n"}, ["b.yaml"],
        ["b.yaml:5:14: model.lora.targets", "nothing in this model is called 'quary'", "did you mean 'query'?"]),
    "4 bits that do not fit the width": (
        {}, ["quickstart", "model={width: 96, heads: 2, mlp_width: 256, lora: {rank: 2, base: nf4}}"],
        ["override model", "model.lora.base: nf4 needs width (96) to be a multiple of 64", "128 would be"]),
    "unknown optimizer": ({"b.yaml": OK + "optimizer: {name: adam}\n"}, ["b.yaml"],
                          ["b.yaml:3:19: optimizer.name", "adamw or lion", "did you mean `adamw`?"]),
    "typo in the forms": ({"b.yaml": OK + "train: {forms: plan}\n"}, ["b.yaml"],
                          ["b.yaml:3:16: train.forms", "auto or plain", "did you mean `plain`?"]),
    "a form of one operation, as there was": (
        {"b.yaml": OK + "train: {forms: {norm: auto, linear: plain}}\n"}, ["b.yaml"],
        ["b.yaml:3:29: train.forms.linear", "one switch for all operations", "train.forms: auto or plain"]),
    "a kernel of attention as a form": ({}, ["quickstart", "train.forms.attention=auto"],
                                        ["override train.forms.attention", "attention is model.attention"]),
    "an update within the backward pass, as there was": (
        {"b.yaml": OK + "memory: {fuse_update: true}\n"}, ["b.yaml"],
        ["b.yaml:3:10: memory.fuse_update", "has been removed", "ever measured on a device", "remove the key"]),
    "wrong branch of a choice": ({"b.yaml": OK + "memory: {accumulation: 0}\n"}, ["b.yaml"],
                                 ["b.yaml:3:24: memory.accumulation", "auto or at least 1; got 0"]),
    "a batch that microbatches do not divide": (
        {"b.yaml": OK + "train: {batch: 7}\nmemory: {accumulation: 2}\n"}, ["b.yaml"],
        ["b.yaml:3:16: train.batch", "7 does not divide into 2", "train.batch=6 or train.batch=8", "accumulation=1"]),
    "patience without an evaluation": ({"b.yaml": OK + "evaluate: {every: null, patience: 3}\n"}, ["b.yaml"],
                                       ["b.yaml:3:35: evaluate.patience", "none before the last step",
                                        "evaluate.every=N"]),
    "a source named twice": ({"b.yaml": OK + "init: {teacher: a, parts: {teacher: b}}\n"}, ["b.yaml"],
                             ["init.teacher and init.parts.teacher both name a source", "init.teacher=RUN"]),
    "a batch of fewer than its microbatches": ({"b.yaml": OK + "train: {batch: 3}\nmemory: {accumulation: 8}\n"},
                                               ["b.yaml"], ["the nearest: train.batch=8; or memory.accumulation=3"]),
    "budget without a unit": ({"b.yaml": OK + "memory: {budget: 96}\n"}, ["b.yaml"],
                              ["b.yaml:3:18: memory.budget: must be a size with its unit, such as 96GB, or auto; got"]),
    "budget with a false unit": ({"b.yaml": OK + "memory: {budget: 96XB}\n"}, ["b.yaml"],
                                 ["b.yaml:3:18: memory.budget", "96GB or 80GiB"]),
    "mesh of no devices": ({"b.yaml": OK + "mesh: {data: 0}\n"}, ["b.yaml"], ["b.yaml:3:14: mesh.data", "-1"]),
    "bad item of a list": ({"b.yaml": OK + "log: {sinks: [wandb, tensorbord]}\n"}, ["b.yaml"],
                           ["b.yaml:3:22: log.sinks.1", "did you mean `tensorboard`?"]),
    "scalar for a section": ({"b.yaml": OK + "train: 5\n"}, ["b.yaml"], ["b.yaml:3:8: train", "section"]),
    "empty section": ({"b.yaml": OK + "train:\n"}, ["b.yaml"], ["b.yaml:3:1: train", "remove the empty section"]),
    "required section absent": ({"b.yaml": "recipe: tiny.py\n"}, ["b.yaml"], ["b.yaml:1:1: data", "is required"]),
    "required key absent": ({"b.yaml": "recipe: tiny.py\ndata: {mixture: {}}\n"}, ["b.yaml"],
                            ["b.yaml:2:1: data.path", "is required"]),
    "name that is no folder name": ({"b.yaml": OK + "name: a/b\n"}, ["b.yaml"], ["b.yaml:3:7: name", "must match"]),
    "duplicate key": ({"b.yaml": OK + "train: {steps: 1}\ntrain: {steps: 2}\n"}, ["b.yaml"],
                      ["b.yaml:4:1", "`train` is written twice", "first at b.yaml:3:1"]),
    "alias": ({"b.yaml": OK + "train: {steps: *n}\n"}, ["b.yaml"], ["b.yaml:3:16", "aliases"]),
    "anchor": ({"b.yaml": OK + "train: {steps: &n 3}\n"}, ["b.yaml"], ["b.yaml:3:16", "anchors"]),
    "tag": ({"b.yaml": OK + "train: !!python/object:os.system {a: 1}\n"}, ["b.yaml"], ["b.yaml:3:8", "tags"]),
    "unclosed bracket": ({"b.yaml": OK + "train: {steps: 3\n"}, ["b.yaml"], ["b.yaml:", "not valid YAML"]),
    "tab for indentation": ({"b.yaml": OK + "train:\n\tsteps: 3\n"}, ["b.yaml"], ["b.yaml:4:1", "not valid YAML"]),
    "control character": ({"b.yaml": OK + "name: \x01\n"}, ["b.yaml"], ["b.yaml", "not valid YAML"]),
    "half a surrogate pair": ({"b.yaml": OK + 'name: "\\ud800"\n'}, ["b.yaml"], ["b.yaml:3:7", "surrogate"]),
    "number of a million digits": ({"b.yaml": OK + f"train: {{steps: {'9' * 10**5}}}\n"}, ["b.yaml"],
                                   ["b.yaml:3:16", "100000 digits"]),
    "nested without end": ({"b.yaml": OK + "x: " + "[" * 5000}, ["b.yaml"], ["b.yaml:3:", "nested deeper than"]),
    "data inside the config": ({"b.yaml": OK + f"x: [{'1, ' * 6000}]\n"}, ["b.yaml"],
                               ["b.yaml:3:", "more than 5000 values"]),
    "two documents": ({"b.yaml": OK + "---\na: 1\n"}, ["b.yaml"], ["b.yaml:3:1", "second YAML document"]),
    "list at the top": ({"b.yaml": "- a\n"}, ["b.yaml"], ["b.yaml:1:1", "`key: value` lines"]),
    "empty file": ({"b.yaml": "# nothing\n"}, ["b.yaml"], ["b.yaml", "is empty"]),
    "huge file": ({"b.yaml": "#" * (1 << 21)}, ["b.yaml"], ["b.yaml", "larger than 1 MiB"]),
    "not UTF-8": ({"b.yaml": b"recipe: tiny.py\nname: caf\xe9\n"}, ["b.yaml"], ["b.yaml:2:10", "0xe9", "UTF-8"]),
    "a folder": ({"b.yaml/c": ""}, ["b.yaml"], ["b.yaml", "is a folder"]),
    "no such config": ({}, ["aa.yaml"], ["aa.yaml", "did you mean `a.yaml`?"]),
    "no recipe": ({"b.yaml": "train: {steps: 1}\n"}, ["b.yaml"], ["b.yaml", "recipe: is required"]),
    "recipe is a list": ({"b.yaml": "recipe: [a]\n"}, ["b.yaml"], ["b.yaml:1:9", "recipe"]),
    "unknown recipe": ({"b.yaml": "recipe: languge_model\n"}, ["b.yaml"], ["b.yaml:1:9", "unknown recipe"]),
    "own recipe without .py": ({"b.yaml": "recipe: tiny\n"}, ["b.yaml"], ["b.yaml:1:9", "`recipe: tiny.py`"]),
    "typo in a recipe file": ({"b.yaml": "recipe: tinny.py\n"}, ["b.yaml"], ["b.yaml:1:9", "`recipe: tiny.py`"]),
    "recipe outside the folder": ({"b.yaml": "recipe: ../tiny.py\n"}, ["b.yaml"], ["b.yaml:1:9", "outside"]),
    "recipe by absolute path": ({"b.yaml": "recipe: /tmp/tiny.py\n"}, ["b.yaml"], ["b.yaml:1:9", "outside"]),
    "recipe with a syntax error": ({"b.yaml": "recipe: r.py\n", "r.py": "x = 1\ndef f(:\n"}, ["b.yaml"],
                                   ["r.py:2:7", "syntax error"]),
    "recipe file without a recipe": ({"b.yaml": "recipe: r.py\n", "r.py": "x = 1\n"}, ["b.yaml"],
                                     ["r.py:1", "no subclass of Recipe"]),
    "recipe file with two recipes": (
        {"b.yaml": "recipe: r.py\n",
         "r.py": STUB + "class A(Recipe):\n  class Config(Section): pass\nclass B(Recipe): pass\n"}, ["b.yaml"],
        ["r.py:5", "2 recipes: A (line 3) and B (line 5)"]),
    "recipe without Config": ({"b.yaml": "recipe: r.py\n", "r.py": STUB + "\nclass A(Recipe): pass\n"}, ["b.yaml"],
                              ["r.py:4", "has no `Config`"]),
    "recipe that takes a core section": (
        {"b.yaml": "recipe: r.py\n",
         "r.py": STUB + "class A(Recipe):\n  class Config(Section):\n    train: int = 1\n"}, ["b.yaml"],
        ["A.Config", "redefines `train`"]),
    "recipe that fails on import": ({"b.yaml": "recipe: r.py\n", "r.py": "\nimport no_such_module\n"}, ["b.yaml"],
                                    ["r.py:2", "No module named 'no_such_module'"]),
    "heads that do not divide the width": ({"b.yaml": OK + "model: {heads: 3}\n"}, ["b.yaml"],
                                           ["b.yaml:3:16: model.heads", "3 heads do not divide a width of 8"]),
    "extends a missing file": ({"b.yaml": "extends: aa.yaml\n"}, ["b.yaml"], ["b.yaml:1:10", "did you mean `a.yaml`?"]),
    "extends itself": ({"b.yaml": "extends: b.yaml\n"}, ["b.yaml"], ["b.yaml:1:10", "cannot extend itself"]),
    "extends in a circle": ({"b.yaml": "extends: c.yaml\n", "c.yaml": "extends: b.yaml\n"}, ["b.yaml"],
                            ["b.yaml:1:10", "c.yaml:1:1", "one level"]),
    "extends a list": ({"b.yaml": "extends: [a.yaml]\n"}, ["b.yaml"], ["b.yaml:1:10", "one YAML file"]),
    "error in the extended file": ({"b.yaml": "extends: c.yaml\n", "c.yaml": OK + "train: {steps: x}\n"}, ["b.yaml"],
                                   ["c.yaml:3:16: train.steps"]),
    "override without =": ({}, ["a.yaml", "train.steps"], ["override `train.steps`", "has no `=`"]),
    "override without key": ({}, ["a.yaml", "=3"], ["override `=3`", "not a key path"]),
    "override of an unknown key": ({}, ["a.yaml", "train.stps=3"], ["override train.stps", "did you mean `steps`?"]),
    "override of a wrong type": ({}, ["a.yaml", "train.steps=many"], ["override train.steps: must be a whole number"]),
    "override that is no YAML": ({}, ["a.yaml", "train.steps=[1"], ["override train.steps", "not valid YAML"]),
    "override of extends": ({}, ["a.yaml", "extends=b.yaml"], ["override extends", "unknown key"]),
    "override against the file": ({"b.yaml": OK + "train: {batch: 8}\n"}, ["b.yaml", "memory.accumulation=3"],
                                  ["error: override memory.accumulation, with b.yaml:3:16: train.batch: a batch of 8"]),
    "size without a unit": ({}, ["a.yaml", "memory.budget=4"],
                            ["override memory.budget: must be a size with its unit, such as 4GB, or auto; got 4"]),
    "size in quotes without a unit": ({}, ["a.yaml", 'memory.budget="16000000000"'], ["such as 16000000000B, or auto"]),
    "an override beside the mistake": (
        {}, ["quickstart", "data.holdout_test=0", "evaluate.examples=3"], ["error: override data.holdout_test: "]),
    "an override of a key beside the wrong one": (
        {"b.yaml": "recipe: language_model\ndata: {source: ., holdout_test: 0}\n"},
        ["b.yaml", "evaluate.examples=3"], ["error: b.yaml:2:33: data.holdout_test: "]),
    "start that is no section": ({}, ["a.yaml", "init=runs/x"], ["override init: must be a section", "init.from=RUN"]),
    "unknown source of facts": ({}, ["a.yaml", "init.facts=onw"],
                                ["init.facts: must be inherit or own; got \"onw\"; did you mean `own`?"]),
    "derived value that does not fit": ({}, ["a.yaml", "model.size=d1", "model.heads=3"],
                                        ["override model.heads", "3 heads do not divide a width of 64"]),
}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", CASES)
def test_a_bad_config_is_one_located_message_and_exit_2(case, folder, capsys):
    files, arguments, expected = CASES[case]
    write(folder, files)
    assert main(["check", *arguments]) == 2
    out, err = capsys.readouterr()
    said = "\n".join(line for line in err.splitlines() if not line.startswith("recipe "))
    assert out == ""
    assert said.startswith("error: ") and said.count("\nerror: ") == 0
    assert "Traceback" not in said and "pydantic" not in said
    for text in expected:
        assert text in said, said


def test_all_errors_come_at_once_in_the_order_of_the_text(folder, capsys):
    write(folder, {"b.yaml": OK + "optimizer: {lr: -1}\ntrain:\n  stps: 3\n  batch: x\nmemory: {budget: 3XB}\n"})
    assert main(["check", "b.yaml", "log.every=0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "5 errors" in next(line for line in lines if line.startswith("error: "))
    places = [line.split(": ")[0].strip() for line in lines if line.startswith("  ")]
    assert places == ["b.yaml:3:17", "b.yaml:5:3", "b.yaml:6:10", "b.yaml:7:18", "override log.every"]


@pytest.mark.parametrize("case", ["typo in a key", "recipe with a syntax error", "not UTF-8"])
def test_the_same_holds_for_the_real_command(case, folder):
    files, arguments, expected = CASES[case]
    write(folder, files)
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-m", "aurora_train.cli.main", "check", *arguments], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": here},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(text in done.stderr for text in expected), done.stderr
