"""Describes this machine: its devices, usable memory, peak rates, and the environment variables for JAX."""
