"""Answers requests over a local socket: JSON lines in, JSON lines out. It serves a function and knows no recipe."""
