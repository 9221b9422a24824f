"""Trains a recipe: from a config to a finished run."""
