"""Where a run's first parameters come from: another run at one step, or a file of weights; and what comes with them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from aurora_train import facts as kept_facts
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
    def of(cls, config) -> Parent | None:
        """The parent that a config names; None where the first parameters are random.

        Raises UserError where there is nothing of the kind, or where its bytes are not those that were saved.
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
        step = require_step(store, None, named)
        refuse_damage(store, step)
        digest = durable.manifest(run.checkpoints / str(step))["digest"]
        return cls(named, step, digest, kept_facts.read(run.facts) or {})

    def record(self) -> dict:
        """For provenance.json and events.jsonl."""
        facts = {"facts_sha256": kept_facts.sha256(self.facts)} if self.facts else {}
        return {"from": self.path, "step": self.step, "digest": self.digest, **facts}

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self.path}{at} ({self.digest[:12]})"

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
