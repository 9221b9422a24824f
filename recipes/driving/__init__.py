"""The kit of driving: scenes and their readers, generators, scores; the model that drives."""
