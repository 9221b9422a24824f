"""The origin of a run's first parameters: a run at one step, an open model or a file of weights; and its facts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aurora_train import facts as kept_facts
from aurora_train import files
from aurora_train import run as runs
from aurora_train.check.intent import init_key, refuse_missing_start
from aurora_train.checkpoint import durable, reading
from aurora_train.checkpoint.store import CheckpointStore
from aurora_train.config.yaml import read_file
from aurora_train.errors import UserError
from aurora_train.facts import DATE, Facts
from aurora_train.interop import hub
from aurora_train.interop.kept import TEMPLATE, facts_of
from aurora_train.interop.placing import matched
from aurora_train.interop.source import digest as foreign_digest
from aurora_train.interop.source import is_foreign, open_source
from aurora_train.interop.tokens import NewRows, with_tokens
from aurora_train.nn.lora_config import Lora, scale_of

log = logging.getLogger("aurora_train")


@dataclass(frozen=True)
class Parent:
    """The source that `init` names for the parameters under `prefix`; `""` is for all that no other prefix covers.

    `step` is None for a file or a foreign source; `digest` is of the checkpoint's manifest, or of the files.
    `facts` include the tokens that `init.tokens` adds, and `rows` are the rows that these take; None without any.
    """

    path: str
    step: int | None
    digest: str
    facts: Facts
    prefix: str = ""
    rows: NewRows | None = None

    def with_tokens(self, tokens: Sequence[str]) -> Parent:
        """The parent with new special tokens; the parent itself if there are none. UserError as `with_tokens` says."""
        if not tokens:
            return self
        facts, rows = with_tokens(self.facts, tokens)
        return replace(self, facts=facts, rows=rows)

    @classmethod
    def of(cls, prefix: str, named: str, recorded: dict | None) -> Parent:
        """The parent at a path. `recorded` as in `parents_of`."""
        if is_foreign(named):
            opened = matched(open_source(named))
            if opened.beside:
                log.warning("%s: its text model is read, and %d tensors of other parts (%s, ...) are not", named,
                            len(opened.beside), opened.beside[0])  # fmt: skip
            facts = facts_of(opened.source, opened.family.model_type, opened.beside)
            return cls(named, None, foreign_digest(named), facts, prefix)
        if Path(named).is_file():
            return cls(named, None, files.sha256(Path(named)), {}, prefix)
        run = runs.Run.existing(named)
        store = CheckpointStore(run.checkpoints, run.trash)
        known = recorded["step"] if recorded and recorded["from"] == named else None
        step, digest = reading.opened(
            store, known, named, lambda at: durable.manifest(run.checkpoints / str(at)).get("digest", "")
        )
        return cls(named, step, digest, kept_facts.read(run.facts) or {}, prefix)

    def refuse_changed(self, recorded: dict | None) -> None:
        """UserError if the parent is not what a run began with, by the run's record of it, if there is one."""
        if recorded and recorded["digest"] != self.digest:
            step = "" if self.step is None else f"step {self.step} of "
            raise UserError(
                f"{step}{self.path} is not what this run began with", where=init_key(self.prefix),
                why=f"its sha256 began with {recorded['digest'][:12]}, it is now {self.digest[:12]}",
                hint="restore it, or start over: `aurora train CONFIG --fresh`",
            )  # fmt: skip

    def record(self) -> dict:
        """The parent as provenance.json and events.jsonl record it."""
        facts = {"facts_sha256": kept_facts.sha256(self.facts)} if self.facts else {}
        prefix = {"prefix": self.prefix} if self.prefix else {}
        return {**prefix, "from": self.path, **hub.origin(self.path), "step": self.step, "digest": self.digest, **facts}

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self.path}{at} ({self.digest[:12]})"

    def refuse_other_scale(self, config) -> None:
        """UserError if a parent's adapters have another rank, or would be multiplied by another number than before."""
        lora = getattr(getattr(config, "model", None), "lora", None)
        if self.step is None or not isinstance(lora, Lora):
            return
        model = read_file(runs.Run(self.path).config).value.get("model")
        known = model.get("lora") if isinstance(model, dict) else None
        if not known:
            return
        if known.get("rank") != lora.rank:
            raise UserError(
                f"the adapters of {self.path} have rank {known.get('rank')}", where="model.lora.rank",
                why="a run that starts from adapters trains these on",
                hint=f"model.lora.rank={known.get('rank')}; or start anew over what `aurora export {self.path} --to "
                "DIR --merge` writes",
            )  # fmt: skip
        scaling = known.get("scaling", "standard")  # earlier versions had no other
        if scale_of(known["alpha"], known["rank"], scaling == "rank_stabilised") != lora.scale:
            raise UserError(
                f"the adapters of {self.path} were trained with alpha {known['alpha']:g} and scaling {scaling}",
                where="model.lora.alpha", why="with another scale, their output is not what was trained",
                hint=f"model.lora.alpha={known['alpha']:g} model.lora.scaling={scaling}; or start anew over what "
                f"`aurora export {self.path} --to DIR --merge` writes",
            )  # fmt: skip

    def refuse_other_tokenizer(self, source) -> None:
        """UserError if a parent from before facts existed was trained with another tokenizer, by its data's record."""
        if self.facts or self.step is None:
            return
        known = files.read_json(runs.Run(self.path).provenance, {}).get("data", {})
        theirs, ours = (data.get("tokenizer", {}).get("sha256") for data in (known, source.describe()))
        if theirs != ours:
            raise UserError(
                f"{self.path} was trained with another tokenizer", where=init_key(self.prefix),
                why=f"it had {theirs}; this config makes {ours}",
                hint=f"`aurora resume {self.path}` once stores its tokenizer in its folder; or set init.facts=own",
            )  # fmt: skip

    def refuse_other_facts(self, facts: Facts) -> None:
        """Raise UserError if the new run's facts differ from the parent's: its parameters depend on them."""
        for name in kept_facts.difference(facts, self.facts):
            ours, theirs = kept_facts.shown(facts[name]), kept_facts.shown(self.facts[name])
            what = "another tokenizer" if name.startswith("tokenizer") else f"another `{name}`"
            inherit = "leave out `data.tokenizer` to use the run's own; or " if name.startswith("tokenizer") else ""
            inherit = "leave out `data.template` to use the model's own; or " if name == TEMPLATE else inherit
            inherit = f"init.facts={self.prefix} uses those of that part; or " if self.prefix else inherit
            raise UserError(
                f"{self.path} was trained with {what}", where=init_key(self.prefix),
                why=f"it had {theirs}; this config makes {ours}",
                hint=f"{inherit}set init.facts=own to train its weights with this one",
            )  # fmt: skip


def parents_of(config, recorded: dict[str, dict]) -> tuple[Parent, ...]:
    """The parents that a config names, by prefix; empty if all first parameters are random.

    `recorded`: the parents' records, by prefix, of a run that has begun but has no step yet: a parent may have more
    steps by now. Raises UserError if a source does not exist, if its bytes are not those that were saved, if it is not
    what was recorded, if its adapters had another scale, or if the facts of two parents differ.
    """
    refuse_missing_start(config)
    parents = tuple(
        Parent.of(prefix, path, recorded.get(prefix)).with_tokens(() if prefix else config.init.tokens)
        for prefix, path in config.init.sources.items()
    )  # fmt: skip
    for parent in parents:
        known = recorded.get(parent.prefix)
        parent.refuse_changed(known if known and known["from"] == parent.path else None)
        parent.refuse_other_scale(config)
    if config.init.facts != "own":
        for one, other in itertools.combinations(parents, 2):
            _refuse_clash(one, other)
    return parents


def _refuse_clash(one: Parent, other: Parent) -> None:
    for name in kept_facts.difference(one.facts, other.facts):
        ours, theirs = kept_facts.shown(one.facts[name]), kept_facts.shown(other.facts[name])
        raise UserError(
            f"{one.path} and {other.path} were trained with another `{name}` each", where=init_key(other.prefix),
            why=f"{one.path} had {ours}; {other.path} had {theirs}",
            hint="start from runs that agree, or set init.facts=own to train them with this config's facts",
        )  # fmt: skip


def inherited_facts(config, parents: tuple[Parent, ...]) -> Facts:
    """The facts that a new run inherits: those of the parent that `init.facts` names, but the day on which it began."""
    facts = next((parent.facts for parent in parents if parent.prefix == config.init.facts_from), {})
    return {name: value for name, value in facts.items() if name != DATE}


def record_of(parents: tuple[Parent, ...]) -> dict:
    """The parents as recorded: `parent` is the source of the whole model, `parents` are those of its parts."""
    whole = [parent.record() for parent in parents if not parent.prefix]
    parts = [parent.record() for parent in parents if parent.prefix]
    return ({"parent": whole[0]} if whole else {}) | ({"parents": parts} if parts else {})


def recorded_parents(provenance: dict) -> dict[str, dict]:
    """The parents' records in a run's provenance, by prefix."""
    whole = {"": provenance["parent"]} if "parent" in provenance else {}
    return whole | {record["prefix"]: record for record in provenance.get("parents", [])}
