"""The kit of language modelling: what a score is set beside, an n-gram model and general compressors."""
