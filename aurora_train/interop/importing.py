"""Imports an open model as a run at step 0: the weights as they are stored, its facts and its origin.

Such a run has no data and no optimizer yet. Every verb that reads a run reads it, `model.from` starts another from it,
and a resume begins its training with the weights that it holds.
"""

from __future__ import annotations

import contextlib
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from aurora_train import facts as kept_facts
from aurora_train import run as runs
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.config import dump, load_values
from aurora_train.config.schema import Init
from aurora_train.errors import UserError
from aurora_train.files import write_atomically, write_json
from aurora_train.interop.kept import TEMPLATE, facts_of
from aurora_train.interop.placing import Opened, matched
from aurora_train.interop.source import as_parent, is_foreign, located, open_source
from aurora_train.machine.precision import settled


def import_model(
    source: str, folder: str, *, online: bool = False, recipe: str = "language_model"
) -> tuple[runs.Run, Opened]:
    """Write the run folder of an open model. Returns the run and the opened source.

    `online`: a source on a hub may be downloaded. Raises UserError for a source that cannot be read, and for a folder
    that holds something.
    """
    run = runs.Run(folder)
    taken = UserError("this folder exists and is not empty", where=str(folder), hint="name another one with --to")
    left, ours = _was_broken_off(run), not run.folder.exists()
    if run.config.is_file() or run.holds_something_else() and not left:
        raise taken
    source = str(located(source, online=online))
    if Path(source).is_file() and not is_foreign(source):
        raise UserError("this file is no open model", where=source, hint="name a folder with config.json and "
                        "*.safetensors, a GGUF file, or hub:owner/name")  # fmt: skip
    if Path(source).exists() and not is_foreign(source):
        raise UserError("this is a run already", where=source, hint=f"a config starts from it by model.from: {source}")
    opened = matched(open_source(source))
    facts = kept_facts.as_kept(facts_of(opened.source, opened.family.model_type, opened.beside), where=source)
    if TEMPLATE in facts:
        facts[kept_facts.DATE] = datetime.now().isoformat(timespec="seconds")
    config = settled(_config(source, recipe, run.folder.name))
    with run.lock():
        if run.config.is_file():  # another process was faster
            raise taken
        if left:
            run.forget()
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        try:
            _write(run, source, opened, facts, config)
        except BaseException:  # nothing of it is a run before the config is there
            if left or ours:
                shutil.rmtree(run.folder, ignore_errors=True)
            raise
    return run, opened


def _was_broken_off(run: runs.Run) -> bool:
    """Whether a folder holds no more than an import that was killed leaves, which can be made again."""
    left = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
    known = {".lock", ".trash", "facts", "checkpoints", "provenance.json", "provenance.json.new", "config.yaml.new"}
    return {".lock", "facts"} <= left <= known and run.step() == 0 and not run.is_held()


def _write(run: runs.Run, source: str, opened: Opened, facts: kept_facts.Facts, config) -> None:
    kept_facts.write(run.facts, facts)
    with contextlib.closing(CheckpointStore(run.checkpoints, run.trash)) as store:
        store.sweep()
        weights = {name: _Deferred(opened, name) for name in opened.shapes}
        store.save(0, {"params": weights}, {"facts": kept_facts.sha256(facts)}, copy=False)
    write_json(run.provenance, {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": {"name": config.recipe, "sha256": config.recipe_sha256}, "code_sha256": runs.code_hash(),
        "facts_sha256": kept_facts.sha256(facts), "versions": runs.versions(),
        "parent": as_parent(source),
    })  # fmt: skip
    write_atomically(run.config, dump(config))  # last: it makes the folder a run


class _Deferred:
    """A parameter that is read when it is written, so that the whole model is never in memory."""

    def __init__(self, opened: Opened, name: str):
        self._opened, self._name = opened, name
        self.shape, self.dtype = opened.shapes[name], opened.dtype(name)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self._opened.read(self._name)
        return array if dtype is None else array.astype(dtype)


def _config(source: str, recipe: str, name: str):
    """The config of a recipe with a source's shape, written out: the run does not need its source any more."""
    values = {"recipe": recipe, "name": name, "model": {"from": str(Path(source).absolute())}}
    config = load_values(values, name)
    model = config.model.model_copy(update={"from_": None})
    whole = config.model_copy(update={"model": model, "init": Init()})
    whole._loaded = config._loaded
    return whole
