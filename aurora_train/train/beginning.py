"""Prepares a recipe's data and facts: the common beginning of training, `check` and `inspect`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from aurora_train import facts as kept_facts
from aurora_train import files
from aurora_train import run as runs
from aurora_train.check.blame import recipe_code
from aurora_train.check.source import refuse_other_data, source_of, taken
from aurora_train.config import Config, tree_of
from aurora_train.errors import UserError
from aurora_train.facts import Facts
from aurora_train.origin.parents import Parent, inherited_facts, parents_of, recorded_parents
from aurora_train.recipe import Recipe
from aurora_train.train.rehearsal import make_recipe
from aurora_train.train.starting import Start


@dataclass
class Beginning:
    """`parents`: sources of the first parameters of a run without a step. `kept`: the facts of a run that has begun."""

    config: Any
    recipe: Recipe
    run: runs.Run | None
    parents: tuple[Parent, ...]
    kept: Facts | None

    @classmethod
    def of(cls, config, run: runs.Run | None = None) -> Beginning:
        """The beginning of a config alone or of a run. UserError if `init` does not name a valid source."""
        begun = run is not None and run.config.is_file()
        recorded = recorded_parents(files.read_json(run.provenance, {})) if begun else {}
        parents = parents_of(config, recorded) if run is None or run.step() == 0 else ()
        if begun and run.step() == 0 and run.has_checkpoint():  # an imported run begins with its own weights
            parents = (Parent.of("", str(run.folder), None),)
        kept = kept_facts.read(run.facts) if begun else None
        recipe = make_recipe(config)
        recipe.inherited = kept or inherited_facts(config, parents)
        if records := {one.prefix: one.record() for one in parents} or recorded:
            recipe.start = Start(config, records)
        return cls(config, recipe, run, parents, kept)

    def ready(self, progress):
        """Prepare the data and set the recipe's facts; returns the training data. UserError if they do not match."""
        with recipe_code(self.recipe, "prepare"):
            self.recipe.ready(progress)
        source = source_of(self.recipe, "train")
        if source is None or len(source) == 0:
            raise UserError("the training split has no example", where="data")
        taken(self.recipe, source, np.zeros(1, np.int64))
        if self.run is not None:
            refuse_other_data(self.run, source)
        if self.kept is not None:
            self._refuse_other_facts()
        elif self.config.init.facts != "own":
            for parent in self.parents:
                parent.refuse_other_facts(self.recipe.known)
                parent.refuse_other_tokenizer(source)
        marker = _marker(self.config)
        if not self._needs_nothing and not marker.exists() and (self.run is None or not self.run.follows):
            with contextlib.suppress(UserError):  # it only saves time later, and another process may be writing it
                files.write_json(marker, {"recipe": self.config.recipe})
        return source

    def is_prepared(self) -> bool:
        """Whether the data have been prepared on this machine or need no preparation."""
        return self._needs_nothing or _marker(self.config).exists()

    @property
    def _needs_nothing(self) -> bool:
        return type(self.recipe).prepare is Recipe.prepare

    def _refuse_other_facts(self) -> None:
        """UserError if the data's facts differ from those that the run keeps (made by another version of a recipe)."""
        known = self.recipe.known
        changed = [name for name in {**self.kept, **known} if self.kept.get(name) != known.get(name)]
        if changed:
            raise UserError(
                f"the data now have another `{changed[0]}` than this run began with", where=str(self.run.facts),
                hint="restore the recipe and the versions that it began with, or start a new run",
            )  # fmt: skip


def _marker(config):
    """A file that marks the data of these sections as prepared; `prepare` itself decides whether they are current."""
    own = {name: section for name, section in tree_of(config).items() if name not in Config.model_fields}
    decisive = json.dumps([config.recipe, config.recipe_sha256, own], sort_keys=True)
    return files.cache_folder() / "prepared" / f"{hashlib.sha256(decisive.encode()).hexdigest()[:32]}.json"
