"""aurora_train: train mid-sized models end to end on one compact supercomputer.

    import aurora_train
    trained = aurora_train.load("runs/quickstart-1a2b3c4d")
    trained.model, trained.config, trained.tokenizer, trained.step

Importing this imports neither jax nor flax.
"""

from aurora_train.errors import MissingExtra, UserError
from aurora_train.loading import Loaded, load
from aurora_train.recipe import Derived, Loss, Recipe, Source

__all__ = ["Derived", "Loaded", "Loss", "MissingExtra", "Recipe", "Source", "UserError", "load"]
