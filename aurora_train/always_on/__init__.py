"""Keeps a machine usable and a run alive: the memory guard, the watchdog over hangs, and who slows the others down."""
