"""The `gates` section: what a run has to pass before it may be exported or served. Nothing here affects the numbers.

A gate that is not set is not there. The limits of a recipe (`Recipe.exceeded`) are one more, which is always there.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

from aurora_train.config.fields import Section, setting
from aurora_train.errors import UserError

NAMES = ("licence", "decontamination", "score", "secrets", "limits")


class Bound(Section):
    """What a number of the score has to be."""

    min: float | None = setting(None, resume="free", help="the least that passes")
    max: float | None = setting(None, resume="free", help="the most that passes")

    @model_validator(mode="after")
    def _has_a_bound(self):
        if self.min is None and self.max is None:
            raise ValueError("needs a min, a max, or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"nothing is at least {self.min:g} and at most {self.max:g}")
        return self


class Decontamination(Section):
    """Evaluation sets that the training texts must not hold."""

    sets: dict[str, str] = setting(
        {}, resume="free", path_unless=(),
        help="for the name of each evaluation set, a local file or folder: tables (JSON, CSV, Parquet, Arrow) or texts",
    )
    ngram: int = setting(13, resume="free", ge=2, help="words in a row that an item and a text may not share")
    max_share: float = setting(0.0, resume="free", ge=0, lt=1, help="share of a set's items that may be found")

    @model_validator(mode="after")
    def _has_sets(self):
        if not self.sets:
            raise ValueError("needs at least one evaluation set: sets: {NAME: FILE}")
        return self


class Gates(Section):
    """What a run has to pass before `aurora export`, `serve`, `act` and `stream`."""

    licence: list[str] | None = setting(
        None, resume="free", help="the only licences that the training data and the models it starts from may have"
    )
    decontamination: Decontamination | None = setting(
        None, resume="free", help="evaluation sets whose items must not be in the training texts"
    )
    score: dict[str, Bound] = setting({}, resume="free", help="for a number of the score, its min or max")
    secrets: bool = setting(False, resume="free", help="the training texts must hold no passwords or keys of services")

    def conflicts(self, config) -> Iterator[UserError]:
        from aurora_train.recipe import Recipe

        if config.recipe_class.texts is not Recipe.texts:
            return
        for key, asked in (("decontamination", self.decontamination is not None), ("secrets", self.secrets)):
            if asked:
                yield UserError(
                    f"the recipe {config.recipe} trains on no texts that could be searched", where=f"gates.{key}",
                    hint="leave it out; a recipe of your own has them by defining `texts`: docs/extend.md",
                )  # fmt: skip
