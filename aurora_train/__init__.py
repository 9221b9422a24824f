"""aurora_train: train mid-sized models end to end on one compact supercomputer.

    import aurora_train
    trained = aurora_train.train("quickstart", ["train.steps=200"])
    trained = aurora_train.load("runs/quickstart-1a2b3c4d")
    trained.generate("def main("), trained.logits(ids), trained.model, trained.config, trained.tokenizer

Importing this package imports neither jax nor flax.
"""

import types

from aurora_train import loading, train
from aurora_train.errors import MissingExtra, UserError
from aurora_train.loading import Loaded, load
from aurora_train.recipe import Derived, Loss, Recipe, Source


class _TrainPackage(types.ModuleType):
    """Makes `aurora_train.train` callable: it is a package, and also the name of the function that people call."""

    def __call__(self, config, overrides=(), **options):
        """`aurora_train.loading.train`."""
        return loading.train(config, overrides, **options)


train.__class__ = _TrainPackage

__all__ = ["Derived", "Loaded", "Loss", "MissingExtra", "Recipe", "Source", "UserError", "load", "train"]
