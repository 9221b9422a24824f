"""The kit of language modelling: baselines of the score, which are an n-gram model and general compressors."""
