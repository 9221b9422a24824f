"""Open models in and results out: what a source of weights is, one table per family, and exports that are proved."""
