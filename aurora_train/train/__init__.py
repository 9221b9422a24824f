"""Running a recipe: from a config to a finished run. Called, it trains: `aurora_train.train("quickstart")`."""

import sys
import types


class _Callable(types.ModuleType):
    """The package is the function too: both names are what people expect, and Python has one place for them."""

    def __call__(self, config, overrides=(), **options):
        """`aurora_train.loading.train`."""
        from aurora_train.loading import train

        return train(config, overrides, **options)


sys.modules[__name__].__class__ = _Callable
