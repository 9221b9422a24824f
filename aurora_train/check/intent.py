"""Decides what `train` or `resume` does with a run folder: start, continue, or refuse and show the difference."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from aurora_train import files
from aurora_train import run as runs
from aurora_train.check.remarks import rate_line
from aurora_train.config import config_hash, diff, flat, load_resolved
from aurora_train.errors import UserError
from aurora_train.interop.placing import shape_of
from aurora_train.interop.source import is_foreign, open_source
from aurora_train.machine.precision import as_in
from aurora_train.recipe import makes_experience

_WHY = {
    "frozen": "a run keeps its model, data, seed, batch and precision: another value is another run",
    "warned": "changes the run from here on",
    "allowed": "frozen, overridden with --allow-change: a different run from here on; recorded in provenance.json",
    "located": "must hold the same bytes in the new place, or the resume is refused",
    "elastic": "the same maths with floating-point sums in another order: equal to tolerance, no longer to the bit",
}


# (key, old, new): since 2026-11-29 the default is `auto`; before that it was the value to which `auto` resolves.
_SETTLED = (("data.tokenizer.kind", "byte", "auto"),)  # compared, not hashed: a value may be a list


def for_train(config, folder: str | None, *, fresh: bool) -> runs.Run:
    """The run that `aurora train CONFIG` starts or continues. UserError for a folder that holds another run."""
    run = runs.Run(Path(folder) if folder else runs.default_folder(config.name, config_hash(config)))
    if fresh:
        run.move_aside()
    if not run.config.is_file():
        refuse_adapters_on_nothing(config)
        if run.holds_something_else():
            raise UserError(
                "this is not a run folder and not empty", where=str(run.folder), hint="name another one with --run"
            )
        return run
    run.refuse_export()
    known = load_resolved(run.folder, reading=False)
    changes = [
        change for change in diff(known, as_in(config, known)) if change[3] != "free" and change[:3] not in _SETTLED
    ]
    if changes and not run.has_begun():
        refuse_adapters_on_nothing(config)
        with run.lock():
            run.forget()  # nothing was trained, so a corrected config may use the folder
        return run
    if changes:
        frozen = all(kind == "frozen" for *_, kind in changes)  # a resume would refuse these too
        raise UserError(
            "this folder holds a run of another config",
            where=str(run.folder),
            why=describe(changes),
            hint="name another folder with --run"
            + ("" if frozen else f", or change that run: aurora resume {run.folder} KEY=VALUE"),
        )
    return run


def for_resume(folder: str, overrides: list[str], allowed: list[str] | tuple = ()) -> tuple[object, runs.Run, list]:
    """(config, run, changes) of `aurora resume RUN [key=value ...]`. UserError if a frozen key would change.

    `allowed`: frozen keys that may change; such a change has the class "allowed".
    """
    run = runs.Run.existing(folder)
    run.refuse_export()
    known = load_resolved(run.folder)
    config = as_in(load_resolved(run.folder, overrides, reading=False), known)
    _refuse_unknown(allowed, config)
    if config.train.steps < run.step():
        raise UserError(
            f"train.steps={config.train.steps}, and this run is at step {run.step()} already",
            where=str(run.folder),
            hint=f"train.steps={run.step()} ends it there",
        )
    changed = [
        (key, old, new, "frozen" if _cuts_what_is_coupled(key, config) else _felt(kind, config))
        for key, old, new, kind in diff(known, config)
    ]
    if run.step() == 0 and "data" not in (files.read_json(run.provenance) or {"data": None}):
        changed = _chosen_for_imported(run, changed)
    code = None if config.recipe_bundled else runs.changed_code(run, config)
    if code:
        changed.append((runs.CODE, *code, "frozen"))
    changes = [
        (key, old, new, "allowed" if kind == "frozen" and _is_allowed(key, allowed) else kind)
        for key, old, new, kind in changed
    ]
    _refuse_idle(allowed, changes)
    frozen = [change for change in changes if change[3] == "frozen"]
    if frozen:
        keys = [key for key, *_ in frozen]
        raise UserError(
            "the recipe's code has changed since this run began" if keys == [runs.CODE]
            else "these keys are frozen for a run that has begun",
            where=str(run.folder),
            why=f"{describe(frozen)}\n  {_WHY['frozen']}",
            hint=("restore the file in its `code` folder" if keys == [runs.CODE]
                  else "start a new run: aurora train CONFIG KEY=VALUE")
            + "; or, if you must: " + " ".join(f"--allow-change {key}" for key in keys),
        )  # fmt: skip
    return config, run, changes


def _chosen_for_imported(run: runs.Run, changed: list[tuple]) -> list[tuple]:
    """The changes of an imported run's first resume: nothing but its model has begun, so all else may be chosen.

    UserError if no data are named, because nobody has chosen those that its config has by default.
    """
    if not any(key.startswith("data.") for key, *_ in changed):
        raise UserError(
            f"{run.folder.name} was imported and not trained, so it has no data", where=str(run.folder),
            hint=f"aurora resume {run.folder} data.source=FOLDER, or a config with `model: {{from: {run.folder}}}`",
        )  # fmt: skip
    return [
        (key, old, new, "free" if kind == "frozen" and not key.startswith("model.") else kind)
        for key, old, new, kind in changed
    ]


def _felt(kind: str, config) -> str:
    """A change's class. A model that makes its own data makes different data if sums are in another order: "warned"."""
    return "warned" if kind == "elastic" and makes_experience(config.recipe_class) else kind


def _cuts_what_is_coupled(key: str, config) -> bool:
    """Whether a change of this key splits the batch differently for a loss that depends on the split."""
    return key == "memory.accumulation" and config.recipe_class(config, files.cache_folder()).couples != "example"


def _refuse_idle(allowed, changes) -> None:
    """UserError if an allowed key has not changed: the user's edit went into another file or has no effect."""
    for key in allowed:
        if not any(kind == "allowed" and _is_allowed(name, [key]) for name, _, _, kind in changes):
            raise UserError(
                f"`{key}` has not changed, so there is nothing to allow", where="--allow-change",
                hint=f"the recipe of a run is the copy in its `code` folder: --allow-change {runs.CODE}"
                if key == "recipe" else f"give its new value too: {key}=VALUE",
            )  # fmt: skip


def _is_allowed(key: str, allowed) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)  # a section includes all of its keys


def _refuse_unknown(allowed, config) -> None:
    known = [runs.CODE, *(
        key for key, (_, kind) in flat(config).items() if kind == "frozen" or _cuts_what_is_coupled(key, config)
    )]  # fmt: skip
    for key in allowed:
        if not any(_is_allowed(name, [key]) for name in known):
            near = get_close_matches(key, known, n=1)
            raise UserError(
                f"`{key}` is not a frozen key",
                where="--allow-change",
                hint=f"did you mean `{near[0]}`?" if near else f"frozen are: {', '.join(known)}",
            )


def refuse_missing_start(config) -> None:
    """UserError if `init` names a path that is not a valid source, judged by its files; no weights are read."""
    for prefix, start in config.init.sources.items():
        _refuse_missing(start, init_key(prefix))


def refuse_adapters_on_nothing(config) -> None:
    """UserError for a new run of adapters whose base would be random.

    A config with the shape of a published model (kind: inherited) may be checked and planned before it names the model;
    without it, it finds no tokenizer to train with.
    """
    lora = getattr(getattr(config, "model", None), "lora", None)
    tokenizer = getattr(getattr(config, "data", None), "tokenizer", None)
    if lora is None or config.init.sources or getattr(tokenizer, "kind", None) == "inherited":
        return
    raise UserError(
        "adapters need a model under them", where="model.lora",
        why="nothing names the weights to start from: adapters beside random weights, which stay frozen, learn nothing",
        hint="init.from=SOURCE (model.from, where the recipe has it), an open model or a run; or model.lora=null",
    )  # fmt: skip


def init_key(prefix: str) -> str:
    """The config key that names the source of the parameters under a prefix."""
    return f"init.{prefix}" if prefix else "init.from"


def _refuse_missing(start: str, key: str) -> None:
    path = Path(start)
    hint = "a run folder, a Hugging Face folder, a GGUF file, or a safetensors file with this project's parameter names"
    if "hub:" in start and not path.exists():
        what = "a model on a hub is not named here"
        hint = "model.from=hub:owner/name starts from it; or `aurora import` it, and name the run"
    elif path.exists() and is_foreign(path) and (path.is_file() or any(path.glob("*config.json"))):
        shape_of(open_source(path))  # which refuses what it cannot read
        return
    elif not path.exists():
        what = f"there is no run folder or weights file {start}"
        hint = "the path is relative to the config file, and on the command line to the current folder"
    else:
        if not path.is_file() and not runs.Run.existing(path).has_checkpoint():
            raise UserError("this run has no checkpoint yet", where=key, hint=f"`aurora resume {start}`")
        return
    raise UserError(what, where=key, why=f"it names {start}", hint=hint)


def rate_after(run: runs.Run, config) -> str | None:
    """One line on how a resume changes the learning rate; None if it does not."""
    return rate_line(load_resolved(run.folder), config, run.step())


def describe(changes) -> str:
    """One line per change: key, old value, new value."""
    return "\n  ".join(f"{key}: {old!r} -> {new!r}" for key, old, new, _ in changes)


def warnings(changes) -> list[str]:
    """One line for each permitted change that the user should know about."""
    return [f"{key}: {old!r} -> {new!r} ({_WHY[kind]})" for key, old, new, kind in changes if kind in _WHY]
