"""The memory plan of a step: estimating, choosing, verifying and showing it, and applying it to a model."""
