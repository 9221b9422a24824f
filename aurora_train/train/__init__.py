"""The trainer: state, step, loop. It knows recipes only through `aurora_train.recipe`."""
