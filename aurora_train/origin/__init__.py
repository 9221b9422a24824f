"""Where the first parameters and facts of a run come from: another run, or a file of weights."""
