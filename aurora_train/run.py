"""The run folder: its paths, its lock and its provenance. No other module knows their names."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from aurora_train import facts
from aurora_train.errors import UserError
from aurora_train.files import gguf_in, make_folder, read_json, write_atomically, write_json
from aurora_train.units import counted

_ATTEMPTS = 6  # to take the lock, which `is_held` of another process holds for an instant


def default_folder(name: str, config_hash: str) -> Path:
    """`runs/<name>-<8 hex>`: the same config always has the same folder, an edited one has another."""
    return Path("runs") / f"{name}-{config_hash[:8]}"


class Run:
    """Paths and small records of one run."""

    def __init__(self, folder):
        self.folder = Path(folder).absolute()

    config = property(lambda self: self.folder / "config.yaml")
    provenance = property(lambda self: self.folder / "provenance.json")
    plan = property(lambda self: self.folder / "plan.json")
    metrics = property(lambda self: self.folder / "metrics.jsonl")
    metrics_set_aside = property(lambda self: self.folder / "metrics.set-aside.jsonl")
    events = property(lambda self: self.folder / "events.jsonl")
    lineage = property(lambda self: self.folder / "lineage.jsonl")
    scores = property(lambda self: self.folder / "scores.json")
    plots = property(lambda self: self.folder / "plots.json")
    before = property(lambda self: self.folder / "before")
    code = property(lambda self: self.folder / "code")
    facts = property(lambda self: self.folder / "facts")
    checkpoints = property(lambda self: self.folder / "checkpoints")
    trash = property(lambda self: self.folder / ".trash")
    samples = property(lambda self: self.folder / "samples")
    suites = property(lambda self: self.folder / "suites")  # what the tasks of lm-eval gave, one file each
    report = property(lambda self: self.folder / "report.html")
    workdir = property(lambda self: self.folder / "work")
    weights = property(lambda self: self.folder / "weights.safetensors")  # of an export, which has no checkpoints
    wandb_id = property(lambda self: self.folder / "wandb.id")

    def journal(self, process: int) -> Path:
        """The file of answers from outside for one of the processes of this run (`train/experience.py`)."""
        return self.folder / "journal" / f"process-{process}.jsonl"

    follows = False  # whether another process writes this run's record

    @classmethod
    def existing(cls, folder) -> Run:
        """The run in an existing run folder; UserError if it is not one."""
        run = cls(folder)
        if not run.config.is_file():
            nearby = sorted(p.parent.name for p in run.folder.parent.glob("[!.]*/config.yaml"))[:5]
            hint = f"runs there: {', '.join(nearby)}" if nearby else "`aurora train CONFIG` starts one"
            why = "it has no config.yaml" if run.folder.exists() else "there is nothing at this path"
            raise UserError(f"not a run folder ({why})", where=str(folder),
                            hint=gguf_in(run.folder) or hint)  # fmt: skip
        return run

    def is_export(self) -> bool:
        """Whether this is a run as `tools/exported.py` writes it: to be served, and not to be trained."""
        return self.config.is_file() and self.weights.is_file()

    def refuse_export(self) -> None:
        """UserError for an export, which has weights and nothing else of a training."""
        if self.is_export():
            raise UserError("this is an export of a run, which cannot be trained", where=str(self.folder),
                            hint="resume the run that it was made of, or train in another folder")  # fmt: skip

    @contextlib.contextmanager
    def lock(self):
        """Create the folder and lock it for this process. The kernel releases the lock when the process dies.

        A folder created here is removed again if the run fails before its first step.
        """
        made = _missing(self.folder)
        try:
            with self._locked():
                try:
                    yield
                except BaseException:
                    if made and not self.has_begun() and not self._was_replanned():
                        shutil.rmtree(self.folder, ignore_errors=True)
                    raise
                if made and os.listdir(self.folder) == [".lock"]:  # nothing was begun
                    (self.folder / ".lock").unlink()
        finally:
            _remove_empty(made)

    def _locked(self):
        """The lock file, open, locked and signed. UserError if another process holds it or it is not writable."""
        try:
            for attempt in range(_ATTEMPTS):
                make_folder(self.folder)
                handle = open(self.folder / ".lock", "a+")
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_same_file(handle, self.folder / ".lock"):
                        handle.truncate(0)
                        os.write(handle.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
                        return handle
                except BlockingIOError:  # perhaps only by another process's check (`is_held`)
                    time.sleep(0.01 * attempt)
                handle.close()
        except OSError as error:
            raise self._unwritable(error) from error
        raise UserError(
            f"this run is being trained by {self.holder().strip() or 'another process'}",
            where=str(self.folder),
            hint="wait for it, stop it, or name another folder with --run",
        )

    def is_held(self) -> bool:
        """Whether a process is training this run now."""
        try:
            with open(self.folder / ".lock") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # never held, or not readable by us
            return False
        return False

    def is_writable(self) -> bool:
        """Whether this process may write what a score leaves in the folder."""
        written = (self.folder, self.workdir, self.samples)
        return all(os.access(path, os.W_OK) for path in written if path.exists())

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the run folder: {error.strerror}",
            where=str(self.folder),
            hint="fix its permissions or free some disk space, or name another folder with --run",
        )

    def holder(self) -> str:
        """The lock holder's description of itself; "" if the folder was never locked."""
        lock = self.folder / ".lock"
        return lock.read_text() if lock.exists() else ""

    def step(self) -> int:
        """The newest saved step, 0 if there is none. Reads names only."""
        from aurora_train.checkpoint.audit import sealed_steps  # the store would import jax too early

        return max(sealed_steps(self.checkpoints), default=0)

    def has_checkpoint(self) -> bool:
        """Whether anything is saved: of a trained run, or, at step 0, of an imported one. Reads names only."""
        from aurora_train.checkpoint.audit import sealed_steps

        return bool(sealed_steps(self.checkpoints))

    def holds_something_else(self) -> bool:
        """Whether the folder holds anything other than the remains of a run that was killed in its first moments."""
        if not self.folder.is_dir():
            return self.folder.exists()
        return bool({path.name for path in self.folder.iterdir()} - {".lock", "code", "facts", "config.yaml.new"})

    def has_begun(self) -> bool:
        """Whether a step was ever taken or a model imported, as far as the files show."""
        return _has_bytes(self.metrics) or self.checkpoints.is_dir() and self.has_checkpoint()

    def _was_replanned(self) -> bool:
        """Whether memory ran out before the first step: the next attempt continues with the smaller plan."""
        from aurora_train.record.metrics import read

        return any(event["event"] == "replan" for event in read(self.events))

    def forget(self) -> None:
        """Remove the files of an attempt that failed before its first step. The caller holds the lock."""
        folders = (self.code, self.facts, self.trash, self.workdir, self.before, self.samples, self.folder / "journal")
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()
        for path in (self.provenance, self.plan, self.events, self.lineage, self.config):
            path.unlink(missing_ok=True)

    def finished_at(self, config) -> int | None:
        """The step at which the run ended under this config and was scored: the last, or where patience ran out."""
        from aurora_train.record.metrics import read

        for event in reversed(read(self.events)):
            if event["event"] == "finish" and is_end(event, config.train.steps, config.evaluate.patience):
                return event["step"]
        return None

    def move_aside(self) -> Path | None:
        """Rename the folder out of the way (`--fresh`), so nothing is lost. UserError while it is being trained."""
        if not self.folder.exists():
            return None
        aside = f"{self.folder.name}.{datetime.now(UTC):%Y%m%dT%H%M%S}"
        target, number = self.folder.with_name(aside), 1
        while target.exists():  # the clock may have been set back
            number += 1
            target = self.folder.with_name(f"{aside}-{number}")
        with self.lock():
            self.folder.rename(target)
        return target


def early_end(patience: int | None, steps: int) -> dict:
    """The fields of the final event of a run that ended before its last step: the settings that ended it."""
    return {"patience": patience, "steps": steps}


def is_end(finish: dict, steps: int, patience: int | None) -> bool:
    """Whether a "finish" event is the end of a run with these settings: its last step, or where patience ran out."""
    return finish["step"] == steps or finish.get("early") == early_end(patience, steps)


def early_words(finish: dict) -> str:
    """Why a run ended before its last step, by its "finish" event; "" if it did not."""
    if not (early := finish.get("early")):
        return ""
    return f"early, after {counted(early['patience'], 'evaluation')} without a new best (evaluate.patience)"


def _missing(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for path in folders:
            if path.exists():
                path.rmdir()


def _is_same_file(handle, path: Path) -> bool:
    """Whether a path still leads to an open file: its previous holder may have removed it with its folder."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    return False


def _has_bytes(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


class FollowedRun(Run):
    """A run that another process leads: its checkpoints are shared, its record is a temporary copy.

    A process that follows does everything that the leader does, so that both reach the same steps. It writes the same
    record, which is needed only once.
    """

    follows = True

    def __init__(self, leaders: Run, folder):
        super().__init__(folder)
        self._leaders = leaders
        for path in (leaders.config, leaders.provenance, leaders.plan, leaders.metrics, leaders.events):
            if path.exists():
                shutil.copyfile(path, self.folder / path.name)
        if leaders.facts.is_dir():
            shutil.copytree(leaders.facts, self.facts)

    checkpoints = property(lambda self: self._leaders.checkpoints)

    def journal(self, process: int) -> Path:
        """The journal in the leader's run folder, because this process's answers are recorded nowhere else."""
        return self._leaders.journal(process)


class UnwritableRun(Run):
    """A run in a folder that this process cannot write: what is made of it goes to another folder."""

    def __init__(self, run: Run, beside):
        super().__init__(run.folder)
        self._beside = Path(beside)
        if run.scores.is_file():  # the baselines in it may be kept
            shutil.copyfile(run.scores, self.scores)

    workdir = property(lambda self: self._beside / "work")
    samples = property(lambda self: self._beside / "samples")
    scores = property(lambda self: self._beside / "scores.json")
    plots = property(lambda self: self._beside / "plots.json")


def provenance(config, session, machine: dict, parents: dict) -> dict:
    """The origin of this run: code, data, facts, the runs it starts from, versions, machine, command."""
    source = session.source
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": config.train.seed,
        "recipe": {"name": config.recipe, "sha256": config.recipe_sha256},
        "code_sha256": code_hash(),
        "data": {**source.describe(), "fingerprint": source.fingerprint},
        "facts_sha256": facts.sha256(session.recipe.known),
        **parents,
        "versions": versions(),
        "machine": machine,
    }


def record_allowed(run: Run, changes: list[tuple]) -> None:
    """Add changes of frozen keys, each (key, old, new, class), to the run's provenance."""
    if not changes:
        return
    known, now = read_json(run.provenance, {}), datetime.now(UTC).isoformat(timespec="seconds")
    allowed = [{"key": key, "old": old, "new": new, "step": run.step(), "time": now} for key, old, new, _ in changes]
    for key, _, new, _ in changes:
        if key == CODE:
            known["recipe"]["sha256"] = new
    write_json(run.provenance, {**known, "allowed_changes": [*known.get("allowed_changes", []), *allowed]})


CODE = "code"  # the key by which `--allow-change` names a recipe's code


def changed_code(run: Run, config) -> tuple[str, str] | None:
    """(recorded, present) sha256 of the recipe's code if they differ, else None."""
    recorded = read_json(run.provenance, {}).get("recipe", {}).get("sha256")
    return (recorded, config.recipe_sha256) if recorded not in (None, config.recipe_sha256) else None


def say_changed_code(run: Run, config, by: str) -> None:
    """Report on standard error and in events.jsonl that a verb reads a run with other code than trained it."""
    from aurora_train.record.metrics import EventLog, read

    changed = changed_code(run, config)
    if changed is None:
        return
    was, now = changed
    file = config.recipe_file.name
    print(f"{file} is not the code that this run was trained with (sha256 {was[:12]}, now {now[:12]})", file=sys.stderr)
    known = {(event.get("by"), event.get("after")) for event in read(run.events) if event["event"] == "other_code"}
    if (by, now) not in known:
        with contextlib.suppress(UserError, OSError), EventLog(run.events) as events:  # the folder may be read-only
            events.event("other_code", run.step(), by=by, before=was, after=now)


def versions() -> dict[str, str]:
    """The versions of Python and of every package that affects the numbers."""
    known = {"python": platform.python_version()}
    for name in ("aurora_train", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return known


def code_hash() -> str:
    """sha256 over the package's own Python files and tables, which identifies a checkpoint's code without git.

    It is the same for a wheel and an editable install, although only the wheel has the bundled recipes in the package.
    """
    root, hasher = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.toml")]):
        if "_bundled" in path.relative_to(root).parts:
            continue
        hasher.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


def copy_code(run: Run, code: dict[str, Path]) -> None:
    """Copy a recipe's files into the run, so that a resume never depends on a file that moved or changed.

    In a folder without a config they are replaced, because a killed attempt may have left those of another version.
    """
    begun = run.config.is_file()
    for name, file in code.items():
        target = run.code / name
        if not (begun and target.exists()):
            write_atomically(target, file.read_bytes())
