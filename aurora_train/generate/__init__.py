"""Generates text from a trained decoder: a prompt is read once, then each token uses cached keys and values."""
