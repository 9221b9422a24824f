"""Measures of models beyond a recipe's own score: intervals, and the tasks of lm-eval."""
