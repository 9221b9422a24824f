"""`python -m aurora_train` is `aurora`."""

from aurora_train.cli.main import run

run()
