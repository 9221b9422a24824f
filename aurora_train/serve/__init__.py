"""Serves models: over HTTP by OpenAI's protocol (`server`), and functions by lines of JSON over a socket (`lines`). It
knows no recipe."""
