"""Where a run's first parameters come from: another run at one step, or a file of weights; and what comes with them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from aurora_train import facts as kept_facts
from aurora_train import files
from aurora_train import run as runs
from aurora_train.checkpoint import durable
from aurora_train.checkpoint.store import CheckpointStore, refuse_damage, require_step
from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.train.intent import refuse_missing_start


@dataclass(frozen=True)
class Parent:
    """What `init.from` names. `step` is None for a file; `digest` is of the checkpoint's manifest, or of the file."""

    path: str
    step: int | None
    digest: str
    facts: Facts

    @classmethod
    def of(cls, config, recorded: dict | None = None) -> Parent | None:
        """The parent that a config names; None where the first parameters are random.

        `recorded`: the record of the parent in a run that has begun and has no step yet, whose parent may have more
        by now. Raises UserError where there is nothing of the kind, where its bytes are not those that were saved, and
        where it is not what was recorded.
        """
        named = config.init.from_
        if named is None:
            return None
        refuse_missing_start(config)
        if Path(named).is_file():
            with Path(named).open("rb") as file:
                return cls(named, None, hashlib.file_digest(file, "sha256").hexdigest(), {})
        run = runs.Run.existing(named)
        store = CheckpointStore(run.checkpoints, run.trash)
        step = require_step(store, recorded["step"] if recorded and recorded["from"] == named else None, named)
        refuse_damage(store, step)
        digest = durable.manifest(run.checkpoints / str(step)).get("digest", "")
        if recorded and recorded["from"] == named and recorded["digest"] != digest:
            raise UserError(
                f"step {step} of {named} is not the checkpoint that this run began with", where="init.from",
                hint="begin anew: `aurora train CONFIG --fresh`",
            )  # fmt: skip
        return cls(named, step, digest, kept_facts.read(run.facts) or {})

    def record(self) -> dict:
        """For provenance.json and events.jsonl."""
        facts = {"facts_sha256": kept_facts.sha256(self.facts)} if self.facts else {}
        return {"from": self.path, "step": self.step, "digest": self.digest, **facts}

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self.path}{at} ({self.digest[:12]})"

    def refuse_other_tokenizer(self, source) -> None:
        """Of a parent that keeps no facts, as runs of before there were any, the record of its data is compared."""
        if self.facts or self.step is None:
            return
        known = files.read_json(runs.Run(self.path).provenance, {}).get("data", {})
        theirs, ours = (data.get("tokenizer", {}).get("sha256") for data in (known, source.describe()))
        if theirs != ours:
            raise UserError(
                f"{self.path} was trained with another tokenizer", where="init.from",
                why=f"it had {theirs}; this config makes {ours}",
                hint=f"`aurora resume {self.path}` once keeps its tokenizer with it; or init.facts=own",
            )  # fmt: skip

    def refuse_other_facts(self, facts: Facts) -> None:
        """Raise UserError where the new run's facts are not the parent's: its parameters mean something else there."""
        for name in kept_facts.difference(facts, self.facts):
            ours, theirs = kept_facts.shown(facts[name]), kept_facts.shown(self.facts[name])
            what = "another tokenizer" if name.startswith("tokenizer") else f"another `{name}`"
            inherit = "leave out `data.tokenizer` to use the run's own; or " if name.startswith("tokenizer") else ""
            raise UserError(
                f"{self.path} was trained with {what}", where="init.from",
                why=f"it had {theirs}; this config makes {ours}",
                hint=f"{inherit}init.facts=own, if you mean to train its weights under this one",
            )  # fmt: skip
