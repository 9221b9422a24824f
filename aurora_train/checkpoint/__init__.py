"""Saving and restoring: Orbax writes the arrays; what Orbax lacks (durability, verification, retention) is here."""
