"""The lineage of a run: a chain of hashed records from its corpus to its export, its signature, its model card."""
